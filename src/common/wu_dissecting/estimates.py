"""Estimates that several figures of Wu et al. (2022) make: one more network, limits and powers of the width."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from common.notebook.intervals import Estimate, bootstrap, log_log_slope

#: What a distance counts as at least where its logarithm is taken.
SMALLEST = 1e-9


def one_more(values: Float[np.ndarray, " R"], confidence: float = 0.95) -> Estimate:
    """Mean of R values, and the interval in which one more of the same law lies (Student-t).

    Raises
    ------
    ValueError
        If there are fewer than two.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 values, got {len(values)}")
    t = stats.t.ppf((1 + confidence) / 2, len(values) - 1)
    mean, half = values.mean(), t * (1 + 1 / len(values)) ** 0.5 * values.std(ddof=1)
    return Estimate(float(mean), (float(mean - half), float(mean + half)))


def limit_in_width(
    values: Float[np.ndarray, "R widths"], widths: Sequence[int], *, seed: int, confidence: float = 0.99
) -> Estimate:
    """a of a + b/n, fitted to the means over R draws at the three largest widths n, with weights n.

    Parameters
    ----------
    seed
        Of the bootstrap over draws, :func:`~common.notebook.intervals.bootstrap`.
    """
    n = np.array(widths[-3:])

    def fit(draws: np.ndarray) -> float:
        return np.polyfit(1 / n, draws.mean(0), 1, w=n**0.5)[1]

    return bootstrap(fit, values[:, -3:], seed=seed, confidence=confidence)


def power_of_width(
    values: Float[np.ndarray, "R widths"], widths: Sequence[int], *, seed: int, confidence: float = 0.99
) -> Estimate:
    """Power of n in the means over R draws, by least squares in logarithms; parameters as :func:`limit_in_width`."""

    def fit(draws: np.ndarray) -> float:
        return log_log_slope(np.array(widths), np.maximum(draws.mean(0), SMALLEST))

    return bootstrap(fit, values, seed=seed, confidence=confidence)
