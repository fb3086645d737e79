"""The left spike of Corollary 2 in closed form, against the general solver, simulation and exact arithmetic."""

import math

import mpmath
import numpy as np
import pytest
import torch

from common.liao_eigenspectra.glm import GLM, LOGISTIC, eigenpair, halves, logistic_loss, squared_cosine
from common.liao_eigenspectra.law import Law
from common.liao_eigenspectra.model_spike import (
    alignment_at_infinite_norm,
    best_alignment,
    critical_ratio,
    left_end,
    log_curvature,
    merging_norm,
    norms_aligned,
    norms_with_spike,
    smallest_eigenpair,
    threshold,
)
from common.liao_eigenspectra.spikes import Eigenspectrum

LOGISTIC_MODEL = {"response": LOGISTIC, "loss": logistic_loss}


@pytest.mark.parametrize(("c", "norm"), [(0.1, 2.0), (0.1, 20.0), (0.1, 300.0), (0.3, 2.0), (0.3, 40.6), (0.3, 41.0)])
def test_the_general_solver_says_the_same(c, norm):
    H = Eigenspectrum.of(GLM(p=4, w=norm * halves(4), **LOGISTIC_MODEL), c)
    edge, spikes = H.support[0][0], [s for s in H.spikes if s.side == "left"]
    found = left_end(norm, c)
    assert math.exp(found.log_edge) == pytest.approx(edge, rel=1e-6)
    gap, cosine = (spikes[0].gap / edge, spikes[0].cosines["w"]) if spikes else (0.0, 0.0)
    assert (found.relative_gap, found.cosine) == (pytest.approx(gap, abs=1e-5), pytest.approx(cosine, abs=1e-4))
    assert all(s.side == "left" for s in H.spikes)


def test_given_a_sample_it_is_the_general_solver_with_the_samples_law():
    n, norm, c = 400, 5.0, 0.3
    t = np.random.default_rng(0).standard_normal(n)
    model = GLM(p=2, w=[norm, 0.0], **LOGISTIC_MODEL)
    H = Eigenspectrum(Law.sampled(np.exp(log_curvature(norm * t)), t[:, None], bounded=True), model, c)
    found = left_end(norm, c, t)
    assert math.exp(found.log_edge) == pytest.approx(H.support[0][0], rel=1e-6)
    assert found.cosine == pytest.approx(H.spikes[0].cosines["w"], abs=1e-6)


@pytest.mark.parametrize(("c", "ends"), [(0.1, (1.25794, 1482.63)), (0.3, (3.01907, 40.73)), (0.35, (4.00017, 20.81))])
def test_the_spike_is_between_two_norms(c, ends):
    """Values of an independent derivation; at each end the spike is there on one side and not on the other."""
    found = norms_with_spike(c)
    assert found == pytest.approx(ends, rel=3e-4)
    assert threshold(found[0]) == pytest.approx(c)
    for end, inward in zip(found, (1.01, 0.99), strict=True):
        assert 0 < left_end(end * inward, c).relative_gap < 1e-3
        assert left_end(end / inward, c).relative_gap == 0


def test_from_the_critical_ratio_on_there_is_none():
    ratio, norm = critical_ratio()
    assert (ratio, norm) == (pytest.approx(0.39396868, abs=1e-7), pytest.approx(7.7818, abs=1e-3))
    assert left_end(norm, ratio - 1e-4).cosine > 0
    assert left_end(norm, ratio + 1e-4).cosine == 0
    with pytest.raises(ValueError, match="no left spike"):
        norms_with_spike(0.4)


def test_small_c_has_the_closed_form():
    c = 0.02
    merging = norms_with_spike(c)[1]
    assert merging_norm(c) == pytest.approx(merging, rel=1e-5)
    x = np.array([0.25, 0.5, 0.9])
    found = [left_end(part * merging, c) for part in x]
    assert np.allclose([end.relative_gap for end in found], 1 - x * np.exp(1 - x), atol=2e-4)
    assert np.allclose([end.cosine for end in found], 1 - x, atol=1e-3)
    assert norms_with_spike(1e-3)[1] == pytest.approx(3 * (2 / math.pi) ** 1.5 / 1e-9, rel=1e-5)


