"""Lanczos measures against dense eigenvalues, and how symmetric they are."""

import numpy as np
import pytest
import torch
from scipy import stats

from common.hessian.operators import SymmetricOperator, ZeroOperator
from common.hessian.spectral_measure import LanczosMeasures, edge_eigenvalues, lanczos, lanczos_measures


class Dense(SymmetricOperator):
    """A matrix that is there."""

    def __init__(self, matrix):
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix = matrix

    def _product(self, V):
        return self.matrix @ V


def problem():
    """A matrix with 20 negative and 50 positive eigenvalues and 30 times 0, and these in ascending order."""
    eigenvalues = torch.cat([torch.linspace(-3, -1, 20), torch.zeros(30), torch.linspace(1, 6, 50)]).double()
    noise = torch.randn(100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U = torch.linalg.qr(noise).Q
    return Dense(U * eigenvalues @ U.T), eigenvalues.numpy()


def test_the_measures_have_the_moments_of_the_dense_spectrum():
    operator, eigenvalues = problem()
    measures = lanczos_measures(operator, iterations=30, starts=60, seed=0)
    assert measures.bound == pytest.approx(np.abs(eigenvalues).max(), rel=1e-6)
    for power in (1, 2, 3, 4):
        sample = measures.moments(power)
        assert abs(sample.mean() - (eigenvalues**power).mean()) < 4 * stats.sem(sample)
    grid, density = measures.density()
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=0.02)
    sample = measures.negative_share(0.5)
    assert abs(sample.mean() - 2 / 7) < 4 * stats.sem(sample) + 0.01


def test_the_outermost_eigenvalues_are_those_of_the_dense_matrix():
    operator, eigenvalues = problem()
    lowest, highest = edge_eigenvalues(operator, 4, seed=0)
    np.testing.assert_allclose(lowest, eigenvalues[:4], rtol=1e-4)
    np.testing.assert_allclose(highest, eigenvalues[:-5:-1], rtol=1e-4)


def test_start_vectors_come_from_the_seed_and_nothing_else():
    operator, _ = problem()
    before = torch.get_rng_state()
    first, again = (lanczos_measures(operator, iterations=10, starts=2, seed=5) for _ in range(2))
    assert torch.equal(first.nodes, again.nodes)
    assert not torch.equal(first.nodes[0], first.nodes[1])
    assert not torch.equal(first.nodes, lanczos_measures(operator, iterations=10, starts=2, seed=6).nodes)
    assert torch.equal(before, torch.get_rng_state())


def test_a_recurrence_that_ends_early_has_the_measure_of_its_space():
    operator = Dense(torch.diag(torch.tensor([3.0, -1.0, 5.0, 7.0, 7.0])))
    nodes, weights = lanczos(operator, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]), 4)
    for power in range(6):
        assert float(weights @ nodes**power) == pytest.approx((3.0**power + (-1.0) ** power) / 2, rel=1e-5)


def test_products_that_are_not_finite_are_refused():
    with pytest.raises(FloatingPointError, match="not finite"):
        lanczos_measures(Dense(torch.full((4, 4), torch.inf)), iterations=3, starts=1, seed=0)


def test_the_zero_matrix_has_the_measure_of_a_point():
    operator = ZeroOperator(50, torch.float32, torch.device("cpu"))
    measures = lanczos_measures(operator, iterations=5, starts=2, seed=0)
    assert measures.bound == 0 and (measures.moments(0) == 1).all()
    assert (measures.skewness() == 0).all() and (measures.asymmetry() == 0).all()
    with pytest.raises(ValueError, match="Lanczos iterations"):
        lanczos_measures(operator, iterations=51, starts=1, seed=0)


def test_asymmetry_of_known_measures():
    def measure(nodes, weights):
        return LanczosMeasures(torch.tensor([nodes]).double(), torch.tensor([weights]).double())

    assert measure([-2.0, -1, 1, 2], [0.1, 0.4, 0.4, 0.1]).asymmetry() == pytest.approx(0)
    assert measure([1.0, 3], [0.5, 0.5]).asymmetry() == pytest.approx(1)
    # half the mass at 1, half at −2: the mirror image is half a unit of mass moved by 1 on either side
    assert measure([1.0, -2], [0.5, 0.5]).asymmetry() == pytest.approx(1 / 3)
    assert measure([1.0, -2], [0.5, 0.5]).skewness() == pytest.approx(-3.5 / 2.5**1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", [[0.0] * 20, [-3.0, 2, 1]])
@pytest.mark.parametrize("count", [2, 3])
def test_edges_of_singular_and_small_matrices(values, count, dtype):
    operator, expected = Dense(torch.diag(torch.tensor(values, dtype=dtype))), np.sort(values)
    lowest, highest = edge_eigenvalues(operator, count, seed=0)
    np.testing.assert_allclose(lowest, expected[:count], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(highest, expected[::-1][:count], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_requests_that_no_matrix_can_meet():
    H = Dense(torch.eye(5))
    measures = LanczosMeasures(torch.zeros(2, 3).double(), torch.full((2, 3), 1 / 3).double())
    varied = LanczosMeasures(torch.arange(3.0).double().expand(2, 3), measures.weights)
    for call, message in (
        (lambda: edge_eigenvalues(H, 0, seed=0), r"count of eigenvalues must lie in 1..5, got 0"),
        (lambda: edge_eigenvalues(ZeroOperator(3, torch.float32, H.device), 4, seed=0), r"1..3, got 4"),
        (lambda: lanczos_measures(H, iterations=3, starts=0, seed=0), "at least one start vector is needed, got 0"),
        (lambda: lanczos(H, torch.ones(5), 0), "at least one Lanczos iteration"),
        (lambda: lanczos(H, torch.zeros(5), 3), r"start vector \(5,\) torch.float32 is needed, not zero"),
        (lambda: lanczos(H, torch.ones(5).double(), 3), r"start vector \(5,\) torch.float32"),
        (measures.density, "all nodes are 0: the measure of a point has no density"),
        (lambda: varied.density(points=1), "a density needs 2 points"),
        (lambda: varied.density(kappa=1.0), "κ > 1"),
        (lambda: varied.negative_share(-1.0), "floor must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FloatingPointError, match="a product with the operator is not finite"):
        edge_eigenvalues(Dense(torch.full((9, 9), torch.nan)), 1, seed=0)
