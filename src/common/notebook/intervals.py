"""Uncertainty: intervals of means, of slopes and of ratios, from independent realizations."""

import warnings
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

#: A value and its interval, (value, (low, high)).
Estimate = tuple[float, tuple[float, float]]


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
        return float(mean), (float(mean), float(mean))
    low, high = stats.t.interval(confidence, len(samples) - 1, loc=mean, scale=error)
    return float(mean), (float(low), float(high))


def smallest(estimates: Iterable[Estimate]) -> Estimate:
    """The smallest of several estimates: every one of them lies above its lower end if its own does."""
    return _extreme(min, estimates)


def largest(estimates: Iterable[Estimate]) -> Estimate:
    """The largest of several estimates: every one of them lies below its upper end if its own does."""
    return _extreme(max, estimates)


def _extreme(choose: Callable, estimates: Iterable[Estimate]) -> Estimate:
    values, intervals = zip(*estimates, strict=True)
    lows, highs = zip(*intervals, strict=True)
    return choose(values), (choose(lows), choose(highs))


def exact(value: float, error: float = 0.0) -> Estimate:
    """An estimate without statistical uncertainty, known up to ``error``."""
    return float(value), (float(value) - error, float(value) + error)


def spread(values: ArrayLike) -> Estimate:
    """The first of several values, and the range of all of them: a value and what it is in variants of the run."""
    values = np.asarray(values, dtype=float)
    return float(values[0]), (float(values.min()), float(values.max()))


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
    return value, (min([value, *ends]), max([value, *ends]))


def log_log_slope(x: ArrayLike, means: ArrayLike) -> float:
    """Least-squares slope of log means against log x."""
    return float(np.polyfit(np.log(x), np.log(means), 1)[0])
