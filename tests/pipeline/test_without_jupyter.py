"""Cells tagged `prepare` of real notebooks, run where nothing of Jupyter is installed, nor of what draws."""

import os
import subprocess
import sys

import pytest

from common import paths

#: Read by every Python that starts, the workers of a pool too.
REFUSING = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {
            "IPython", "ipykernel", "ipywidgets", "jupyter_client", "jupyter_core", "jupyterlab", "matplotlib",
            "nbclient", "nbformat", "nbval", "papermill", "seaborn", "snakemake",
        }:
            raise ModuleNotFoundError(f"No module named {name!r}: not on this machine", name=name)

sys.meta_path.insert(0, Refusing())
"""


@pytest.mark.parametrize(
    "ident",
    ["dong_quantifying/fig02_03_training", "li_adaptive/fig01_06_coupling", "wu_dissecting/fig19_20_trajectory"],
)
def test_prepared_without_jupyter(ident, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(REFUSING)
    cache = tmp_path / "cache"
    cache.mkdir()
    if (paths.CACHE / "data").is_dir():
        (cache / "data").symlink_to(paths.CACHE / "data")  # decoded images
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{paths.SOURCE}", "HESSIAN_CACHE": str(cache), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    refused = subprocess.run([sys.executable, "-c", "import IPython"], env=environment, capture_output=True, text=True)
    assert "not on this machine" in refused.stderr
    command = [sys.executable, "-m", "common.pipeline.prepare", ident, "--scale", "quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{ident}: all is made\n")
    assert list(cache.glob("*/*.pt"))
