"""What run_all.sh does once it has Python: run what is out of date, show how far it is, publish, sum up.

What takes long in a notebook, a training say, is a *piece*: a job of its own in Snakemake's graph, before those of the
notebooks that need it. Which pieces are missing is asked of each notebook beforehand
(:func:`common.pipeline.prepare.make_some`) and handed to the Snakefile in ``build/<scale>/pieces.json``.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock

from common import paths
from common.notebook.provenance import code_cells, read_notebook
from common.pipeline.execute import PlanError, Task, committed_costs, last_cost, one_line, plan, read_cost, shown
from common.pipeline.isolation import isolate
from common.pipeline.publish import read_record, summarize, verdict_counts


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


class Progress:
    """Prints a line when a notebook starts and when it ends.

    It looks at the files that :mod:`common.pipeline.execute` writes, which a cluster's nodes write too.
    """

    def __init__(self, tasks: list[Task], total: int, pieces: list[Path]):
        self.total = total
        self.ended = 0
        self._pieces, self._waited_for = len(pieces), list(pieces)
        self._not_started = {task: _stamp(task.log) for task in tasks}
        self._not_ended = {task: self._end(task) for task in tasks}

    @staticmethod
    def _end(task: Task) -> tuple:
        return _stamp(task.timing), _stamp(task.error)

    def _say(self, task: Task, what: str) -> None:
        width = len(str(self.total))
        print(f"[{self.ended:{width}d}/{self.total}] {task.ident} {what}", flush=True)

    def update(self) -> None:
        """Print what has happened since the last call."""
        for marker in [m for m in self._waited_for if m.exists()]:
            self._waited_for.remove(marker)
            made = self._pieces - len(self._waited_for)
            print(f"piece {made} of {self._pieces}: {marker.parent.name}, {marker.name[:8]}", flush=True)
        for task in [t for t, before in self._not_started.items() if _stamp(t.log) != before]:
            del self._not_started[task]
            self._say(task, "started")
        for task in [t for t, before in self._not_ended.items() if self._end(t) != before]:
            if not (task.error.exists() or task.done):
                continue  # what was there before has been removed
            del self._not_ended[task]
            self.ended += 1
            if task.error.exists():
                self._say(task, f"FAILED: {task.error.read_text(encoding='utf-8').strip()}")
            else:
                seconds = read_cost(task.folder).seconds
                self._say(task, f"done in {seconds:.0f} s: {verdict_counts(read_record(task.record))}")


def _stop(process: subprocess.Popen) -> None:
    """End Snakemake: by the Ctrl-C that it may have got too, by one of ours, by force."""
    for patience, stop in ((3, lambda: process.send_signal(signal.SIGINT)), (10, process.kill), (None, None)):
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            stop()


def marker_of(scale: str, piece: str) -> Path:
    """The file that says that a piece has been tried; whether it was made, the notebook finds out."""
    return paths.BUILD / scale / "pieces" / piece


def _tethered() -> dict[str, str]:
    """The environment of what ends with this process."""
    return os.environ | {"HESSIAN_TETHERED": str(os.getpid())}


def plan_pieces(tasks: list[Task], jobs: int) -> list[Path]:
    """Ask which pieces of the tasks are missing, and write them down for the Snakefile; their markers."""
    asking = [t for t in tasks if code_cells(read_notebook(paths.notebook_path(t.ident)), "prepare")]

    def missing(task: Task) -> list[str]:
        command = [sys.executable, "-m", "common.pipeline.prepare", task.ident, "--scale", task.scale, "--list"]
        done = subprocess.run(command, cwd=paths.ROOT, env=_tethered(), capture_output=True, text=True, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else []  # what is wrong, the notebook will say

    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip((t.ident for t in asking), pool.map(missing, asking), strict=True))
    scale = tasks[0].scale
    markers = [marker_of(scale, piece) for piece in dict.fromkeys(p for pieces in found.values() for p in pieces)]
    for marker in markers:
        marker.unlink(missing_ok=True)
    with paths.replacing(paths.BUILD / scale / "pieces.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return markers


def _limits() -> list[str]:
    """What this machine has, for Snakemake's own scheduler; a cluster's has its own."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    return ["--resources", f"mem_mb={memory}", "gpu=1"]


