"""What takes long, made without Jupyter: one piece or all, in slices of time, and what is said of mistakes."""

import json
import signal

import nbformat
import pytest

from common import cache, paths
from common.pipeline import prepare

IDENT = "dong_quantifying/toy"
PARAMETERS = """steps: int = 4  # of training; paper: 50000
seeds: int = 2  # trainings; paper: 1"""
TRAININGS = """
import torch
from common.dong_quantifying.full_batch import trained
def arguments(k):
    X = torch.randn(9, 3, generator=torch.Generator().manual_seed(k))
    return {"X": X, "y": torch.arange(9) % 2, "W": torch.ones(2, 3), "V": torch.ones(2, 2), "loss": "CE",
            "steps": steps, "lr": 0.1, "keep": [steps]}
results = trained([arguments(k) for k in range(seeds)])"""
MORE = """
again = arguments(0) | {"W": results[0].W[0], "V": results[0].V[0]}
longer = trained([again])"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    for name in ("NOTEBOOKS", "CACHE", "SCALES"):
        monkeypatch.setattr(paths, name, tmp_path / name)
    path = paths.notebook_path(IDENT)
    path.parent.mkdir(parents=True)

    def cell(code, *tags):
        return nbformat.v4.new_code_cell(code, metadata={"tags": list(tags)})

    cells = [cell(PARAMETERS, "parameters"), cell("import IPython\n1 / 0")]
    cells += [cell(TRAININGS, "prepare"), cell(MORE, "prepare")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def made():
    return sorted(file.stem for file in paths.CACHE.glob("*/*.pt"))


def test_only_the_cells_to_be_prepared_run(toy, capsys):
    assert prepare.main([IDENT, "--scale", "quick"]) == 0
    assert "all is made" in capsys.readouterr().out
    assert len(made()) == 3


def test_one_piece_at_a_time(toy, capsys):
    """Two trainings can be made at once; the third is named when the first, which it goes on from, is there."""
    assert prepare.main([IDENT, "--scale", "quick", "--list"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(first) == 2 and made() == []
    assert prepare.main([IDENT, "--scale", "quick", "--piece", first[0]]) == 0
    assert made() == [first[0].partition("/")[2]]
    assert prepare.make_some(IDENT, {}) == [first[1]]
    assert prepare.make_some(IDENT, {}, first[1])[0] not in first
    assert len(made()) == 2
    prepare.run_cells(IDENT, {})
    assert prepare.make_some(IDENT, {}) == []


def test_parameters_are_those_of_the_scale(toy, capsys):
    paths.SCALES.mkdir()
    (paths.SCALES / "laptop.yaml").write_text(f"{IDENT}:\n  seeds: 1\n")
    assert prepare.main([IDENT, "--scale", "laptop", "--list"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
    (paths.SCALES / "laptop.yaml").write_text(f"{IDENT}:\n  seed: 1\n")
    assert prepare.main([IDENT, "--scale", "laptop"]) == 2
    assert "has no parameter 'seed'; it has steps: int, seeds: int" in capsys.readouterr().err


def test_notebooks_are_taken_in_the_order_of_the_scale(toy, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "matching", lambda pattern: ["a/b", "a/c", "a/d"])
    monkeypatch.setattr(prepare, "scale_parameters", lambda scale: {"a/d": {}, "a/b": {}})
    monkeypatch.setattr(prepare, "run_cells", lambda ident, overrides: print(f"made {ident}"))
    assert prepare.main(["a/*", "--scale", "paper"]) == 0
    assert [line[5:] for line in capsys.readouterr().out.splitlines() if line.startswith("made")] == [
        "a/d",
        "a/b",
        "a/c",
    ]


def test_when_time_is_over_the_same_call_goes_on(toy, capsys, monkeypatch):
    monkeypatch.setattr(cache, "CHECKPOINT_SECONDS", 0.0)
    offer = cache.PartialFile.offer
    monkeypatch.setattr(cache.PartialFile, "offer", lambda *a: (offer(*a), signal.raise_signal(signal.SIGALRM)))
    monkeypatch.setattr("common.dong_quantifying.full_batch.side_by_side", lambda f, tasks: [f(task) for task in tasks])
    assert prepare.main([IDENT, "--scale", "quick", "--minutes", "1"]) == prepare.AGAIN
    assert "1 minutes are over; call again to go on" in capsys.readouterr().out
    assert len(list(paths.CACHE.glob("*/*.partial.pt"))) == 1 and len(made()) == 1
    monkeypatch.setattr(cache.PartialFile, "offer", offer)
    assert prepare.main([IDENT, "--scale", "quick", "--minutes", "1"]) == 0
    assert len(made()) == 3 and not list(paths.CACHE.glob("*/*.partial.pt"))


def test_out_of_time_is_no_fault_of_a_file(toy, capsys, monkeypatch):
    """Even in the middle of writing a result."""
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda *_: signal.raise_signal(signal.SIGALRM))
    monkeypatch.setattr("common.dong_quantifying.full_batch.side_by_side", lambda f, tasks: [f(task) for task in tasks])
    assert prepare.main([IDENT, "--scale", "quick", "--minutes", "1"]) == prepare.AGAIN
    assert made() == []


def test_a_piece_that_cannot_be_made_is_left_to_the_notebook(toy, capsys, monkeypatch):
    content = nbformat.read(toy, 4)
    content.cells[2].source = TRAININGS.replace('"lr": 0.1', '"lr": -1.0')
    nbformat.write(content, toy)
    (first,) = prepare.make_some(IDENT, {"seeds": 1})
    monkeypatch.setattr(prepare, "scale_parameters", lambda scale: {IDENT: {"seeds": 1}})
    assert prepare.main([IDENT, "--scale", "quick", "--piece", first]) == 0
    assert "the learning rate must be positive" in capsys.readouterr().err
    assert made() == []


def test_a_notebook_that_is_not_there_is_named(toy, capsys):
    assert prepare.main(["dong_quantifying/toys", "--scale", "quick"]) == 2
    assert "no notebook that matches 'dong_quantifying/toys'" in capsys.readouterr().err
    assert prepare.matching("dong*/*") == [IDENT]
