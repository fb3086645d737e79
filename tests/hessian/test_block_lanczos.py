"""Block Lanczos against dense linear algebra: all pairs that exist, at any rank, in clusters, in both precisions."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.hessian.block_lanczos import ROUNDING, descending_eigh, top_eigenpairs
from common.hessian.convergence import ConvergenceError
from common.hessian.layer import LayerHessian, layer_hessian
from common.hessian.operators import SymmetricOperator
from common.wu_dissecting.networks import classifier


class Dense(SymmetricOperator):
    """A matrix, and how many vectors it has multiplied."""

    def __init__(self, matrix):
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix, self.multiplied = matrix, 0

    def _product(self, V):
        self.multiplied += V.shape[1]
        return self.matrix @ V


def spectrum(draw, size):
    """Eigenvalues with clusters, multiplicities, zeros, of both signs and any size."""
    found = []
    while len(found) < size:
        value, m = draw.choice([-1, 1]) * 10 ** draw.uniform(-6, 2), draw.randint(1, 20)
        found += draw.choice([
            [0.0] * m, [value] * m, [value * (1 + 10 ** draw.uniform(-12, -1) * draw.random()) for _ in range(m)],
            [draw.gauss(0, 1) for _ in range(m)], [abs(value) * draw.gauss(0, 1) ** 2 for _ in range(m)],
            [abs(value) * 10.0**-i for i in range(m)], [abs(value) * 0.5**i for i in range(m)], [value],
        ])  # fmt: skip
    found = np.array(found[:size])
    return np.sort(abs(found) if draw.random() < 0.3 else found)[::-1]


def symmetric(draw, values, dtype):
    """A matrix with these eigenvalues, and its eigenvectors."""
    rng = np.random.default_rng(draw.randint(0, 2**30))
    size = len(values)
    mixed = np.linalg.qr(rng.standard_normal((size, size)))[0]
    vectors = mixed if draw.random() < 0.8 else np.eye(size)[:, rng.permutation(size)]
    matrix = (vectors * values) @ vectors.T
    return torch.tensor((matrix + matrix.T) / 2, dtype=dtype), torch.tensor(vectors.copy(), dtype=dtype)


def check(draw):
    size, dtype = draw.randint(1, 60), draw.choice([torch.float32, torch.float64])
    matrix, vectors = symmetric(draw, spectrum(draw, size), dtype)
    k, block = draw.randint(1, size), draw.randint(1, min(size, 9))
    tolerance = 10 ** draw.uniform(-10 if dtype == torch.float64 else -5, -2)
    start = torch.randn(size, block, dtype=dtype, generator=torch.Generator().manual_seed(draw.randint(0, 2**30)))
    if draw.random() < 0.5:  # exactly some of the eigenvectors, not always the wanted ones
        start = vectors[:, draw.sample(range(size), block)]
    operator = Dense(matrix)
    found = top_eigenpairs(operator, np.int64(k), start=start, tolerance=tolerance)
    exact = np.linalg.eigvalsh(matrix.double().numpy())[::-1]
    floor = ROUNDING * torch.finfo(dtype).eps * abs(exact).max()
    allowed = np.maximum(tolerance * abs(exact[:k]), 4 * floor)
    assert (abs(found.values.double().numpy() - exact[:k]) <= allowed).all()
    V = found.vectors.double()
    assert (V.T @ V - torch.eye(k)).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-12)
    residuals = torch.linalg.vector_norm(matrix.double() @ V - V * found.values, dim=0).numpy()
    assert (residuals <= allowed).all()
    assert (abs(found.residuals.numpy() - residuals) <= 1.1 * floor).all()
    assert operator.multiplied == int(found.products)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_all_pairs_of_any_matrix_are_found(seed):
    check(random.Random(seed))


def test_no_ghosts_where_the_rank_is_low():
    torch.manual_seed(27)
    network = classifier("F-20^2", (1, 5, 5), 10).double()
    H = layer_hessian(network, "fc1", torch.rand(2, 1, 5, 5, dtype=torch.float64))
    found = H.top_eigenpairs(9)
    expected = [0.03336, 0.01628, 0.00881, 0.00699, 0.00339, 0.00221, 0.00063, 0.00042, 0.00018]
    np.testing.assert_allclose(found.values, expected, atol=5e-6)
    assert (found.vectors.T @ found.vectors - torch.eye(9)).abs().max() < 1e-12


def test_beyond_the_rank_there_are_zeros_and_few_products():
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(3000, 5, generator=generator, dtype=torch.float64)
    operator = Dense(B @ B.T)
    start = torch.randn(3000, 4, generator=generator, dtype=torch.float64)
    found = top_eigenpairs(operator, 40, start=start)
    assert torch.equal(found.values[5:], torch.zeros(35)) and (found.values[:5] > 0).all()
    assert operator.multiplied <= 100
    assert (found.vectors.T @ found.vectors - torch.eye(40)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_matrix_has_zeros_with_residual_zero(dtype):
    found = top_eigenpairs(Dense(torch.zeros(9, 9, dtype=dtype)), 5, start=torch.ones(9, 2, dtype=dtype))
    assert not found.values.any() and not found.residuals.any()
    saturated = LayerHessian(torch.rand(7, 6, dtype=dtype), torch.zeros(7, 4, 3, dtype=dtype))
    assert not saturated.top_eigenpairs(6).values.any()


def test_what_cannot_be_exact_enough_raises_with_its_residual():
    class Inexact(Dense):
        def _product(self, V):
            return super()._product(V) * (1 + 1e-3 * torch.randn(V.shape, dtype=V.dtype))

    matrix = torch.diag(torch.arange(1.0, 41)).double()
    with pytest.raises(ConvergenceError, match=r"residual is \d\.\de-0[1-4]"):
        top_eigenpairs(Inexact(matrix), 5, start=torch.eye(40, 4, dtype=torch.float64), tolerance=1e-8)
    unsymmetric = matrix + torch.triu(torch.ones(40, 40, dtype=torch.float64), 1)
    with pytest.raises(ConvergenceError, match="residual"):
        top_eigenpairs(Dense(unsymmetric), 5, start=torch.eye(40, 4, dtype=torch.float64))


class Diagonal(SymmetricOperator):
    def __init__(self, values):
        super().__init__(len(values), values.dtype, values.device)
        self.values = values

    def _product(self, V):
        return self.values[:, None] * V


@pytest.mark.parametrize(("size", "gap"), [(100_000, 0.01), (10_000, 0.003), (1000, 0.001)])
def test_the_largest_is_found_where_the_start_has_all_but_it(size, gap):
    values = torch.cat([1 - gap * torch.arange(9), torch.linspace(0.5, 0, size - 9)]).double()
    found = top_eigenpairs(Diagonal(values), 8, start=torch.eye(size, 9, dtype=torch.float64)[:, 1:])
    torch.testing.assert_close(found.values, values[:8], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-30, -15, 15, 30])
def test_scales_of_any_size(dtype, power):
    values = (10.0**power * 0.9 ** torch.arange(200).double()).to(dtype)
    start = torch.randn(200, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    found = top_eigenpairs(Diagonal(values), 9, start=start)
    torch.testing.assert_close(found.values / values[:9], torch.ones(9, dtype=dtype), rtol=0, atol=1e-5)
    assert (found.residuals / values[:9] <= 2e-4).all() and (found.residuals > 0).all()


class LowRank(SymmetricOperator):
    """U diag(values) Uᵀ, multiplied in double precision."""

    def __init__(self, U, values):
        super().__init__(len(U), torch.float32, U.device)
        self.U, self.values = U, values

    def __matmul__(self, V):
        return (self.U @ (self.values[:, None] * (self.U.T @ V.double()))).float()


def test_vectors_of_a_million_entries():
    """In single precision sums of that many terms lose four digits more than the terms do."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.rand(1_000_000, 4, dtype=torch.float64, generator=generator))[0]
    values = torch.tensor([10.0, 4.0, 1.0, 0.3], dtype=torch.float64)
    start = torch.randn(len(U), 4, generator=generator)
    found = top_eigenpairs(LowRank(U, values), 4, start=start, tolerance=1e-5)
    torch.testing.assert_close(found.values.double(), values, rtol=1e-6, atol=0)
    vectors = found.vectors.double()
    assert (vectors.T @ vectors - torch.eye(4)).abs().max() < 1e-6
    assert torch.linalg.vector_norm(U @ (values[:, None] * (U.T @ vectors)) - vectors * values, dim=0).max() < 5e-6


