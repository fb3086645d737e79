"""Runs, claims and records: what they keep, what they refuse, and that nothing half-written is left."""

import errno
import json

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch

from common import paths
from common.data import DataSource
from common.notebook.intervals import bootstrap, largest, log_log_slope, mean_interval, smallest
from common.notebook.plotting import block_heatmap
from common.notebook.provenance import ParameterError, resolve_parameters, source_hash
from common.notebook.run import Run, above, below, exactly, inside, meets

IDENT = "dong_quantifying/toy"
PARAMETERS = """C: int = 3  # classes; paper: 10
lr: float = 1  # step; paper: 0.1
sizes: list = [1, 2]  # sizes; paper: none"""


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("HESSIAN_OUT", str(tmp_path / "out"))
    monkeypatch.delenv("HESSIAN_SCALE", raising=False)
    path = tmp_path / "notebooks" / f"{IDENT}.ipynb"
    path.parent.mkdir(parents=True)
    cell = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    cells = [cell, nbformat.v4.new_code_cell("from common.notebook.run import Run")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def start(stand_in=False, **namespace):
    run = Run(IDENT, namespace, title="A toy", figures=["1"])
    run.uses(DataSource("toy data", "generated, seed 0", None, 5, stand_in))
    return run


def claim(run, ident="slope", measured=-2.0, **changes):
    arguments = {"source": "Fig 1", "expected": -2.0, "criterion": inside(-2.2, -1.8)} | changes
    run.claim(ident, "The slope is minus two", (measured, (-2.1, -1.9)), **arguments)
    return run.record()["claims"][-1]


@pytest.mark.parametrize(
    ("criterion", "holds", "fails"),
    [
        (below(1), (0, 0.9), (0, 1.1)),
        (above(1), (1.1, 2), (0.9, 2)),
        (inside(-1, 1), (-1, 1), (-1.1, 0)),
        (meets(1), (0.9, 1.0), (0.8, 0.9)),
        (meets(1, 0.2), (0.5, 0.8), (0.5, 0.7)),
        (exactly(0), (0, 0), (0, 1e-300)),
    ],
)
def test_criteria_hold_and_fail(criterion, holds, fails):
    assert criterion.holds(*holds)
    assert not criterion.holds(*fails)


def test_verdicts(notebook):
    run = start()
    assert claim(run, "holds")["verdict"] == "reproduced"
    failed = claim(run, "fails", criterion=below(-3))
    assert failed["verdict"] == "not reproduced"
    assert "upper end below -3" in failed["note"]
    wrong = claim(run, "wrong", criterion=meets(-3), derived=-2.0)
    assert wrong["verdict"] == "paper in error"
    assert "Derived instead: -2, inside the interval." in wrong["note"]
    # A derivation that the measurement excludes as well shows nothing of the paper.
    assert claim(run, "both_wrong", criterion=meets(-3), derived=-4.0)["verdict"] == "not reproduced"
    untested = claim(run, "small", untested="3 draws, fewer than 10")
    assert untested["verdict"] == "untested"
    assert untested["note"] == "3 draws, fewer than 10; here the criterion would hold."


def test_stand_in_data_leave_every_claim_untested_and_are_said(notebook, capsys):
    run = start(stand_in=True)
    assert claim(run)["verdict"] == "untested"
    assert "stand-in" in claim(run, "other")["note"]
    assert "STAND-IN" in capsys.readouterr().out
    assert "STAND-IN" in run.small_print()


def test_claims_that_make_no_sense_are_refused(notebook):
    run = start()
    with pytest.raises(ValueError, match="outside its own interval"):
        claim(run, measured=5.0)
    with pytest.raises(ValueError, match="outside its own interval"):
        claim(run, measured=float("nan"))
    claim(run)
    with pytest.raises(ValueError, match="made twice"):
        claim(run)


def test_record_is_written_valid_and_the_same_twice(notebook):
    texts = []
    for _ in range(2):
        run = start(C=4, lr=0.5, sizes=[3])
        assert run.parameters == {"C": 4, "lr": 0.5, "sizes": [3]}
        assert run.paper_values(C=10, lr=0.5) == "C: 4 instead of 10"
        claim(run)
        fig, ax = plt.subplots()
        ax.plot([1, 2])
        run.save(fig, "a")
        run.numbers |= {"array": np.arange(3), "tensor": torch.ones(2), "nested": {"x": np.float32(0.5)}}
        table = run.finish()
        texts.append((run.out / "toy.json").read_bytes() + (run.out / "toy_a.png").read_bytes())
    assert texts[0] == texts[1]
    record = json.loads((run.out / "toy.json").read_text())
    assert record["numbers"] == {"array": [0, 1, 2], "tensor": [1.0, 1.0], "nested": {"x": 0.5}}
    assert record["scale"] == "custom"
    assert record["reduced"] == ["C: 4 instead of 10"]
    assert record["source"] == source_hash(notebook, run.parameters)
    assert "reproduced" in repr(table)
    assert "<td" in table._repr_html_()


def test_numbers_that_are_not_finite_are_refused_by_name(notebook):
    run = start()
    claim(run)
    run.numbers["ratio"] = [1.0, float("nan")]
    with pytest.raises(ValueError, match=r"numbers\.ratio is nan"):
        run.record()


def test_a_run_without_claims_or_figures_is_no_record(notebook):
    with pytest.raises(Exception, match="should be non-empty"):
        start().finish()
    assert not (paths.NOTEBOOKS.parent / "out" / "toy.json").exists()


def test_wrong_parameters_are_named_with_the_right_ones(notebook):
    with pytest.raises(ParameterError, match=r"no parameter 'classes'; it has C: int, lr: float, sizes: list"):
        resolve_parameters(notebook, {"classes": 3})
    with pytest.raises(ParameterError, match=r"C must be int, got '3'"):
        start(C="3")
    with pytest.raises(ParameterError, match=r"C must be int, got True"):
        start(C=True)
    with pytest.raises(ValueError, match="unknown paper"):
        Run("nobody/toy", {}, title="x")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(notebook, monkeypatch):
    run = start()
    claim(run)
    run._figures.append("toy_a.png")
    run.finish()
    old = (run.out / "toy.json").read_bytes()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    run.numbers["more"] = 1
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(OSError, match="No space left"):
            run.finish()
    assert (run.out / "toy.json").read_bytes() == old
    assert [p.name for p in run.out.iterdir()] == ["toy.json"]


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    draws = rng.normal(3.0, 2.0, size=(400, 12))
    covered = [low <= 3.0 <= high for _, (low, high) in map(mean_interval, draws)]
    assert 0.91 < np.mean(covered) < 0.985
    many = rng.normal(3.0, 2.0, size=(100, 60))
    covered = [low <= 3.0 <= high for _, (low, high) in (bootstrap(np.mean, x, seed=1, resamples=400) for x in many)]
    assert 0.87 < np.mean(covered) <= 1
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, (2.0, 2.0))
    with pytest.raises(ValueError, match="at least 2"):
        mean_interval([1.0])


def test_extremes_take_the_extreme_ends():
    estimates = [(1.0, (0.9, 1.1)), (0.8, (0.0, 1.6)), (1.05, (1.0, 1.08))]
    assert smallest(estimates) == (0.8, (0.0, 1.08))
    assert largest(estimates) == (1.05, (1.0, 1.6))


def test_slope_of_a_power_law():
    x = np.array([1, 10, 100])
    assert log_log_slope(x, 5 * x**-1.5) == pytest.approx(-1.5)


def test_heat_map_of_nothing_is_refused():
    fig, ax = plt.subplots()
    with pytest.raises(ValueError, match="not zero"):
        block_heatmap(ax, np.zeros((2, 2)), 2)
    plt.close(fig)
