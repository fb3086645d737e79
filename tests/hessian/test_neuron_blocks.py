"""Layer-wise Hessian blocks of deep perceptrons against automatic differentiation."""

import pytest
import torch

from common.dong_quantifying.networks import lecun_weights
from common.hessian.neuron_blocks import neuron_block_norms

WIDTHS = [4, 5, 3, 6, 3]


def network(weights, X):
    for W in weights[:-1]:
        X = torch.relu(X @ W.T)
    return X @ weights[-1].T


@pytest.mark.parametrize("loss", ["CE", "MSE"])
@pytest.mark.parametrize("layer", range(len(WIDTHS) - 1))
def test_block_norms_of_every_layer_against_autograd(layer, loss):
    generator = torch.Generator().manual_seed(layer)
    weights = [W.double() for W in lecun_weights(WIDTHS, generator)]
    X = torch.randn(9, WIDTHS[0], generator=generator, dtype=torch.float64)
    y = torch.arange(9) % WIDTHS[-1]
    shape = weights[layer].shape

    def objective(w):
        f = network([*weights[:layer], w.reshape(shape), *weights[layer + 1 :]], X)
        if loss == "CE":
            return torch.nn.functional.cross_entropy(f, y)
        return ((f - torch.nn.functional.one_hot(y, WIDTHS[-1])) ** 2).sum(1).mean()

    H = torch.func.hessian(objective)(weights[layer].flatten()).reshape(*shape, *shape)
    expected = (H**2).sum((1, 3))
    assert expected.max() > 0
    torch.testing.assert_close(neuron_block_norms(weights, X, loss, layer, 100), expected, rtol=1e-10, atol=1e-16)
    # A subset of neurons gives the corner that belongs to them.
    torch.testing.assert_close(neuron_block_norms(weights, X, loss, layer, 2), expected[:2, :2], rtol=1e-10, atol=1e-16)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="at least two widths"):
        lecun_weights([3], generator)
    with pytest.raises(ValueError, match="at least 1"):
        lecun_weights([3, 0], generator)
    weights = lecun_weights([3, 2], generator)
    with pytest.raises(ValueError, match="layer must be between 0 and 0"):
        neuron_block_norms(weights, torch.ones(1, 3), "CE", 1, 1)
    with pytest.raises(ValueError, match="'CE' or 'MSE'"):
        neuron_block_norms(weights, torch.ones(1, 3), "hinge", 0, 1)


@pytest.mark.usefixtures("unchecked")
def test_networks_and_samples_that_do_not_fit_are_refused():
    W, V, X = torch.ones(2, 3), torch.ones(4, 2), torch.ones(5, 3)
    for arguments, message in (
        (([W, V], X, "CE", 0, -1), "number of neurons must be at least 1, got -1"),
        (([W, V], X, "CE", 0, 0), "number of neurons must be at least 1, got 0"),
        (([W, V], X[:0], "CE", 0, 1), "number of samples N must be at least 1"),
        (([W, V], X * torch.nan, "CE", 0, 1), "X holds values that are not finite"),
        (([W, V.T], X, "CE", 0, 1), r"weights\[1\] has 4 columns but weights\[0\] has 2 rows"),
        (([W, V], X[0], "CE", 0, 1), "X must be a matrix"),
    ):
        with pytest.raises(ValueError, match=message):
            neuron_block_norms(*arguments)
