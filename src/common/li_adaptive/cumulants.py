"""How many joint cumulants of random variables are not zero: Li, App E, Algorithms 1 and 2.

A sub-matrix of the Hessian of a batch is drawn at N_b random rows and N_b random columns; its N_b² entries, over n
batches, are n samples of as many random variables (:mod:`common.li_adaptive.hessian_samples`). Of their correlations,
third and fourth cumulants those are counted that exceed a threshold.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

#: Thresholds of Table 2 by the order of the cumulants, and N_b, the rows and columns of a random sub-matrix.
THRESHOLDS = {2: 0.4, 3: 0.4, 4: 1.0}
SUBMATRIX = {2: 100, 3: 10, 4: 10}
#: How moments are normalized. "pearson": about the mean, divided by sample standard deviations. "uncentred": about
#: zero, divided by root mean squares. "unit": about zero, not divided, for variables known to have variance 1.
CONVENTIONS = ("pearson", "uncentred", "unit")


@dataclass(frozen=True)
class Count:
    """How many cumulants exceed a threshold.

    Attributes
    ----------
    exceeding
        Ordered tuples whose modulus exceeds it; a pair with itself is no pair (Algorithm 3).
    unordered
        The same with every set of entries, some perhaps repeated, counted once.
    distinct
        Ordered tuples without a repeated entry.
    variables, constant
        Number of entries of the sub-matrix, and of those among them that do not vary: their statistics are 0/0 and
        count as zero.
    order
        2, 3 or 4.
    """

    exceeding: int
    unordered: int
    distinct: int
    variables: int
    constant: int
    order: int

    @property
    def per_entry(self) -> float:
        """Step 4 of Algorithm 1: tuples divided by N_b²."""
        return self.exceeding / self.variables

    @property
    def exponent(self) -> float:
        """e in ``per_entry`` = N_b^e; 0 where there are fewer tuples than entries, NaN if there is one entry."""
        if self.variables == 1:
            return math.nan
        return math.log(max(self.per_entry, 1.0)) / (0.5 * math.log(self.variables))

    @property
    def fraction(self) -> float:
        """Share of all ordered tuples."""
        return self.exceeding / float(self.variables) ** self.order

    @property
    def constant_share(self) -> float:
        """Share of the entries that do not vary."""
        return self.constant / self.variables

    @property
    def share_of_varying(self) -> float:
        """Of the ordered pairs of different entries that vary, the share whose correlation exceeds the threshold."""
        varying = self.variables - self.constant
        return self.exceeding / max(varying * (varying - 1), 1)


def normalized(samples: Float[Tensor, "n M"], convention: str) -> tuple[Float[Tensor, "n K"], int]:
    """Variables that vary, brought to unit size by a convention, and how many do not vary.

    Raises
    ------
    ValueError
        If the convention is unknown, there are fewer than 3 samples or no variables, or a sample is not finite.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}; known are {', '.join(CONVENTIONS)}")
    if samples.ndim != 2 or len(samples) < 3 or not samples.shape[1]:
        raise ValueError(f"cumulants need at least 3 samples of 1 variable, (n, M); got {tuple(samples.shape)}")
    if not samples.isfinite().all():
        raise ValueError("samples must be finite: some are NaN or infinite")
    varies = (samples != samples[0]).any(0)
    kept = samples[:, varies]
    constant = samples.shape[1] - kept.shape[1]
    if convention == "unit":
        return kept, constant
    scale = kept.abs().amax(0)  # entries of a Hessian can be too small to be squared
    kept = kept / scale
    if convention == "pearson":
        kept = kept - kept.mean(0)
    return kept / kept.square().mean(0).sqrt(), constant


def correlation_matrix(samples: Float[Tensor, "n M"]) -> Float[Tensor, "M M"]:
    """Pearson's correlations of M variables; 0 where one of the two does not vary.

    Raises
    ------
    ValueError
        As :func:`normalized`.
    """
    z, _ = normalized(samples, "pearson")
    varies = (samples != samples[0]).any(0)
    matrix = z.new_zeros(len(varies), len(varies))
    matrix[varies.nonzero(), varies.nonzero().T] = z.T @ z / len(z)
    return matrix


