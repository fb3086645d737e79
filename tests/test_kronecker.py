"""Layer-wise Hessians and subspaces of Wu et al. against autograd and dense linear algebra."""

import pytest
import torch

from common.hessian.kronecker import ConvergenceError, LayerHessian, perceptron_layer
from common.hessian.subspace import matricized, nested_overlaps, overlap, rank_one_share


def network(widths=(7, 6, 5, 4), samples=40, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    pairs = list(zip(widths[1:], widths[:-1], strict=True))
    weights = [torch.randn(out, inputs, generator=generator, dtype=dtype) for out, inputs in pairs]
    biases = [torch.randn(out, generator=generator, dtype=dtype) for out, _ in pairs]
    X = torch.randn(samples, widths[0], generator=generator, dtype=dtype).abs()
    return weights, biases, X


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_operator_is_the_hessian_by_autograd(layer, monkeypatch):
    monkeypatch.setattr("common.hessian.kronecker.CHUNK", 64)
    weights, biases, X = network()

    def loss(w):
        x = X
        for k, (W, b) in enumerate(zip(weights, biases, strict=True)):
            z = x @ (w.view_as(W) if k == layer else W).T + b
            x = z.relu()
        return torch.nn.functional.cross_entropy(z, torch.zeros(len(X), dtype=torch.int64))

    H = perceptron_layer(weights, biases, X, layer)
    expected = torch.func.hessian(loss)(weights[layer].flatten())
    torch.testing.assert_close(H @ torch.eye(H.shape[0], dtype=torch.float64), expected, atol=1e-12, rtol=1e-9)


def test_factors_and_their_eigenpairs():
    H = perceptron_layer(*network(), 1)
    M, C = H.output_hessian(), H.autocorrelation()
    torch.testing.assert_close(M, (H.B @ H.B.mT).mean(0))
    torch.testing.assert_close(C, torch.einsum("ni,nj->ij", H.X, H.X) / len(H.X))
    product = torch.kron(M, C)
    values, vectors = H.kronecker_eigenpairs(9)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(product).flip(0)[:9])
    torch.testing.assert_close(product @ vectors, vectors * values, atol=1e-10, rtol=1e-8)
    same_input = LayerHessian(H.X[:1].repeat(40, 1), H.B)  # one input for all: the conjecture holds exactly
    torch.testing.assert_close(
        same_input @ torch.eye(H.shape[0], dtype=torch.float64),
        torch.kron(same_input.output_hessian(), same_input.autocorrelation()),
    )


@pytest.mark.parametrize("k", [1, 5, 15])
def test_top_eigenpairs_are_those_of_the_dense_matrix(k):
    H = perceptron_layer(*network(), 0)
    dense = H @ torch.eye(H.shape[0], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(dense)
    found = H.top_eigenpairs(k, tolerance=1e-9, block=4)
    torch.testing.assert_close(found.values, values.flip(0)[:k], rtol=1e-8, atol=1e-14)
    assert overlap(found.vectors, vectors.flip(1)[:, :k]) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(k, dtype=torch.float64))
    assert found.residuals.max() <= 1e-8


def test_eigenpairs_that_cannot_be_had():
    H = perceptron_layer(*network((30, 20, 10)), 0)
    with pytest.raises(ConvergenceError, match="largest residual"):
        H.top_eigenpairs(20, tolerance=1e-12, block=2, most=26)
    with pytest.raises(ValueError, match="eigenpairs"):
        H.top_eigenpairs(0)
    with pytest.raises(ValueError, match="layer"):
        perceptron_layer(*network(), 3)


def test_overlaps():
    generator = torch.Generator().manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(12, 5, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    assert overlap(U, U @ rotation) == pytest.approx(1)
    angles = torch.linalg.svdvals(U.T @ V)
    assert overlap(U, V) == pytest.approx(float(angles.square().mean()))
    nested = nested_overlaps(U, V)
    assert nested.tolist() == pytest.approx([overlap(U[:, :k], V[:, :k]) for k in range(1, 6)])
    with pytest.raises(ValueError, match="equal shape"):
        overlap(U, V[:, :3])


def test_a_product_of_two_vectors_has_rank_one():
    u, w = torch.randn(3), torch.randn(5)
    h = torch.kron(u, w)
    torch.testing.assert_close(matricized(h, 3), u[:, None] * w)
    torch.testing.assert_close(rank_one_share(torch.stack([h, h], 1), 3), torch.ones(2))
