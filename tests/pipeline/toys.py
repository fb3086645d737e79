"""A small clone of the repository with notebooks of its own, for tests that start run_all.sh from outside."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAPER = "dong_quantifying"

#: A notebook that can be told to stop and wait at its start or after its first figure.
TOY = [
    """
n: int = 3  # draws; paper: 3
noise: float = 0.5  # standard deviation; paper: 0.5""",
    """
import os, time
from pathlib import Path

def wait(where):
    if os.environ.get("TOY_WAIT") == where:
        Path(os.environ["TOY_PID"]).write_text(str(os.getpid()))
        while True:
            time.sleep(0.05)

wait("start")""",
    """
import matplotlib.pyplot as plt
import numpy as np
from common import toy_user
from common.data import DataSource
from common.notebook.claims import inside
from common.notebook.run import Run

run = Run("dong_quantifying/alpha", globals(), title="A toy", figures=["1"])
run.uses(DataSource("noise", "generated, seed 0", None, n))
x = np.random.default_rng(0).normal(scale=noise, size=n) * toy_user.value()""",
    """
fig, ax = plt.subplots(figsize=(4, 3))
ax.plot(x)
run.save(fig, "a")
wait("middle")""",
    """
run.numbers["x"] = x
run.claim("mean", "The mean of the noise vanishes.", (x.mean(), (x.mean() - 1, x.mean() + 1)), source="Fig 1",
          expected=0.0, criterion=inside(-3, 3))
run.finish()""",
]

#: What Run does, without the seconds that importing torch takes; for the notebooks that need not be like real ones.
LIGHT_RUN = """
import json, os, random
from pathlib import Path
from common import paths
from common.notebook.provenance import source_hash

def finish(ident, label, parameters):
    x = [random.Random(0).gauss(0, parameters["noise"]) for _ in range(parameters["n"])]
    out, name = Path(os.environ["HESSIAN_OUT"]), ident.rpartition("/")[2]
    (out / f"{name}_{label}.png").write_text(f"no picture {x}")
    claim = {"id": "size", "statement": "The noise is small.", "source": "Fig 1", "expected": 0.0, "measured": x[0],
             "interval": [x[0], x[0]], "criterion": "none", "verdict": "reproduced", "note": ""}
    data = {"name": "noise", "origin": "generated", "sha256": None, "samples": len(x), "stand_in": False}
    record = {
        "schema": 1, "id": ident, "title": "A toy",
        "paper": {"key": ident.partition("/")[0], "figures": [], "tables": []},
        "scale": os.environ["HESSIAN_SCALE"], "parameters": parameters, "reduced": [], "data": [data],
        "claims": [claim], "numbers": {"x": x}, "figures": [f"{name}_{label}.png"],
        "source": source_hash(paths.notebook_path(ident), parameters),
        "environment": {"python": "3", "torch": "none", "device": "cpu", "threads": int(os.environ["OMP_NUM_THREADS"])},
    }
    (out / "spared.json").write_text(json.dumps({"seconds": 0.0}))
    with paths.replacing(out / f"{name}.json") as path:
        path.write_text(json.dumps(record))
"""
LIGHT_TOY = """
from common.light_run import finish
MODULE
finish("dong_quantifying/NAME", "a", {"n": n, "noise": noise})"""
#: What follows the dashes on a cluster that keeps no accounts.
SLURM = ("--executor", "slurm", "--slurm-status-command", "squeue")
NAMES = {"alpha", "beta", "gamma"}
#: What a notebook calls, and what that needs.
USER = '"""User."""\n\nfrom common.toy_base import VALUE\n\n\ndef value():\n    """One."""\n    return VALUE\n'
PARAMETERS = "n: int = 3  # draws; paper: 3"