@pytest.mark.parametrize(("c", "at_merging"), [(0.02, 0.5), (0.1, 0.484), (0.3, 0.34)])
def test_gap_and_alignment_vanish_together(c, at_merging):
    """Gap over edge is a multiple of cos⁴ at both ends: 1/2 where it merges for small c, far less at the onset."""
    onset, merging = norms_with_spike(c)
    near, nearer, last = (
        end.relative_gap / end.cosine**2
        for end in (left_end(norm, c) for norm in (1.001 * onset, 1.0005 * onset, 0.999 * merging))
    )
    assert last == pytest.approx(at_merging, abs=3e-3)
    assert near == pytest.approx(nearer, rel=0.01)
    assert near < 0.1


def test_the_best_alignment():
    """Values of an independent derivation, and none nearby is larger."""
    for c, expected in ((0.1, (15.626, 0.98899)), (0.25, (8.173, 0.88361)), (0.3, (7.582, 0.77367))):
        norm, cosine = best_alignment(c)
        assert (norm, cosine) == (pytest.approx(expected[0], rel=1e-3), pytest.approx(expected[1], abs=1e-5))
        assert max(left_end(norm * factor, c).cosine for factor in (0.95, 1.05)) < cosine
    assert norms_aligned(0.1, 0.9) == pytest.approx((2.296, 165.99), rel=1e-3)
    with pytest.raises(ValueError, match=r"largest value 0\.7737"):
        norms_aligned(0.3, 0.9)


def test_alignment_at_infinite_norm_is_that_of_matrices_at_a_huge_one():
    """Means over runs, within five standard errors."""
    p, n, runs, rng = 12, 60, 1500, np.random.default_rng(0)
    drawn = np.array([alignment_at_infinite_norm(p, n, rng) for _ in range(runs)])
    whole = np.array([smallest_eigenpair(rng.standard_normal((n, p)), halves(p), 1e6)[1] for _ in range(runs)])
    error = math.sqrt((drawn.var() + whole.var()) / runs)
    assert abs(drawn.mean() - whole.mean()) < 5 * error
    assert 0.05 < drawn.mean() < 0.95


def test_simulation_follows_it_given_each_sample():
    """Mean over runs of the difference from the theory given t, within five standard errors."""
    p, n, norm, runs = 120, 400, 10.0, 40
    rng, direction, off = np.random.default_rng(1), halves(120), []
    for _ in range(runs):
        X = rng.standard_normal((n, p))
        log_value, cosine = smallest_eigenpair(X, direction, norm)
        expected = left_end(norm, (p - 1) / n, X @ direction)
        off.append([math.expm1(log_value - expected.log_edge) + expected.relative_gap, cosine - expected.cosine])
    mean, error = np.mean(off, axis=0), np.std(off, axis=0, ddof=1) / math.sqrt(runs)
    assert (np.abs(mean) < np.minimum(5 * error, 0.1)).all()


def test_the_smallest_eigenpair_is_that_of_the_matrix():
    model = GLM(p=40, w=6 * halves(40), **LOGISTIC_MODEL)
    X = model.sample_features(200, torch.Generator().manual_seed(0))
    value, vector = eigenpair(model.hessian(X, torch.Generator()), 0)
    found = smallest_eigenpair(X.numpy(), halves(40), 6.0)
    assert found == (pytest.approx(math.log(value), rel=1e-9), pytest.approx(squared_cosine(vector, halves(40))))


def test_the_smallest_eigenpair_far_below_rounding():
    """Against 120 digits: eigenvalues from 1e-80 to 1e-1."""
    n, p, norm = 12, 5, 300.0
    X, direction = np.random.default_rng(2).standard_normal((n, p)), halves(5)
    with mpmath.workdps(120):
        H = mpmath.zeros(p)
        for x in X:
            r = mpmath.mpf(norm) * mpmath.fdot(zip(x, direction, strict=True))
            column = mpmath.matrix(x.tolist())
            H += column * column.T / (2 + mpmath.exp(r) + mpmath.exp(-r)) / n
        values, vectors = mpmath.eigsy(H)
        k = min(range(p), key=lambda i: values[i])
        expected = float(mpmath.log(values[k])), float(mpmath.fdot(zip(vectors[:, k], direction, strict=True)) ** 2)
    assert expected[0] < -40
    assert smallest_eigenpair(X, direction, norm) == pytest.approx(expected, rel=1e-6)


def test_what_has_no_left_end_is_refused():
    with pytest.raises(ValueError, match="below 1"):
        left_end(2.0, 1.0)
    with pytest.raises(ValueError, match="smallest eigenvalue is zero"):
        smallest_eigenpair(np.ones((3, 3)), halves(3), 1.0)
