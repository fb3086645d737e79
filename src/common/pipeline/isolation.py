"""Processes of a run: they see nothing of a person's own settings, and end with the process that started them.

A startup file of IPython, a ``matplotlibrc``, another kernel by the name of ``python3``, a ``PYTHONPATH``: each could
change a number or a picture, and a record would not say so. ``kernels/`` beside this module describes the only kernel
that runs find: the Python that they run in, started as ``python -m common.pipeline.isolation``.
"""

import os
import runpy
import threading
import time
from pathlib import Path

from common import paths

#: What programs look for, and leave, in a home folder, which need not exist or be writable.
HOME = paths.BUILD / "home"
#: Beginnings of the names of variables by which a person sets up Python, Jupyter, matplotlib, Snakemake and Git.
PERSONAL = ("PYTHON", "JUPYTER", "IPYTHON", "MPL", "MATPLOTLIBRC", "SNAKEMAKE_PROFILE", "GIT_DIR", "GIT_WORK_TREE")


def isolate() -> None:
    """Let this process, and all that it starts, find settings and caches of the project only.

    Raises
    ------
    OSError
        If ``build/`` cannot be written to.
    """
    HOME.mkdir(parents=True, exist_ok=True)
    for name in [name for name in os.environ if name.startswith(PERSONAL)]:
        del os.environ[name]
    os.environ.update(
        PYTHONPATH=str(paths.SOURCE),
        PYTHONHASHSEED="0",
        PYTHONNOUSERSITE="1",
        PYTHONUTF8="1",
        JUPYTER_PATH=str(Path(__file__).parent),
        JUPYTER_CONFIG_DIR=str(HOME / "jupyter"),
        JUPYTER_DATA_DIR=str(HOME / "jupyter"),
        JUPYTER_RUNTIME_DIR=str(HOME / "jupyter"),
        IPYTHONDIR=str(HOME / "ipython"),
        MPLCONFIGDIR=str(HOME / "matplotlib"),
        XDG_CACHE_HOME=str(HOME / "cache"),
    )


def stop_with_parent(parent: int) -> None:
    """End this process at once when its parent ends, however that came about.

    A killed parent cannot stop its children, and Snakemake and the notebooks would run on unseen.

    Parameters
    ----------
    parent
        Its process number, from the parent itself: it may have ended before this is called.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def tether() -> None:
    """:func:`stop_with_parent`, if the parent has left its process number in ``HESSIAN_TETHERED``."""
    if parent := os.environ.pop("HESSIAN_TETHERED", ""):
        stop_with_parent(int(parent))


if __name__ == "__main__":
    if parent := os.environ.get("JPY_PARENT_PID"):
        stop_with_parent(int(parent))  # IPython's own watch takes any adopting parent but the first process for the old
    runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)
