"""Subspaces and how much two of them overlap; eigenvectors of a layer as matrices: Wu et al. (2022), Section 2."""

import torch
from jaxtyping import Float
from torch import Tensor


def overlap(U: Float[Tensor, "d k"], V: Float[Tensor, "d k"]) -> float:
    """‖UᵀV‖²_F / k for two orthonormal bases: the mean squared cosine of the canonical angles (Definition 2.1).

    Raises
    ------
    ValueError
        If the bases differ in shape.
    """
    if U.shape != V.shape:
        raise ValueError(f"two bases of equal shape are needed, got {tuple(U.shape)} and {tuple(V.shape)}")
    return float((U.mT @ V).double().square().sum() / U.shape[1])


def nested_overlaps(U: Float[Tensor, "d K"], V: Float[Tensor, "d K"]) -> Float[Tensor, " K"]:
    """:func:`overlap` of the first k columns for every k = 1, ..., K, from one product."""
    squares = (U.mT @ V).double().square()
    corners = squares.cumsum(0).cumsum(1).diagonal()
    return corners / torch.arange(1, len(corners) + 1, device=corners.device)


def matricized(h: Float[Tensor, "mn *k"], m: int) -> Float[Tensor, "*k m n"]:
    """Mat(h): an eigenvector of a layer in the shape of its weight matrix, row by row (Definition 2.2).

    The definition prints the index (i − 1) m + j, which is right for square matrices only; it is (i − 1) n + j.
    """
    n = len(h) // m
    return h.reshape(m, n, *h.shape[1:]).movedim((0, 1), (-2, -1))


def rank_one_share(h: Float[Tensor, "mn *k"], m: int) -> Float[Tensor, "*k"]:
    """‖Mat(h)‖/‖Mat(h)‖_F: 1 for a matrix of rank 1 (Figure 21)."""
    singular_values = torch.linalg.svdvals(matricized(h, m))
    return singular_values[..., 0] / torch.linalg.vector_norm(singular_values, dim=-1)
