"""Features that are not Gaussian have the moments they should."""

import numpy as np
import pytest

from common.liao_eigenspectra.universality import random_signs, student_t, whitened


def test_random_signs():
    X = random_signs(400, 100, np.random.default_rng(0))
    assert X.shape == (400, 100)
    assert np.array_equal(np.unique(X), [-1.0, 1.0])
    assert abs(X.mean()) < 5 / np.sqrt(X.size)


def test_student_t_entries_have_unit_variance_where_there_is_one():
    X = student_t(5.0, 400, 100, np.random.default_rng(0))
    assert X.var() == pytest.approx(1, abs=0.1)  # five standard errors of a law of kurtosis 9
    assert abs(X.mean()) < 5 / np.sqrt(X.size)


def test_student_t_entries_without_a_variance_have_that_of_the_sample():
    X = student_t(1.5, 400, 100, np.random.default_rng(0))
    assert X.std() == pytest.approx(1)
    assert np.abs(X).max() > 30  # heavy tails


def test_whitened_population():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((50, 4)) @ rng.standard_normal((4, 4)) + 3
    before = X.copy()
    W = whitened(X)
    assert np.allclose(W.mean(0), 0, atol=1e-12)
    assert np.allclose(np.cov(W.T, bias=True), np.eye(4))
    assert np.array_equal(X, before)
    # Distances between members are Mahalanobis's.
    d, e = W[0] - W[1], X[0] - X[1]
    assert d @ d == pytest.approx(e @ np.linalg.solve(np.cov(X.T, bias=True), e))


RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: student_t(-1.0, 3, 3, RNG), "degrees must be positive and finite, got -1.0"),
        (lambda: student_t(3.0, 0, 3, RNG), "n must be a positive whole number, not 0"),
        (lambda: random_signs(3, -1, RNG), "p must be a positive whole number, not -1"),
        (lambda: whitened(np.ones((3, 2))), r"X of shape \(3, 2\) has a singular covariance"),
        (lambda: whitened(RNG.standard_normal((3, 5))), r"X of shape \(3, 5\) has a singular covariance"),
        (lambda: whitened(np.full((3, 2), np.nan)), "X must be finite numbers"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
