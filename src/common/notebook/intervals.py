"""Uncertainty: intervals of means, of slopes and of ratios, from independent realizations."""

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Estimate(NamedTuple):
    """A value and its interval, (low, high)."""

    value: float
    interval: tuple[float, float]


class Exact(Estimate):
    """What no other draw, start or processor would change: an identity, a count, a number that was computed.

    It alone may have an interval of width zero.
    """

    __slots__ = ()


def mean_interval(samples: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean of independent samples, shape (R,), and its Student-t interval.

    Raises
    ------
    ValueError
        If there are fewer than 2 samples.
    """
    samples = np.asarray(samples, dtype=float)
    if len(samples) < 2:
        raise ValueError(f"an interval needs at least 2 samples, got {len(samples)}")
    mean, error = samples.mean(), stats.sem(samples)
    if error == 0:
        return Estimate(float(mean), (float(mean), float(mean)))
    low, high = stats.t.interval(confidence, len(samples) - 1, loc=mean, scale=error)
    return Estimate(float(mean), (float(low), float(high)))


def share(outcomes: ArrayLike, confidence: float = 0.95) -> Estimate:
    """How often independent trials, shape (R,) of bool, succeed, and the interval of Clopper and Pearson (1934)."""
    outcomes = np.asarray(outcomes, dtype=bool)
    found = stats.binomtest(int(outcomes.sum()), outcomes.size).proportion_ci(confidence, "exact")
    return Estimate(float(outcomes.mean()), (float(found.low), float(found.high)))


def smallest(estimates: Iterable[tuple]) -> Estimate:
    """The smallest of several estimates: every one of them lies above its lower end if its own does."""
    return _extreme(min, estimates)


def largest(estimates: Iterable[tuple]) -> Estimate:
    """The largest of several estimates: every one of them lies below its upper end if its own does."""
    return _extreme(max, estimates)


def _extreme(choose: Callable, estimates: Iterable[tuple]) -> Estimate:
    estimates = list(estimates)
    values, intervals = zip(*estimates, strict=True)
    lows, highs = zip(*intervals, strict=True)
    kind = Exact if all(isinstance(estimate, Exact) for estimate in estimates) else Estimate
    return kind(choose(values), (choose(lows), choose(highs)))


def exact(value: float, error: float = 0.0) -> Exact:
    """A value without statistical uncertainty, known up to ``error``: see :class:`Exact`."""
    return Exact(float(value), (float(value) - error, float(value) + error))


def spread(values: ArrayLike, step: float = 0.0) -> Estimate:
    """The first of several values, and the range of all of them: a value and what it is in variants of the run.

    Parameters
    ----------
    values
        Shape (R,).
    step
        Of the grid on which they lie, such as 1 for whole numbers; the range is wider by half of it at either end.
    """
    values = np.asarray(values, dtype=float)
    return Estimate(float(values[0]), (float(values.min() - step / 2), float(values.max() + step / 2)))


def jackknife(values: ArrayLike, step: float = 0.0, confidence: float = 0.95) -> Estimate:
    """A statistic of E realizations, and its Student-t interval by the jackknife (Tukey, 1958).

    Parameters
    ----------
    values
        Shape (1 + E,): of all realizations, then with each of them left out in turn.
    step
        Of the grid on which they lie, such as 1 for whole numbers; the interval is wider by half of it at either end.

    Raises
    ------
    ValueError
        If there are fewer than 2 realizations.
    """
    value, *without_one = np.asarray(values, dtype=float)
    if (E := len(without_one)) < 2:
        raise ValueError(f"leaving one out needs at least 2 realizations, got {E}")
    half = stats.t.ppf((1 + confidence) / 2, E - 1) * np.sqrt((E - 1) * np.var(without_one)) + step / 2
    return Estimate(float(value), (float(value - half), float(value + half)))


def mean_on_grid(samples: ArrayLike, step: float, confidence: float = 0.95) -> Estimate:
    """:func:`mean_interval` of values on a grid such as counts, wider by half a step at either end.

    Where all samples fall on one point of the grid, it still has the width that the grid leaves open.
    """
    value, (low, high) = mean_interval(samples, confidence)
    return Estimate(value, (low - step / 2, high + step / 2))


def bootstrap(
    statistic: Callable[[np.ndarray], float], samples: ArrayLike, *, seed: int, resamples: int = 2000,
    confidence: float = 0.95,
) -> Estimate:  # fmt: skip
    """A statistic of realizations along the first axis, and its BCa interval (Efron, 1987), by SciPy.

    Whole realizations are drawn, so what is correlated inside one stays together.

    Raises
    ------
    ValueError
        If there are fewer than 2 realizations.
    """
    samples = np.asarray(samples, dtype=float)
    if len(samples) < 2:
        raise ValueError(f"an interval needs at least 2 realizations, got {len(samples)}")
    value = float(statistic(samples))
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # all resamples alike: an interval of width 0
        interval = stats.bootstrap(
            (np.arange(len(samples)),), lambda rows: statistic(samples[rows]), vectorized=False, method="BCa",
            n_resamples=resamples, confidence_level=confidence, rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    ends = [float(end) for end in interval if np.isfinite(end)]
    return Estimate(value, (min([value, *ends]), max([value, *ends])))


def log_log_slope(x: ArrayLike, means: ArrayLike) -> float:
    """Least-squares slope of log means against log x."""
    return float(np.polyfit(np.log(x), np.log(means), 1)[0])
