"""Every operator against its dense matrix, and whoever takes operators with every one of them."""

import curvlinops
import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

from common.hessian.block_lanczos import top_eigenpairs
from common.hessian.layer import LayerHessian, WeightSharingHessian, layer_hessians
from common.hessian.operators import FullHessian, KroneckerProduct, SymmetricOperator, ZeroOperator
from common.hessian.spectral_measure import edge_eigenvalues, lanczos, lanczos_measures
from common.li_adaptive.hinge_hessian import BipartitePart, TridiagonalGOE, hinge_hessian

SAMPLES = 12


def network(classes):
    """Two layers with 5 · 4 + 5 + 5 · classes parameters, dropout and batch norm between them."""
    statistics = nn.BatchNorm1d(5, affine=False)
    made = nn.Sequential(nn.Linear(4, 5), statistics, nn.ReLU(), nn.Dropout(), nn.Linear(5, classes))
    generator = torch.Generator().manual_seed(3)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return made.double()


def by_autograd(network, x, objective):
    """Hessian of an objective of the outputs in evaluation mode by all parameters."""
    network.eval()
    named = dict(network.named_parameters())

    def at(theta):
        parts = theta.split([p.numel() for p in named.values()])
        weights = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
        return objective(torch.func.functional_call(network, weights, (x,)))

    return torch.func.hessian(at)(nn.utils.parameters_to_vector(named.values()).detach())


def samples():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64), torch.arange(SAMPLES) % 3


def hinge_problem():
    single = nn.Sequential(*network(1), nn.Flatten(0))
    x, y = samples()
    y = torch.where(y > 0, 1.0, -1.0).double()
    return single, x, y


def layer():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    B = torch.randn(SAMPLES, 4, 3, generator=generator, dtype=torch.float64)
    dense = torch.einsum("zmr,zlr,zn,zp->mnlp", B, B, X, X) / SAMPLES
    return LayerHessian(X, B), dense.reshape(24, 24)


def convolution():
    J = torch.randn(SAMPLES, 3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = (torch.eye(4).double(), torch.eye(5).double(), torch.ones(5).double())
    return WeightSharingHessian(J, *factors), torch.einsum("zri,zrj->ij", J, J) / SAMPLES


def full():
    x, y = samples()
    dense = by_autograd(network(3), x, lambda f: nn.functional.cross_entropy(f, y))
    return FullHessian(network(3), x, y), dense


def hinge():
    single, x, y = hinge_problem()
    active = y * single.eval()(x) < 1
    assert 0 < active.sum() < SAMPLES
    return hinge_hessian(single, x, y), by_autograd(single, x, lambda f: torch.relu(1 - y * f).mean())


def bipartite():
    operator, dense = hinge()
    first = torch.arange(len(dense)) < 25
    return BipartitePart(operator, hinge_problem()[0]), dense * (first[:, None] != first)


def goe():
    rng = np.random.default_rng(1)
    diagonal = rng.standard_normal(20) * np.sqrt(2 / 20)
    beside = np.sqrt(rng.chisquare(np.arange(19, 0, -1)) / 20)
    dense = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    return TridiagonalGOE(20, seed=1), torch.from_numpy(dense)


def kronecker():
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(k, k, generator=generator, dtype=torch.float64) for k in (3, 7))
    return KroneckerProduct(A + A.T, B @ B.T), torch.kron(A + A.T, B @ B.T)


def zero():
    return ZeroOperator(20, torch.float64, torch.device("cpu")), torch.zeros(20, 20, dtype=torch.float64)


def doubled():
    """Made by curvlinops' algebra, and as good as any."""
    operator, dense = layer()
    return operator + 1.0 * operator, 2 * dense


KINDS = [layer, convolution, full, hinge, bipartite, goe, kronecker, zero]


