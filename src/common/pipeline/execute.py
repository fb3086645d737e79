"""Which notebooks a scale consists of, and how one of them is run.

A result lives where its content says: ``build/<scale>/<paper>/<notebook>/<hash>/`` with the hash of
:func:`common.notebook.provenance.source_hash`. Whatever changes the result changes the folder, so a result is out of
date exactly if its folder is not complete; neither file times nor any memory of earlier runs are asked.

``python -m common.pipeline.execute dong_quantifying/fig08_scaling_linear --scale laptop`` runs one notebook.
"""

import argparse
import errno
import fnmatch
import json
import math
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from common import paths
from common.notebook.provenance import FormatError, declared_ident, read_notebook, resolve_parameters, source_hash
from common.pipeline.isolation import isolate, tether

SCALES = ("quick", "laptop", "paper")

#: One BLAS thread a notebook, whatever runs beside it: results must not depend on the number of jobs.
THREADS = 1
#: How a process is told so; they are read when the libraries are loaded.
THREAD_VARIABLES = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(THREADS))


class PlanError(ValueError):
    """A scale, a file of a scale or a selection of notebooks that makes no sense."""


class NotebookError(RuntimeError):
    """A notebook that did not come to its end; the message is one line."""


@dataclass(frozen=True)
class Cost:
    """What a run of a notebook took.

    Attributes
    ----------
    seconds
        From its start to its end, whatever ran beside it.
    processor
        Seconds that it kept one core busy.
    spared
        The same of what it found in the cache, when that was made.
    peak_mb
        Memory of the largest process.
    """

    seconds: float
    processor: float
    spared: float
    peak_mb: int

    @property
    def cold(self) -> float:
        """Seconds that it keeps one core busy when nothing is in the cache."""
        return self.processor + self.spared


@dataclass(frozen=True, eq=False)
class Task:
    """One notebook at one scale.

    Attributes
    ----------
    ident
        ``"<paper>/<notebook>"``.
    scale
        ``"quick"``, ``"laptop"`` or ``"paper"``.
    overrides
        The parameters that the scale sets; types checked.
    source
        SHA-256 over all that the result depends on.
    folder
        Where the result belongs.
    """

    ident: str
    scale: str
    overrides: dict[str, object]
    source: str
    folder: Path

    def _file(self, suffix: str) -> Path:
        return self.folder / f"{self.ident.rpartition('/')[2]}{suffix}"

    @property
    def record(self) -> Path:
        """The record, written by the notebook as its last act."""
        return self._file(".json")

    @property
    def executed(self) -> Path:
        """The executed copy of the notebook, kept after a failure too."""
        return self._file(".executed.ipynb")

    @property
    def log(self) -> Path:
        """Messages and the full traceback; made anew at every start."""
        return self._file(".log")

    @property
    def timing(self) -> Path:
        """What it cost, a :class:`Cost`; written last of all, so that it stands for a complete result."""
        return self.folder / "timing.json"

    @property
    def error(self) -> Path:
        """The one line that says why the last run failed; absent if it did not."""
        return self.folder / "error.txt"

    @property
    def done(self) -> bool:
        """Whether a complete result is there."""
        return self.record.exists() and read_cost(self.folder) is not None


def shown(path: Path) -> str:
    """A path as messages print it: relative to the repository where it lies inside."""
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)


