"""The Matrix Dyson Equation against laws that are known."""

import numpy as np
import pytest
from scipy import stats

from common.hessian.convergence import ConvergenceError
from common.li_adaptive.dyson import (
    DysonEquation,
    correlated_entries,
    distance,
    excess_kurtosis,
    mean_share,
    outside_remark_d4,
    smoothed_density,
)

X = np.linspace(-3, 3, 25)


def wigner(N, mean=None):
    """A and S of a Gaussian matrix with E w_ij² = 1/N off the diagonal and 2/N on it."""
    identity = np.eye(N)
    # S[R] = (tr R + Rᵀ)/N
    covariance = (np.einsum("ij,kl->ijkl", identity, identity) + np.einsum("il,jk->ijkl", identity, identity)) / N
    return DysonEquation(np.zeros((N, N)) if mean is None else mean, covariance.reshape(N * N, N * N))


def test_semicircle():
    z = X + 0.05j
    m = np.trace(wigner(1).solve(z), axis1=1, axis2=2)
    # of dimension 1: E w² = 2, m = −1/(z + 2m)
    np.testing.assert_allclose(m, (-z + np.sqrt(z - np.sqrt(8)) * np.sqrt(z + np.sqrt(8))) / 4, atol=1e-6)
    N = 24
    m = np.trace(wigner(N).solve(z), axis1=1, axis2=2) / N
    q = 1 + 1 / N  # by symmetry M = m·1, and S[M] = m (1 + 1/N)
    np.testing.assert_allclose(m, (-z + np.sqrt(z - 2 * np.sqrt(q)) * np.sqrt(z + 2 * np.sqrt(q))) / (2 * q), atol=1e-6)


def test_the_equation_of_samples_is_that_of_their_law():
    rng = np.random.default_rng(0)
    N, n = 8, 200_000
    G = rng.standard_normal((n, N, N))
    H = (G + G.transpose(0, 2, 1)) / np.sqrt(2 * N) + np.diag(np.arange(N))
    equation = DysonEquation.of_samples(H)
    R = rng.standard_normal((N, N))
    np.testing.assert_allclose(equation.apply(R), (np.trace(R) * np.eye(N) + R.T) / N, atol=0.03)
    W = H[:500] - H[:500].mean(0)
    direct = np.einsum("nij,jk,nkl->il", W, R, W) / 499
    np.testing.assert_allclose(DysonEquation.of_samples(H[:500]).apply(R), direct)
    np.testing.assert_allclose(DysonEquation.of_samples(H[:500]).apply(1j * R), 1j * direct)


def test_the_density_is_that_of_gaussian_samples():
    rng = np.random.default_rng(1)
    N = 40
    variances = rng.uniform(0.2, 2, (N, N))
    variances = (variances + variances.T) / 2
    H = rng.standard_normal((4000, N, N)) * np.sqrt(variances / N)
    H = np.tril(H) + np.tril(H, -1).transpose(0, 2, 1) + np.diag(np.linspace(-2, 2, N))
    equation = DysonEquation.of_samples(H)
    eta = 0.2
    theory = equation.density(X, eta)
    sampled = smoothed_density(np.linalg.eigvalsh(H), X, eta)
    np.testing.assert_allclose(sampled, theory, atol=0.01)
    redrawn = smoothed_density(np.linalg.eigvalsh(equation.gaussian_samples(1000, rng)), X, eta)
    np.testing.assert_allclose(redrawn, sampled, atol=0.01)


def test_a_mean_of_zero_makes_the_solution_symmetric():
    rng = np.random.default_rng(2)
    H = rng.standard_normal((300, 9, 9)) ** 3
    H = H + H.transpose(0, 2, 1)
    equation = DysonEquation(np.zeros((9, 9)), DysonEquation.of_samples(H).covariance)
    density = equation.density(10 * X, 1.0)
    np.testing.assert_allclose(density, density[::-1], rtol=1e-5)


def test_comparability_of_a_wigner_matrix_and_of_a_hollow_one():
    rng = np.random.default_rng(3)
    low, high = wigner(10).comparability(starts=5, rng=rng)
    assert (low, high) == pytest.approx((1, 2))  # N uᵀS[ttᵀ]u = 1 + (u·t)²
    G = rng.standard_normal((1000, 6, 6))
    H = G + G.transpose(0, 2, 1)
    H[:, range(6), range(6)] = 0
    low, high = DysonEquation.of_samples(H).comparability(starts=5, rng=rng)
    assert low == pytest.approx(0, abs=1e-12)
    assert high > 1


