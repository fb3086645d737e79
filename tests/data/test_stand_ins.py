"""Stand-ins: announced, as large as the real data, drawn by seed, learnable where they should be."""

import pytest
import torch

from common.data import cifar, images
from common.data import mnist as original_mnist


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("MNIST", (1, 28, 28), 10),
        ("CIFAR-10", (3, 32, 32), 10),
        ("CIFAR-100", (3, 32, 32), 100),
        ("CoverType", (54,), 2),
    ],
)
def test_stand_ins_are_announced_and_sized_like_the_real_data(place, name, shape, classes, capsys):
    assert not images.available(name)
    found = images.load(name)
    assert capsys.readouterr().out.endswith("): a stand-in takes its place\n")
    assert found.source.stand_in and "scikit-learn" in found.source.origin and found.source.sha256 is None
    size = images.SIZES[name]["train"]
    assert found.x.shape == (size, *shape) and found.x.dtype == torch.float32 and found.source.samples == size
    assert found.y.min() >= 0 and found.y.max() < classes and len(found.y.unique()) > min(classes, 20) / 2
    if len(shape) == 3:
        assert found.x.min() >= 0 and 0.5 < found.x.max() <= 1
    part = images.load(name, split="test", samples=15, seed=1)
    assert part.x.shape == (15, *shape)
    assert torch.equal(part.x, images.load(name, split="test", samples=15, seed=1).x)
    assert not torch.equal(part.x, images.load(name, split="test", samples=15, seed=2).x)


@pytest.mark.parametrize(("name", "least"), [("MNIST", 0.9), ("CIFAR-10", 0.2)])
def test_digits_can_be_learned(place, monkeypatch, name, least):
    """The nearest training image has the label: far more often than one time in ten."""
    for sizes in (original_mnist.SIZES, cifar.SIZES):
        monkeypatch.setitem(sizes, "train", 4000)
        monkeypatch.setitem(sizes, "test", 300)
    train, test = images.load(name), images.load(name, split="test")
    nearest = torch.cdist(test.x.flatten(1), train.x.flatten(1)).argmin(1)
    assert (train.y[nearest] == test.y).float().mean() > least


def test_cifar100_stand_in_takes_cifar10_where_it_can(place):
    place.pack(place.data / "cifar10.tar.gz", place.cifar10())
    real = images.load("CIFAR-10")
    x, y, source = images.load("CIFAR-100")
    assert source.stand_in and source.origin == "CIFAR-10 (image folder, PNG) with random 100-way labels"
    assert source.sha256 == real.source.sha256
    pixels = {tuple(v) for v in real.x[:, :, 0, 0].tolist()}
    assert {tuple(v) for v in x[:, :, 0, 0].tolist()} == pixels and len(x) == 60
    assert y.max() >= 10 and y.max() < 100
    label = dict(zip(map(tuple, x[:, :, 0, 0].tolist()), y.tolist(), strict=True))
    part = images.load("CIFAR-100", samples=20, seed=5)  # an image keeps its label
    assert [label[tuple(v)] for v in part.x[:, :, 0, 0].tolist()] == part.y.tolist()
