"""The bound against fifty digits and against exact probabilities of its failure."""

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from common.wu_dissecting.pac_bayes.bound import (
    Confidence,
    binary_kl,
    complexity,
    implied_union,
    kl_inverse,
    pac_bayes_bound,
    with_more_draws,
)


@pytest.mark.parametrize("q", [0.0, 1e-9, 0.02, 0.3, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("bound", [0.0, 1e-12, 1e-6, 0.003, 0.3, 2.0, 30.0])
def test_the_inverse_of_kl_to_fifty_digits(q, bound):
    found = kl_inverse(q, bound)
    with mpmath.workdps(50):
        Q = mpmath.mpf(q)

        def kl(p):
            first = Q * mpmath.log(Q / p) if q > 0 else mpmath.mpf(0)
            return first + ((1 - Q) * mpmath.log((1 - Q) / (1 - p)) if q < 1 else 0)

        assert q <= found <= 1
        if found < 1:
            assert kl(mpmath.mpf(found)) >= bound  # a bound must not be rounded down
            assert abs(float(kl(mpmath.mpf(found))) - binary_kl(q, found)) <= 1e-12 + 1e-9 * bound
        below = mpmath.mpf(found) - mpmath.mpf("2e-12")
        assert below <= q or kl(below) <= bound + 2e-15
    if q == 0:
        assert found == pytest.approx(-math.expm1(-bound), abs=4e-12)


@pytest.mark.parametrize("draws", [1, 7, 200, 5000])
def test_the_bound_from_draws_fails_as_rarely_as_it_says(draws):
    """Exactly, from the binomial distribution of the number of errors."""
    confidence = Confidence(delta_sampling=0.05)
    counts = np.arange(draws + 1)
    raised = np.array([kl_inverse(k / draws, math.log(2 / 0.05) / draws) for k in counts])
    failing = [stats.binom.pmf(counts[raised < e], draws, e).sum() for e in np.linspace(0.001, 0.999, 97)]
    assert max(failing) <= confidence.delta_sampling
    assert draws < 200 or max(failing) > 0.005  # a bound of 1 would pass as well


@pytest.mark.parametrize("N", [8, 50, 1000])
def test_the_bound_of_one_hypothesis_fails_as_rarely_as_it_says(N):
    """With Q = P and one network only, exactly: kl(ê‖e) ≤ ln(N/δ)/(N − 1)."""
    delta, counts = 0.2, np.arange(N + 1)
    raised = np.array([kl_inverse(k / N, math.log(N / delta) / (N - 1)) for k in counts])
    assert max(stats.binom.pmf(counts[raised < e], N, e).sum() for e in np.linspace(0.001, 0.999, 97)) <= delta


def test_the_terms_of_the_bound():
    confidence = Confidence()
    rho = (math.log(confidence.c) - 137.3 / confidence.b) / 2
    found = pac_bayes_bound(300, 10_000, lambda rho: 5000 + 100 * rho, rho, 60_000, confidence)
    assert found.j in (137, 138)
    assert found.half_log_prior == pytest.approx((math.log(0.1) - found.j / 100) / 2)
    assert found.kl == pytest.approx(5000 + 100 * found.half_log_prior)
    B = float(complexity(torch.tensor(found.kl), torch.tensor(found.half_log_prior).double(), 60_000, confidence))
    expected = (found.kl + math.log(60_000 * math.pi**2 * found.j**2 / (6 * 0.025))) / 59_999
    assert pytest.approx(expected, rel=1e-6) == B
    assert found.error == 0.03
    assert found.bound == pytest.approx(kl_inverse(kl_inverse(0.03, math.log(200) / 10_000), expected), rel=1e-6)
    assert pac_bayes_bound(3, 10, lambda _: 5.0, -1.0, 60, confidence).j == 1  # λ > c is not on the grid
    assert pac_bayes_bound(10, 10, lambda _: 5.0, -2.0, 60, confidence).bound == 1
    with pytest.raises(ValueError, match="errors"):
        pac_bayes_bound(11, 10, lambda _: 5.0, -2.0, 60, confidence)
    for wrong in ({"delta": 0.0}, {"delta_sampling": 1.0}, {"b": 0}, {"c": -1.0}):
        with pytest.raises(ValueError, match="probabilities"):
            Confidence(**wrong)
    with pytest.raises(ValueError, match="bound of at least 0"):
        kl_inverse(0.5, -1e-9)


def test_more_draws_of_the_same_share_of_errors():
    confidence = Confidence()
    found = pac_bayes_bound(1500, 50_000, lambda _: 0.0, -2.0, 60_000, confidence)
    more = pac_bayes_bound(4500, 150_000, lambda _: 0.0, -2.0, 60_000, confidence)
    assert with_more_draws(found.error_bound, 50_000, 150_000, 0.01) == pytest.approx(more.error_bound, abs=1e-9)
    with pytest.raises(ValueError, match="no share"):
        with_more_draws(1e-6, 50_000, 150_000, 0.01)


def test_the_nats_of_the_union_are_what_went_into_a_bound():
    confidence = Confidence()
    found = pac_bayes_bound(1500, 50_000, lambda _: 5000.0, -2.0, 60_000, confidence)
    nats = implied_union(found.bound, found.error_bound, found.kl, 60_000, confidence)
    assert nats == pytest.approx(2 * math.log(found.j), abs=1e-4)
