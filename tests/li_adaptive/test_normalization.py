"""Homogeneity of gradient and Hessian in the size of the weights, and short trainings."""

import numpy as np
import pytest
import torch

from common import paths
from common.data import DataSource
from common.hessian.spectral_measure import LanczosMeasures
from common.li_adaptive import normalization
from common.li_adaptive.data import BinaryData
from common.li_adaptive.hinge_hessian import formed_hessian
from common.li_adaptive.networks import BatchStandardize, initialize, perceptron, vgg
from common.li_adaptive.normalization import (
    HeldDeviation,
    batch_norm_gradient,
    course_of_vgg,
    expected_gradient,
    gradient_size,
    homogeneous_sizes,
    initialized_vgg,
    layer_factor,
    random_batches,
    shape_distance,
    single_gradients,
    take_steps,
)


def network_at(c, layers):
    network = perceptron([5] + [6] * (layers - 1)).double()
    initialize(network, "fan-in", torch.Generator().manual_seed(0), scale=c)
    return network


def data():
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.where(x[:, 0] > 0, 1.0, -1.0).double()


@pytest.mark.parametrize("layers", [2, 3, 5])
def test_gradient_and_hessian_are_homogeneous_in_the_weights(layers):
    x, y = data()
    one, other = (gradient_size(network_at(c, layers), x, y) for c in (0.3, 0.03))
    assert one.inside and other.inside
    assert one.weights / other.weights == pytest.approx(10 ** (layers - 1))
    H, G = (formed_hessian(network_at(c, layers), x, y) for c in (0.3, 0.03))
    torch.testing.assert_close(H, 10 ** ((layers - 2) / 2) * G)


def test_biases_scale_otherwise_and_samples_beyond_the_margin_are_noticed():
    x, y = torch.randn(8, 3, 32, 32), torch.ones(8)
    sizes = []
    for c in (0.5, 1.0, 30.0):
        network = vgg(width=1 / 16, standardize=False, layers=6)
        initialize(network, "fan-in", torch.Generator().manual_seed(0), scale=c)
        sizes.append(gradient_size(network, x, y))
    assert sizes[1].weights / sizes[0].weights == pytest.approx(2**5, rel=1e-3)
    assert sizes[1].biases / sizes[0].biases < 0.9 * 2**5
    assert sizes[0].inside


def test_steps_are_those_asked_for():
    x, y = data()
    network = network_at(1.0, 3)
    squared = gradient_size(network, x, y)
    found = take_steps(network, [(x, y)] * 40, (x, y), dynamic=0.01)
    assert found.step[0] == pytest.approx(0.01 / (squared.weights + squared.biases))
    assert found.risk[-1] < found.risk[0] and len(found.accuracy) == 2 and not found.exploded
    with pytest.raises(ValueError, match="either a constant or a dynamic"):
        take_steps(network, [], (x, y))


def test_an_explosion_ends_the_training_and_leaves_finite_numbers():
    x, y = data()
    found = take_steps(network_at(2.0, 5), [(x, y)] * 50, (x, y), constant=1e200)
    assert found.exploded and len(found.risk) < 50
    assert np.isfinite(found.risk).all() and np.isfinite(found.step).all()


def test_a_gradient_that_vanishes_makes_no_step():
    x, y = data()
    network = network_at(2.0, 2)
    network[0].weight.data.zero_()
    found = take_steps(network, [(x, y)] * 3, (x, y), dynamic=0.01)
    assert (found.step == 0).all() and (found.risk == 1).all()


def test_a_network_is_left_as_it_is():
    x, y = data()
    network = network_at(1.0, 3).train()
    before = [p.clone() for p in network.parameters()]
    gradient_size(network, x, y)
    found = take_steps(network, [(x, y)] * 3, (x, y), constant=0.1)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))
    assert all(module.training for module in network.modules())
    step = torch.autograd.grad(torch.relu(1 - y * network(x)).mean(), list(network.parameters()))
    once = take_steps(network, [(x, y)], (x, y), constant=0.1).network
    for new, old, part in zip(once.parameters(), before, step, strict=True):
        torch.testing.assert_close(new, old - 0.1 * part)
    assert not torch.equal(next(found.network.parameters()), before[0])


