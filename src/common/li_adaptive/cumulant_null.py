"""How many cumulants of independent normal variables exceed a threshold: what Li, App E.3 and E.4, simulates.

Counting them on simulated variables gives Table 2; their expectation is exact for correlations, and nearly so for the
others. Moments are normalized as in :mod:`common.li_adaptive.cumulants`.
"""

import math

import numpy as np
from jaxtyping import Float
from scipy import special

from common.li_adaptive.cumulants import CONVENTIONS
from common.notebook.intervals import Estimate


def _linear_tail(
    a: Float[np.ndarray, "draws n"], n: int, threshold: float, convention: str
) -> Float[np.ndarray, " draws"]:
    """P(|mean of a·w| > threshold) for independent normal w, normalized by the convention."""
    if convention == "unit":
        return special.erfc(threshold * n / np.sqrt(2 * (a**2).sum(1)))
    if convention == "pearson":
        a = a - a.mean(1, keepdims=True)
    # w/√n is uniform on the unit sphere of n (or, centred, n − 1) dimensions: its square along a is a beta variable.
    cosine = np.minimum(threshold * np.sqrt(n / (a**2).sum(1)), 1)
    free = n - 2 if convention == "pearson" else n - 1
    return special.betaincc(0.5, free / 2, cosine**2)


def _standard(w: Float[np.ndarray, "draws n"], convention: str) -> Float[np.ndarray, "draws n"]:
    if convention == "pearson":
        w = w - w.mean(1, keepdims=True)
    return w if convention == "unit" else w / np.sqrt((w**2).mean(1, keepdims=True))


def _mean(x: Float[np.ndarray, "draws n"]) -> Float[np.ndarray, "draws 1"]:
    return x.mean(1, keepdims=True)


def expected_null_count(
    order: int, variables: int, n: int, threshold: float, convention: str, *, draws: int = 20_000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Expected number of ordered tuples above a threshold if all variables are independent and normal.

    Split by how often an index repeats. Of the second order the value is exact: the squared correlation is a beta
    variable (Student's t in disguise). Where some variable appears once, the cumulant is linear in it, and its tail is
    exact given the others, over which the mean is taken; only the patterns without such a variable are counted.

    Parameters
    ----------
    order
        2, 3 or 4.
    variables, n
        M variables of n samples each.
    convention
        One of :data:`~common.li_adaptive.cumulants.CONVENTIONS`.
    draws, seed
        Draws of the other variables.

    Returns
    -------
    dict
        Pattern ("11" distinct pair, "111", "21", "3", "1111", "211", "31", "22", "4") to the expected count and its
        standard error.

    Raises
    ------
    ValueError
        If the order or the convention is unknown, a count of variables is negative, the threshold is, or there are
        fewer than 3 samples or 2 draws.
    """
    if order not in (2, 3, 4):
        raise ValueError(f"null counts of order 2, 3 or 4 are known, got {order}")
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}; known are {', '.join(CONVENTIONS)}")
    if variables < 0 or n < 3 or draws < 2 or not threshold >= 0:
        given = f"{variables} of {n} samples, {draws} draws, threshold {threshold}"
        raise ValueError(f"variables of at least 3 samples, 2 draws and a threshold from 0 on are needed, got {given}")
    rng = np.random.default_rng(seed)
    M = int(variables)  # NumPy's integers overflow

    def draw(count: int) -> list[np.ndarray]:
        return [_standard(rng.standard_normal((draws, n)), convention) for _ in range(count)]

    def tail(linear: np.ndarray) -> np.ndarray:
        return _linear_tail(linear, n, threshold, convention)

    def beyond(cumulants: np.ndarray) -> np.ndarray:
        return np.abs(cumulants) > threshold

    def count(tuples: int, probabilities: np.ndarray) -> tuple[float, float]:
        return tuples * float(probabilities.mean()), tuples * float(probabilities.std(ddof=1) / math.sqrt(draws))

    if order == 2:
        if convention == "unit":
            return {"11": count(M * (M - 1), tail(draw(1)[0]))}
        (exact,) = tail(_standard(np.arange(n)[None] - 0.3, convention))  # the same for any vector
        return {"11": (M * (M - 1) * float(exact), 0.0)}
    x, y = draw(2)
    if order == 3:
        return {
            "111": count(M * (M - 1) * (M - 2), tail(x * y)),
            "21": count(3 * M * (M - 1), tail(x * x)),
            "3": count(M, beyond((x**3).mean(1))),
        }
    (z,) = draw(1)
    # what multiplies the variable that appears once, the products of second moments taken off
    one = x * y * z - sum(p * _mean(q * r) for p, (q, r) in zip((x, y, z), ((y, z), (x, z), (x, y)), strict=True))
    two = x * x * y - 2 * x * _mean(x * y) - y * _mean(x * x)
    three = x**3 - 3 * x * _mean(x * x)
    pairs = (x * x * y * y).mean(1) - (x * x).mean(1) * (y * y).mean(1) - 2 * (x * y).mean(1) ** 2
    alone = (x**4).mean(1) - 3 * (x * x).mean(1) ** 2
    return {
        "1111": count(M * (M - 1) * (M - 2) * (M - 3), tail(one)),
        "211": count(6 * M * (M - 1) * (M - 2), tail(two)),
        "31": count(4 * M * (M - 1), tail(three)),
        "22": count(3 * M * (M - 1), beyond(pairs)),
        "4": count(M, beyond(alone)),
    }


def drawn_means(
    counts: Float[np.ndarray, " R"], *, members: int, seed: int | np.random.Generator, draws: int = 4000
) -> Float[np.ndarray, " draws"]:
    """Means over ``members`` of R independent counts, drawn with replacement; those of :func:`mean_tail` too."""
    rng = np.random.default_rng(seed)
    return counts[rng.integers(len(counts), size=(draws, members))].mean(1)


def mean_tail(
    counts: Float[np.ndarray, " R"], printed: float, *, members: int, seed: int, draws: int = 4000, resamples: int = 200
) -> Estimate:
    """Two-sided tail probability of a printed mean over some simulations, given the counts of R independent ones.

    Means are drawn from the R counts; the interval is that of the percentile bootstrap, in which the R counts
    themselves are drawn again.

    Parameters
    ----------
    members
        Simulations over which the mean was taken.
    seed, draws, resamples
        Of the means and of the counts.
    """
    rng, counts = np.random.default_rng(seed), np.asarray(counts, dtype=float)

    def tail(v: np.ndarray, number: int) -> float:
        means = drawn_means(v, members=members, seed=rng, draws=number)
        return min(1.0, 2 * min(np.mean(means <= printed), np.mean(means >= printed)))

    value = tail(counts, draws)
    again = [tail(counts[rng.integers(len(counts), size=len(counts))], 1000) for _ in range(resamples)]
    low, high = np.quantile(again, [0.025, 0.975])
    return Estimate(float(value), (float(min(low, value)), float(max(high, value, low + 1 / draws))))