def write_notebook(file, cells, outputs=()):
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in cells]
    cells[0].metadata["tags"] = ["parameters"]
    for cell, text in zip(cells, outputs, strict=False):
        cell.execution_count = 1
        if text:
            cell.metadata["tags"] = ["nbval-check-output"]
            cell.outputs = [nbformat.v4.new_output("stream", text=text)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A toy", id="title"), *cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, file)


def finish(process, seconds=240):
    """Output of a process, which is killed if it takes too long; what it has started ends with it."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"it did not end: {process.communicate()[0]}")


class Clone:
    """A copy of the repository's engine with toy notebooks."""

    def __init__(self, root):
        self.root = root
        root.mkdir()
        for name in ("run_all.sh", "Snakefile", "pyproject.toml", "requirements.lock"):
            shutil.copy(ROOT / name, root)
        shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        (root / "scales").mkdir()
        (root / "README.md").write_text("# Toys\n\n<!-- scorecard -->\n<!-- /scorecard -->\n")

    @property
    def environment(self):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HESSIAN_", "PYTEST_", "CONDA_"))}
        return kept | {"HESSIAN_PYTHON": sys.executable, "HESSIAN_DATA": str(self.root / "data")}

    def notebook(self, name):
        return self.root / "notebooks" / PAPER / f"{name}.ipynb"

    def add_toys(self):
        common = self.root / "src" / "common"
        (common / "toy_base.py").write_text('"""Base."""\n\nVALUE = 1\n')
        (common / "toy_user.py").write_text(USER)
        (common / "light_run.py").write_text(LIGHT_RUN)
        write_notebook(self.notebook("alpha"), TOY)
        for name, module in {"beta": "from common import toy_base\ntoy_base.VALUE", "gamma": ""}.items():
            write_notebook(self.notebook(name), [*TOY[:1], LIGHT_TOY.replace("NAME", name).replace("MODULE", module)])

    def replace(self, file, old, new):
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))

    def start(self, *arguments, before=(), **environment):
        return subprocess.Popen(
            [*before, "bash", self.root / "run_all.sh", *arguments], env=self.environment | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def run(self, *arguments, code=0, **environment):
        """Output of run_all.sh, its exit code checked."""
        process = self.start(*arguments, **environment)
        output = finish(process)
        assert process.returncode == code, output
        return output

    def would_run(self):
        output = self.run("--scale", "quick", "--dry-run")
        return set(re.findall(rf"would run .* {PAPER}/(\w+)", output))

    def ran(self, output):
        return set(re.findall(rf"{PAPER}/(\w+) started", output))

    def files(self, *folders):
        """Content and time of change of every file."""
        found = (f for folder in folders for f in (self.root / folder).rglob("*") if f.is_file())
        return {f.relative_to(self.root): (f.stat().st_mtime_ns, f.read_bytes()) for f in found if f.name != "lock"}

    def figures(self, scale="quick"):
        return {f.name: content for f, (_, content) in self.files(f"figures/{scale}").items()}

    def result(self, name, scale="quick"):
        """The one folder of results that a notebook has."""
        (folder,) = (self.root / "build" / scale / PAPER / name).iterdir()
        return folder

    def git(self, *arguments):
        author = ["-c", "user.name=Toy", "-c", "user.email=toy@example.org"]
        subprocess.run(["git", *author, *arguments], cwd=self.root, check=True, capture_output=True)


def personal_settings(folder):
    """An environment in which somebody has set up everything otherwise, and has no home to write to."""
    for name, text in {
        "ipython/profile_default/startup/mine.py": "import random, numpy\nrandom.Random = numpy.array = None",
        "matplotlib/matplotlibrc": "lines.linewidth: 9\naxes.facecolor: red\nsavefig.bbox: tight",
        "jupyter/kernels/python3/kernel.json": '{"argv": ["false"], "display_name": "Mine", "language": "python"}',
        "jupyter/jupyter_config.py": "1 / 0",
        "snakemake/config.yaml": "dry-run: true",
        "modules/numpy.py": "1 / 0",
        "modules/sitecustomize.py": "import random\nrandom.Random = None",
        "bin/python": "#!/bin/sh\nexit 9",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "bin" / "python").chmod(0o755)
    (folder / "bin" / "python3").symlink_to("python")
    variables = {
        "IPYTHONDIR": "ipython", "MPLCONFIGDIR": "matplotlib", "MATPLOTLIBRC": "matplotlib", "JUPYTER_PATH": "jupyter",
        "JUPYTER_DATA_DIR": "jupyter", "JUPYTER_CONFIG_DIR": "jupyter", "SNAKEMAKE_PROFILE": "snakemake",
        "PYTHONPATH": "modules", "PYTHONHOME": "modules", "PYTHONSTARTUP": "modules/sitecustomize.py",
    }  # fmt: skip
    return {name: str(folder / place) for name, place in variables.items()} | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache",
        "XDG_CONFIG_HOME": "/dev/null", "MPLBACKEND": "nowhere", "PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error",
        "LC_ALL": "C", "TERM": "", "HESSIAN_SCALE": "paper", "HESSIAN_OUT": "/dev/null",
    }  # fmt: skip
