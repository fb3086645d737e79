"""Intervals of one more value and of limits in the width: how often they hold what they should."""

import numpy as np
import pytest

from common.wu_dissecting.estimates import limit_in_width, one_more, power_of_width

WIDTHS = (16, 32, 64, 128)


def test_one_more_value_lies_in_its_interval_as_often_as_said():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        *some, other = rng.normal(3.0, 2.0, size=5)
        low, high = one_more(np.array(some)).interval
        inside += low < other < high
    assert abs(inside / 2000 - 0.95) < 4 * (0.95 * 0.05 / 2000) ** 0.5
    assert one_more(np.array([1.0, 2.0, 3.0])).value == 2
    assert one_more(np.array([1.0, 3.0]), 0.5).interval == pytest.approx(
        (2 - 3**0.5, 2 + 3**0.5)
    )  # t of 1 degree: 1 at 3/4
    with pytest.raises(ValueError, match="at least 2"):
        one_more(np.array([1.0]))


def test_a_limit_in_the_width_is_that_of_the_law():
    n = np.array(WIDTHS)
    exact = np.tile(0.3 + 2 / n, (4, 1))
    exact[:, 0] += 1.0  # the smallest width does not enter
    assert limit_in_width(exact, WIDTHS, seed=0).value == pytest.approx(0.3)
    rng, held = np.random.default_rng(1), 0
    for _ in range(100):
        draws = 0.3 + 2 / n + rng.normal(size=(30, 4)) * 0.1 / n**0.5
        low, high = limit_in_width(draws, WIDTHS, seed=0, confidence=0.9).interval
        held += low < 0.3 < high
    assert abs(held / 100 - 0.9) < 4 * (0.9 * 0.1 / 100) ** 0.5


def test_a_power_of_the_width_is_that_of_the_law():
    exact = np.tile(3.0 * np.array(WIDTHS) ** -0.7, (4, 1))
    assert power_of_width(exact, WIDTHS, seed=0).value == pytest.approx(-0.7)
    draws = exact * np.exp(np.random.default_rng(2).normal(size=(4, 4)) * 0.1)
    found = power_of_width(draws, WIDTHS, seed=0)
    assert found.interval[0] < -0.7 < found.interval[1]
