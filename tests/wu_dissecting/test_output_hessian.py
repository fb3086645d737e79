"""Output Hessians in closed form."""

import pytest
import torch
from torch import nn

from common.hessian.layer import layer_hessian
from common.wu_dissecting.eigenspaces import overlap
from common.wu_dissecting.output_hessian import halved_products, later_weights, row_space_without_sum


def test_output_hessians_of_a_wide_network_at_initialization():
    generator = torch.Generator().manual_seed(0)
    sizes = {"fc1": (500, 40), "fc2": (500, 500), "fc3": (4, 500)}
    network = nn.Sequential()
    for name, (m, n) in sizes.items():
        network.add_module(name, nn.Linear(n, m))
        if name != "fc3":
            network.add_module(f"relu_{name}", nn.ReLU())
    for name in sizes:
        weight = network.get_submodule(name).weight.detach()
        weight.copy_(torch.randn(weight.shape, generator=generator) * (2 / weight.shape[1]) ** 0.5)
        network.get_submodule(name).bias.detach().zero_()
    X = torch.randn(400, 40, generator=generator)
    products = halved_products([network.get_submodule(name).weight.detach() for name in sizes])
    assert [tuple(S.shape) for S in products] == [(4, 500), (4, 500), (4, 4)]
    A = layer_hessian(network, "fc3", X).output_hessian
    torch.testing.assert_close(products[2], torch.eye(4))
    for S, name in zip(products, sizes, strict=True):
        assert torch.equal(later_weights(network, name), S)
    for S, name in zip(products[:2], ("fc1", "fc2"), strict=True):
        M, approximated = layer_hessian(network, name, X).output_hessian, S.T @ A @ S
        top, expected = (torch.linalg.eigh(matrix).eigenvectors[:, -3:] for matrix in (M, approximated))
        assert overlap(top, expected) > 0.7  # by chance 3/500
        along = torch.trace(expected.T @ M @ expected) / torch.trace(approximated)
        assert float(along) == pytest.approx(1, abs=0.1)


def test_row_space_without_the_sum_of_the_rows():
    S = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = row_space_without_sum(S)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(S.sum(0) @ basis, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.lstsq(S.T, basis).solution.T @ S, basis.T)  # in the span of the rows
    # With orthonormal rows it is the range of S^T A S for any A of rank 3 whose null space is that of all ones.
    rows = torch.linalg.qr(S.T).Q.T
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    A = torch.diag(p) - torch.outer(p, p)
    top = torch.linalg.eigh(rows.T @ A @ rows).eigenvectors[:, -3:]
    assert overlap(top, row_space_without_sum(rows)) == pytest.approx(1)