def count_cumulants(samples: Float[Tensor, "n M"], order: int, threshold: float, convention: str = "pearson") -> Count:
    """Number of ordered tuples of variables whose normalized joint cumulant exceeds a threshold.

    Parameters
    ----------
    samples
        n samples of M variables.
    order
        2: correlations; 3: mean of x y z; 4: mean of w x y z less the three products of second moments (App E.1).
    convention
        One of :data:`CONVENTIONS`.

    Raises
    ------
    ValueError
        If the order is unknown, or as :func:`normalized`.
    """
    if order not in (2, 3, 4):
        raise ValueError(f"cumulants of order 2, 3 or 4 are counted, got {order}")
    z, constant = normalized(samples, convention)
    n, K = z.shape
    total = unordered = distinct = 0
    second = z.T @ z / n if order == 4 else None
    products = (z[:, :, None] * z[:, None, :]).flatten(1) if order > 2 else None
    places = torch.arange(K, device=z.device)
    if order == 2:
        for rows in places.split(2048):
            large = (z[:, rows].T @ z / n).abs() > threshold
            large[torch.arange(len(rows), device=z.device), rows] = False
            total += int(large.sum())
        return Count(total, total // 2, total, samples.shape[1], constant, order)
    if order == 4:
        b, c, d = torch.meshgrid(places, places, places, indexing="ij")
        all_apart, all_rising = (b != c) & (b != d) & (c != d), (b <= c) & (c <= d)
    for a in range(K):
        if order == 3:
            large = ((z[:, a] @ products / n).abs() > threshold).view(K, K)
            b2, c2 = places[:, None], places[None, :]
            apart = (b2 != a) & (c2 != a) & (b2 != c2)
            rising = (a <= b2) & (b2 <= c2)
        else:
            fourth = ((z[:, a, None] * z).T @ products / n).view(K, K, K)
            fourth -= second[a, :, None, None] * second
            fourth -= second[a, None, :, None] * second[:, None, :]
            fourth -= second[a, None, None, :] * second[:, :, None]
            large = fourth.abs() > threshold
            apart = (b != a) & (c != a) & (d != a) & all_apart
            rising = (a <= b) & all_rising
        total += int(large.sum())
        unordered += int((large & rising).sum())
        distinct += int((large & apart).sum())
    return Count(total, unordered, distinct, samples.shape[1], constant, order)


def cumulant_values(
    samples: Float[Tensor, "n M"], order: int, convention: str = "pearson", *, pairs: int, generator: torch.Generator
) -> Float[Tensor, " tuples"]:
    """Normalized joint cumulants of ordered tuples, one by one: as many as M variables are few.

    Parameters
    ----------
    samples, order, convention
        As :func:`count_cumulants` has them; a pair of a variable with itself is left out.
    pairs
        Of the fourth order only so many ordered pairs, drawn at random, are the first two of a tuple.
    generator
        Of that draw.

    Raises
    ------
    ValueError
        As :func:`count_cumulants`, or if ``pairs`` is negative.
    """
    if order not in (2, 3, 4):
        raise ValueError(f"cumulants of order 2, 3 or 4 are known, got {order}")
    if pairs < 0:
        raise ValueError(f"the number of pairs must not be negative, got {pairs}")
    z, _ = normalized(samples, convention)
    n, K = z.shape
    second = z.T @ z / n
    if order == 2:
        return second[~torch.eye(K, dtype=torch.bool)]
    products = (z[:, :, None] * z[:, None, :]).flatten(1)
    if order == 3:
        return (z.T @ products / n).flatten()
    some = torch.randperm(K * K, generator=generator)[:pairs]
    a, b = some // K, some % K
    crossed = second[a][:, :, None] * second[b][:, None, :] + second[a][:, None, :] * second[b][:, :, None]
    parallel = second.flatten()[some][:, None] * second.flatten()
    return (products[:, some].T @ products / n - parallel - crossed.flatten(1)).flatten()


def smaller_submatrices(samples: Float[Tensor, "n M"], size: int, number: int, seed: int) -> list[Float[Tensor, "n m"]]:
    """Samples of the entries of ``number`` random sub-matrices, ``size`` rows and columns, of a square one of √M.

    Raises
    ------
    ValueError
        If M is no square, or the sub-matrices are not smaller than it.
    """
    side = math.isqrt(samples.shape[1])
    if side**2 != samples.shape[1] or not 1 <= size <= side:
        raise ValueError(f"sub-matrices of 1..{side} rows of a square one are needed, got {size} of {samples.shape[1]}")
    generator, square = torch.Generator().manual_seed(seed), samples.unflatten(1, (side, side))
    pairs = [[torch.randperm(side, generator=generator)[:size] for _ in range(2)] for _ in range(number)]
    return [square[:, rows][:, :, columns].flatten(1) for rows, columns in pairs]