def run_snakemake(tasks: list[Task], log: Path, *, jobs: int, extra: list[str], progress: Progress) -> int:
    """Have Snakemake complete ``tasks``, its own words going to ``log``; its exit code.

    Raises
    ------
    KeyboardInterrupt
        After everything has been stopped.
    """
    command = [
        sys.executable, "-m", "snakemake", *(shown(task.timing) for task in tasks),
        "--snakefile", str(paths.ROOT / "Snakefile"), "--directory", str(paths.ROOT),
        "--config", f"scale={tasks[0].scale}", "--cores", str(jobs), "--jobs", str(jobs), "--keep-going",
        "--rerun-incomplete", "--rerun-triggers", "mtime", "--nolock", "--scheduler", "greedy",
        *([] if "--executor" in extra else _limits()), *extra,
    ]  # fmt: skip
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=paths.ROOT, env=_tethered(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            while process.poll() is None:
                progress.update()
                time.sleep(0.2)
            progress.update()
        except BaseException:
            _stop(process)
            raise
    return process.returncode


def how_snakemake_ended(code: int, log: Path) -> str:
    """Its exit code, or what its log says, in words."""
    if code < 0:
        return f"Snakemake was ended by {signal.Signals(-code).name}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if any(line.startswith("Will exit after finishing") for line in lines):
        return "Snakemake was asked to end"
    return f"Snakemake says: {lines[-1] if lines else 'nothing'}"


def why_incomplete(task: Task, log_before: object, ended: str, snakemake_log: Path) -> str:
    """In one line why a task has no complete result, and the log that tells more."""
    if task.error.exists():
        reason = task.error.read_text(encoding="utf-8").strip()
    elif shutil.disk_usage(paths.BUILD).free < 2**20:
        reason = f"no space left on the disk that holds {shown(paths.BUILD)}"
    elif _stamp(task.log) != log_before:
        reason = "it was killed"
    else:
        return f"it was not started; {ended} (log: {shown(snakemake_log)})"
    return f"{reason} (log: {shown(task.log)})"


def outlived(task: Task) -> bool:
    """Whether a result was made on stand-in data and the real ones have come since."""
    names = [data["name"] for data in read_record(task.record)["data"] if data["stand_in"]] if task.done else []
    if not names:
        return False
    from common.data import images  # imports torch, which nothing else here needs

    return any(images.available(name) for name in names if name in images.NAMES)


def regenerate(scale: str, *, only: str = "", jobs: int, dry_run: bool = False, extra: list[str]) -> int:
    """Bring all figures of a scale up to date and print the closing table; the exit code.

    Raises
    ------
    PlanError
        If scale or selection make no sense; nothing has been touched then.
    """
    tasks, broken = plan(scale, only)
    waiting = [task for task in tasks if not task.done or outlived(task)]
    if dry_run:
        committed = committed_costs()
        for task in tasks:
            cost = last_cost(task, committed)
            took = f"{cost[0]:6.0f} s of one core, {cost[1]:6d} MB" if cost else "never run".rjust(28)
            print(f"{'would run ' if task in waiting else 'up to date'}  {took}  {task.ident}")
        for ident, reason in broken.items():
            print(f"broken      {ident}: {reason}")
        return 1 if broken else 0

    failed = dict(broken)
    if waiting or (tasks and extra):
        for task in waiting:
            task.error.unlink(missing_ok=True)
            task.timing.unlink(missing_ok=True)
        print(f"{len(waiting)} of {len(tasks)} notebooks to run at the {scale} scale, {jobs} at once", flush=True)
        log = paths.BUILD / scale / "snakemake.log"
        logs_before = {task: _stamp(task.log) for task in waiting}
        try:
            pieces = plan_pieces(waiting or tasks, jobs) if scale != "quick" else []  # there, all takes seconds
            if pieces:
                print(f"{len(pieces)} pieces that they need are to be made before", flush=True)
            progress = Progress(tasks, len(waiting) or len(tasks), pieces)
            code = run_snakemake(waiting or tasks, log, jobs=jobs, extra=extra, progress=progress)
        except KeyboardInterrupt:
            left = sum(not task.done for task in tasks)
            print(f"interrupted with {left} of {len(tasks)} notebooks to go; the same command goes on from there")
            return 130
        ended = how_snakemake_ended(code, log)
        incomplete = {t.ident: why_incomplete(t, logs_before.get(t), ended, log) for t in tasks if not t.done}
        if code and not incomplete:
            failed["Snakemake"] = f"{ended} (log: {shown(log)})"
        failed |= incomplete
    elif tasks:
        print(f"all {len(tasks)} notebooks are up to date at the {scale} scale")

    table, changed = summarize(tasks)
    if table:
        print(f"\n{table}")
        print(f"Figures and records: {shown(paths.FIGURES / scale)}")
    if scale != "quick" and (changed or (table and not (paths.FIGURES / "README.md").exists())):
        command = [sys.executable, "-m", "common.pipeline.gallery"]
        gallery = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, check=False)
        if gallery.returncode:
            failed["figures/README.md"] = (gallery.stderr.strip().splitlines() or ["it was not written"])[-1]
    for ident, reason in sorted(failed.items()):
        print(f"FAILED {ident}: {reason}", flush=True)
    return 1 if failed else 0


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments: list[str] | None = None) -> int:
    """Entry point of run_all.sh; every error that a user can make is one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="python -m common.pipeline.workflow", description=__doc__)
    parser.add_argument("--scale", default="laptop")
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=cores())
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments[:split])
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    try:
        lock = filelock.FileLock(paths.BUILD / "lock")
        if not options.dry_run:
            isolate()
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                print("run_all.sh: another one is at work in this clone; waiting for it to end", flush=True)
                lock.acquire()
        return regenerate(**vars(options), extra=arguments[split + 1 :])
    except (ValueError, OSError) as error:
        reason = one_line(error) if isinstance(error, OSError) else error
        print(f"run_all.sh: {reason}", file=sys.stderr)
        return 2 if isinstance(error, PlanError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
