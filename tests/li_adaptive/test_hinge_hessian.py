"""The Hessian of the hinge loss against the formed one, and the matrices beside it."""

import pytest
import torch

from common.hessian.operators import ZeroOperator
from common.hessian.spectral_measure import edge_eigenvalues, lanczos_measures
from common.li_adaptive.hinge_hessian import BipartitePart, TridiagonalGOE, formed_hessian, hinge_hessian
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


def test_the_hessian_by_some_parameters_is_a_block_of_the_whole():
    network, x, y = problem()
    whole = formed_hessian(network, x, y)
    for p in network.parameters():
        p.requires_grad_(False)  # flags do not matter
    names, sizes = zip(*((name, p.numel()) for name, p in network.named_parameters()), strict=True)
    places = dict(zip(names, torch.arange(len(whole)).split(sizes), strict=True))
    chosen = [names[2], names[0]]
    rows = torch.cat([places[name] for name in chosen])
    operator = hinge_hessian(network, x, y, names=chosen)
    formed = operator @ torch.eye(operator.shape[0], dtype=torch.float64)
    torch.testing.assert_close(formed, whole[rows][:, rows], atol=1e-12, rtol=1e-9)
    with pytest.raises(ValueError, match=r"no parameter '9\.weight'"):
        hinge_hessian(network, x, y, names=["9.weight"])


def test_the_bipartite_part_is_symmetric_and_is_all_there_is_of_two_layers():
    network, x, y = problem(depth=2)
    operator = hinge_hessian(network, x, y)
    identity = torch.eye(operator.shape[0], dtype=torch.float64)
    torch.testing.assert_close(BipartitePart(operator, network) @ identity, operator @ identity)
    deep, x, y = problem(depth=4)
    part = BipartitePart(hinge_hessian(deep, x, y), deep)
    formed = part @ torch.eye(part.shape[0], dtype=torch.float64)
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
