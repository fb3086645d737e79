"""Which eigenvectors of the factors a layer's eigenvectors are made of."""

import numpy as np
import pytest
import torch

from common.hessian.layer import LayerHessian
from common.wu_dissecting.eigenspaces import band_mean, correspondence, kronecker_correspondence


def test_those_of_a_kronecker_product_are_what_its_eigenvectors_give():
    generator = torch.Generator().manual_seed(0)
    H = LayerHessian(torch.randn(50, 6, generator=generator), torch.randn(50, 4, 3, generator=generator))
    _, vectors = H.kronecker_eigenpairs(10)
    of_inputs, of_outputs = kronecker_correspondence(H, 10)
    by_definition = correspondence(vectors, H.output_basis[1], H.input_basis[1])
    assert of_inputs.shape == (6, 10) and of_outputs.shape == (4, 10)
    torch.testing.assert_close(of_inputs, by_definition[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(of_outputs, by_definition[1], atol=1e-5, rtol=0)


def test_a_band_is_a_twentieth_of_the_outputs_to_either_side():
    shifted = np.eye(40, 60, 2)  # h_j is u_{j - 2}
    assert band_mean(shifted) == pytest.approx(38 / 40)  # the first two j have no such i
    assert band_mean(shifted, slice(0, 2)) == 0
    assert band_mean(np.eye(40, 60, 3)) == 0
    assert band_mean(np.eye(19, 28)) == 1
    assert band_mean(np.eye(19, 28, 1)) == 0
