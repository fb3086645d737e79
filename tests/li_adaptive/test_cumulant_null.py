"""Expected counts of cumulants of independent variables, against simulation and against Student's law."""

import numpy as np
import pytest
import torch
from scipy import stats

from common.li_adaptive.cumulant_null import drawn_means, expected_null_count, mean_tail
from common.li_adaptive.cumulants import count_cumulants


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
    n, r = 157, 0.4
    p = 2 * stats.t.sf(r * np.sqrt((n - 2) / (1 - r**2)), n - 2)
    assert expected_null_count(2, 10_000, n, r, "pearson")["11"][0] == pytest.approx(1e4 * (1e4 - 1) * p, rel=1e-9)


@pytest.mark.parametrize(("order", "convention"), [(5, "pearson"), (3, "spearman")])
def test_counts_that_are_not_known(order, convention):
    with pytest.raises(ValueError, match=r"order|convention"):
        expected_null_count(order, 5, 9, 0.4, convention)


@pytest.mark.usefixtures("unchecked")
def test_counts_of_many_variables_do_not_overflow_and_others_are_refused():
    found = [expected_null_count(4, M, 9, 0.5, "unit", draws=4)["1111"][0] for M in (10**6, np.int64(10**6))]
    assert found[0] == found[1] > 0
    for change in ({"threshold": -0.1}, {"n": 2}, {"draws": 1}, {"variables": -1}, {"threshold": np.nan}):
        with pytest.raises(ValueError, match="at least 3 samples, 2 draws and a threshold from 0 on"):
            expected_null_count(
                **{"order": 2, "variables": 5, "n": 9, "threshold": 0.4, "convention": "pearson"} | change
            )


def test_tail_probabilities_of_a_mean_are_those_of_the_normal_law():
    counts = np.random.default_rng(0).normal(10, 3, 4000)
    for deviations in (0.5, -1.96):
        printed = counts.mean() + deviations * counts.std() / 5**0.5
        found = mean_tail(counts, printed, members=5, seed=1, draws=20_000)
        assert found.value == pytest.approx(2 * stats.norm.sf(abs(deviations)), rel=0.15)
        assert found.interval[0] <= found.value <= found.interval[1]
    assert mean_tail(counts, 1e3, members=5, seed=1).interval[1] < 0.05


def test_means_that_are_drawn_are_those_of_the_tail():
    counts = np.random.default_rng(0).normal(10, 3, 400)
    means = drawn_means(counts, members=5, seed=1)
    assert means.shape == (4000,)
    assert means.mean() == pytest.approx(counts.mean(), abs=0.1)
    assert means.std() == pytest.approx(counts.std() / 5**0.5, rel=0.05)
    printed = 8.0
    assert mean_tail(counts, printed, members=5, seed=1).value == 2 * min(
        (means <= printed).mean(), (means >= printed).mean()
    )
