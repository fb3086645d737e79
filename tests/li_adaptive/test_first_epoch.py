"""The steps of the first epoch, against the training that keeps epochs only, and what is measured there."""

import numpy as np
import pytest
import torch

from common.hessian.spectral_measure import edge_eigenvalues
from common.li_adaptive.first_epoch import EarlyHessians, early_hessians, first_steps
from common.li_adaptive.hinge_hessian import hinge_hessian
from common.li_adaptive.networks import initialize, lenet
from common.li_adaptive.training import RECIPES, train_recipe


def images(n, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator), 1.0 - 2.0 * (torch.arange(n) % 2)


@pytest.mark.parametrize(("name", "shape", "width"), [("LeNet", (1, 28, 28), 1.0), ("VGG", (3, 32, 32), 1 / 32)])
def test_a_whole_epoch_of_steps_is_the_epoch_of_the_training(name, shape, width):
    x, y = images(150, shape)
    kept = train_recipe(name, width, x, y, x[:4], y[:4], epochs=2, keep=[0, 1], seed=3)["parameters"]
    found = first_steps(name, width, x, y, [0, 1, 3], 3)
    assert torch.equal(found[0], kept[0]) and not torch.equal(found[1], kept[0])
    torch.testing.assert_close(found[2], kept[1])
    with pytest.raises(ValueError, match=r"steps 0..3, got \[4\]"):
        first_steps(name, width, x, y, [4], 3)


def test_measures_are_those_of_the_operator():
    x, y = images(96, (1, 28, 28))
    found = EarlyHessians(**early_hessians("LeNet", 1.0, x, y, [0, 2], active=5, edges=2, seed=1))
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
    probe = torch.randn(H.shape[0], 1, generator=torch.Generator().manual_seed(1))
    assert float(found.rms[0]) == pytest.approx(
        float((hinge_hessian(network, x, y) @ probe).double().square().mean().sqrt()), rel=1e-5
    )


def test_asymmetry_and_shares_of_known_edges():
    edges = {
        "lowest": torch.tensor([[-3.0, -1.0], [-2.0, -1.0]]),
        "highest": torch.tensor([[3.0, 1.0], [4.0, 3.0]]),
    }
    found = EarlyHessians(torch.tensor([0, 1]), torch.ones(2), torch.ones(2), torch.tensor([5, 5]), **edges)
    np.testing.assert_allclose(found.edge_asymmetry(), [0, 4 / 10])
    np.testing.assert_allclose(found.negative_share(), [0.5, 0.0])
