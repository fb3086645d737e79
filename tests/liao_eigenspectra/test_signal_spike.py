"""The bidiagonal model of Corollary 1 against whole matrices and a line that is known."""

import numpy as np
import pytest

from common.liao_eigenspectra.signal_spike import extrapolated, sample_top_eigenpair


@pytest.mark.parametrize("strength", [0.0, 0.7, 2.0])
def test_it_has_the_law_of_whole_matrices(strength):
    """Means of eigenvalue, squared cosine and its square, within five standard errors."""
    p, n, rng = 16, 64, np.random.default_rng(0)
    drawn = np.array([sample_top_eigenpair(p, n, strength, rng) for _ in range(6000)])
    whole = []
    for _ in range(3000):
        X = rng.standard_normal((n, p))
        X[:, 3] += np.sqrt(strength)
        values, vectors = np.linalg.eigh(X.T @ X / (4 * n))
        whole.append([values[-1], vectors[3, -1] ** 2])
    for moments in ((lambda x: x), np.square):
        a, b = moments(drawn), moments(np.array(whole))
        error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
        assert (np.abs(a.mean(0) - b.mean(0)) < 5 * error).all()


def test_a_line_in_1_over_p_is_found():
    """And its interval covers the limit 95 times in 100."""
    p, rng, covered, misfit = np.array([100, 200, 400, 800]), np.random.default_rng(0), [], []
    errors = np.array([0.02, 0.01, 0.01, 0.005])
    for _ in range(1000):
        (_, (low, high)), chi2 = extrapolated(p, 0.3 - 5 / p + errors * rng.standard_normal(4), errors)
        covered.append(low <= 0.3 <= high)
        misfit.append(chi2)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)
    assert np.mean(misfit) == pytest.approx(1, abs=0.15)
    assert extrapolated(p, 0.3 - 5 / p, errors)[0].value == pytest.approx(0.3)


def test_what_has_no_such_law_is_refused():
    with pytest.raises(ValueError, match="more than p"):
        sample_top_eigenpair(8, 8, 1.0, np.random.default_rng(0))
