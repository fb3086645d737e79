"""The rule for deciding short of the paper's schedule: each of its conditions, on laws that are known."""

import numpy as np
import pytest

from common.notebook.claims import above, below, inside
from common.notebook.intervals import spread
from common.wu_dissecting.schedule import (
    CHANGED,
    Snapshot,
    claim_by_schedule,
    decided_early,
    extrapolated,
    not_decidable,
    settled_in_samples,
    snapshots_to_measure,
)

EPOCHS = (20, 40, 80)


def drifting(level, slope, spread_of_networks=0.01, epochs=EPOCHS):
    """Q = level + slope ln(t/80) + a constant of each of five networks, (3, 5)."""
    networks = spread_of_networks * np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    return level + slope * np.log(np.array(epochs)[:, None] / epochs[-1]) + networks


def test_a_line_in_the_logarithm_is_extrapolated_exactly():
    expected = 0.6 + 0.02 * np.log(1000 / 80) + 0.01 * np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    np.testing.assert_allclose(extrapolated(EPOCHS, drifting(0.6, 0.02), 1000), expected)
    np.testing.assert_allclose(extrapolated((10, 20, 80), drifting(0.6, 0.02, epochs=(10, 20, 80)), 1000), expected)
    with pytest.raises(ValueError, match="ascending epochs"):
        extrapolated((20, 20, 80), drifting(0.6, 0.02), 1000)
    with pytest.raises(ValueError, match="ascending epochs"):
        extrapolated((20, 40), drifting(0.6, 0.02), 1000)


@pytest.mark.parametrize(
    ("level", "slope", "networks", "reason"),
    [
        (0.7, 0.0, 0.01, ""),
        (0.7, 0.1, 0.01, ""),  # away from the bound; ln 2 of it is 0.07, below 0.1
        (0.7, -0.05, 0.01, ""),  # 0.7 - 0.05 ln 12.5 = 0.574
        (0.7, -0.1, 0.01, "extrapolated to 1000"),  # 0.447
        (0.7, -0.07, 0.05, "extrapolated to 1000"),  # 0.523, with an interval of ± 0.05
        (0.7, -0.2, 0.01, "from 40 to 80 the value went from 0.839 to 0.7"),
        (0.5, 0.0, 0.01, "which is not below half"),  # on the bound
        (0.52, 0.0, 0.05, "not on the side"),  # straddles it
        (0.3, 0.0, 0.01, ""),  # violated for good
        (0.3, 0.11, 0.01, "extrapolated to 1000"),  # 0.578
    ],
)
def test_what_moves_towards_the_bound_is_left_open(level, slope, networks, reason):
    found = not_decidable(EPOCHS, drifting(level, slope, networks), above(0.5), target=1000)
    assert reason in found
    assert bool(reason) == bool(found)


def test_either_bound_of_an_interval_counts():
    assert not not_decidable(EPOCHS, drifting(1.0, 0.05), inside(0.67, 1.5), target=1000)
    assert "extrapolated" in not_decidable(EPOCHS, drifting(1.0, -0.14), inside(0.67, 1.5), target=1000)
    assert "extrapolated" in not_decidable(EPOCHS, drifting(1.3, 0.1), inside(0.67, 1.5), target=1000)


def test_what_is_missing_is_said():
    rule = {"criterion": below(0.5), "target": 1000}
    steady = drifting(0.3, 0.0)
    assert not_decidable((50,), steady[-1:], **rule).startswith("50 of 1000 epochs, and the value after a quarter")
    assert "is not known" in not_decidable((20, 50, 80), steady, **rule)  # 50 is beyond t/2
    assert not_decidable((10, 20, 80), steady, **rule) == ""  # earlier ones ask for more
    assert not_decidable(EPOCHS, steady, differs="samples: 10 instead of 0", **rule) == "samples: 10 instead of 0"
    assert not_decidable((1000,), steady[-1:], differs="samples: 10", **rule) == "samples: 10"
    assert not_decidable((1000,), steady[-1:], **rule) == ""
    effective = [900.0, 1300.0, 1200.0, 1100.0, 1000.0]
    assert not_decidable(EPOCHS, steady, effective=effective, k=90, **rule).endswith(
        "900 effective samples are too few for 90 eigenvectors"
    )
    assert not_decidable(EPOCHS, steady, effective=effective, k=89, **rule) == ""
    with pytest.raises(ValueError, match="a row for each of 1 epochs"):
        not_decidable((1000,), steady, **rule)


