"""Runs, claims and records: what they keep, what they refuse, and that nothing half-written is left."""

import errno
import json
import subprocess

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch

from common import paths
from common.data import DataSource
from common.notebook.claims import above, below, exactly, identifier, inside, meets
from common.notebook.intervals import (
    Exact,
    bootstrap,
    exact,
    jackknife,
    largest,
    log_log_slope,
    mean_interval,
    mean_on_grid,
    share,
    smallest,
    spread,
)
from common.notebook.plotting import block_heatmap
from common.notebook.provenance import IdentityError, ParameterError, resolve_parameters, source_hash
from common.notebook.run import Run

IDENT = "dong_quantifying/toy"
PARAMETERS = """C: int = 3  # classes; paper: 10
lr: float = 1  # step; paper: 0.1
sizes: list = [1, 2]  # sizes; paper: 5 each
name: str = "a"  # of a network; paper: "b"
words: int = 1  # counted; paper: not stated"""
VALUES = {"C": 3, "lr": 1.0, "sizes": [1, 2], "name": "a", "words": 1}


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("HESSIAN_OUT", str(tmp_path / "out"))
    monkeypatch.delenv("HESSIAN_SCALE", raising=False)
    path = tmp_path / "notebooks" / f"{IDENT}.ipynb"
    path.parent.mkdir(parents=True)
    cell = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    cells = [cell, nbformat.v4.new_code_cell(f'from common.notebook.run import Run\nrun = Run("{IDENT}", globals())')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def start(stand_in=False, **namespace):
    run = Run(IDENT, VALUES | namespace, title="A toy", figures=["1"])
    run.uses(DataSource("toy data", "generated, seed 0", None, 5, stand_in))
    return run


def claim(run, ident="slope", measured=-2.0, **changes):
    arguments = {"source": "Fig 1", "expected": -2.0, "criterion": inside(-2.2, -1.8)} | changes
    run.claim(ident, "The slope is minus two", (measured, (-2.1, -1.9)), **arguments)
    return run.record()["claims"][-1]


@pytest.mark.parametrize(
    ("criterion", "holds", "straddles", "fails"),
    [
        (below(1), (0, 0.9), (0, 1.1), (1.0, 1.1)),
        (above(1), (1.1, 2), (0.9, 2), (0.9, 1.0)),
        (inside(-1, 1), (-1, 1), (-1.1, 0), (-1.2, -1.1)),
        (meets(1, 0.2), (0.5, 0.8), (0.0, 2.0), (0.5, 0.7)),
        (exactly(0), (0, 0), (0, 1e-300), (1e-300, 1.0)),
    ],
)
def test_a_criterion_holds_or_is_violated_or_neither(criterion, holds, straddles, fails):
    seen = [(criterion.holds(*ends), criterion.violated(*ends)) for ends in (holds, straddles, fails)]
    assert seen == [(True, False), (False, False), (False, True)]


def test_verdicts(notebook):
    run = start()
    assert claim(run, "holds")["verdict"] == "reproduced"
    failed = claim(run, "fails", criterion=below(-3), note="It is flat.")
    assert failed["verdict"] == "not reproduced" and failed["note"] == "It is flat."
    wrong = claim(run, "wrong", criterion=meets(-3, 0.1), derived=-2.0)
    assert wrong["verdict"] == "paper in error"
    assert wrong["note"] == "Derived instead: -2, inside the interval."
    # A derivation that the measurement excludes as well shows nothing of the paper.
    assert claim(run, "both_wrong", criterion=meets(-3, 0.1), derived=-4.0)["verdict"] == "not reproduced"
    untested = claim(run, "small", untested="3 draws, fewer than 10")
    assert untested["verdict"] == "untested"
    assert untested["note"] == "3 draws, fewer than 10; here the criterion would hold."
    assert claim(run, "words", untested="too few draws")["note"].startswith("Too few draws; here")
    assert claim(run, "unlike", untested="lr: 1.0 instead of 0.1")["note"].startswith("lr: 1.0 instead of 0.1; here")


def test_what_straddles_is_undecided_and_says_how_much_more_it_needs(notebook):
    run = start()
    straddles = claim(run, "straddles", criterion=below(-1.95), derived=-2.0)
    assert straddles["verdict"] == "undecided"
    # The interval is -2 +- 0.1, the bound 0.05 away.
    assert straddles["note"] == "An interval 2 times narrower decides: about 4 times as many runs."
    assert "no number of runs" in claim(run, "on_it", criterion=below(-2.0))["note"]
    wide = claim(run, "wide", criterion=meets(-2.0, 0.01))
    assert wide["verdict"] == "undecided" and "10 times narrower" in wide["note"]
    assert claim(run, "both", criterion=below(-1.95), untested="small")["note"].endswith("would not be decided.")


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
    with pytest.raises(ValueError, match="width zero"):
        run.claim("sure", "It is", (1.0, (1.0, 1.0)), source="Fig 1", expected=1.0, criterion=exactly(1))
    run.claim("sure", "It is", exact(1.0), source="Fig 1", expected=1.0, criterion=exactly(1))


def test_record_is_written_valid_and_the_same_twice(notebook):
    texts = []
    for _ in range(2):
        run = start(C=4, lr=0.5, sizes=[3])
        assert run.parameters == VALUES | {"C": 4, "lr": 0.5, "sizes": [3]}
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
    assert record["reduced"] == [
        "C: 4 instead of 10", "lr: 0.5 instead of 0.1", "sizes: [3] instead of 5 each", "name: a instead of b",
    ]  # fmt: skip
    assert record["source"] == source_hash(notebook, run.parameters)
    assert "reproduced" in repr(table) and "-2.0" not in repr(table).replace("within [-2.2", "")
    assert "<td" in table._repr_html_()
    assert "[-2.1, -1.9]" in repr(run.measurements())
    assert set(json.loads((run.out / "spared.json").read_text())) == {"seconds"}


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
    with pytest.raises(ParameterError, match=r"no parameter 'classes'; it has C: int, lr: float, sizes: list, name"):
        resolve_parameters(notebook, {"classes": 3})
    with pytest.raises(ParameterError, match=r"C must be int, got '3'"):
        start(C="3")
    with pytest.raises(ParameterError, match=r"C must be int, got True"):
        start(C=True)
    with pytest.raises(ValueError, match="unknown paper"):
        Run("nobody/toy", {}, title="x")


def test_what_differs_from_the_paper_is_read_off_the_comments(notebook):
    run = start(C=10, lr=0.1, sizes=[5, 5], name="b")
    assert run.unlike_paper() == ""
    assert start().unlike_paper("C", "words") == "C: 3 instead of 10"
    assert "unlike the paper: C: 3 instead of 10, lr: 1.0 instead of 0.1" in start().small_print()
    with pytest.raises(KeyError):
        run.unlike_paper("D")


@pytest.mark.parametrize(
    ("namespace", "message"),
    [
        ({"size": [3]}, "there is no parameter 'size'; did you mean 'sizes'"),
        ({"word": 3}, "there is no parameter 'word'; did you mean 'words'"),
        ({"sizes": None, "sizs": [3]}, "the parameter 'sizes' is not set; did you mean it by 'sizs'"),
        ({"C": None}, "the parameter 'C' is not set; run the cell tagged"),
        ({"Words": 3}, "there is no parameter 'Words'; did you mean 'words'"),
        ({"D": 3, "__annotations__": {"C": int, "D": int}}, "the saved notebook has no parameter 'D', but C, lr"),
    ],
)
def test_a_name_that_looks_like_a_misspelt_parameter_is_refused(notebook, namespace, message):
    names = {name: value for name, value in (VALUES | namespace).items() if value is not None}
    with pytest.raises(ParameterError, match=message):
        Run(IDENT, names, title="A toy")
    start(words_of_mine="fine", sizes_by_name={"a": 1}, n=3)


@pytest.fixture
def committed(notebook, monkeypatch):
    """The toy notebook, committed in a repository of its own; gives a function that saves it with other parameters."""
    root = notebook.parents[2]
    monkeypatch.setattr(paths, "ROOT", root)
    (root / "requirements.lock").write_text("")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y", "-C", str(root)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "toy"]):
        subprocess.run([*git, *command], check=True)

    def save(old, new):
        content = nbformat.read(notebook, 4)
        content.cells[0].source = PARAMETERS.replace(old, new)
        nbformat.write(content, notebook)

    return save


def test_a_saved_change_of_a_default_is_custom(committed):
    assert start().scale == "quick"
    committed("C: int = 3", "C: int = 4")
    assert start(C=4).scale == "custom"
    assert start(C=3).scale == "quick"


def test_a_scale_alone_in_the_environment_is_a_persons_own(notebook, monkeypatch):
    monkeypatch.setenv("HESSIAN_SCALE", "paper")
    assert start().scale == "paper"
    monkeypatch.delenv("HESSIAN_OUT")
    assert (start().scale, start(C=4).scale) == ("quick", "custom")


def test_a_parameter_that_the_committed_notebook_does_not_have_is_refused(committed):
    committed("C: int", "classes: int")
    names = {"classes": 3, **{name: value for name, value in VALUES.items() if name != "C"}}
    with pytest.raises(ParameterError, match="the committed notebook has no parameter 'classes'; did you mean 'C'"):
        Run(IDENT, names, title="A toy")
    committed("C: int = 3", "more: int = 1  # of something; paper: 1\nC: int = 3")
    assert Run(IDENT, VALUES | {"more": 1}, title="A toy").scale == "custom"  # one more is a development


@pytest.mark.parametrize("name", ["dong_quantifying/toy-Copy1.ipynb", "li_adaptive/toy.ipynb", "mine/new/toy.ipynb"])
def test_a_copy_is_refused_wherever_it_lies(notebook, monkeypatch, name):
    copy = paths.NOTEBOOKS / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(notebook.read_text())
    start()  # by run_all.sh, which would refuse the copy
    monkeypatch.delenv("HESSIAN_OUT")
    with pytest.raises(IdentityError, match=rf"{name} runs under the name of {IDENT}: write its own, {name[:-6]}, in"):
        start()
    copy.write_text(notebook.read_text()[:-9])  # it cannot run
    start()
    for folder in (".ipynb_checkpoints", "dong_quantifying/.ipynb_checkpoints"):
        saved = paths.NOTEBOOKS / folder / "toy-checkpoint.ipynb"
        saved.parent.mkdir()
        saved.write_text(notebook.read_text())
    start()


def test_a_renamed_notebook_is_refused(notebook):
    notebook.unlink()
    with pytest.raises(IdentityError, match=r"there is no notebook dong_quantifying/toy.ipynb: if this one was copied"):
        start()


def test_the_verdict_of_the_committed_record_stands_beside(notebook, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    run = start()
    claim(run)
    run._figures.append("toy_a.png")
    assert repr(run.finish()).splitlines()[1].endswith("reproduced        -")
    for scale, verdict in (("laptop", "untested"), ("paper", "not reproduced")):
        file = tmp_path / "figures" / scale / f"{IDENT}.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"claims": [{"id": "slope", "verdict": verdict}]}))
        header, line = repr(run.finish()).splitlines()
        assert header.endswith(f"verdict, {scale}") and line.endswith(verdict)


def test_a_damaged_committed_record_is_named(notebook, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    run = start()
    claim(run)
    run._figures.append("toy_a.png")
    file = paths.FIGURES / "laptop" / f"{IDENT}.json"
    file.parent.mkdir(parents=True)
    file.write_text("<<<<<<< HEAD")
    with pytest.raises(ValueError, match=rf"laptop/{IDENT}\.json is damaged: Expecting value"):
        run.finish()


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
    assert sorted(p.name for p in run.out.iterdir()) == ["spared.json", "toy.json"]


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    draws = rng.normal(3.0, 2.0, size=(400, 12))
    covered = [low <= 3.0 <= high for _, (low, high) in map(mean_interval, draws)]
    assert 0.91 < np.mean(covered) < 0.985
    many = rng.normal(3.0, 2.0, size=(100, 60))
    covered = [low <= 3.0 <= high for _, (low, high) in (bootstrap(np.mean, x, seed=1, resamples=400) for x in many)]
    assert 0.87 < np.mean(covered) <= 1
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, (2.0, 2.0))
    assert bootstrap(np.mean, np.full(5, 2.0), seed=0) == (2.0, (2.0, 2.0))
    with pytest.raises(ValueError, match="at least 2"):
        bootstrap(np.mean, [1.0], seed=0)
    with pytest.raises(ValueError, match="at least 2"):
        mean_interval([1.0])


def test_shares_cover_the_truth_at_least_as_often_as_they_say():
    rng = np.random.default_rng(0)
    for truth in (0.02, 0.5, 0.95):
        found = [share(rng.random(12) < truth).interval for _ in range(300)]
        assert np.mean([low <= truth <= high for low, high in found]) > 0.94
    assert share([True, True, True]).interval == (pytest.approx(0.025 ** (1 / 3)), 1.0)


def test_bootstrap_of_a_skewed_statistic_covers_better_than_percentiles():
    """BCa is right to second order: the variance of 15 log-normal numbers, whose percentile interval is too low."""
    rng = np.random.default_rng(0)
    truth = (np.e - 1) * np.e
    covered = {"bca": 0, "percentile": 0}
    for k in range(60):
        x = rng.lognormal(size=40)
        low, high = bootstrap(np.var, x, seed=k, resamples=400)[1]
        covered["bca"] += low <= truth <= high
        resampled = [np.var(rng.choice(x, len(x))) for _ in range(400)]
        low, high = np.quantile(resampled, [0.025, 0.975])
        covered["percentile"] += low <= truth <= high
    assert covered["bca"] > covered["percentile"]


def test_estimates_without_sampling():
    assert exact(2, 0.5) == (2.0, (1.5, 2.5))
    assert spread([2, 1, 5]) == (2.0, (1.0, 5.0))
    assert spread([2, 2], step=1) == (2.0, (1.5, 2.5))
    x = np.array([0.2, 0.9, 0.4])  # of a mean the jackknife is the usual interval
    value, (low, high) = jackknife([x.mean(), *((x.sum() - x) / 2)], step=0.1)
    assert (value, (low + 0.05, high - 0.05)) == (pytest.approx(x.mean()), pytest.approx(mean_interval(x).interval))
    with pytest.raises(ValueError, match="at least 2"):
        jackknife([1.0, 1.0])
    assert mean_on_grid([1.0, 1.0, 1.0], 0.1) == (1.0, (pytest.approx(0.95), pytest.approx(1.05)))
    value, (low, high) = mean_interval([0.2, 0.4, 0.3])
    wider = (value, (pytest.approx(low - 0.05), pytest.approx(high + 0.05)))
    assert mean_on_grid([0.2, 0.4, 0.3], 0.1) == wider
    assert identifier("fc1:LeNet5-(fc1-80) CIFAR-10") == "fc1_lenet5_fc1_80_cifar_10"


def test_extremes_take_the_extreme_ends():
    estimates = [(1.0, (0.9, 1.1)), (0.8, (0.0, 1.6)), (1.05, (1.0, 1.08))]
    assert smallest(estimates) == (0.8, (0.0, 1.08))
    assert largest(estimates) == (1.05, (1.0, 1.6))
    assert isinstance(largest([exact(1), exact(2)]), Exact) and not isinstance(largest([exact(1), *estimates]), Exact)


def test_slope_of_a_power_law():
    x = np.array([1, 10, 100])
    assert log_log_slope(x, 5 * x**-1.5) == pytest.approx(-1.5)


def test_heat_map_of_nothing_is_refused():
    fig, ax = plt.subplots()
    with pytest.raises(ValueError, match="not zero"):
        block_heatmap(ax, np.zeros((2, 2)), 2)
    plt.close(fig)
