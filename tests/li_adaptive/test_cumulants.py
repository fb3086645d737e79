"""Counts of cumulants against all tuples one by one, and against the Hessian from which entries are drawn."""

import itertools

import numpy as np
import pytest
import torch

from common.li_adaptive.cumulants import (
    correlation_matrix,
    count_cumulants,
    cumulant_values,
    normalized,
    smaller_submatrices,
)
from common.li_adaptive.hessian_samples import hessian_samples
from common.li_adaptive.hinge_hessian import formed_hessian
from common.li_adaptive.networks import initialize, perceptron


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


@pytest.mark.parametrize("order", [2, 3, 4])
def test_values_of_all_tuples_are_those_that_are_counted(order):
    samples = torch.randn(30, 5, generator=torch.Generator().manual_seed(order), dtype=torch.float64) ** 3
    draw = torch.Generator().manual_seed(0)
    values = cumulant_values(samples, order, "uncentred", pairs=25, generator=draw)
    assert len(values) == {2: 20, 3: 125, 4: 625}[order]
    for threshold in (0.1, 0.5, 2.0):
        counted = count_cumulants(samples, order, threshold, "uncentred").exceeding
        assert int((values.abs() > threshold).sum()) == counted
    if order == 4:
        assert len(cumulant_values(samples, 4, pairs=3, generator=draw)) == 3 * 25


def test_shares_of_what_varies():
    samples = torch.tensor([[1.0, -1.0, 2.0], [2.0, -2.0, 2.0], [4.0, -4.0, 2.0]])
    count = count_cumulants(samples, 2, 0.9)
    assert (count.constant_share, count.share_of_varying) == (1 / 3, 1.0)
    assert count_cumulants(torch.ones(3, 2), 2, 0.9).share_of_varying == 0


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


@pytest.mark.usefixtures("unchecked")
def test_samples_that_have_no_cumulants_are_refused():
    samples, generator = torch.randn(8, 3), torch.Generator().manual_seed(0)
    bad = samples.clone()
    bad[2, 1] = torch.nan
    for count in (
        lambda s: count_cumulants(s, 3, 0.4), correlation_matrix, lambda s: normalized(s, "unit"),
        lambda s: cumulant_values(s, 2, pairs=1, generator=generator),
    ):  # fmt: skip
        for given, message in ((bad, "must be finite"), (samples[:, 0], "of 1 variable"), (samples[:, :0], "variable"),
                               (samples[:0], "at least 3 samples")):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                count(given)
    with pytest.raises(ValueError, match="pairs must not be negative, got -1"):
        cumulant_values(samples, 4, pairs=-1, generator=generator)


@pytest.mark.usefixtures("unchecked")
def test_whole_numbers_have_correlations_that_are_none():
    samples = torch.tensor([[1, 2, 5], [2, 1, 5], [4, 5, 5], [3, 2, 5]])
    torch.testing.assert_close(correlation_matrix(samples), correlation_matrix(samples.double()).float())


def test_a_single_entry_has_no_exponent():
    assert np.isnan(count_cumulants(torch.randn(9, 1), 3, 0.4).exponent)


def test_smaller_submatrices_keep_the_share_and_not_the_exponent():
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(100, 1, generator=generator)
    strong = torch.rand(30 * 30, generator=generator) < 0.4  # these entries are correlated, the others are not
    samples = torch.randn(100, 900, generator=generator) + 3 * common * strong
    large = count_cumulants(samples, 2, 0.5)
    parts = [count_cumulants(s, 2, 0.5) for s in smaller_submatrices(samples, 10, 40, seed=1)]
    assert all(part.variables == 100 for part in parts)
    assert sum(p.fraction for p in parts) / len(parts) == pytest.approx(large.fraction, rel=0.1)
    assert sum(p.exponent for p in parts) / len(parts) < large.exponent - 0.1
    with pytest.raises(ValueError, match="of a square one"):
        smaller_submatrices(samples[:, :-1], 10, 1, seed=0)
    whole = smaller_submatrices(samples, 30, 1, seed=0)[0]
    torch.testing.assert_close(whole.sort(1).values, samples.sort(1).values)
