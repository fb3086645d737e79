"""After the notebooks have run: results into ``figures/``, new records against committed ones, the closing table."""

import json
import math
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tabulate import tabulate

from common import paths
from common.pipeline.execute import Task, read_cost


def verdicts() -> list[str]:
    """The verdicts that a claim can have, best first, as ``record.schema.json`` lists them."""
    schema = json.loads((Path(__file__).parents[1] / "notebook" / "record.schema.json").read_text(encoding="utf-8"))
    return schema["properties"]["claims"]["items"]["properties"]["verdict"]["enum"]


def read_record(file: Path) -> dict | None:
    """The record in ``file``, or None if there is none; ValueError with its name if it is damaged."""
    try:
        return paths.read_json(file)
    except FileNotFoundError:
        return None


def verdict_counts(record: dict) -> str:
    """Such as ``"3 reproduced, 1 paper in error"``."""
    count = Counter(claim["verdict"] for claim in record["claims"])
    return ", ".join(f"{count[v]} {v}" for v in verdicts() if count[v])


def committed_record(published: Path) -> tuple[dict | None, str]:
    """The record as the last commit has it, or, if it was never committed, the one published by an earlier run.

    Returns
    -------
    record : dict or None
    origin : str
        ``"committed"`` or ``"earlier run"``.
    """
    name = f"HEAD:./{published.relative_to(paths.ROOT).as_posix()}"
    try:
        git = subprocess.run(["git", "show", name], cwd=paths.ROOT, capture_output=True, check=False)
    except FileNotFoundError:  # no git
        return read_record(published), "earlier run"
    if git.returncode:
        return read_record(published), "earlier run"
    return json.loads(git.stdout), "committed"


def _leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{name}.{key}")
    else:
        yield name, value


def _measurements(record: dict) -> dict[str, object]:
    claims = {claim["id"]: [claim["measured"], claim["interval"]] for claim in record["claims"]}
    return dict([*_leaves(record["numbers"], "numbers"), *_leaves(claims, "claims")])


def _relative_difference(a: object, b: object) -> float:
    if a == b:
        return 0.0
    if isinstance(a, str | None) or isinstance(b, str | None):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def compare(new: dict, old: dict | None) -> str:
    """How a record differs from an older one: verdicts, and the largest relative difference of its numbers."""
    if old is None:
        return "no committed record"
    was, now = ({claim["id"]: claim["verdict"] for claim in record["claims"]} for record in (old, new))
    changed = [
        f"{ident} ({was.get(ident, 'absent')} -> {now.get(ident, 'absent')})"
        for ident in dict.fromkeys([*was, *now])
        if was.get(ident) != now.get(ident)
    ]
    before, after = _measurements(old), _measurements(new)
    if not changed and before == after:
        return "identical"
    difference = max((_relative_difference(before[n], after[n]) for n in before.keys() & after.keys()), default=0)
    alone = len(before.keys() ^ after.keys())
    return (
        ("verdicts differ: " + ", ".join(changed) if changed else "same verdicts")
        + f"; numbers within {difference:.1g}"
        + f"; {alone} numbers in only one of the two" * bool(alone)
    )


def publish(task: Task) -> bool:
    """Bring figures and record of a complete result into ``figures/``; forget the results it replaces.

    Figures first, the record last, each in one step: what the record names is there. What is there already is
    not written again.

    Returns
    -------
    bool
        Whether anything in ``figures/`` has changed.
    """
    folder = paths.FIGURES / task.scale / Path(task.ident).parent
    published = folder / task.record.name
    record = read_record(task.record)
    stale = set((read_record(published) or record)["figures"]) - set(record["figures"])
    changed = bool(stale)
    for name in [*record["figures"], task.record.name]:
        content = (task.folder / name).read_bytes()
        if not (folder / name).exists() or (folder / name).read_bytes() != content:
            changed = True
            with paths.replacing(folder / name) as path:
                path.write_bytes(content)
    for file in [*(folder / name for name in stale), *folder.glob(f".{task.record.stem}*")]:
        file.unlink(missing_ok=True)
    for sibling in task.folder.parent.iterdir():
        if sibling != task.folder:
            shutil.rmtree(sibling)
    return changed


def summarize(tasks: list[Task]) -> tuple[str, bool]:
    """Publish every complete result among ``tasks`` and make the closing table.

    Returns
    -------
    table : str
        One row a notebook: the verdicts of its claims, seconds, peak memory, and how it compares with the committed
        record; below it, what ran on stand-in data. Empty if there is no result.
    changed : bool
        Whether anything in ``figures/`` has changed.
    """
    changed = False
    rows = [["notebook", *verdicts(), "seconds", "MB", "against the committed record"]]
    stand_ins: dict[str, list[str]] = {}
    for task in sorted((t for t in tasks if t.done), key=lambda t: t.ident):
        record, cost = read_record(task.record), read_cost(task.folder)
        old, origin = committed_record(paths.FIGURES / task.scale / f"{task.ident}.json")
        changed |= publish(task)
        difference = compare(record, old) + " (to an earlier run)" * (old is not None and origin == "earlier run")
        count = Counter(claim["verdict"] for claim in record["claims"])
        counts = [str(count[verdict]) for verdict in verdicts()]
        rows.append([task.ident, *counts, f"{cost.seconds:.0f}", str(cost.peak_mb), difference])
        for data in record["data"]:
            if data["stand_in"]:
                stand_ins.setdefault(data["name"], []).append(task.ident)
    if len(rows) == 1:
        return "", changed
    totals = [str(sum(int(row[i]) for row in rows[1:])) for i in range(1, len(verdicts()) + 2)]
    rows.append([f"{len(rows) - 1} notebooks", *totals, "", ""])
    notes = [f"Stand-in data for {name}: {', '.join(idents)}" for name, idents in stand_ins.items()]
    aligned = ["left", *["right"] * (len(rows[0]) - 2), "left"]
    table = tabulate(rows, headers="firstrow", tablefmt="plain", disable_numparse=True, colalign=aligned)
    return "\n".join([table, *notes]), changed