@pytest.fixture(params=[*KINDS, doubled], ids=lambda kind: kind.__name__)
def pair(request):
    """An operator and its dense matrix."""
    return request.param()


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_products_are_those_of_the_dense_matrix(pair):
    operator, dense = pair
    d = len(dense)
    assert operator.shape == (d, d) and operator.dtype == dense.dtype and operator.device == dense.device
    V = torch.randn(d, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = V.clone()
    close(operator @ V, dense @ V)
    close(operator @ V[:, 0], dense @ V[:, 0])
    close(operator @ V[:, ::2], dense @ V[:, ::2])
    close(operator @ V.T.contiguous().T, dense @ V)
    assert torch.equal(V, before)
    with pytest.raises(ValueError, match="must have shape"):
        operator @ V[1:]


def test_the_algebra_of_curvlinops(pair):
    operator, dense = pair
    V = torch.randn(len(dense), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert operator.adjoint() is operator or not isinstance(operator, SymmetricOperator)
    close((operator + 2.5 * operator) @ V, 3.5 * dense @ V)
    close((operator * 2 - operator @ operator) @ V, 2 * dense @ V - dense @ (dense @ V))
    close(operator.adjoint() @ V, dense.T @ V)


def test_operators_of_different_kinds_can_be_added():
    operators, matrices = zip(*(kind() for kind in (hinge, bipartite)), strict=True)
    V = torch.eye(len(matrices[0]), dtype=torch.float64)
    close((operators[0] - operators[1]) @ V, matrices[0] - matrices[1])


def test_scipy_takes_them(pair):
    operator, dense = pair
    V = np.random.default_rng(0).standard_normal((len(dense), 3))
    np.testing.assert_allclose(operator.to_scipy() @ V, dense.numpy() @ V, atol=1e-10)
    if not isinstance(operator, ZeroOperator):  # ARPACK does not take it
        found = eigsh(operator.to_scipy(), 3, which="LA", v0=V[:, 0], return_eigenvectors=False)
        np.testing.assert_allclose(np.sort(found), torch.linalg.eigvalsh(dense)[-3:], atol=1e-10)
    lowest, highest = edge_eigenvalues(operator, 2, seed=0, tolerance=1e-10)
    values = torch.linalg.eigvalsh(dense)
    np.testing.assert_allclose([*lowest, *highest], values[[0, 1, -1, -2]], atol=1e-8)


def test_block_lanczos_takes_them(pair):
    operator, dense = pair
    if isinstance(operator, ZeroOperator):
        pytest.skip("residuals relative to an eigenvalue of 0")
    start = torch.randn(len(dense), 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = top_eigenpairs(operator, 3, start=start, tolerance=1e-8)
    close(found.values, torch.linalg.eigvalsh(dense).flip(0)[:3], 1e-7)
    close(dense @ found.vectors, found.vectors * found.values, 1e-6)


def test_lanczos_takes_them_and_has_the_moments_of_its_start_vector(pair):
    operator, dense = pair
    start = torch.randn(len(dense), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nodes, weights = lanczos(operator, start, 5)
    assert (weights >= 0).all() and (nodes.diff() >= 0).all()
    vector = start / start.norm()
    scale = torch.linalg.matrix_norm(dense, 2) or 1
    for power in range(2 * 5):
        close(weights @ nodes**power / scale**power, start @ vector / start.norm() / scale**power, 1e-9)
        vector = dense @ vector
    measures = lanczos_measures(operator, iterations=5, starts=2, seed=0)
    assert measures.nodes.shape == measures.weights.shape == (2, 5)
    close(measures.weights.sum(1), torch.ones(2, dtype=torch.float64))


def test_the_algorithms_of_curvlinops_take_them(pair):
    operator, dense = pair
    algorithms = {curvlinops.hutchinson_trace: 7, curvlinops.hutchinson_diag: 7, curvlinops.hutchinson_squared_fro: 7}
    if not isinstance(operator, ZeroOperator):  # the others divide by its products
        algorithms |= {curvlinops.hutchpp_trace: 6, curvlinops.xtrace: 6, curvlinops.xdiag: 6}
    for algorithm, products in algorithms.items():
        found = []
        for matrix in (operator, dense):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                found.append(algorithm(matrix, products))
        close(*found, 1e-8)


def test_densities_are_those_of_curvlinops(pair):
    """Its public function draws the start vector from the global generator and gives the density alone."""
    operator, _ = pair
    if isinstance(operator, ZeroOperator):
        pytest.skip("the density of a point")
    measures = lanczos_measures(operator, iterations=8, starts=1, seed=5)
    own = int(np.random.SeedSequence((5, 0, 1950)).generate_state(1)[0])
    boundaries = float(measures.nodes.min()), float(measures.nodes.max())
    with torch.random.fork_rng():
        torch.manual_seed(own)
        grid, density = curvlinops.lanczos_approximate_spectrum(operator, 8, boundaries=boundaries)
    found = measures.density()
    np.testing.assert_allclose(found[0], grid, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found[1], density, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# What a caller gives is left as it is


def state_of(network):
    return (
        [module.training for module in network.modules()],
        [p.requires_grad for p in network.parameters()],
        {name: value.clone() for name, value in network.state_dict().items()},
        sum(len(module._forward_hooks) for module in network.modules()),
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_left_as_it_was(training):
    three, (x, y) = network(3).train(training), samples()
    single, _, signs = hinge_problem()
    single.train(training)
    for one in (three, single):
        one[1].train(not training)  # frozen statistics, say
        one[0].weight.requires_grad_(False)
    calls = [
        (three, lambda: layer_hessians(three, ["0", "4"], x)["0"]), (three, lambda: FullHessian(three, x, y)),
        (single, lambda: hinge_hessian(single, x, signs)),
    ]  # fmt: skip
    for one, make in calls:
        modes, flags, values, hooks = state_of(one)
        operator = make()
        first = operator @ torch.ones(operator.shape[0], dtype=torch.float64)
        after = state_of(one)
        assert (modes, flags, hooks) == (after[0], after[1], after[3])
        assert all(torch.equal(value, after[2][name]) for name, value in values.items())
        # nor does the operator change with the network
        one.train(not training)
        for p in one.parameters():
            p.data.zero_()
        assert torch.equal(operator @ torch.ones(operator.shape[0], dtype=torch.float64), first) and first.any()
        one.load_state_dict(values)


def test_a_network_is_left_as_it_was_where_its_layer_cannot_be_done():
    broken = nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.Linear(4, 3)).train()
    with pytest.raises(ValueError, match="shapes"):
        layer_hessians(broken, ["0"], torch.ones(2, 4))
    assert all(module.training for module in broken.modules()) and not broken[0]._forward_hooks


@pytest.mark.usefixtures("unchecked")
def test_samples_labels_and_factors_that_do_not_fit_are_refused_in_one_line():
    made, (X, y) = network(3), samples()
    for call, message in (
        (lambda: FullHessian(made, X, y[:, None]), r"one label a sample is needed, \(12,\), .* got \(12, 1\)"),
        (lambda: FullHessian(made, X.float(), y), "the samples are torch.float32 .* the network is torch.float64"),
        (lambda: KroneckerProduct(X, X), "two square matrices of one type"),
        (lambda: KroneckerProduct(torch.eye(2), torch.eye(2).double()), "two square matrices of one type"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_network_that_draws_at_random_leaves_the_generator_as_it_was():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    before = torch.get_rng_state()
    made = nn.Sequential(*network(3), Noisy())
    torch.set_rng_state(before)
    with pytest.raises(ValueError, match="draws at random"):
        FullHessian(made, *samples())
    assert torch.equal(torch.get_rng_state(), before)
