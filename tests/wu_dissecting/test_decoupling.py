"""The distance from Kronecker's product against a matrix that is formed."""

import pytest
import torch

from common.hessian.convergence import ConvergenceError
from common.hessian.layer import LayerHessian
from common.wu_dissecting.decoupling import distance_from_kronecker


def sampled(scale):
    """A layer's Hessian whose M grows with ‖x‖ by ``scale``."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 12, generator=generator)
    sizes = (1 + scale * X.square().mean(1)).view(-1, 1, 1)
    return LayerHessian(X, torch.randn(200, 7, 3, generator=generator) * sizes)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_the_distance_is_the_norm_of_the_difference(scale):
    H = sampled(scale)
    formed = H @ torch.eye(84)
    difference = torch.kron(H.output_hessian, H.autocorrelation) - formed
    norm, residual = distance_from_kronecker(H, seed=0)
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(difference, 2)), rel=1e-3)
    assert residual <= 1e-3
    assert distance_from_kronecker(H, seed=0) == (norm, residual)


def test_a_tolerance_that_is_not_reached_is_an_error():
    with pytest.raises(ConvergenceError, match="norm"):
        distance_from_kronecker(sampled(3.0), seed=0, tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1, 12, 7), (1, 1, 1), (5, 6, 4), (5, 1, 4)])
def test_equal_inputs_and_zero_factors_are_decoupled(sizes, dtype):
    N, n, m = sizes
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(1, n, generator=generator, dtype=dtype).expand(N, n).contiguous()
    B = torch.randn(N, m, 3, generator=generator, dtype=dtype)
    for factors in (B, 0 * B):
        assert distance_from_kronecker(LayerHessian(X, factors), seed=0) == (0, 0)
