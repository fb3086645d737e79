"""Laws of the gates against closed forms, simulation and automatic differentiation."""

import numpy as np
import pytest
import torch
from torch import nn

from common import paths
from common.hessian.layer import layer_hessian
from common.wu_dissecting.closed_forms import ClosedForms, closed_forms, closed_forms_along_training
from common.wu_dissecting.gates import (
    COSINE,
    both_active,
    gate_means,
    gate_moment,
    gated_weights,
    jacobian_means,
    kernel_means,
    limit_of_overlap,
    next_cosine,
    overlap_at_initialization,
)
from common.wu_dissecting.networks import classifier
from common.wu_dissecting.output_hessian import later_weights, mean_gradient
from common.wu_dissecting.schedule import Snapshot
from common.wu_dissecting.trained import dissected


def test_moments_of_the_share_of_active_inputs():
    assert gate_moment(1, 0.4) == pytest.approx(0.5)
    for cosine in (0.0, COSINE, 0.6):
        assert gate_moment(2, cosine) == pytest.approx(float(both_active(cosine)), rel=1e-9)
        assert gate_moment(3, cosine) == pytest.approx(1 / 8 + 3 / (4 * np.pi) * np.arcsin(cosine), rel=1e-9)
    assert limit_of_overlap() == pytest.approx(1 / (1 + 2 / np.pi * np.arcsin(1 / np.pi)), rel=1e-12)
    assert limit_of_overlap(0.0, 1) == 1
    assert limit_of_overlap(layers=2) == pytest.approx(0.62392, abs=1e-5)
    with pytest.raises(ValueError, match="cosine"):
        gate_moment(2, 1.0)


def test_cosines_from_layer_to_layer():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 400, generator=generator).relu()
    cosine = float(nn.functional.cosine_similarity(x[0], x[1], dim=0))
    W = torch.randn(100000, 400, generator=generator)
    u = x @ W.T
    active = ((u > 0).all(0)).float()
    assert float(active.mean()) == pytest.approx(float(both_active(cosine)), abs=4 * float(active.std()) / 100000**0.5)
    y = u.relu()
    after = float(nn.functional.cosine_similarity(y[0], y[1], dim=0))
    assert after == pytest.approx(float(next_cosine(cosine)), abs=0.01)


def test_means_of_jacobians_are_those_of_automatic_differentiation(at_initialization):
    network = at_initialization("F-7^2", 5, 3, torch.Generator().manual_seed(2))
    for name in ("fc1", "fc2", "fc3"):
        network.get_submodule(name).bias.detach().copy_(
            torch.linspace(-0.3, 0.3, len(network.get_submodule(name).bias))
        )
    X = torch.randn(30, 5, 1, 1, generator=torch.Generator().manual_seed(3))
    G, AG, p = [], [], network(X).softmax(1).detach()
    for x, probability in zip(X, p, strict=True):
        u = (network.fc1(x.flatten())).detach()
        J = torch.autograd.functional.jacobian(lambda u: network.fc3(network.fc2(u.relu()).relu()), u)
        G.append(J)
        AG.append((torch.diag(probability) - torch.outer(probability, probability)) @ J)
    G, inputs = torch.stack(G), X.flatten(1)
    mean, products = jacobian_means(network, "fc1", inputs)
    torch.testing.assert_close(mean, G.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(products, torch.einsum("zkm,zn->kmn", G, inputs) / 30, atol=1e-5, rtol=1e-4)
    H = layer_hessian(network, "fc1", X)
    torch.testing.assert_close(mean_gradient(H, p), torch.stack(AG).mean(0), atol=1e-5, rtol=1e-4)
    # The part of M between: M is not below it, and the rest is not negative.
    A = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0).double()
    gradient = mean_gradient(H, p).double()
    rest = H.output_hessian.double() - gradient.T @ torch.linalg.pinv(A) @ gradient
    assert float(torch.linalg.eigvalsh(rest).min()) > -1e-6


