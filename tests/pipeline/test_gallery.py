"""The gallery and the scorecard, on records made here."""

import json
import re
from types import SimpleNamespace

import pytest

from common import paths
from common.pipeline import gallery
from common.pipeline.execute import committed_costs
from common.pipeline.gallery import gallery_text, summary_block, with_block
from common.pipeline.markdown import escaped, measurement, number

LINEAR, HIDDEN, EDGES = (
    "dong_quantifying/fig08_linear",
    "dong_quantifying/fig09_hidden",
    "liao_eigenspectra/fig01_overview",
)


def claim(ident="slope", verdict="reproduced", **changes):
    base = {
        "id": ident, "statement": "The ratio falls like C^-2", "source": "Fig 8c, eq (26)", "expected": -2.0,
        "measured": -1.98, "interval": [-2.01, -1.95], "criterion": "interval meets -2 ± 0.1", "verdict": verdict,
        "note": "" if verdict == "reproduced" else f"why it is {verdict}",
    }  # fmt: skip
    return base | changes


def record(ident, scale="laptop", claims=None, **changes):
    paper, _, name = ident.partition("/")
    base = {
        "schema": 1, "id": ident, "title": f"Title of {name}", "scale": scale, "parameters": {"C": 8}, "reduced": [],
        "paper": {"key": paper, "figures": ["8"], "tables": []},
        "data": [{"name": "MNIST", "origin": "torchvision", "sha256": "0" * 64, "samples": 60000, "stand_in": False}],
        "claims": claims or [claim()], "numbers": {}, "figures": [f"{name}_a.png"], "source": "ab" * 32,
        "environment": {"python": "3.11.7", "torch": "2.13.0", "device": "cpu", "threads": 1},
    }  # fmt: skip
    return base | changes


