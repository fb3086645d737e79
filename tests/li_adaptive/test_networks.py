"""The networks of Li, their data and their training."""

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from common.cache import PartialFile
from common.li_adaptive.data import shift_and_flip, zero_against_rest
from common.li_adaptive.networks import BatchStandardize, affine_layers, initialize, lenet, perceptron, vgg
from common.li_adaptive.training import HingeLoss, train_sgd

GENERATOR = torch.Generator


def count(network):
    return sum(p.numel() for p in network.parameters())


def test_lenet_has_the_printed_number_of_parameters():
    network = lenet()
    assert count(network) == 1_232_768
    assert network(torch.zeros(3, 1, 28, 28)).shape == (3,)


def test_vgg_has_as_many_parameters_as_the_described_network():
    network = vgg()
    assert count(network) == 8_684_864  # printed as 8,684,684
    assert len(affine_layers(network)) == 12
    assert vgg(width=1 / 16)(torch.randn(2, 3, 32, 32)).shape == (2,)


@pytest.mark.parametrize("layers", [6, 9, 12])
def test_vgg_of_fewer_layers(layers):
    network = vgg(width=1 / 32, layers=layers)
    assert len(affine_layers(network)) == layers
    assert network(torch.randn(2, 3, 32, 32)).shape == (2,)


@pytest.mark.parametrize("arguments", [{"width": 0.0}, {"layers": 5}, {"layers": 13}])
def test_vgg_that_cannot_be(arguments):
    with pytest.raises(ValueError, match=r"width|layers"):
        vgg(**arguments)


def test_standardized_batches_are_those_of_torch_and_a_constant_channel_is_0():
    x = 3e-3 * torch.randn(20, 4, 5, 5) + 0.1
    x[:, 2] = 1.0
    x.requires_grad_()
    out = BatchStandardize()(x)
    expected = torch.nn.BatchNorm2d(4, affine=False, track_running_stats=False)(x)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-3)
    assert (out[:, 2] == 0).all()
    (gradient,) = torch.autograd.grad((out**3).sum(), x)
    assert gradient.isfinite().all()
    flat = torch.randn(30, 3)
    torch.testing.assert_close(BatchStandardize(0.0)(flat).var(0, correction=0), torch.ones(3))


@pytest.mark.parametrize(("kind", "expected"), [("uniform", 1 / 25), ("normal", 1.0), ("fan-in", 1 / 25)])
def test_initialization_has_the_stated_variance(kind, expected):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4000, 5))
    initialize(network, kind, GENERATOR().manual_seed(0))
    assert float(network[0].weight.detach().var()) == pytest.approx(expected, rel=0.02)
    assert (network[0].bias == 0).all()
    with pytest.raises(ValueError, match="unknown initialization"):
        initialize(network, "xavier", GENERATOR())


def test_zero_against_the_rest_is_balanced_and_standardized():
    data = zero_against_rest("MNIST", split="train", seed=1)
    assert len(data.y) == len(data.x) == data.source.samples
    assert float(data.y.sum()) == 0
    assert set(data.y.tolist()) == {-1.0, 1.0}
    assert abs(float(data.x.mean())) < 0.2
    assert 0.7 < float(data.x.std()) < 1.3
    few = zero_against_rest("MNIST", split="train", seed=1, samples=10)
    assert float(few.y.sum()) == 0
    with pytest.raises(ValueError, match="an even number"):
        zero_against_rest("MNIST", split="train", seed=1, samples=11)


def test_augmentation_crops_the_padded_image_or_its_mirror():
    x = torch.arange(1.0, 37).view(1, 1, 6, 6).repeat(50, 1, 1, 1)
    crops = shift_and_flip(x, GENERATOR().manual_seed(0))
    padded = torch.nn.functional.pad(x[0, 0], (4, 4, 4, 4))
    windows = [padded[i : i + 6, j : j + 6] for i in range(9) for j in range(9)]
    known = torch.stack(windows + [w.flip(1) for w in windows])
    matches = (crops == known).flatten(2).all(2).any(1)
    assert matches.all()
    assert len(crops.unique(dim=0)) > 20


def small_problem():
    generator = GENERATOR().manual_seed(0)
    x = torch.randn(70, 5, generator=generator)
    y = torch.sign(x[:, 0] + 0.3 * x[:, 1])
    network = perceptron([5, 8, 8])
    initialize(network, "fan-in", generator, scale=2.0)
    return network, (x, y)


ARGUMENTS = {"epochs": 6, "batch_size": 16, "lr": 0.1, "decay": {3: 0.02}, "momentum": 0.9, "keep": [0, 2, 6],
             "seed": 3}  # fmt: skip


def test_training_is_that_of_torch():
    network, data = small_problem()
    start = parameters_to_vector(network.parameters()).detach().clone()
    result = train_sgd(network, data, data, **ARGUMENTS)
    assert result.epochs.tolist() == [0, 2, 6]
    torch.testing.assert_close(result.parameters[0], start)
    other, _ = small_problem()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(6):
        if epoch == 3:
            optimizer.param_groups[0]["lr"] = 0.02
        generator = GENERATOR().manual_seed(3 * 100_003 + epoch)
        for rows in torch.randperm(70, generator=generator).split(16):
            optimizer.zero_grad()
            HingeLoss()(other(data[0][rows]), data[1][rows]).backward()
            optimizer.step()
    torch.testing.assert_close(result.parameters[-1], parameters_to_vector(other.parameters()).detach())
    assert result.risk[-1, 0] < result.risk[0, 0]


def test_interrupted_training_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("common.cache.CHECKPOINT_SECONDS", 0.0)
    network, data = small_problem()
    whole = train_sgd(network, data, data, **ARGUMENTS)

    def stop_in_epoch_4(x, generator):
        if generator.initial_seed() == 3 * 100_003 + 4:
            raise KeyboardInterrupt
        return x

    checkpoint = PartialFile(tmp_path / "training.pt", "a training")
    network, _ = small_problem()
    with pytest.raises(KeyboardInterrupt):
        train_sgd(network, data, data, **ARGUMENTS, augment=stop_in_epoch_4, checkpoint=checkpoint)
    network, _ = small_problem()
    resumed = train_sgd(network, data, data, **ARGUMENTS, checkpoint=checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(vars(whole).values(), vars(resumed).values(), strict=True))


def test_a_training_that_explodes_says_so():
    network, data = small_problem()
    with pytest.raises(FloatingPointError, match="not finite after epoch"):
        train_sgd(network, data, data, **ARGUMENTS | {"lr": 1e30})
    with pytest.raises(ValueError, match="epochs must lie in"):
        train_sgd(network, data, data, **ARGUMENTS | {"keep": [7]})


def test_ten_layers_of_a_hundred_neurons_have_some_ninety_thousand_parameters():
    assert sum(p.numel() for p in perceptron([100] * 10).parameters()) == 90_100
