"""The steps of the first epoch, against the training that keeps epochs only, and what is measured there."""

import numpy as np
import pytest
import torch
from torch.nn.utils import vector_to_parameters

from common.hessian.spectral_measure import edge_eigenvalues, lanczos_measures
from common.li_adaptive.first_epoch import EarlyHessians, early_hessians, first_steps
from common.li_adaptive.hinge_hessian import hinge_hessian
from common.li_adaptive.networks import initialize, lenet
from common.li_adaptive.training import RECIPES, train_recipe


def images(n, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator), 1.0 - 2.0 * (torch.arange(n) % 2)


def test_a_whole_epoch_of_steps_is_the_epoch_of_the_training():
    x, y = images(150, (1, 28, 28))
    kept = train_recipe("LeNet", 1.0, x, y, x[:4], y[:4], epochs=2, keep=[0, 1], seed=3)["parameters"]
    found = first_steps(x, y, [0, 1, 3], 3)
    assert torch.equal(found[0], kept[0]) and torch.equal(found[2], kept[1])
    for outside in (4, -1):
        with pytest.raises(ValueError, match=rf"steps 0..3, got \[{outside}\]"):
            first_steps(x, y, [outside], 3)


def test_a_step_is_one_of_gradient_descent():
    # all images in one batch: whatever their order, the gradient is that of the mean loss
    x, y = images(40, (1, 28, 28))
    start, end = first_steps(x, y, [0, 1], 3)
    network = lenet()
    vector_to_parameters(start, network.parameters())
    risk = torch.relu(1 - y * network(x)).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(risk, list(network.parameters()))])
    assert gradient.abs().max() > 0
    torch.testing.assert_close(end, start - RECIPES["LeNet"].lr * gradient)


def test_measures_are_those_of_the_operator():
    x, y = images(96, (1, 28, 28))
    found = EarlyHessians(**early_hessians(x, y, [0, 2], active=5, edges=2, seed=1))
    assert found.steps.tolist() == [0, 2] and found.lowest.shape == (2, 2)
    network = lenet()
    initialize(network, "uniform", torch.Generator().manual_seed(1), scale=RECIPES["LeNet"].initialization[1])
    number = int(found.images[0])
    margin = y * network(x).detach()
    assert int((margin[:number] < 1).sum()) == 5 and bool(margin[number - 1] < 1)
    assert float(found.active[0]) == pytest.approx(float((margin < 1).double().mean()))
    H = hinge_hessian(network, x[:number], y[:number])
    lowest, highest = edge_eigenvalues(H, 1, seed=7)
    assert float(found.lowest[0, 0]) == pytest.approx(lowest[0], rel=1e-2)
    assert float(found.highest[0, 0]) == pytest.approx(highest[0], rel=1e-2)


def test_the_rms_eigenvalue_is_that_of_lanczos_moments():
    # of other random vectors; six networks, as one vector is enough for a rough value only
    x, y = images(24, (1, 28, 28))
    found = [EarlyHessians(**early_hessians(x, y, [0], active=5, edges=1, seed=k)) for k in range(6)]
    other = []
    for k in range(6):
        network = lenet()
        initialize(network, "uniform", torch.Generator().manual_seed(k), scale=1.0)
        H = hinge_hessian(network, x, y)
        moments = lanczos_measures(H, iterations=2, starts=6, seed=100 + k).moments(2)
        other.append(float(moments.mean()) ** 0.5)
    np.testing.assert_allclose([float(f.rms[0]) for f in found], other, rtol=0.5)
    assert abs(np.mean([float(f.rms[0]) for f in found] / np.array(other)) - 1) < 0.1


def test_asymmetry_and_shares_of_known_edges():
    edges = {
        "lowest": torch.tensor([[-3.0, -1.0], [-2.0, -1.0]]),
        "highest": torch.tensor([[3.0, 1.0], [4.0, 3.0]]),
    }
    found = EarlyHessians(torch.tensor([0, 1]), torch.ones(2), torch.ones(2), torch.tensor([5, 5]), **edges)
    np.testing.assert_allclose(found.edge_asymmetry(), [0, 4 / 10])
    np.testing.assert_allclose(found.negative_share(), [0.5, 0.0])


def test_an_odd_number_of_edges_cannot_be_half_negative():
    edges = torch.tensor([[3.0, 2.0, 1.0]])
    found = EarlyHessians(torch.tensor([0]), torch.ones(1), torch.ones(1), torch.tensor([5]), -edges, edges)
    with pytest.raises(ValueError, match=r"even number of eigenvalues .* got 3"):
        found.negative_share()
    pairs = EarlyHessians(
        torch.tensor([0]), torch.ones(1), torch.ones(1), torch.tensor([5]), -edges[:, :2], edges[:, :2]
    )
    assert pairs.negative_share() == 0.5
