"""Entries of the Hessian at chosen places, and counts of cumulants."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from common.li_adaptive.cumulants import (
    correlation_matrix,
    count_cumulants,
    expected_null_count,
    hessian_samples,
    normalized,
)
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


def brute_force(samples, order, threshold, convention):
    z, _ = normalized(samples, convention)
    z = z.numpy()
    n, K = z.shape
    total = unordered = distinct = 0
    for tuple_ in itertools.product(range(K), repeat=order):
        if order == 2 and tuple_[0] == tuple_[1]:
            continue
        w = z[:, tuple_]
        value = w.prod(1).mean()
        if order == 4:
            second = w.T @ w / n
            value -= second[0, 1] * second[2, 3] + second[0, 2] * second[1, 3] + second[0, 3] * second[1, 2]
        if abs(value) > threshold:
            total += 1
            unordered += tuple_ == tuple(sorted(tuple_))
            distinct += len(set(tuple_)) == order
    return total, unordered, distinct


@pytest.mark.parametrize("convention", ["pearson", "uncentred", "unit"])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_counts_are_those_of_all_tuples_one_by_one(order, convention):
    generator = torch.Generator().manual_seed(order)
    samples = torch.randn(30, 6, generator=generator, dtype=torch.float64) ** 3 + 0.2
    samples[:, 4] = 0.7
    threshold = 0.2 * order
    found = count_cumulants(samples, order, threshold, convention)
    assert (found.exceeding, found.unordered, found.distinct) == brute_force(samples, order, threshold, convention)
    assert (found.variables, found.constant) == (6, 1)
    assert 0 < found.exceeding
    assert found.fraction == found.exceeding / 6**order
    assert found.per_entry == found.exceeding / 6


def test_pearson_is_that_of_numpy_and_tiny_entries_do_not_vanish():
    samples = 1e-30 * torch.randn(50, 3)
    z, constant = normalized(samples, "pearson")
    np.testing.assert_allclose(z.T @ z / 50, np.corrcoef(samples.double().T), atol=1e-5)
    assert constant == 0
    with_constant = torch.cat([samples, torch.ones(50, 1)], 1)
    matrix = correlation_matrix(with_constant)
    np.testing.assert_allclose(matrix[:3, :3], np.corrcoef(samples.double().T), atol=1e-5)
    assert (matrix[3] == 0).all() and (matrix[:, 3] == 0).all()


@pytest.mark.parametrize("convention", ["pearson", "uncentred", "unit"])
@pytest.mark.parametrize(("order", "threshold"), [(2, 0.35), (3, 0.45), (4, 0.8)])
def test_expected_counts_are_the_mean_of_simulated_ones(order, threshold, convention):
    variables, n, runs = 12, 40, 400
    generator = torch.Generator().manual_seed(order)
    draws = torch.randn(runs, n, variables, generator=generator, dtype=torch.float64)
    counts = [count_cumulants(samples, order, threshold, convention) for samples in draws]
    parts = expected_null_count(order, variables, n, threshold, convention)
    all_tuples = np.array([c.exceeding for c in counts])
    distinct = np.array([c.distinct for c in counts])
    for sample, patterns in ((all_tuples, parts), (distinct, [order * "1"])):
        expected = sum(parts[p][0] for p in patterns)
        error = np.hypot(sample.std(ddof=1) / np.sqrt(runs), np.hypot.reduce([parts[p][1] for p in patterns]))
        assert abs(sample.mean() - expected) < 4 * error
        assert error < 0.5 * expected


def test_expected_number_of_large_correlations_is_that_of_student():
    from scipy import stats

    n, r = 157, 0.4
    p = 2 * stats.t.sf(r * np.sqrt((n - 2) / (1 - r**2)), n - 2)
    assert expected_null_count(2, 10_000, n, r, "pearson")["11"][0] == pytest.approx(1e4 * (1e4 - 1) * p, rel=1e-9)


@pytest.mark.parametrize(("order", "convention", "n"), [(5, "pearson", 9), (2, "spearman", 9), (3, "unit", 2)])
def test_counts_that_there_are_not(order, convention, n):
    with pytest.raises(ValueError, match=r"order|convention|samples"):
        count_cumulants(torch.randn(n, 3), order, 0.4, convention)


def test_random_submatrices_estimate_the_share_in_the_full_hessian():
    """The oracle of Algorithm 1: all entries of a formed Hessian, on many batches."""
    generator = torch.Generator().manual_seed(3)
    network = perceptron([4, 4, 3]).double()
    initialize(network, "fan-in", generator, scale=2.0)
    x = torch.randn(60 * 8, 4, generator=generator, dtype=torch.float64)
    y = torch.sign(torch.randn(len(x), generator=generator, dtype=torch.float64))
    formed = torch.stack([formed_hessian(network, *part) for part in zip(x.split(8), y.split(8), strict=True)])
    count = formed.shape[1]
    full = count_cumulants(formed.flatten(1), 2, 0.4)
    shares = []
    for _ in range(60):
        rows, columns = (torch.randperm(count, generator=generator)[:8] for _ in range(2))
        samples = hessian_samples(network, x, y, rows, columns, batch_size=8)
        shares.append(count_cumulants(samples.flatten(1), 2, 0.4).exceeding / (64 * 63))
    # entries that share a row or a column are more often drawn together than in the full matrix, and correlate more
    chances = exceeding_pairs_by_place(formed, 0.4)
    drawn = {"same row": 7 * 64, "same column": 7 * 64, "neither": 49 * 64}
    expected = sum(chances[k] * n for k, n in drawn.items()) / (64 * 63)
    error = np.std(shares, ddof=1) / np.sqrt(len(shares))
    assert abs(np.mean(shares) - expected) < 4 * error
    assert full.exceeding > 1000 and full.constant > count**2 / 3


def exceeding_pairs_by_place(formed, threshold):
    """Shares of correlations above the threshold among pairs of entries of one row, of one column, and of neither."""
    count = formed.shape[1]
    large = (correlation_matrix(formed.flatten(1)).abs() > threshold).view(count, count, count, count)
    i = torch.arange(count)
    row = i[:, None, None, None] == i[None, None, :, None]
    column = i[None, :, None, None] == i[None, None, None, :]
    kinds = {"same row": row & ~column, "same column": ~row & column, "neither": ~row & ~column}
    return {k: float(large[m.expand_as(large)].double().mean()) for k, m in kinds.items()}