@pytest.mark.parametrize("wrong", [{"tolerance": 0.0}, {"tolerance": 1.0}, {"tolerance": float("nan")}, {"most": 2}])
def test_tolerances_and_sizes_that_are_none(wrong):
    with pytest.raises(ValueError, match=r"a tolerance in 0\.\.1 and most ≥ 3 are needed"):
        top_eigenpairs(Dense(torch.eye(6)), 3, start=torch.ones(6, 2), **wrong)


@pytest.mark.parametrize(
    "wrong", [torch.ones(6, 2).double(), torch.ones(5, 2), torch.full((6, 2), float("nan")), torch.ones(6, 0)]
)
def test_start_vectors_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match=r"start vectors are needed, \(6, b\)"):
        top_eigenpairs(Dense(torch.eye(6)), 2, start=wrong)


def test_products_that_are_not_finite():
    with pytest.raises(FloatingPointError, match="not finite"):
        top_eigenpairs(Dense(torch.full((6, 6), float("inf"))), 2, start=torch.ones(6, 2))


def test_all_eigenvalues_of_a_factor_of_one_sample(monkeypatch):
    """In single precision LAPACK fails on some of these; then double precision is taken."""
    eigh = torch.linalg.eigh

    def failing(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("it did not converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    x = torch.rand(1, 50, generator=torch.Generator().manual_seed(0))
    values, vectors = descending_eigh(x.T @ x)
    assert values.dtype == vectors.dtype == torch.float32
    assert values[0] == pytest.approx(float(x.square().sum()), rel=1e-5)
    assert abs(vectors[:, 0] @ x[0]) == pytest.approx(float(x.norm()), rel=1e-5)
    with pytest.raises(ValueError, match="finite entries"):
        descending_eigh(torch.full((3, 3), float("nan")))
    with pytest.raises(ValueError, match="finite entries"):
        descending_eigh(torch.ones(0, 0))