def test_what_cannot_be_solved():
    with pytest.raises(ValueError, match="above the real axis"):
        wigner(3).solve(np.array([1.0]))
    with pytest.raises(ValueError, match="at least two square matrices"):
        DysonEquation.of_samples(np.zeros((1, 3, 3)))
    with pytest.raises(ConvergenceError, match="did not converge"):
        wigner(3).solve(np.array([1e-9j]), iterations=3)


def test_conditions_on_the_entries():
    rng = np.random.default_rng(4)
    G = rng.standard_normal((20_000, 5, 5))
    H = G + G.transpose(0, 2, 1)
    H[:, range(5), range(5)] = 0  # constant entries do not count
    assert mean_share(H) < 1e-3
    assert mean_share(H + 1) == pytest.approx(25 / (25 + 40), rel=0.02)
    assert excess_kurtosis(H) < 0.1
    signs = rng.choice([-1.0, 1.0], size=(20_000, 1, 1))
    assert correlated_entries(H) == 0
    assert correlated_entries(np.abs(H) + 3 * signs) == 14  # one sign in all entries
    uniform = rng.uniform(size=(20_000, 3, 3))
    assert excess_kurtosis(uniform) == pytest.approx(1.2, rel=0.05)


def test_distance_of_densities():
    x = np.linspace(-9, 9, 2001)
    one, other = (np.exp(-((x - at) ** 2) / 2) / np.sqrt(2 * np.pi) for at in (0, 1))
    assert distance(x, one, one) == 0
    assert distance(x, one, other) == pytest.approx(0.3829249, rel=1e-4)  # 2 Φ(1/2) − 1


def test_few_points_few_samples_and_constant_entries():
    H = np.random.default_rng(0).standard_normal((9, 3, 3))
    H = H + H.transpose(0, 2, 1)
    equation = DysonEquation.of_samples(H)
    assert equation.solve(np.array([], complex)).shape == (0, 3, 3)
    assert equation.density(np.array([]), 0.1).shape == (0,)
    constant = np.full((7, 3, 3), 0.1)
    constant[:, 0, 0] = np.arange(7.0) ** 3
    assert correlated_entries(constant) == 0
    alone = excess_kurtosis(constant)
    assert alone == pytest.approx(abs(stats.kurtosis(np.arange(7.0) ** 3)))
    assert correlated_entries(constant[:, 1:, 1:]) == 0 and np.isnan(excess_kurtosis(constant[:, 1:, 1:]))
    few = np.random.default_rng(0).standard_normal((3, 40, 40))
    assert correlated_entries(few + few.transpose(0, 2, 1)) >= 0


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_density_is_refused():
    H = np.random.default_rng(0).standard_normal((9, 3, 3))
    equation = DysonEquation.of_samples(H + H.transpose(0, 2, 1))
    x = np.linspace(-1, 1, 5)
    for call, message in (
        (lambda: DysonEquation.of_samples(H), "must be symmetric and finite"),
        (lambda: DysonEquation.of_samples(H * np.nan), "must be symmetric and finite"),
        (lambda: equation.density(x, 0.0), "eta must be positive, got 0"),
        (lambda: equation.solve(1j), "points z are needed"),
        (lambda: smoothed_density(x, x, -1.0), "eta must be positive, got -1"),
        (lambda: smoothed_density(x[:0], x, 1.0), "at least one of the eigenvalues"),
        (lambda: distance(x[::-1], x, x**2), "grid x must increase"),
        (lambda: correlated_entries(H[:2]), "at least 3 samples, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_share_of_a_mean_of_zero_is_zero_on_average():
    rng = np.random.default_rng(5)
    G = rng.standard_normal((400, 5, 6, 6))
    found = np.array([mean_share(H + H.transpose(0, 2, 1)) for H in G])
    assert abs(found.mean()) < 4 * found.std() / 20 < 0.02
    assert np.isnan(mean_share(G[0, :1]))


def test_the_bound_of_remark_d4_on_the_semicircle_and_two_centres():
    rng, N = np.random.default_rng(6), 8
    G = rng.standard_normal((4000, N, N))
    W = (G + G.transpose(0, 2, 1)) / np.sqrt(2 * N)
    A = np.diag(np.repeat([-5.0, 5.0], N // 2))
    equation = DysonEquation.of_samples(W + A)
    assert outside_remark_d4(equation, np.linalg.eigvalsh(W + A)) < 0.01
    reach = 2 * np.sqrt(1 + 1 / N)  # S[1] = (1 + 1/N) 1 for such matrices
    values = np.array([-5 - 1.1 * reach, -5 + 0.9 * reach, 0.0, 5 - 0.9 * reach, 5 + 1.1 * reach])
    assert outside_remark_d4(equation, values) == pytest.approx(3 / 5)
