"""Gallery, scorecard and errata, written from the committed records; ``python -m common.pipeline.gallery [--check]``.

``figures/README.md`` is generated whole; of the README at the top only what stands between the two ``scorecard``
comments; the errata are those of :mod:`common.pipeline.errata`. All follow from the records in ``figures/laptop`` and
``figures/paper``; of each record it is said whether the present code made it. What a run cost is measured where this
machine has run what the record records, and carried over from the file where it has not, so that a fresh clone, which
has no measurements, finds the committed files up to date.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path

import jsonschema

from common import paths
from common.notebook.claims import REPRODUCED, VERDICTS
from common.notebook.papers import PAPERS
from common.paths import replacing
from common.pipeline.errata import errata_text, load_errata, page
from common.pipeline.execute import NotebookError, committed_costs, read_cost, scale_parameters, task
from common.pipeline.markdown import escaped, measurement, number, table

#: Scales whose records are committed, in the order in which the gallery shows them; the last one found is counted.
SCALES = ("laptop", "paper")

_COMMAND = "python -m common.pipeline.gallery"
_BEGIN, _END = "<!-- scorecard -->", "<!-- /scorecard -->"

Records = Sequence[Mapping]
#: Seconds of one core from a cold cache and MB by scale and notebook.
Costs = Mapping[tuple[str, str], tuple[int, int]]


def load_records() -> list[dict]:
    """Committed records in the order of the gallery: by paper, then by notebook, then by scale.

    Raises
    ------
    ValueError
        If a record is damaged or does not obey the schema, or lies under another name than its own.
    """
    records = []
    # Not by common.notebook.run, whose libraries take seconds to start.
    schema = json.loads((paths.SOURCE / "common/notebook/record.schema.json").read_text(encoding="utf-8"))
    valid = jsonschema.validators.validator_for(schema)(schema)
    for scale in SCALES:
        for file in sorted((paths.FIGURES / scale).glob("*/[!.]*.json")):
            name = file.relative_to(paths.FIGURES).as_posix()
            try:
                record = json.loads(file.read_text(encoding="utf-8"))
                if wrong := jsonschema.exceptions.best_match(valid.iter_errors(record)):
                    raise wrong
            except (json.JSONDecodeError, jsonschema.ValidationError) as error:
                reason = error.message if isinstance(error, jsonschema.ValidationError) else error
                raise ValueError(f"figures/{name} is not a record: {reason}") from error
            if f"{record['scale']}/{record['id']}.json" != name:
                raise ValueError(f"figures/{name} holds the record of {record['id']} at scale {record['scale']}")
            records.append(record)
    order = list(PAPERS)
    return sorted(records, key=lambda r: (order.index(r["paper"]["key"]), r["id"], SCALES.index(r["scale"])))


def counted(records: Records) -> list[Mapping]:
    """One record of each notebook, that of the largest scale: the one whose verdicts are counted."""
    return list({r["id"]: r for r in sorted(records, key=lambda r: SCALES.index(r["scale"]))}.values())


def count_verdicts(records: Iterable[Mapping]) -> Counter:
    """Number of claims by verdict."""
    return Counter(claim["verdict"] for record in records for claim in record["claims"])


def measured_costs(records: Records) -> dict[tuple[str, str], tuple[int, int]]:
    """What the records' runs cost, where this machine has run the same source; as if nothing had been in the cache."""
    costs = {}
    for record in records:
        for file in (paths.BUILD / record["scale"] / record["id"]).glob("*/timing.json"):
            if record["source"].startswith(file.parent.name) and (cost := read_cost(file.parent)):
                costs[record["scale"], record["id"]] = max(1, round(cost.cold)), cost.peak_mb
    return costs


def outdated(records: Records) -> set[tuple[str, str]]:
    """Scale and notebook of the records that were made by earlier code, or with other parameters."""
    overrides = {scale: scale_parameters(scale) for scale in SCALES}
    found = set()
    for record in records:
        scale, ident = record["scale"], record["id"]
        try:
            source = task(ident, scale, overrides[scale].get(ident, {})).source
        except NotebookError:  # gone, or broken
            source = ""
        if record["source"] != source:
            found.add((scale, ident))
    return found


def _summary(counts: Counter) -> str:
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)