def test_gates_that_are_all_a_half_give_the_printed_products(at_initialization):
    network = at_initialization("F-9^3", 4, 3, torch.Generator().manual_seed(4))
    for layer, count in (("fc1", 3), ("fc2", 2), ("fc4", 0)):
        halves = [torch.full((9,), 0.5)] * count
        torch.testing.assert_close(gated_weights(network, layer, halves), later_weights(network, layer))
    with pytest.raises(ValueError, match="gates of 3 layers"):
        gated_weights(network, "fc1", [])
    X = torch.randn(50, 4, 1, 1, generator=torch.Generator().manual_seed(5))
    means = gate_means(network, "fc1", X.flatten(1))
    first, _, last = means.plain
    torch.testing.assert_close(first, (network.fc1(X.flatten(1)) > 0).float().mean(0))
    inputs = nn.Sequential(*list(network.children())[:5])(X).detach()
    weighted = gate_means(network, "fc3", inputs).weighted[0]
    p = network(X).softmax(1).detach()
    torch.testing.assert_close(means.probabilities, p)
    w = 1 - p.square().sum(1)
    hidden = nn.Sequential(*list(network.children())[:-1])(X) > 0
    torch.testing.assert_close(weighted, w @ hidden.float() / w.sum(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last, hidden.float().mean(0))
    with pytest.raises(ValueError, match="ReLU after each"):
        gate_means(classifier("F-9^2-BN", (4, 1, 1), 3), "fc1", X.flatten(1))
    with pytest.raises(ValueError, match="no layer 'fc9'"):
        gate_means(network, "fc9", X.flatten(1))


def test_printed_and_gated_spaces_of_a_deep_network(at_initialization):
    found = []
    for seed in range(6):
        network = at_initialization("F-300^2", 1500, 3, torch.Generator().manual_seed(seed))
        X = torch.randn(1000, 1500, 1, 1, generator=torch.Generator().manual_seed(seed)).relu()
        found.append(closed_forms(network, "fc1", layer_hessian(network, "fc1", X), pairs=300))
    mean = ClosedForms(*np.mean(found, 0))
    error = ClosedForms(*np.std(found, 0)).printed / len(found) ** 0.5
    assert abs(mean.printed - limit_of_overlap(layers=2)) < 4 * error + 0.01
    assert mean.predicted == pytest.approx(limit_of_overlap(layers=2), abs=0.01)
    assert mean.gates > 0.98
    assert mean.weighted > 0.98
    assert mean.gradient > 0.99
    assert mean.explained == pytest.approx(4 * float(both_active(COSINE) * both_active(next_cosine(COSINE))), abs=0.05)
    assert mean.effective > 500


def test_closed_forms_of_an_output_layer_are_exact(at_initialization):
    network = at_initialization("F-6^2", 5, 3, torch.Generator().manual_seed(8))
    X = torch.randn(40, 5, 1, 1, generator=torch.Generator().manual_seed(9))
    found = closed_forms(network, "fc3", layer_hessian(network, "fc3", X))
    assert found[:4] == pytest.approx([1] * 4, abs=1e-5)  # A1 = 0
    assert found.explained == pytest.approx(1, abs=1e-5)
    assert found.predicted == 1


def test_closed_forms_along_training_are_those_of_every_network_and_epoch(tmp_path, monkeypatch):
    (paths.CACHE / "data").mkdir(parents=True, exist_ok=True)
    (tmp_path / "data").symlink_to(paths.CACHE / "data")  # decoded images
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    case = dissected("F-12^2", "MNIST", members=2, epochs=1, samples=50, seed=3)
    found = closed_forms_along_training(case, ["fc1", "fc2"], [Snapshot(0, 40), Snapshot(1, 40)])
    assert found.printed.shape == (2, 2, 2)
    H = case.hessian(1, "fc2", 40, 0)
    expected = closed_forms(case.network(1, 0), "fc2", H)
    assert [form[0, 1, 1] for form in found] == pytest.approx(list(expected), rel=1e-4)


def test_kernel_of_pairs_of_inputs():
    X = torch.randn(70, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    norms = X.norm(dim=1)
    cosine = (X @ X.T / torch.outer(norms, norms)).numpy()
    np.fill_diagonal(cosine, 1.0)
    second = both_active(cosine) * both_active(next_cosine(cosine))
    of_k, of_product = kernel_means(X, 2, rows=32)
    assert float(of_k[0]) == pytest.approx(both_active(cosine).mean())
    assert float(of_k[1]) == pytest.approx(second.mean())
    assert float(of_product[1]) == pytest.approx((second * (X @ X.T).numpy()).mean())
    assert overlap_at_initialization(X, 2) == pytest.approx(1 / 16 / second.mean())