RECORDS = [
    record(LINEAR, claims=[claim(), claim("limit", "paper in error"), claim("spread", "untested")]),
    record(LINEAR, "paper", claims=[claim(), claim("limit", "not reproduced")]),
    record(
        HIDDEN, paper={"key": "dong_quantifying", "figures": ["9", "13"], "tables": ["1"]}, reduced=["epochs: 3 | 4"]
    ),
    record(EDGES, paper={"key": "liao_eigenspectra", "figures": [], "tables": []}),
]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty repository in a temporary folder; returns a function that puts records into it."""
    for name, folder in (("ROOT", ""), ("FIGURES", "figures"), ("BUILD", "build")):
        monkeypatch.setattr(paths, name, tmp_path / folder)
    (tmp_path / "README.md").write_text("# Papers\n\n<!-- scorecard -->\n<!-- /scorecard -->\n\nThe end.\n")

    def put(*records):
        for one in records:
            file = tmp_path / "figures" / one["scale"] / f"{one['id']}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(one))
        return tmp_path

    return put


def took(root, one, seconds, source=None, spared=0.0):
    folder = root / "build" / one["scale"] / one["id"] / (source or one["source"])[:16]
    folder.mkdir(parents=True, exist_ok=True)
    cost = {"seconds": 1e4, "processor": seconds, "spared": spared, "peak_mb": 300}
    (folder / "timing.json").write_text(json.dumps(cost))


def unescaped_cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables(text):
    """Tables of a Markdown text, each a list of rows of cells."""
    blocks = re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE)
    return [[unescaped_cells(line) for line in block.splitlines()] for block in blocks]


@pytest.mark.parametrize(
    ("value", "interval", "shown"),
    [
        (-1.98, (-2.01, -1.95), "-1.98 [-2.01, -1.95]"),
        (0.123456, (0.1, 0.2), "0.123 [0.1, 0.2]"),
        (1000.0, (999.4, 1000.6), "1000 [999, 1001]"),
        (0.99987, (0.99981, 0.99993), "0.9999 [0.9998, 0.9999]"),
        (108, (108, 108), "108 [108, 108]"),
        (3.14159265, (3.14159264, 3.14159266), "3.14159 [3.14159, 3.14159]"),
        (1.5e-9, (1e-9, 2e-9), "1.5e-09 [1e-09, 2e-09]"),
    ],
)
def test_measurement_tells_the_ends_of_its_interval_apart(value, interval, shown):
    assert measurement(value, interval) == shown


def test_number_leaves_words_and_whole_numbers_as_they_are():
    assert [number(x) for x in ("none", 8, 64000.0, 1234.56, 2.0e7)] == ["none", "8", "64000", "1235", "2e+07"]


def test_escaped_text_stays_one_cell_and_has_no_markup():
    text = escaped("a | b\n‖H_ij‖_F < 1 & *no* `code` [x](y) $z$ <b>")
    assert unescaped_cells(f"| {text} |") == [text]
    assert "\n" not in text and "<" not in text and "&amp;" in text
    assert re.search(r"(?<!\\)[*_`\[\]$|]", text) is None


def test_gallery_shows_every_notebook_image_and_claim():
    text = gallery_text(RECORDS, {})
    for one in RECORDS:
        assert f"](../notebooks/{one['id']}.ipynb)" in text
        assert f"]({one['scale']}/{one['paper']['key']}/{one['figures'][0]})" in text
    overview, *scorecards = tables(text)
    assert [row[1:] for row in overview[2:]] == [["2", "2", "1", "0", "0", "0"], ["1", "1", "0", "0", "0", "0"]]
    assert sum(len(rows) - 2 for rows in scorecards) == sum(len(one["claims"]) for one in RECORDS)
    assert {len(row) for rows in scorecards for row in rows} == {9}
    row = scorecards[0][3]
    assert row[1:] == [
        "laptop", "The ratio falls like C^-2", "Fig 8c, eq (26)", "-2", r"-1.98 \[-2.01, -1.95\]",
        "interval meets -2 ± 0.1", "**paper in error**", "why it is paper in error",
    ]  # fmt: skip
    assert scorecards[0][2][-1] == ""


def test_papers_are_headed_by_their_citation_and_the_count_of_the_largest_scale():
    text = gallery_text(RECORDS, {})
    heading = text.index("\n## Dong, Zhang, Yao, Sun (2025), Towards Quantifying")
    summary = "Claims: 2 reproduced, 1 not reproduced, 0 paper in error, 0 undecided, 0 untested."
    assert heading < text.index(summary) < text.index("\n## Liao, Mahoney (2021)")
    assert "Figures 9, 13; Table 1: Title" in text
    assert "### Beyond the paper: Title of fig01\\_overview" in text
    assert "Reduced: epochs: 3 \\| 4" in text
    assert "Wu, Zhu" not in text


def test_links_within_the_gallery_have_targets():
    text = gallery_text(RECORDS, {})
    outside = summary_block(RECORDS)
    assert set(re.findall(r"\(#([^)]*)\)", text)) <= set(re.findall(r'<a id="([^"]*)">', text))
    assert set(re.findall(r"README.md#([^)]*)\)", outside)) <= set(re.findall(r'<a id="([^"]*)">', text))


def test_stand_ins_are_marked():
    source = {"name": "CIFAR-100", "origin": "photographs", "sha256": None, "samples": 128, "stand_in": True}
    text = gallery_text([record(LINEAR, data=[source])], {})
    assert "**STAND-IN** for CIFAR-100, 128 samples, from photographs" in text
    assert "STAND-IN" not in gallery_text(RECORDS, {})


def test_costs_survive_in_the_text(repository):
    costs = {("laptop", LINEAR): (83, 412), ("laptop", HIDDEN): (5, 300)}
    text = gallery_text(RECORDS, costs)
    assert "- One core from a cold cache: 83 s, 412 MB" in text
    assert text.count("- One core from a cold cache: –") == 2
    (repository(*RECORDS) / "figures" / "README.md").write_text(text)
    assert committed_costs() == costs


def test_block_replaces_only_what_stands_between_the_comments():
    readme = "above\n<!-- scorecard -->\nold\n<!-- /scorecard -->\nbelow\n"
    assert with_block(readme, "new") == "above\n<!-- scorecard -->\nnew\n<!-- /scorecard -->\nbelow\n"


@pytest.mark.parametrize("text", ["", "<!-- scorecard -->", "<!-- /scorecard --> <!-- scorecard -->"])
def test_readme_without_its_comments_is_refused_and_nothing_written(text, repository, capsys):
    root = repository(RECORDS[0])
    (root / "README.md").write_text(text)
    assert gallery.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert (root / "README.md").read_text() == text
    assert not (root / "figures" / "README.md").exists()


def test_written_gallery_is_up_to_date_until_a_record_changes(repository, capsys):
    root = repository(*RECORDS)
    assert gallery.main(["--check"]) == 1
    assert gallery.main([]) == 0
    assert "The end." in (root / "README.md").read_text()
    assert gallery.main(["--check"]) == 0
    assert gallery.write_gallery() == []
    repository(record(HIDDEN, claims=[claim("limit", "not reproduced")]))
    capsys.readouterr()
    assert gallery.main(["--check"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "figures/README.md and README.md" in message
    assert gallery.stale_files() == [root / "figures" / "README.md", root / "README.md"]


def test_errata_show_the_records_that_are_counted(repository):
    root = repository(*RECORDS)
    (root / "errata").mkdir()
    entry = "- {at: Theorem 1, printed: a, correct: b, consequence: none, claims: [fig08_linear/%s]}"
    (root / "errata" / "dong_quantifying.yaml").write_text(entry % "limit")
    gallery.write_gallery()
    assert "; not reproduced" in (root / "errata" / "dong_quantifying.md").read_text()
    (root / "errata" / "dong_quantifying.yaml").write_text(entry % "spread")  # of the smaller scale alone
    with pytest.raises(ValueError, match="no record has the claim fig08_linear/spread"):
        gallery.write_gallery()


def test_an_edit_by_hand_is_noticed(repository):
    root = repository(*RECORDS)
    gallery.write_gallery()
    readme = root / "README.md"
    readme.write_text(readme.read_text().replace("reproduced", "proved", 1))
    assert gallery.stale_files() == [readme]


def test_costs_are_those_of_a_cold_run_measured_here_or_carried_over(repository):
    root = repository(*RECORDS)
    took(root, RECORDS[0], 12.7, spared=70.0)  # what it found in the cache took so long
    took(root, RECORDS[0], 999, source="cd" * 32)  # an earlier source; not what the record records
    took(root, RECORDS[2], 0.2)
    gallery.write_gallery()
    measured = {("laptop", LINEAR): (83, 300), ("laptop", HIDDEN): (1, 300)}
    assert committed_costs() == measured

    (root / "build").rename(root / "elsewhere")  # as in a fresh clone
    assert gallery.stale_files() == []
    assert gallery.write_gallery() == []

    took(root, RECORDS[0], 40.0)  # another machine: not out of date for that, but measured anew when written
    assert gallery.stale_files() == []
    gallery.write_gallery()
    assert committed_costs() == measured | {("laptop", LINEAR): (40, 300)}


def test_a_record_of_earlier_code_is_marked(monkeypatch, repository):
    def of_now(ident, scale, overrides):
        if ident == EDGES:
            raise gallery.NotebookError("it is gone")
        return SimpleNamespace(source="ab" * 32 if scale == "laptop" and ident == LINEAR else "cd" * 32)

    monkeypatch.setattr(gallery, "task", of_now)
    assert gallery.outdated(RECORDS) == {("paper", LINEAR), ("laptop", HIDDEN), ("laptop", EDGES)}
    root = repository(*RECORDS)
    gallery.write_gallery()
    assert (root / "figures" / "README.md").read_text().count("- **Made by earlier code**") == 3
    assert "3 of 4 records were made by earlier code" in (root / "README.md").read_text()


def test_a_damaged_record_is_named(repository, capsys):
    root = repository(*RECORDS)
    file = root / "figures" / "laptop" / f"{HIDDEN}.json"
    for content in ("{", json.dumps(record(HIDDEN) | {"claims": []}), json.dumps(record(LINEAR))):
        file.write_text(content)
        assert gallery.main(["--check"]) == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and f"figures/laptop/{HIDDEN}.json" in message


def test_half_written_files_are_left_alone(repository):
    root = repository(*RECORDS)
    (root / "figures" / "laptop" / "dong_quantifying" / ".fig08_linear.json.x1.json").write_text("{")
    assert len(gallery.load_records()) == len(RECORDS)


def test_no_record_yet(repository):
    root = repository()
    gallery.write_gallery()
    assert "No record is committed yet." in (root / "figures" / "README.md").read_text()
    assert "No record is committed yet." in (root / "README.md").read_text()