def _of_papers(records: Records) -> list[tuple[str, list[Mapping]]]:
    """Papers that have records, each with its own."""
    groups = [(key, [r for r in records if r["paper"]["key"] == key]) for key in PAPERS]
    return [(key, group) for key, group in groups if group]


def _anchor(ident: str) -> str:
    return ident.replace("/", "-")


def _shown(record: Mapping) -> str:
    """What a record regenerates: ``Figures 2, 3, 13``, or that the paper has no such figure."""
    kinds = (("Figure", record["paper"]["figures"]), ("Table", record["paper"]["tables"]))
    named = [f"{kind}{'s' * (len(which) > 1)} {', '.join(which)}" for kind, which in kinds if which]
    return escaped("; ".join(named)) or "beyond the paper"


def _data(source: Mapping) -> str:
    origin = f"{escaped(source['name'])}, {source['samples']} samples, from {escaped(source['origin'])}"
    return f"**STAND-IN** for {origin}" if source["stand_in"] else origin


def _counts_table(records: Records, gallery: str) -> str:
    """Verdicts by paper; ``gallery`` is where the gallery lies, seen from the table."""
    rows = [
        (f"[{escaped(PAPERS[key])}]({gallery}#{key})", len(counted(group)), *_verdict_cells(counted(group)))
        for key, group in _of_papers(records)
    ]
    return table(("paper", "notebooks", *VERDICTS), rows)


def _verdict_cells(records: Iterable[Mapping]) -> list[int]:
    counts = count_verdicts(records)
    return [counts[verdict] for verdict in VERDICTS]


def _notebook_section(group: Records, costs: Costs, old: Set[tuple[str, str]]) -> str:
    """The gallery's entry for one notebook: its records, one for each scale."""
    ident, title, shown = group[0]["id"], escaped(group[0]["title"]), _shown(group[0])
    lines = [
        f'<a id="{_anchor(ident)}"></a>',
        "",
        f"### {shown[0].upper()}{shown[1:]}: {title}",
        "",
        f"Notebook [{escaped(ident)}](../notebooks/{ident}.ipynb)",
    ]
    for record in group:
        scale, device, threads = record["scale"], record["environment"]["device"], record["environment"]["threads"]
        cost = costs.get((scale, ident))
        time = "–" if cost is None else "{0} s, {1} MB <!-- cost: {2} {3} {0} s {1} MB -->".format(*cost, scale, ident)
        folder = f"{scale}/{record['paper']['key']}"
        lines += [
            "",
            *(f"![{title}]({folder}/{name})" for name in record["figures"]),
            "",
            f"- Scale: {scale}, on {device} with {threads} thread{'s' * (threads > 1)}",
            *[f"- **Made by earlier code**: `./run_all.sh --only {ident}` makes it anew"] * ((scale, ident) in old),
            f"- Data: {'; '.join(map(_data, record['data']))}",
            f"- Reduced: {escaped('; '.join(record['reduced'])) or 'nothing'}",
            f"- Claims: {_summary(count_verdicts([record]))} ([record]({scale}/{ident}.json))",
            f"- One core from a cold cache: {time}",
        ]
    return "\n".join(lines)


def _scorecard(records: Records) -> str:
    """Every claim of a paper, one row each."""
    rows = []
    for record in records:
        notebook = f"[{escaped(record['id'].partition('/')[2])}](#{_anchor(record['id'])})"
        for claim in record["claims"]:
            verdict = claim["verdict"] if claim["verdict"] == REPRODUCED else f"**{claim['verdict']}**"
            rows.append((
                notebook, record["scale"], escaped(claim["statement"]), escaped(claim["source"]),
                escaped(number(claim["expected"])), escaped(measurement(claim["measured"], claim["interval"])),
                escaped(claim["criterion"]), verdict,
                "" if claim["verdict"] == REPRODUCED else escaped(claim["note"]),
            ))  # fmt: skip
    header = ("notebook", "scale", "claim", "source", "expected", "measured [interval]", "criterion", "verdict", "note")
    return table(header, rows)


