"""Entries of the Hessian at chosen places, against the formed Hessian."""

import pytest
import torch
from torch import nn

from common.li_adaptive.hessian_samples import hessian_samples
from common.li_adaptive.hinge_hessian import formed_hessian
from common.li_adaptive.networks import BatchStandardize, initialize, perceptron


def small_lenet():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 1, bias=False), nn.Flatten(0),
    )  # fmt: skip


def small_standardized():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), BatchStandardize(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 3),
        BatchStandardize(), nn.ReLU(), nn.Linear(3, 1, bias=False), nn.Flatten(0),
    )  # fmt: skip


@pytest.mark.parametrize("make", [small_lenet, small_standardized])
def test_entries_are_those_of_the_formed_hessian(make):
    generator = torch.Generator().manual_seed(0)
    network = make().double()
    initialize(network, "fan-in", generator, scale=2.0)
    for p in network.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(23, 1, 10, 10, generator=generator, dtype=torch.float64)
    y = torch.sign(torch.randn(23, generator=generator, dtype=torch.float64))
    count = sum(p.numel() for p in network.parameters())
    rows, columns = torch.arange(count).split(count // 2 + 1)
    samples = hessian_samples(network, x, y, rows, columns, batch_size=8)
    assert samples.shape == (3, len(rows), len(columns))
    for H, part, labels in zip(samples, x.split(8), y.split(8), strict=True):
        whole = formed_hessian(network, part, labels)
        torch.testing.assert_close(H, whole[rows][:, columns], atol=1e-12, rtol=1e-9)
    assert (samples != 0).double().mean() > 0.02
    repeated = hessian_samples(network, x, y, columns[[3, 0, 3]], rows[[5, 5]], batch_size=8)
    torch.testing.assert_close(repeated, samples.mT[:, [3, 0, 3]][:, :, [5, 5]])


def test_entries_of_a_perceptron_and_of_samples_beyond_the_margin():
    network = perceptron([4, 5, 3]).double()
    initialize(network, "fan-in", torch.Generator().manual_seed(1), scale=20.0)
    x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = torch.sign(network(x)).detach()  # all are right, some beyond the margin
    assert 0 < int((y * network(x) < 1).sum()) < 30
    everything = torch.arange(sum(p.numel() for p in network.parameters()))
    (H,) = hessian_samples(network, x, y, everything, everything, batch_size=30)
    torch.testing.assert_close(H, formed_hessian(network, x, y), atol=1e-13, rtol=1e-10)
    network[-2].weight.data *= 1e6
    (H,) = hessian_samples(network, x, y, everything, everything, batch_size=30)
    assert (H[: 4 * 5, 4 * 5 :] == 0).float().mean() > 0.5


@pytest.mark.parametrize(("rows", "size"), [([-1], 4), ([10**6], 4), ([0], 0)])
def test_entries_that_there_are_not(rows, size):
    network, rows = perceptron([4, 5]), torch.tensor(rows)
    with pytest.raises(ValueError, match=r"indices|batches"):
        hessian_samples(network, torch.randn(8, 4), torch.ones(8), rows, rows, batch_size=size)


def test_a_network_keeps_its_modes_and_one_that_is_not_piecewise_linear_is_refused():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Linear(3, 1, bias=False), nn.Flatten(0))
    x, y, places = torch.randn(8, 4), torch.ones(8), torch.arange(5)
    first, second = (hessian_samples(network, x, y, places, places, batch_size=4) for _ in range(2))
    assert torch.equal(first, second)  # dropout is off
    assert all(module.training for module in network.modules())
    network[1] = nn.Tanh()
    with pytest.raises(TypeError, match="Tanh is not linear between its switches"):
        hessian_samples(network, x, y, places, places, batch_size=4)
