r"""Weighted Gram matrices :math:`\sum_n \lambda_n x_n x_n^\top`, the blocks of Hessians, and their norms.

The weights may have either sign.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Samples gathered at a time: bounds memory and keeps the factors of a product in the cache.
SAMPLES_AT_ONCE = 4096
#: Entries of the largest Khatri-Rao matrix, 256 MiB in float32.
LARGEST_PRODUCTS = 2**26
#: Entries of the largest Gram matrix of the samples, 512 MiB in float32.
LARGEST_GRAM = 2**27


def _check(rows: Tensor, weights: Tensor, ndim: int) -> None:
    """Whether there is a weight, or a row of them, for each of at least one sample: others would be broadcast."""
    if not rows.is_floating_point() or rows.ndim != 2 or weights.ndim != ndim or len(weights) != len(rows):
        given = f"{tuple(weights.shape)} for {rows.dtype} of shape {tuple(rows.shape)}"
        raise ValueError(
            f"weights need {ndim} dimensions and a row for each row of a floating-point matrix, got {given}"
        )
    if not len(rows):
        raise ValueError("the number of samples N must be at least 1, got 0")


def weighted_gram(
    X: Float[Tensor, "N d"], weights: Float[Tensor, "N"], samples: Int[Tensor, "n"] | None = None
) -> Float[Tensor, "d d"]:
    r"""Sum :math:`\sum_n \lambda_n x_n x_n^\top`, exactly symmetric, of which only the upper triangle is computed.

    Parameters
    ----------
    X
        Features, shape (N, d).
    weights
        Weights :math:`\lambda` of either sign, shape (N,).
    samples
        The samples to sum over, indices of shape (n,); all if left out.

    Returns
    -------
    Tensor, shape (d, d)
        In the precision of X.

    Raises
    ------
    ValueError
        If there is not one weight a sample, or no sample.
    """
    _check(X, weights, 1)
    d = X.shape[1]
    gram = X.new_zeros(d, d)
    panels = max(1, min(8, d // 128))
    edges = [d * k // panels for k in range(panels + 1)]
    if samples is None:
        factors = zip(X.split(SAMPLES_AT_ONCE), weights.split(SAMPLES_AT_ONCE), strict=True)
    else:
        factors = ((X.index_select(0, n), weights.index_select(0, n)) for n in samples.split(SAMPLES_AT_ONCE))
    for left, scale in factors:
        right = left * scale[:, None].to(X.dtype)
        for low, high in pairwise(edges):
            gram[low:high, low:].addmm_(left[:, low:high].T, right[:, low:])
    for low, high in pairwise(edges):
        square = gram[low:high, low:high]
        square.copy_(square.triu() + square.triu(1).T)
        gram[high:, low:high] = gram[low:high, high:].T
    return gram


def squared_gram(X: Float[Tensor, "N d"]) -> Float[Tensor, "N N"]:
    r"""Entrywise square :math:`K \circ K` of the Gram matrix :math:`K = X X^\top` of the samples, shape (N, N)."""
    return (X @ X.T).square_()


def weighted_gram_norms(K2: Float[Tensor, "N N"], weights: Float[Tensor, "N B"]) -> Float[Tensor, "B"]:
    r"""Squared Frobenius norms of :math:`\frac1N \sum_n \lambda_n x_n x_n^\top` without forming a matrix.

    .. math:: \Big\|\tfrac1N \sum_n \lambda_n x_n x_n^\top\Big\|_F^2 = \tfrac1{N^2} \lambda^\top (K \circ K) \lambda

    Parameters
    ----------
    K2
        :math:`K \circ K` from :func:`squared_gram`, shape (N, N); serves any number of weights.
    weights
        One column :math:`\lambda` per block, shape (N, B).

    Returns
    -------
    Tensor, shape (B,)
        In the precision of K∘K.

    Raises
    ------
    ValueError
        If there is not one row of weights a sample, or no sample.
    """
    _check(K2, weights, 2)
    weights = weights.to(K2.dtype)
    return ((K2 @ weights) * weights).sum(0) / len(K2) ** 2


def weighted_block_norms(X: Float[Tensor, "N d"], weights: Float[Tensor, "N B"]) -> Float[Tensor, "B"]:
    r"""Squared Frobenius norms of :math:`\frac1N \sum_n \lambda_n x_n x_n^\top`, by the cheapest of three ways.

    From the unique products of two features if they are fewer than the samples, from :math:`K \circ K` if the samples
    are fewer, and from the blocks themselves, one at a time, if there are too many of both.

    Parameters
    ----------
    X
        Features, shape (N, d): the inputs of the layer whose blocks these are.
    weights
        One column :math:`\lambda` per block, shape (N, B), such as :math:`A_{n,ij}` or
        :math:`(v_{\cdot k}^\top A_n v_{\cdot l}) a_{nk} a_{nl}`.

    Returns
    -------
    Tensor, shape (B,)
        In the precision of X.

    Raises
    ------
    ValueError
        If there is not one row of weights a sample, or no sample.
    """
    _check(X, weights, 2)
    return block_norms(X, weights.shape[1])(weights)


def block_norms(X: Float[Tensor, "N d"], count: int) -> Callable[[Tensor], Tensor]:
    """:func:`weighted_block_norms` of any weights, prepared for this many blocks."""
    N, d = X.shape
    if KhatriRao.fits(N, d) and d * (d + 1) // 2 <= N:
        products = KhatriRao(X)
        return lambda weights: products.squared_norms(weights.to(X.dtype)) / N**2
    if N * N <= LARGEST_GRAM and N * (d + count) < d * d * count:
        K2 = squared_gram(X)
        return lambda weights: weighted_gram_norms(K2, weights.to(X.dtype))
    return lambda weights: torch.stack([weighted_gram(X, column).square_().sum() for column in weights.T]) / N**2


class KhatriRao:
    r"""Many weighted Gram matrices of the same features at once.

    As :math:`\sum_n \lambda_n x_n x_n^\top` is symmetric, the matrix of the d (d + 1) / 2 unique products
    :math:`x_{na} x_{nb}`, a ≤ b, times a matrix of weights gives any number of them in one product.

    Parameters
    ----------
    X
        Features, shape (N, d).
    """

    def __init__(self, X: Float[Tensor, "N d"]):
        self.d = X.shape[1]
        own, (low, high) = torch.arange(self.d), torch.triu_indices(self.d, self.d, offset=1)
        self.a, self.b = torch.cat([own, low]).to(X.device), torch.cat([own, high]).to(X.device)  # squares first
        self.products = X[:, self.a].mul_(X[:, self.b])

    @staticmethod
    def fits(N: int, d: int) -> bool:
        """Whether the matrix is small enough, and d small enough for it to be better than :func:`weighted_gram`."""
        return d <= 256 and N * d * (d + 1) // 2 <= LARGEST_PRODUCTS

    def unique(self, weights: Float[Tensor, "N B"]) -> Float[Tensor, "f B"]:
        r"""Unique entries (a, b) of :math:`\sum_n \lambda_n x_n x_n^\top`, a column for each column of the weights."""
        return self.products.T @ weights

    def grams(self, weights: Float[Tensor, "N B"]) -> Float[Tensor, "B d d"]:
        """The matrices themselves, shape (B, d, d)."""
        unfold = torch.empty(self.d, self.d, dtype=torch.long, device=weights.device)
        unfold[self.a, self.b] = unfold[self.b, self.a] = torch.arange(len(self.a), device=weights.device)
        return self.unique(weights).index_select(0, unfold.flatten()).view(self.d, self.d, -1).permute(2, 0, 1)

    def squared_norms(self, weights: Float[Tensor, "N B"]) -> Float[Tensor, "B"]:
        """Their squared Frobenius norms, shape (B,)."""
        squares = self.unique(weights).square_()
        return squares[: self.d].sum(0) + 2 * squares[self.d :].sum(0)