def gallery_text(records: Records, costs: Costs, old: Set[tuple[str, str]] = frozenset()) -> str:
    """The whole of ``figures/README.md``.

    Parameters
    ----------
    records
        In the order of :func:`load_records`.
    costs
        What each run took; what is missing is shown as a dash.
    old
        Those that are :func:`outdated`.
    """
    parts = [
        f"<!-- Generated by `{_COMMAND}` from the records in this folder; changes made by hand are lost. -->",
        "# Gallery and scorecard",
        "Every figure, the notebook it comes from, and every claim of the papers held against a measurement. "
        "*Reproduced*: the whole of the measured interval fulfils the criterion. *Not reproduced*: the whole of it "
        "violates the criterion, and the note says what was seen instead. *Paper in error*: so does it, and it holds "
        "the value that a derivation gives. *Undecided*: the interval straddles, and the note says how many runs "
        "would decide. *Untested*: the run is too small, or its data are not the paper's. "
        "Where a notebook was run at more than one scale, the counts take the largest.",
    ]
    if not records:
        return "\n\n".join([*parts, "No record is committed yet."]) + "\n"
    parts.append(_counts_table(records, ""))
    for key, group in _of_papers(records):
        claims = _summary(count_verdicts(counted(group)))
        parts += [f'<a id="{key}"></a>\n\n## {escaped(PAPERS[key])}', f"Claims: {claims}."]
        for ident in dict.fromkeys(r["id"] for r in group):
            parts.append(_notebook_section([r for r in group if r["id"] == ident], costs, old))
        parts += [f"### Scorecard of {escaped(key)}", _scorecard(group)]
    return "\n\n".join(parts) + "\n"


def summary_block(records: Records, old: int = 0) -> str:
    """What stands between the ``scorecard`` comments of the README at the top: counts by paper and by notebook."""
    if not records:
        return "No record is committed yet."
    rows = [
        (
            f"[{escaped(r['id'])}](notebooks/{r['id']}.ipynb)", _shown(r), escaped(r["title"]), *_verdict_cells([r]),
            f"[see](figures/README.md#{_anchor(r['id'])})",
        )
        for r in counted(records)
    ]  # fmt: skip
    by_notebook = table(("notebook", "figure", "what it shows", *VERDICTS, "gallery"), rows)
    said = f"{old} of {len(records)} records were made by earlier code; the gallery marks them.\n\n" if old else ""
    return f"{said}{_counts_table(records, 'figures/README.md')}\n\n{by_notebook}"


def with_block(readme: str, block: str) -> str:
    """``readme`` with ``block`` between its ``scorecard`` comments.

    Raises
    ------
    ValueError
        If the comments are not there, once each and in order.
    """
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end) or _BEGIN in after or _END in before + after:
        raise ValueError(f"README.md must have one line {_BEGIN} and after it one line {_END}")
    return f"{before}{begin}\n{block}\n{end}{after}"


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _generated(measure: bool) -> dict[Path, str]:
    """The files that this module writes, and what belongs in them."""
    gallery, readme = paths.FIGURES / "README.md", paths.ROOT / "README.md"
    records = load_records()
    costs = committed_costs() | (measured_costs(records) if measure else {})
    old = outdated(records)
    block = summary_block(records, len(old))
    said = counted(records)
    errata = {page(paper): errata_text(paper, entries, said) for paper in PAPERS if (entries := load_errata(paper))}
    return {gallery: gallery_text(records, costs, old), readme: with_block(_text(readme), block), **errata}


def stale_files() -> list[Path]:
    """Files that differ from what the records say; the costs in them are taken as they are."""
    return [file for file, text in _generated(measure=False).items() if _text(file) != text]


def write_gallery() -> list[Path]:
    """Bring the gallery and the README's block up to date, and say which files changed.

    Raises
    ------
    ValueError
        If a record is damaged or the README lacks its comments; nothing is written then.
    """
    changed = {file: text for file, text in _generated(measure=True).items() if _text(file) != text}
    for file, text in changed.items():
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return list(changed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the gallery, or with ``--check`` say whether it is up to date; 0 if all is well."""
    parser = argparse.ArgumentParser(
        prog=_COMMAND, description="Generate figures/README.md, README.md's scorecard and errata/*.md."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    check = parser.parse_args(arguments).check
    try:
        files = stale_files() if check else write_gallery()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    names = " and ".join(file.relative_to(paths.ROOT).as_posix() for file in files)
    if check and files:
        print(f"out of date with the records: {names}; run {_COMMAND}", file=sys.stderr)
        return 1
    print("up to date" if not files else f"written: {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