def test_nothing_is_measured_that_decides_nothing():
    def measured(checkpoints, images=0, **rest):
        return [tuple(one) for one in snapshots_to_measure(checkpoints, images, 500, **rest)]

    assert measured([10, 20, 80]) == [(10, 0), (20, 0), (80, 0)]
    assert measured([10, 20, 80], images=500) == [(10, 0), (20, 0), (80, 0)]
    assert measured([10, 20, 80], images=100) == [(80, 50), (10, 100), (20, 100), (80, 100)]
    assert measured([10, 20, 80], images=100, differs=True) == [(80, 100)]
    assert measured([10, 20, 80], images=100, differs=True, of_any=True) == [(80, 50), (80, 100)]
    assert measured([200, 500, 1000], images=100) == [(1000, 50), (1000, 100)]
    assert measured([200, 500, 1000]) == [(1000, 0)]
    assert measured([50]) == [(50, 0)]


def test_other_estimates_than_means():
    places = np.array([[1.0, 1.0, 1.05], [1.0, 1.05, 1.0], [1.05, 1.0, 1.0]])
    assert not not_decidable(EPOCHS, places, inside(0.8, 1.3), target=1000, estimate=spread)
    places[:, 2] = 1.4  # without the third network
    assert "not on the side" in not_decidable(EPOCHS, places, inside(0.8, 1.3), target=1000, estimate=spread)


def test_twice_the_images_may_move_a_quarter_of_the_distance():
    half, every = np.array([0.60, 0.61, 0.62]), np.array([0.56, 0.57, 0.58])
    assert settled_in_samples(above(0.4), half, every, images=2000) == ""  # 0.04 against 0.17 / 4
    reason = settled_in_samples(above(0.45), half, every, images=2000)
    assert reason.startswith("2000 images of the Hessian: from half of them to all the value went from 0.61 to 0.57")


def test_the_rule_is_calibrated_on_a_training_that_goes_to_the_end():
    epochs = [50, 100, 250, 500, 1000]

    def through(*means):
        return np.array(means)[:, None] + np.array([-0.01, 0.0, 0.01])

    assert decided_early(epochs, through(0.6, 0.61, 0.62, 0.62, 0.62), above(0.5)) == {250: "right", 500: "right"}
    assert decided_early(epochs, through(0.6, 0.6, 0.6, 0.6, 0.4), above(0.5)) == {250: "wrong", 500: "wrong"}
    assert decided_early(epochs, through(0.6, 0.6, 0.6, 0.6, 0.5), above(0.5)) == {250: "wrong", 500: "wrong"}
    assert decided_early(epochs, through(0.8, 0.7, 0.6, 0.52, 0.45), above(0.5)) == {250: "open", 500: "open"}
    assert decided_early([50, 1000], through(0.6, 0.6), above(0.5)) == {}


class _Claims(dict):
    def claim(self, ident, statement, estimate, **rest):
        self[ident] = statement, estimate, rest