def one_line(error: BaseException) -> str:
    """An exception in one line of words."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk ({error.filename or 'build/'})"
    lines = str(getattr(error, "evalue", error)).strip().splitlines() or [""]
    if "No space left on device" in lines[0]:
        return f"no space left on the disk: {lines[0]}"
    name = getattr(error, "ename", type(error).__name__)
    if name == "DeadKernelError":
        return "the kernel died: killed, or out of memory"
    return f"{name}: {lines[0]}".removeprefix("ParameterError: ").rstrip(": ")


def scale_parameters(scale: str) -> dict[str, dict[str, object]]:
    """Parameters that a scale sets, by notebook, in the order of ``scales/<scale>.yaml``.

    Raises
    ------
    PlanError
        If there is no such scale, or its file is not a mapping from notebooks to parameters.
    """
    if scale not in SCALES:
        raise PlanError(f"unknown scale {scale!r}; there are {', '.join(SCALES)}")
    file = paths.SCALES / f"{scale}.yaml"
    if not file.exists():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"{shown(file)} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise PlanError(f"{shown(file)} must map notebooks to their parameters")
    for ident, overrides in content.items():
        if not isinstance(ident, str) or not re.fullmatch(r"\w+/\w+", ident):
            raise PlanError(f"{shown(file)}: {ident!r} is no <paper>/<notebook>")
        if not isinstance(overrides, dict | None):
            raise PlanError(f"{shown(file)}: {ident} must map parameters to values, got {overrides!r}")
    return {ident: overrides or {} for ident, overrides in content.items()}


def task(ident: str, scale: str, overrides: dict[str, object], folder: Path | None = None) -> Task:
    """The task of one notebook, its parameters and its code checked as far as that goes without running it.

    Raises
    ------
    NotebookError
        With the reason in one line.
    """
    notebook = paths.notebook_path(ident)
    try:
        parameters = resolve_parameters(notebook, overrides)
        source = source_hash(notebook, parameters)
        if (named := declared_ident(read_notebook(notebook))) not in (None, ident):
            raise NotebookError(f"it runs under the name of {named}: write its own in the first argument of its Run")
    except FileNotFoundError:
        raise NotebookError(f"there is no notebook {shown(notebook)}") from None
    except OSError as error:
        raise NotebookError(one_line(error)) from None
    except SyntaxError as error:
        raise NotebookError(f"SyntaxError: {error.msg}, in {(error.text or '').strip()!r}") from None
    except FormatError as error:
        raise NotebookError(str(error)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise NotebookError(one_line(error)) from None
    folder = folder or paths.BUILD / scale / ident / source[:16]
    return Task(ident, scale, {name: parameters[name] for name in overrides}, source, folder)


def plan(scale: str, only: str = "") -> tuple[list[Task], dict[str, str]]:
    """Tasks of a scale, those that take longest first, and the notebooks that cannot be run at all.

    Parameters
    ----------
    scale
        One of :data:`SCALES`.
    only
        A part of the notebooks' identifiers, or a glob pattern; empty for all.

    Returns
    -------
    tasks : list of Task
        Those last seen to take longest come first; before them those never timed, in the order of the scale's
        file (at the quick scale, which has none, of ``laptop.yaml``).
    broken : dict
        Reason by notebook.

    Raises
    ------
    PlanError
        If the scale is not known, its file is wrong, or ``only`` matches nothing.
    """
    overrides = scale_parameters(scale)
    order = list(overrides or scale_parameters("laptop"))
    known = {*paths.notebook_ids(), *overrides}
    idents = sorted(i for i in known if only in i or fnmatch.fnmatchcase(i, only))
    if not idents:
        raise PlanError(f"no notebook matches {only!r}" if only else "there are no notebooks")
    tasks, broken = [], {}
    for ident in sorted(idents, key=lambda i: order.index(i) if i in order else len(order)):
        try:
            tasks.append(task(ident, scale, overrides.get(ident, {})))
        except NotebookError as error:
            broken[ident] = str(error)
    committed = committed_costs()
    return sorted(tasks, key=lambda t: -(last_cost(t, committed) or (float("inf"), 0))[0]), broken


def read_cost(folder: Path) -> Cost | None:
    """Cost of the result in ``folder``; None if there is none."""
    try:
        return Cost(**json.loads((folder / "timing.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


#: What the gallery carries on of a notebook: scale, identifier, seconds of one core from a cold cache, MB.
COST_LINE = re.compile(r"<!-- cost: (\S+) (\S+) (\d+) s (\d+) MB -->")


def committed_costs() -> dict[tuple[str, str], tuple[int, int]]:
    """Seconds of one core from a cold cache and MB by scale and notebook, as the gallery has them."""
    gallery = paths.FIGURES / "README.md"
    text = gallery.read_text(encoding="utf-8") if gallery.exists() else ""
    return {(scale, ident): (int(s), int(mb)) for scale, ident, s, mb in COST_LINE.findall(text)}


def last_cost(task: Task, committed: Mapping[tuple[str, str], tuple[int, int]]) -> tuple[float, int] | None:
    """Seconds of one core from a cold cache, and MB, that a notebook took last: here, or as the gallery has it."""
    here = [cost for folder in task.folder.parent.glob("*") if (cost := read_cost(folder))]
    if here:
        return max(cost.cold for cost in here), max(cost.peak_mb for cost in here)
    return committed.get((task.scale, task.ident))


def needed_mb(task: Task, committed: Mapping[tuple[str, str], tuple[int, int]]) -> int:
    """Memory to ask for: a quarter more than it took last, 4 GB where that is not known."""
    known = last_cost(task, committed)
    return max(1000, round(1.25 * known[1])) if known else 4000


def needed_minutes(task: Task, committed: Mapping[tuple[str, str], tuple[int, int]]) -> int:
    """Time to ask a cluster for: three times what it took last, half an hour at least; a day where it never ran."""
    known = last_cost(task, committed)
    return max(30, math.ceil(3 * known[0] / 60)) if known else 24 * 60


def execute(task: Task) -> None:
    """Run a notebook as a task says and leave a complete result in its folder, or an error and its log.

    Everything that papermill and the kernel print goes where this process' output goes.

    Raises
    ------
    NotebookError
        With the reason in one line; the traceback has been printed then.
    """
    import papermill  # a second that planning does not need to spend

    notebook = paths.notebook_path(task.ident)
    for stale in (task.record, task.timing, task.error, *task.folder.glob(".*")):
        stale.unlink(missing_ok=True)
    isolate()
    os.environ.update(THREAD_VARIABLES, HESSIAN_SCALE=task.scale, HESSIAN_OUT=str(task.folder))
    started = time.perf_counter()
    source, executed = (str(p).replace("{", "{{").replace("}", "}}") for p in (notebook, task.executed))  # formatted
    try:
        papermill.execute_notebook(
            source, executed, task.overrides, kernel_name="python3", cwd=notebook.parent, progress_bar=False
        )
        if not task.record.exists():
            raise NotebookError("it ended without a record; its last cell must call run.finish()")
        if json.loads(task.record.read_text(encoding="utf-8"))["source"] != task.source:
            raise NotebookError("its code changed while it ran; run it again")
        spared = json.loads((task.folder / "spared.json").read_text(encoding="utf-8"))["seconds"]
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cost = Cost(
            seconds=round(time.perf_counter() - started, 1),
            processor=round(used.ru_utime + used.ru_stime, 1),
            spared=spared,
            peak_mb=round(used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)),
        )
        with paths.replacing(task.timing) as path:
            path.write_text(json.dumps(vars(cost)) + "\n", encoding="utf-8")
    except Exception as error:
        task.record.unlink(missing_ok=True)
        if isinstance(error, NotebookError):
            raise
        traceback.print_exc()
        raise NotebookError(one_line(error)) from None


def main(arguments: list[str] | None = None) -> int:
    """Run one notebook from the command line; print one line if it fails."""
    command = "python -m common.pipeline.execute"
    parser = argparse.ArgumentParser(prog=command, description="Run one notebook at one scale.")
    parser.add_argument("notebook", help="<paper>/<notebook>")
    parser.add_argument("--scale", default="laptop", help=", ".join(SCALES))
    parser.add_argument("--out", type=Path, help="folder of the result; default: where run_all.sh looks for it")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tether()

    screen = os.fdopen(os.dup(sys.stderr.fileno()), "w")
    this, where = None, ""
    try:
        overrides = scale_parameters(options.scale).get(options.notebook, {})
        this = task(options.notebook, options.scale, overrides, options.out and options.out.resolve())
        where = f" (log: {shown(this.log)})"
        this.folder.mkdir(parents=True, exist_ok=True)
        with this.log.open("w") as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
        execute(this)
    except KeyboardInterrupt:
        return 130
    except (PlanError, NotebookError, OSError) as error:
        reason = one_line(error) if isinstance(error, OSError) else str(error)
        print(f"{options.notebook} failed: {reason}{where}", file=screen)
        if this:
            _note(this, reason)
        return 1
    return 0


def _note(task: Task, reason: str) -> None:
    try:
        with paths.replacing(task.error) as path:
            path.write_text(reason + "\n", encoding="utf-8")
    except OSError:
        pass  # a full disk: whoever waits for this task finds that out by itself


if __name__ == "__main__":
    sys.exit(main())