def test_single_gradients_are_those_of_the_output():
    squares = single_gradients([8, 16], [2, 3], networks=3, seed=5)
    assert squares.shape == (3, 2, 2)
    generator = torch.Generator().manual_seed(5 + 1)
    network = perceptron([8, 8, 8])
    initialize(network, "fan-in", generator, scale=2.0)
    T = network(torch.randn(1, 8, generator=generator)).sum()
    expected = sum(float(g.square().sum()) for g in torch.autograd.grad(T, list(network.parameters())))
    assert squares[1, 1, 0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("n", "L", "c"), [(3, 2, 2.0), (8, 3, 1.0), (16, 5, 2.0), (16, 4, 0.5)])
def test_the_mean_squared_gradient_is_exact_at_any_width(n, L, c):
    squares = single_gradients([n], [L], networks=800, seed=1, scale=c)[:, 0, 0] / expected_gradient(n, L, c)
    assert squares.mean() == pytest.approx(1, abs=4 * squares.std() / len(squares) ** 0.5)
    assert squares.std() / len(squares) ** 0.5 < 0.1


def test_held_deviations_change_the_gradient_and_not_the_values():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(HeldDeviation()(x), BatchStandardize()(x))
    found = batch_norm_gradient([5, 6, 7], x, seed=3)
    assert found.true.shape == (2,) and found.difference > 0.1
    np.testing.assert_allclose(found.true, 0, atol=1e-10)
    np.testing.assert_allclose(found.held, 1, rtol=1e-10)


def test_no_factor_of_a_layer_changes_a_network_with_batch_norm():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    network = perceptron([5, 6, 7], standardize=True).double()
    initialize(network, "fan-in", torch.Generator().manual_seed(3))
    for module in network:
        if isinstance(module, BatchStandardize):
            module.eps = 0.0
    before = network(x).detach()
    network[0].weight.data *= 3.0
    torch.testing.assert_close(network(x).detach(), before)


def test_gradient_and_range_of_the_vgg_are_powers_of_c():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([1.0, -1.0, 1.0, -1.0])
    how = {"layers": 6, "width": 0.0625, "networks": 2, "samples": 4, "iterations": 10, "seed": 0}
    squares, ranges = homogeneous_sizes(x, y, [0.0625, 0.125], **how)
    assert squares.shape == (2, 2)
    np.testing.assert_allclose(squares[:, 1] / squares[:, 0], 2.0**5, rtol=1e-3)
    np.testing.assert_allclose(ranges[1] / ranges[0], 2.0**2, rtol=1e-2)
    with pytest.raises(ValueError, match="beyond its margin at c = 1000"):
        homogeneous_sizes(x, y, [1000.0], **how)


def test_factor_of_a_layer():
    depths = [3, 5, 9]
    squares = np.array([[L * 0.7**L * scale for L in depths] for scale in (0.5, 1.5)])
    assert layer_factor(depths, squares) == pytest.approx(0.7)


def test_spectra_of_one_shape_have_distance_zero():
    def measures(nodes):
        return LanczosMeasures(torch.tensor([nodes]), torch.tensor([[0.25, 0.75]]))

    assert shape_distance(measures([-1.0, 0.5]), measures([-4.0, 2.0])) == pytest.approx(0, abs=1e-6)
    assert shape_distance(measures([-1.0, 0.5]), measures([-1.0, 0.0])) == pytest.approx(0.375 / 0.625)


def test_equal_seeds_mean_equal_batches():
    x = torch.randn(100, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    first, second, other = (list(random_batches(x, x[:, 0, 0, 0].sign(), 2, seed)) for seed in (0, 0, 1))
    assert len(first) == 2 and first[0][0].shape == (64, 3, 1, 1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][0], other[0][0])


def test_the_course_of_a_training_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    x = torch.randn(80, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    some = BinaryData(x, x[:, 0, 0, 0].sign(), DataSource("test", "here", None, 80))
    settings = {"width": 1 / 16, "steps": 2, "seed": 3, "dynamic": 0.01}
    found = course_of_vgg(2.0, some, some, **settings)
    network = initialized_vgg(2.0, width=1 / 16, seed=3)
    expected = take_steps(network, random_batches(x, some.y, 2, 3), (x, some.y), dynamic=0.01)
    for key in ("risk", "step", "accuracy"):
        np.testing.assert_allclose(getattr(found, key), getattr(expected, key), rtol=1e-5)
    assert not found.exploded
    monkeypatch.setattr(normalization, "take_steps", None)
    assert (course_of_vgg(2.0, some, some, **settings).risk == found.risk).all()
