"""Norms of Hessian blocks at random initialization, realization by realization: Figures 8 and 9 of Dong et al. (2025).

With K = X Xᵀ a block (1/N) Σ λ_n x_n x_nᵀ has squared Frobenius norm λᵀ(K∘K)λ / N², so that no d×d block is formed.
Everything that depends on X alone, and the logits, serve all values of C at once: the classes of a smaller C are the
first ones of the largest. Realizations remain independent at every C, so error bars at one C are those of independent
draws; only values at different C of the same realization are correlated, and whoever fits a slope over C must resample
whole realizations (:func:`common.notebook.intervals.bootstrap`).

The Hessians are the paper's, without the factor 2 of the MSE loss.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index

import torch
from jaxtyping import Float
from torch import Tensor

from common.dong_quantifying.block_norms import SampledValue, check_least
from common.hessian.gram import squared_gram, weighted_block_norms, weighted_gram_norms


def _checked_counts(class_counts: Sequence[int]) -> list[int]:
    counts = [index(count) for count in class_counts]  # NumPy's integers overflow
    if not counts or min(counts) < 2:
        raise ValueError(f"every number of classes C must be at least 2, got {counts}")
    if counts != sorted(set(counts)):
        raise ValueError(f"the numbers of classes must increase, got {counts}")
    return counts


def _class_chunks(counts: Sequence[int], N: int, entries: int = 2**22) -> Iterator[tuple[int, int]]:
    """Ranges of classes that end at every count and keep N × chunk below ``entries``."""
    start, width = 0, max(1, entries // N)
    for stop in counts:
        while start < stop:
            end = min(start + width, stop)
            yield start, end
            start = end


def _class_weights(p: Float[Tensor, "N k"], averaged: int) -> tuple[Float[Tensor, "N a"], Float[Tensor, "N b"]]:
    """Weights p_i (1 - p_i) of the first classes and p_i p_j of their pairs; one of each if ``averaged`` is 1."""
    i, j = torch.triu_indices(p.shape[1], p.shape[1], offset=1)
    own, pairs = p * (1 - p), p[:, i] * p[:, j]
    return (own[:, :1], pairs[:, :1]) if averaged == 1 else (own, pairs)


def linear_block_norms(
    d: int, N: int, class_counts: Sequence[int], realizations: int, generator: torch.Generator, *, averaged: int = 1
) -> Iterator[Float[Tensor, "K 2"]]:
    """Squared norms of the blocks (1, 1) and (1, 2) of the linear model under CE, (5), one realization after another.

    One block's norm is ruled by the few samples with the largest p_1 p_2; a mean over classes is much sharper.

    Parameters
    ----------
    d, N
        Dimension and number of the standard Gaussian features.
    class_counts
        Increasing values of C, each at least 2.
    realizations
        Number of independent draws of features and weights V ~ N(0, 1/d).
    averaged
        If above 1, the means over the first so many classes (or all, if there are fewer) and over their pairs.

    Yields
    ------
    Tensor, shape (len(class_counts), 2)
        ||H_11||² and ||H_12||² at every C, or the means.

    Raises
    ------
    ValueError
        If the class counts are not increasing or below 2, or d, N, the number of realizations or of averaged
        classes is below 1.
    """
    counts = _checked_counts(class_counts)
    check_least(1, d=d, N=N, realizations=realizations, averaged=averaged)
    for _ in range(realizations):
        X = torch.randn(N, d, generator=generator)
        gram = squared_gram(X)
        first = torch.empty(N, 0, dtype=torch.float64)
        partition = torch.zeros(N, dtype=torch.float64)
        rows = []
        for start, stop in _class_chunks(counts, N):
            V = torch.randn(stop - start, d, generator=generator) / math.sqrt(d)
            exponentials = torch.mm(X, V.T).exp_()
            first = torch.cat([first, exponentials[:, : max(2, averaged) - first.shape[1]].double()], dim=1)
            partition += exponentials.sum(1, dtype=torch.float64)
            if stop in counts:
                own, pairs = _class_weights(first / partition[:, None], averaged)
                # Norms grow or shrink with C by many orders: scale by C before float32, back after.
                norms = weighted_gram_norms(gram, torch.cat([stop * own, stop**2 * pairs], dim=1).float()).double()
                own, pairs = norms.tensor_split([own.shape[1]])
                rows.append(torch.stack([own.mean() / stop**2, pairs.mean() / float(stop) ** 4]))
        yield torch.stack(rows)


@dataclass(frozen=True)
class HiddenNorms:
    """Mean squared norms of the blocks of one realization at each of K values of C.

    Attributes
    ----------
    ce_ii, ce_ij : Tensor, shape (K,)
        H_{w_i w_i} and H_{w_i w_j} under CE, (14), averaged over the m neurons and their m(m-1) pairs.
    mse_ii, mse_ij : Tensor, shape (K,)
        The same under MSE, (8).
    mask_ii, mask_ij : Tensor, shape ()
        Of these, the part that has no V: the matrices L_ii and L_ij of Section 7.2.2.
    vv_ii, vv_ij : Tensor, shape (K,) or (0,)
        H_{v_i v_i} and H_{v_i v_j} under CE, (15), averaged over the first classes, or all if there are fewer, and
        their pairs; empty if they were left out.
    """

    ce_ii: Float[Tensor, "K"]
    ce_ij: Float[Tensor, "K"]
    mse_ii: Float[Tensor, "K"]
    mse_ij: Float[Tensor, "K"]
    mask_ii: Float[Tensor, ""]
    mask_ij: Float[Tensor, ""]
    vv_ii: Float[Tensor, "L"]
    vv_ij: Float[Tensor, "L"]


def hidden_block_norms(
    d: int,
    N: int,
    m: int,
    class_counts: Sequence[int],
    realizations: int,
    generator: torch.Generator,
    *,
    output_classes: int = 0,
) -> Iterator[HiddenNorms]:
    """Norms of the blocks of the one-hidden-layer model, (8), (14), (15), one realization after another.

    Parameters
    ----------
    d, N
        Dimension and number of the standard Gaussian features.
    m
        Number of hidden ReLU neurons, at least 2; W ~ N(0, 1/d), V ~ N(0, 1/m).
    class_counts, realizations
        As in :func:`linear_block_norms`.
    output_classes
        Over the blocks of how many classes those of the output layer are averaged, and over their pairs; 0 leaves them
        out.

    Yields
    ------
    HiddenNorms

    Raises
    ------
    ValueError
        If the class counts are not increasing or below 2, m < 2, the number of output classes is 1 or negative, or d, N
        or the number of realizations is below 1.
    """
    counts = _checked_counts(class_counts)
    check_least(1, d=d, N=N, realizations=realizations)
    if m < 2:
        raise ValueError(f"the number of hidden neurons m must be at least 2, got {m}")
    if output_classes < 0 or output_classes == 1:
        raise ValueError(f"the number of output classes must be 0 or at least 2, got {output_classes}")
    rows, columns = torch.triu_indices(m, m)
    diagonal = rows == columns
    for _ in range(realizations):
        X = torch.randn(N, d, generator=generator)
        gram = squared_gram(X).double()
        W = torch.randn(m, d, generator=generator) / math.sqrt(d)
        preactivation = torch.mm(X, W.T).double()
        F = preactivation.clamp(min=0)
        active = (preactivation > 0).double()
        both = active[:, rows] * active[:, columns]
        mask_norms = weighted_gram_norms(gram, both)
        sums = torch.zeros(N, 1 + m + len(rows), dtype=torch.float64)
        inner = torch.zeros(len(rows), dtype=torch.float64)
        ce, mse, output, first = [], [], [], F.new_empty(N, 0)
        for start, stop in _class_chunks(counts, N):
            V = torch.randn(stop - start, m, generator=generator, dtype=torch.float64) / math.sqrt(m)
            products = V[:, rows] * V[:, columns]
            exponentials = torch.mm(F, V.T).exp_()
            first = torch.cat([first, exponentials[:, : output_classes - first.shape[1]]], dim=1)
            sums += exponentials @ torch.cat([torch.ones(len(V), 1, dtype=V.dtype), V, products], dim=1)
            inner += products.sum(0)
            if stop in counts:
                mean = sums[:, 1 : m + 1] / sums[:, :1]
                covariance = sums[:, m + 1 :] / sums[:, :1] - mean[:, rows] * mean[:, columns]
                ce.append(weighted_gram_norms(gram, covariance * both))
                mse.append(inner**2 * mask_norms)
                if output_classes:
                    own, pairs = _class_weights(first / sums[:, :1], output_classes)
                    vv = weighted_block_norms(F, torch.cat([own, pairs], dim=1)).tensor_split([own.shape[1]])
                    output.append(torch.stack([part.mean() for part in vv]))
        norms = (torch.stack(ce), torch.stack(mse), mask_norms)
        hidden = (x[..., which].mean(-1) for x in norms for which in (diagonal, ~diagonal))
        yield HiddenNorms(*hidden, *(torch.stack(output, dim=1) if output else (F.new_empty(0), F.new_empty(0))))


def mask_limits(
    gamma: float, m: int, sizes: tuple[int, int], realizations: int, generator: torch.Generator
) -> tuple[SampledValue, SampledValue]:
    r"""Limits of :math:`E\|L_{ii}\|_F^2/(m^2 d)` and :math:`E\|L_{ij}\|_F^2/(m^2 d)` from networks of two sizes.

    These are the constants of (31): V is independent of the masked matrices L, and
    :math:`E(\sum_k V_{ki}^2)^2 \approx C^2/m^2` and :math:`E(\sum_k V_{ki}V_{kj})^2 = C/m^2` are exact moments, so that
    only the norms of L need simulation. Their error of order 1/N is extrapolated away.

    Parameters
    ----------
    gamma
        d/N.
    m
        Number of hidden neurons.
    sizes
        Two values of N, the smaller one first.
    realizations
        Networks of each size.

    Returns
    -------
    tuple of SampledValue
        For the diagonal and the off-diagonal blocks.

    Raises
    ------
    ValueError
        If the sizes do not increase, or as :func:`hidden_block_norms`.
    """
    small, large = sizes
    if not 0 < small < large:
        raise ValueError(f"two increasing sizes N are needed, got {small} and {large}")
    means = []
    for N in sizes:
        d = round(gamma * N)
        networks = list(hidden_block_norms(d, N, m, [2], realizations, generator))
        masks = [torch.stack([getattr(x, name) for x in networks]) for name in ("mask_ii", "mask_ij")]
        means.append([SampledValue.of(norms * (1 / (m**2 * d))) for norms in masks])
    return tuple(
        SampledValue(
            (large * fine.value - small * coarse.value) / (large - small),
            math.hypot(large * fine.error, small * coarse.error) / (large - small),
        )
        for coarse, fine in zip(*means, strict=True)
    )
