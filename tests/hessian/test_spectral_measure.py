"""Lanczos measures against dense eigenvalues, and how symmetric they are."""

import numpy as np
import pytest
import torch
from scipy import stats

from common.hessian.spectral_measure import (
    BipartitePart,
    LanczosMeasures,
    TridiagonalGOE,
    ZeroOperator,
    edge_eigenvalues,
    formed_hessian,
    hinge_hessian,
    lanczos_measures,
)  # fmt: skip
from common.li_adaptive.networks import initialize, perceptron


def problem(depth=3, standardize=False, scale=2.0):
    generator = torch.Generator().manual_seed(0)
    network = perceptron([6] + [7] * (depth - 1), standardize=standardize).double()
    initialize(network, "fan-in", generator, scale=scale)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    return network, x, torch.sign(x[:, 0]).double()


@pytest.mark.parametrize("standardize", [False, True])
def test_the_operator_is_the_formed_hessian(standardize):
    network, x, y = problem(standardize=standardize, scale=6.0)
    assert 0 < int((y * network(x) > 1).sum()) < 40
    operator = hinge_hessian(network, x, y, batch_size=16)
    formed = operator @ torch.eye(operator.shape[0], dtype=torch.float64)
    torch.testing.assert_close(formed, formed_hessian(network, x, y), atol=1e-12, rtol=1e-9)


def test_the_measures_have_the_moments_of_the_dense_spectrum():
    network, x, y = problem()
    eigenvalues = torch.linalg.eigvalsh(formed_hessian(network, x, y)).numpy()
    measures = lanczos_measures(hinge_hessian(network, x, y), iterations=30, starts=60, seed=0)
    assert measures.bound == pytest.approx(np.abs(eigenvalues).max(), rel=1e-8)
    for power in (1, 2, 3, 4):
        sample = measures.moments(power)
        assert abs(sample.mean() - (eigenvalues**power).mean()) < 4 * stats.sem(sample)
    grid, density = measures.density()
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=0.02)
    negative = (eigenvalues < -1e-3).sum() / (np.abs(eigenvalues) > 1e-3).sum()
    sample = measures.negative_share(1e-3)
    assert abs(sample.mean() - negative) < 4 * stats.sem(sample) + 0.02


def test_the_outermost_eigenvalues_are_those_of_the_dense_matrix():
    network, x, y = problem()
    eigenvalues = torch.linalg.eigvalsh(formed_hessian(network, x, y)).numpy()
    lowest, highest = edge_eigenvalues(hinge_hessian(network, x, y), 4, seed=0)
    np.testing.assert_allclose(lowest, eigenvalues[:4], rtol=1e-4)
    np.testing.assert_allclose(highest, eigenvalues[:-5:-1], rtol=1e-4)


def test_start_vectors_come_from_the_seed_and_nothing_else():
    network, x, y = problem()
    operator = hinge_hessian(network, x, y)
    before = torch.get_rng_state()
    first, again = (lanczos_measures(operator, iterations=10, starts=2, seed=5) for _ in range(2))
    assert torch.equal(first.nodes, again.nodes)
    assert not torch.equal(first.nodes[0], first.nodes[1])
    assert torch.equal(before, torch.get_rng_state())


def test_asymmetry_of_known_measures():
    def measure(nodes, weights):
        return LanczosMeasures(torch.tensor([nodes]).double(), torch.tensor([weights]).double())

    assert measure([-2.0, -1, 1, 2], [0.1, 0.4, 0.4, 0.1]).asymmetry() == pytest.approx(0)
    assert measure([1.0, 3], [0.5, 0.5]).asymmetry() == pytest.approx(1)
    # half the mass at 1, half at −2: the mirror image is half a unit of mass moved by 1 on either side
    assert measure([1.0, -2], [0.5, 0.5]).asymmetry() == pytest.approx(1 / 3)
    assert measure([1.0, -2], [0.5, 0.5]).skewness() == pytest.approx(-3.5 / 2.5**1.5)


def test_the_bipartite_part_is_symmetric_and_is_all_there_is_of_two_layers():
    network, x, y = problem(depth=2)
    operator = hinge_hessian(network, x, y)
    identity = torch.eye(operator.shape[0], dtype=torch.float64)
    torch.testing.assert_close(BipartitePart(operator, network) @ identity[0], operator @ identity[0])
    deep, x, y = problem(depth=4)
    part = BipartitePart(hinge_hessian(deep, x, y), deep)
    formed = torch.stack([part @ e for e in torch.eye(part.shape[0], dtype=torch.float64)])
    eigenvalues = torch.linalg.eigvalsh(formed)
    torch.testing.assert_close(eigenvalues, -eigenvalues.flip(0), atol=1e-12, rtol=1e-9)


def test_the_tridiagonal_matrix_has_the_semicircle():
    measures = lanczos_measures(TridiagonalGOE(100_000, seed=0), iterations=40, starts=4, seed=0)
    for power, catalan in ((2, 1), (4, 2), (6, 5)):
        assert measures.moments(power).mean() == pytest.approx(catalan, rel=0.02)
    assert measures.pooled_asymmetry() < 0.01


def test_a_zero_hessian_is_said_to_be_zero():
    network, x, y = problem(depth=2)
    y = torch.sign(network(x)).detach()
    network[-2].weight.data *= 1e9
    network[0].weight.data *= 1e9
    operator = hinge_hessian(network, x[y != 0], y[y != 0])
    assert isinstance(operator, ZeroOperator)
    measures = lanczos_measures(operator, iterations=5, starts=2, seed=0)
    assert measures.bound == 0
    assert (measures.skewness() == 0).all() and (measures.asymmetry() == 0).all()
    with pytest.raises(ValueError, match="Lanczos iterations"):
        lanczos_measures(operator, iterations=10**6, starts=1, seed=0)


def test_a_network_of_dead_units_has_a_zero_hessian_inside_the_margin():
    network, x, y = problem(depth=3)
    network[0].weight.data.fill_(-1.0)
    operator = hinge_hessian(network, x.abs(), y)
    assert isinstance(operator, ZeroOperator)
    assert lanczos_measures(operator, iterations=4, starts=1, seed=0).bound == 0
    assert edge_eigenvalues(operator, 2, seed=0)[0].tolist() == [0, 0]
