"""Uncertainty: intervals of means, of slopes and of ratios, from independent realizations."""

from collections.abc import Callable, Iterable, Sequence

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


def bootstrap(
    statistic: Callable[[np.ndarray], float], samples: ArrayLike, *, seed: int, resamples: int = 2000,
    confidence: float = 0.95,
) -> Estimate:  # fmt: skip
    """A statistic of realizations along the first axis, and its percentile interval over resampled realizations.

    Whole realizations are drawn, so what is correlated inside one stays together.
    """
    samples = np.asarray(samples, dtype=float)
    rng = np.random.default_rng(seed)
    values = [statistic(samples[rng.integers(len(samples), size=len(samples))]) for _ in range(resamples)]
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = float(statistic(samples))
    return value, (float(min(low, value)), float(max(high, value)))


def log_log_slope(x: Sequence[float], means: ArrayLike) -> float:
    """Least-squares slope of log means against log x."""
    return float(np.polyfit(np.log(x), np.log(means), 1)[0])
