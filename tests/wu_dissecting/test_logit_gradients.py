"""Logit gradients by class, held against automatic differentiation and against what is to be expected of them."""

import pytest
import torch

from common.hessian.layer import LayerHessian, layer_hessian
from common.wu_dissecting.logit_gradients import (
    corrected_centres,
    cosines_at_initialization,
    logit_gradients,
    mean_cosine,
    own_centres,
    share_between,
    share_between_classes,
    trace_parts,
)
from common.wu_dissecting.networks import classifier


def samples(number, classes, generator):
    return torch.randn(number, 12, 1, 1, generator=generator), torch.arange(number) % classes


def test_means_are_those_of_automatic_differentiation():
    generator = torch.Generator().manual_seed(0)
    X, y = samples(20, 3, generator)
    network = classifier("F-6-5", (12, 1, 1), 3).eval()
    found = logit_gradients(network, "fc1", layer_hessian(network, "fc1", X), X, y)
    weight = network.get_submodule("fc1").weight
    gamma, delta = torch.zeros(3, 3, 6), torch.zeros(3, 3, 6 * 12)
    for x, i in zip(X, y, strict=True):
        z = network(x[None])[0]
        p = z.detach().softmax(0)
        root = torch.diag(p.sqrt()) - p.sqrt()[:, None] * p  # rows j: sqrt(p_j) (e_j - p)
        torch.testing.assert_close(root.T @ root, torch.diag(p) - torch.outer(p, p))
        for j in range(3):
            (gradient,) = torch.autograd.grad(root[j] @ z, weight, retain_graph=True)
            delta[i, j] += gradient.flatten() / (y == i).sum()
            gamma[i, j] += gradient @ x.flatten() / x.square().sum() / (y == i).sum()
    torch.testing.assert_close(found.gamma, gamma, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.delta, delta, atol=1e-5, rtol=1e-4)


def test_centres_of_a_wide_network_at_initialization_are_predicted(at_initialization):
    generator = torch.Generator().manual_seed(1)
    X, y = torch.randn(400, 12, 1, 1, generator=generator) + 0.6, torch.arange(400) % 4
    expected, printed, gated, joint = cosines_at_initialization(X.flatten(1), 2), [], [], []
    for _ in range(4):
        network = at_initialization("F-400^2", 12, 4, generator)
        H = layer_hessian(network, "fc1", X)
        found = logit_gradients(network, "fc1", H, X, y)
        centres = corrected_centres(network, "fc1", H, found.mean_root)
        of_printed = (found.gamma, found.gamma_centres), (found.delta, found.delta_centres)
        printed.append([mean_cosine(*parts) for parts in of_printed])
        gated.append([mean_cosine(found.gamma, centres.gamma), mean_cosine(found.delta, centres.delta)])
        joint.append([mean_cosine(found.gamma, centres.gamma_joint), mean_cosine(found.delta, centres.delta_joint)])
    printed, gated, joint = (torch.tensor(part).mean(0) for part in (printed, gated, joint))
    assert 0.3 < expected["Δ"] < expected["Γ"] < 0.95
    assert printed.tolist() == pytest.approx([expected["Γ"], expected["Δ"]], abs=0.03)
    assert float(gated[0]) > 0.98
    assert (gated > printed + 0.02).all()
    assert (joint > 0.97).all()  # 400 samples leave a little
    assert own_centres(found.gamma, found.gamma_centres) == 1
    assert own_centres(found.gamma, found.gamma_centres.roll(1, 0)) == 0
    assert float(found.gamma_centres.norm() / found.gamma.mean(0).norm()) == pytest.approx(expected["Γ"], abs=0.1)
    assert share_between(found.gamma, 0) > 0.8 > 0.2 > share_between(found.gamma, 1)
    p = network(X).softmax(1).detach()
    assert trace_parts(H, y, found.gamma).between == pytest.approx(
        share_between_classes(X.flatten(1), y, p, 2), rel=0.1
    )


def test_trace_between_classes_is_a_part_of_that_of_the_output_hessian():
    generator = torch.Generator().manual_seed(3)
    X, y = samples(30, 3, generator)
    network = classifier("F-6-5", (12, 1, 1), 3).eval()
    H = layer_hessian(network, "fc1", X)
    gamma = logit_gradients(network, "fc1", H, X, y).gamma
    found = trace_parts(H, y, gamma)
    assert found.total == pytest.approx(float(torch.trace(H.output_hessian)), rel=1e-4)
    assert (found.total - found.within) / found.mean == pytest.approx(3, rel=1e-4)  # a sum over logits, no mean
    alone = LayerHessian(H.X[y == 1], H.B[y == 1] - H.B[y == 1].mean(0))
    others = [LayerHessian(H.X[y == i], H.B[y == i] - H.B[y == i].mean(0)) for i in (0, 2)]
    within = sum(float(torch.trace(part.output_hessian)) for part in (alone, *others)) / 3
    assert found.within == pytest.approx(within, rel=1e-4)
    assert found.between == pytest.approx(1 - within / found.total, rel=1e-4)


def test_every_class_needs_a_sample():
    X, y = samples(6, 2, torch.Generator().manual_seed(0))
    network = classifier("F-6-5", (12, 1, 1), 3).eval()
    with pytest.raises(ValueError, match="all 3 classes"):
        logit_gradients(network, "fc1", layer_hessian(network, "fc1", X), X, y)


def test_shares_of_variance():
    generator = torch.Generator().manual_seed(2)
    c, centres = 10, torch.randn(10, 30, generator=generator)
    assert share_between(centres.expand(c, c, 30), 0) == pytest.approx(1)
    assert share_between(centres.expand(c, c, 30), 1) == pytest.approx(0, abs=1e-12)
    noise = torch.randn(c, c, 2000, generator=generator)
    assert share_between(noise, 0) == pytest.approx(1 / (c + 1), abs=0.01)
