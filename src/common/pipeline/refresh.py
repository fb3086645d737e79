"""Committed outputs and quick records: made anew by this command, and held against what another run measures.

``python -m common.pipeline.refresh [PATTERN]`` runs notebooks as they are, with the parameters of their own cells,
saves what they show into the files themselves, and writes what they measure to ``tests/quick/<paper>/<notebook>.json``.
The tests run the same notebooks, on whatever processor they find, and :func:`differences` says where a measurement has
left its tolerance.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor

from common import paths
from common.pipeline.execute import THREAD_VARIABLES, PlanError, one_line, plan
from common.pipeline.isolation import isolate, stop_with_parent
from common.pipeline.older_processor import VARIABLES
from common.pipeline.workflow import cores

#: The committed quick records.
QUICK = paths.ROOT / "tests" / "quick"

#: Progress bars, which are no results.
_WIDGET = "application/vnd.jupyter.widget-view+json"

#: Part of an interval's half width that a measurement may move by.
OF_INTERVAL = 0.25
#: Part of its own size that a measurement may move by.
OF_SIZE = 1e-3
#: In units of how far the measurement moved when it was made as an older processor would have it.
OF_MOVES = 3.0
#: What double precision leaves of a number that is zero.
OF_NOTHING = 1e-12


def quick_record(record: Mapping) -> dict:
    """What the tests need of a record: the data by name and SHA-256, and every measurement.

    Parameters
    ----------
    record
        As ``record.schema.json`` describes it.

    Returns
    -------
    dict
        ``{"data": {name: sha256 | "stand-in" | None}, "claims": {id: {"measured", "interval", "verdict"}}}``, numbers
        with six significant digits.
    """
    return {
        "data": {d["name"]: "stand-in" if d["stand_in"] else d["sha256"] for d in record["data"]},
        "claims": {
            c["id"]: {
                "measured": _six(c["measured"]), "interval": [_six(x) for x in c["interval"]], "verdict": c["verdict"],
            }
            for c in record["claims"]
        },
    }  # fmt: skip


def quick_text(quick: Mapping) -> str:
    """A quick record as JSON, a claim on each line."""
    claims = (f"{json.dumps(ident)}: {json.dumps(claim)}" for ident, claim in quick["claims"].items())
    data = json.dumps(quick["data"], ensure_ascii=False)
    return f'{{"data": {data},\n "claims": {{\n  ' + ",\n  ".join(claims) + "\n }}\n"


def _width(interval: Sequence[float]) -> float:
    return interval[1] - interval[0]


def _six(x: float) -> float:
    return float(f"{x:.6g}")


def tolerance(claim: Mapping) -> float:
    r"""How far a measurement may be from the committed one, on another processor.

    With :math:`[l, h]` the interval and :math:`m` the measurement, :math:`(h - l)/8 + 10^{-3} |m| + 10^{-12}`.

    Two processors round differently, and what is chaotic, a training above all, makes of the difference what it likes,
    within the spread that the interval states: a quarter of its half width is a shift that no reader of the interval
    would notice, and that no change of the method hides in. What is not estimated but computed has an interval of no
    width; 10\ :sup:`-3` is ten thousand roundings of single precision, of which such numbers are made, and less than
    any table of a paper prints. The last term is for what is zero but for rounding. An older processor's kernels
    (:mod:`common.pipeline.older_processor`) and two threads moved no claim by more than 0.06 of its half width or,
    where that is nothing, 2.5 · 10\ :sup:`-4` of its size, but for those that :func:`refresh` has seen to move further:
    to these, three times that distance is allowed besides.
    """
    low, high = claim["interval"]
    expected = OF_INTERVAL * (high - low) / 2 + OF_SIZE * abs(claim["measured"]) + OF_NOTHING
    return expected + OF_MOVES * claim.get("moves", 0.0)


def differences(committed: Mapping, record: Mapping) -> list[str]:
    """Where a run has left the tolerances of the committed quick record, in a line each; empty if nowhere.

    An interval, estimated from few runs as it mostly is, may be half as wide as the committed one, or twice. A verdict
    must be the same: where an interval ends so near to its criterion's bound that another processor may decide
    otherwise, the claim is not to be decided at the quick scale.

    Parameters
    ----------
    committed
        As :func:`quick_record` makes it.
    record
        What the run has written. If it used other data than the committed record, or a stand-in, nothing is compared.
    """
    found = quick_record(record)
    if found["data"] != committed["data"] or "stand-in" in found["data"].values():
        return []
    was, now = committed["claims"], found["claims"]
    lines = [f"{ident}: no longer claimed" for ident in was.keys() - now.keys()]
    lines += [f"{ident}: not in the quick record" for ident in now.keys() - was.keys()]
    for ident in was.keys() & now.keys():
        old, new, allowed = was[ident], now[ident], tolerance(was[ident])
        if abs(new["measured"] - old["measured"]) > allowed:
            lines.append(f"{ident}: measured {new['measured']:g}, committed {old['measured']:g} ± {allowed:.1g}")
        width, committed_width = _width(new["interval"]), _width(old["interval"])
        if not committed_width / 2 - allowed <= width <= 2 * committed_width + allowed:
            lines.append(f"{ident}: interval of width {width:.2g}, committed {committed_width:.2g}")
        if new["verdict"] != old["verdict"]:
            lines.append(f"{ident}: {new['verdict']}, committed {old['verdict']}")
    return sorted(lines)


def refresh(ident: str) -> list[str]:
    """Run a notebook at the quick scale and commit what it shows and measures to its files.

    It runs three times: as this machine computes, and as an older one would, with one thread and with two. Where that
    moves a measurement, or the width of its interval, further than the interval lets expect, as where an eigenbasis of
    equal eigenvalues decides, the distance is kept.

    Returns
    -------
    list of str
        Names of the data sets that a stand-in replaced: such a notebook is tested to run, and no more.

    Raises
    ------
    Exception
        What the notebook raised, or what its outputs should not hold; its files are as they were then.
    """
    import nbformat  # seconds that those who only compare need not spend

    content, record = _executed(ident, dict.fromkeys(THREAD_VARIABLES, "1"), "here")
    measured = quick_record(record)
    for threads in ("1", "2"):
        _, elsewhere = _executed(ident, dict.fromkeys(THREAD_VARIABLES, threads) | VARIABLES, f"older {threads}")
        moved = quick_record(elsewhere)["claims"]
        for name, claim in measured["claims"].items():
            distance, other = abs(moved[name]["measured"] - claim["measured"]), moved[name]["interval"]
            allowed, width, other_width = tolerance(claim), _width(claim["interval"]), _width(other)
            if not width / 2 - allowed <= other_width <= 2 * width + allowed:
                distance = max(distance, abs(other_width - width))
            if distance > allowed:
                claim["moves"] = max(_six(distance), claim.get("moves", 0.0))
    for file, text in (
        (paths.notebook_path(ident), nbformat.writes(content) + "\n"),
        (QUICK / f"{ident}.json", quick_text(measured)),
    ):
        with paths.replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [name for name, origin in measured["data"].items() if origin == "stand-in"]


def _executed(ident: str, variables: Mapping[str, str], where: str) -> tuple[object, dict]:
    """A notebook with its outputs as they are committed, and its record, from a run in an environment."""
    import nbclient
    import nbformat

    notebook, out = paths.notebook_path(ident), paths.BUILD / "refresh" / where / ident.partition("/")[0]
    record = out / f"{notebook.stem}.json"
    record.unlink(missing_ok=True)
    kept = paths.BUILD / "refresh" / where / "cache"
    (paths.CACHE / "data").mkdir(parents=True, exist_ok=True)
    kept.mkdir(parents=True, exist_ok=True)
    if not (kept / "data").exists():
        (kept / "data").symlink_to(paths.CACHE / "data")  # decoded images
    before = dict(os.environ)
    isolate()
    os.environ.update(variables, HESSIAN_SCALE="quick", HESSIAN_OUT=str(out), HESSIAN_CACHE=str(kept))
    os.environ["OMP_WAIT_POLICY"] = "passive"
    content = nbformat.read(notebook, as_version=4)
    metadata = dict(content.metadata)
    client = nbclient.NotebookClient(
        content, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(notebook.parent)}},
        record_timing=False, coalesce_streams=True, store_widget_state=False,
    )  # fmt: skip
    try:
        client.execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    content.metadata = metadata  # the kernel adds its own version
    for cell in content.cells:
        if cell.cell_type == "code":
            prepared = "prepare" in cell.metadata.get("tags", [])  # prints how far a training is, or nothing
            cell.outputs = [o for o in cell.outputs if _WIDGET not in o.get("data", {}) and not prepared]
            for output in cell.outputs:
                if output.get("name") == "stderr":
                    raise ValueError(f"it prints to stderr: {output.text.strip().splitlines()[-1]}")
    return content, json.loads(record.read_text(encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Refresh the notebooks that match, several at once; 1 if one of them failed, and why in a line."""
    parser = argparse.ArgumentParser(prog="python -m common.pipeline.refresh", description="Run notebooks in place.")
    parser.add_argument("only", nargs="?", default="", metavar="PATTERN", help="as --only of run_all.sh; default: all")
    parser.add_argument("--jobs", type=int, default=cores(), help="notebooks at once; default: one per core")
    options = parser.parse_args(arguments)
    try:
        tasks, broken = plan("quick", options.only)
    except PlanError as error:
        print(error, file=sys.stderr)
        return 2
    with ProcessPoolExecutor(options.jobs, initializer=stop_with_parent, initargs=(os.getpid(),)) as pool:
        runs = {task.ident: pool.submit(refresh, task.ident) for task in tasks}
        for ident, run in runs.items():
            try:
                stand_ins = run.result()
                print(ident + "".join(f", on stand-in data for {name}" for name in stand_ins), flush=True)
            except Exception as error:
                broken[ident] = one_line(error)
    for ident, reason in broken.items():
        print(f"FAILED {ident}: {reason}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