def test_a_claim_has_its_reason_and_its_effective_samples():
    run, rest = _Claims(), {"snapshots": snapshots_to_measure(EPOCHS, 0, 500), "source": "Fig 1", "expected": "low"}
    claim_by_schedule(run, "a", "A.", drifting(0.3, 0.0), below(0.5), effective=[900.0, 1100.0], note="Seen.", **rest)
    statement, (value, (low, high)), more = run["a"]
    course = f"After {', '.join(map(str, EPOCHS))} epochs the value is 0.3, 0.3, 0.3."
    assert statement == "A." and value == pytest.approx(0.3) and low < value < high
    assert more["untested"] == "" and more["note"] == f"Seen. {course} n_eff is 1000. {CHANGED}"
    claim_by_schedule(run, "b", "B.", drifting(0.3, 0.0), below(0.5), effective=[900.0], k=90, **rest)
    assert "too few" in run["b"][2]["untested"]
    claim_by_schedule(run, "d", "D.", drifting(0.3, 0.0), below(0.5), effective=[900.0], k=90, needs="a GPU", **rest)
    assert run["d"][2]["untested"] == run["b"][2]["untested"] + "; a GPU"
    claim_by_schedule(run, "e", "E.", drifting(0.3, 0.0), below(0.5), effective=np.inf, needs="a GPU", **rest)
    assert run["e"][2]["untested"] == ""
    claim_by_schedule(run, "c", "C.", drifting(0.3, 0.0), below(0.5), effective=np.inf, differs="d", **rest)
    assert (run["c"][2]["untested"], run["c"][2]["note"]) == ("d", "")
    rest["snapshots"] = [Snapshot(1000)]
    claim_by_schedule(run, "f", "F.", drifting(0.3, 0.0)[-1:], below(0.5), effective=np.inf, **rest)
    assert (run["f"][2]["untested"], run["f"][2]["note"]) == ("", "")  # as in the paper: nothing is for the rule


def test_an_extreme_that_was_reached_early_is_decided_as_what_moves_now():
    run, rest = _Claims(), {"snapshots": snapshots_to_measure(EPOCHS, 0, 500), "source": "Fig 1", "expected": "high"}
    smallest = drifting(0.8, 0.0)  # since the beginning; now it falls to below the bound within the paper's epochs
    claim_by_schedule(run, "a", "A.", smallest, above(0.5), effective=np.inf, **rest)
    assert run["a"][2]["untested"] == ""
    for slope, reason in ((-0.18, "not on the side of the bound"), (0.01, "")):
        claim_by_schedule(run, "b", "B.", smallest, above(0.5), effective=np.inf, current=drifting(0.9, slope), **rest)
        assert reason in run["b"][2]["untested"] and bool(reason) == bool(run["b"][2]["untested"])
        assert run["b"][1] == run["a"][1]


def test_a_claim_over_some_of_the_images_needs_half_of_them():
    run, rest = _Claims(), {"source": "Fig 1", "expected": "low", "effective": [900.0], "k": 80}

    def reason(values, snapshots, **more):
        claim_by_schedule(run, "a", "A.", values, below(0.5), snapshots=snapshots, **rest | more)
        return run["a"][2]["untested"]

    snapshots, found = snapshots_to_measure(EPOCHS, 100, 500), drifting(0.3, 0.0)
    assert reason(np.array([found[-1] + 0.02, *found]), snapshots) == ""
    assert run["a"][1].value == pytest.approx(0.3)
    assert reason(np.array([found[-1] + 0.1, *found]), snapshots).startswith(
        "100 images of the Hessian: from half of them to all"
    )
    assert "half of them is not known" in reason(found, [Snapshot(epoch, 100) for epoch in EPOCHS])
    assert "half of them is not known" in reason(found[-1:].repeat(2, 0), [Snapshot(80, 90), Snapshot(80, 100)])
    assert reason(found[-1:], snapshots[-1:], differs="another network") == "another network"
    whole = {"snapshots": [Snapshot(1000, 50), Snapshot(1000, 100)], "k": 90}
    assert "too few for 90" in reason(found[-1:].repeat(2, 0), **whole)
    assert reason(found[-1:].repeat(2, 0), whole["snapshots"]) == ""
    with pytest.raises(ValueError):
        reason(found, snapshots)
    with pytest.raises(ValueError, match="effective numbers of samples are needed for 80"):
        reason(found, snapshots[1:], effective=np.array([]), differs="another network")
