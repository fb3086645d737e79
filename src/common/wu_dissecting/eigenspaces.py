"""Subspaces and how much two of them overlap; eigenvectors of a layer as matrices: Wu et al. (2022), Section 2."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.hessian.block_lanczos import ROUNDING
from common.hessian.layer import LayerHessian, WeightSharingHessian


def overlap(U: Float[Tensor, "d k"], V: Float[Tensor, "d k"]) -> float:
    """‖UᵀV‖²_F / k for two orthonormal bases: the mean squared cosine of the canonical angles (Definition 2.1).

    Raises
    ------
    ValueError
        If the bases differ in shape, or are no matrices of at least one column.
    """
    if U.shape != V.shape or U.ndim != 2 or not U.shape[1]:
        raise ValueError(f"two bases of equal shape (d, k) are needed, got {tuple(U.shape)} and {tuple(V.shape)}")
    return float(_squared_cosines(U, V).sum() / U.shape[1])


def _squared_cosines(U: Float[Tensor, "d k"], V: Float[Tensor, "d l"]) -> Float[Tensor, "k l"]:
    dtype = torch.promote_types(U.dtype, V.dtype)
    return (U.mT.to(dtype) @ V.to(dtype)).double().square()


def nested_overlaps(U: Float[Tensor, "d K"], V: Float[Tensor, "d K"]) -> Float[Tensor, " K"]:
    """:func:`overlap` of the first k columns for every k = 1, ..., K, from one product."""
    corners = _squared_cosines(U, V).cumsum(0).cumsum(1).diagonal()
    return corners / torch.arange(1, len(corners) + 1, device=corners.device)


def matricized(h: Float[Tensor, "mn *k"], m: int) -> Float[Tensor, "*k m n"]:
    """Mat(h): an eigenvector of a layer in the shape of its weight matrix, row by row (Definition 2.2).

    The definition prints the index (i − 1) m + j, which is right for square matrices only; it is (i − 1) n + j.

    Raises
    ------
    ValueError
        If m does not divide the length.
    """
    if m < 1 or len(h) % m:
        raise ValueError(f"vectors of length {len(h)} have no matrices of {m} rows")
    n = len(h) // m
    return h.reshape(m, n, *h.shape[1:]).movedim((0, 1), (-2, -1))


def rank_one_share(h: Float[Tensor, "mn *k"], m: int) -> Float[Tensor, "*k"]:
    """‖Mat(h)‖/‖Mat(h)‖_F: 1 for a matrix of rank 1 (Figure 21)."""
    singular_values = torch.linalg.svdvals(matricized(h, m))
    return singular_values[..., 0] / torch.linalg.vector_norm(singular_values, dim=-1)


def correspondence(
    h: Float[Tensor, "mn k"], U: Float[Tensor, "m a"], V: Float[Tensor, "n b"]
) -> tuple[Float[Tensor, "b k"], Float[Tensor, "a k"]]:
    """‖Mat(h_j) v_i‖² and ‖Mat(h_j)ᵀ u_i‖², (265) and (266): 1 where h_j is a Kronecker product with that vector."""
    matrices = matricized(h, len(U))
    return (matrices @ V).square().sum(1).T, (matrices.mT @ U).square().sum(1).T


@runtime_checkable
class HasInputs(Protocol):
    """What is known of the inputs of a layer, by its Hessian or alone.

    Attributes
    ----------
    input_basis
        Eigenvalues of E[xxᵀ], descending, and eigenvectors.
    mean_input
        E[x]/‖E[x]‖.
    """

    input_basis: tuple[Tensor, Tensor]
    mean_input: Tensor


def dominance_of_mean(H: HasInputs) -> tuple[float, float]:
    """(v₁ᵀÊ[x])² and γ₁/γ₂ of the autocorrelation E[xxᵀ] of a layer's inputs (App F.1): 1 and ∞ for equal inputs.

    A γ₂ that is rounding counts as 0; the ratio of zero inputs is NaN.
    """
    values, vectors = H.input_basis
    first, second = (float(value) for value in nn.functional.pad(values, (0, 1))[:2])
    if second <= ROUNDING * torch.finfo(values.dtype).eps * first:
        second = 0.0
    ratio = first / second if second else math.inf if first > 0 else math.nan
    return float(vectors[:, 0] @ H.mean_input) ** 2, ratio


def kronecker_correspondence(
    H: LayerHessian | WeightSharingHessian, k: int
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "m k"]]:
    """:func:`correspondence` of the first k eigenvectors of E[M] ⊗ E[xxᵀ]: each has a 1 in either, and else zeros."""
    _, i, j = H.kronecker_places(k)
    identities = torch.eye(len(H.autocorrelation)), torch.eye(len(H.output_hessian))
    return identities[0][:, j], identities[1][:, i]


def band_mean(of_outputs: Float[np.ndarray, "m k"], part: slice = slice(None)) -> float:
    """Mean over j ≤ m and k, or a part of them, of the correspondence of h_j with all u_i of |i − j| ≤ m/20.

    The diagonal of Figures 11 to 15, read as a band: where eigenvalues nearly meet, h_j is a mixture of neighbours. For
    m < 20 it is the diagonal itself.
    """
    m = len(of_outputs)
    i, j = np.ogrid[:m, : min(m, of_outputs.shape[1])]
    return float((of_outputs[:, :m] * (abs(i - j) <= m // 20)).sum(0)[part].mean())


def pairwise_overlaps(bases: Sequence[Float[Tensor, "d K"]]) -> Float[np.ndarray, "E E K"]:
    """:func:`nested_overlaps` of every two of E bases; nan on the diagonal.

    Raises
    ------
    ValueError
        If there are none, or they differ in shape.
    """
    if len({basis.shape for basis in bases}) != 1:
        raise ValueError(f"bases of one shape are needed, got {[tuple(basis.shape) for basis in bases]}")
    E, K = len(bases), bases[0].shape[1]
    pairs = np.full((E, E, K), np.nan)
    for i, j in combinations(range(E), 2):
        pairs[i, j] = pairs[j, i] = nested_overlaps(bases[i], bases[j]).cpu().numpy()
    return pairs


def each_pair(pairs: Float[np.ndarray, "E E *more"]) -> Float[np.ndarray, "pairs *more"]:
    """What is known of every two of E models, each pair once."""
    return pairs[np.triu_indices(len(pairs), 1)]


def linear_range(
    tau: Float[Tensor | np.ndarray, "E m"], gamma: Float[Tensor | np.ndarray, "E n"]
) -> Int[Tensor | np.ndarray, " E"]:
    """k₀, the number of i with τ_i γ_1 > τ_1 γ_2, for E models (Theorem G.1, App G.3.3).

    Kronecker's first k₀ eigenvectors are u_i ⊗ v_1, so that up to k₀ the overlap of two models grows linearly with k.

    Parameters
    ----------
    tau, gamma
        Eigenvalues of E[M] and E[xxᵀ], descending.

    Raises
    ------
    ValueError
        If there is no γ_2.
    """
    if gamma.shape[1] < 2:
        raise ValueError(f"gamma needs at least two eigenvalues a model, got {gamma.shape[1]}")
    return (tau * gamma[:, :1] > tau[:, :1] * gamma[:, 1:2]).sum(1)


def overlap_of_uncorrelated(
    squares: Float[np.ndarray, "E E"], shares: Float[np.ndarray, " E"], k: int, m: int
) -> Float[np.ndarray, "E E"]:  # fmt: skip
    """s⁽¹⁾s⁽²⁾ (k/m) (t₁⁽¹⁾·t₁⁽²⁾)²: the law of Theorem G.1 where Kronecker's approximation is not accurate.

    The part of a top k eigenspace in R^m ⊗ t₁ is A ⊗ t₁ with ‖A‖²_F = k s. Of two such A that are uncorrelated, as
    those of networks whose neurons can be permuted, ‖A⁽¹⁾ᵀA⁽²⁾‖²_F is k² s⁽¹⁾s⁽²⁾/m in the mean. What lies outside
    counts as 0.

    Parameters
    ----------
    squares
        (t₁ · t₁)² of every two of E models.
    shares
        s of each, the mean of ‖Mat(h_j) t₁‖², (265), over j ≤ k.
    """
    return shares[:, None] * shares[None] * squares * k / m


def pseudovalues(pairs: Float[np.ndarray, "E E *more"]) -> Float[np.ndarray, "E *more"]:
    """Jackknife of the mean over pairs of E models: the mean of what is returned is that mean.

    Pairs that share a model depend on one another; leaving out a model at a time, E θ − (E − 1) θ_{−i}, gives values
    whose t-interval allows for that. With few models it is too wide rather than too narrow.

    Raises
    ------
    ValueError
        If there are fewer than three models.
    """
    others = 1 - np.eye(len(pairs))
    return ratio_pseudovalues(pairs, others.reshape(others.shape + (1,) * (pairs.ndim - 2)))


def ratio_pseudovalues(
    above: Float[np.ndarray, "E E *more"], below: Float[np.ndarray, "E E *more_or_1"]
) -> Float[np.ndarray, "E *more"]:
    """Jackknife of the ratio of two means over pairs of E models, as :func:`pseudovalues` of one mean.

    The error of the denominator is in it, and what both have in common falls out. The diagonal may be NaN; otherwise it
    must be 0.

    Raises
    ------
    ValueError
        If there are fewer than three models.
    """
    E = len(above)
    if E < 3:
        raise ValueError(f"leaving one of the models out needs at least 3, got {E}")
    of_above, of_below = np.nansum(above, 1), np.nansum(below, 1)
    whole_above, whole_below = of_above.sum(0) / 2, of_below.sum(0) / 2
    without = (whole_above - of_above) / (whole_below - of_below)
    return E * whole_above / whole_below - (E - 1) * without


def peaks(pairs: Float[np.ndarray, "E E K"]) -> list[int]:
    """The k at which the mean overlap over pairs is largest: of all models, then with each of them left out in turn.

    Raises
    ------
    ValueError
        If there are fewer than three models.
    """
    if len(pairs) < 3:
        raise ValueError(f"leaving one of the models out needs at least 3, got {len(pairs)}")
    every = [pairs, *(np.delete(np.delete(pairs, i, 0), i, 1) for i in range(len(pairs)))]
    return [int(np.nanmean(some, (0, 1)).argmax()) + 1 for some in every]
