r"""The exact Hessian of linear and one-hidden-layer ReLU models, block by block and in closed form.

Section 4 of Dong, Zhang, Yao & Sun (2025), "Towards Quantifying the Hessian Structure of Neural Networks". Samples
:math:`x_1, \dots, x_N \in \mathbb{R}^d` with labels :math:`y_n \in \{1, \dots, C\}`, no biases, and

- the linear model :math:`f(x) = V x` with :math:`V \in \mathbb{R}^{C \times d}`, parameters :math:`v_1, \dots, v_C`;
- one hidden layer, :math:`f(x) = V \sigma(W x)`, :math:`W \in \mathbb{R}^{m \times d}`,
  :math:`V \in \mathbb{R}^{C \times m}`, parameters :math:`w_1, \dots, w_m, v_1, \dots, v_C`; all vectors are rows.

The losses are means over the samples:

- ``"CE"``, (4) and (13): :math:`\frac1N \sum_n -\log p_{n, y_n}` with :math:`p_n = \mathrm{softmax}(f(x_n))`;
- ``"MSE"``, (2) and (7): :math:`\frac1N \sum_n \|f(x_n) - e_{y_n}\|^2`, neither halved nor divided by C.

We differentiate the losses as they stand. **Under MSE every block carries the factor 2**, as (11) of the paper does;
its (3), (8) and (9) lack it. The kink of the ReLU contributes nothing: :math:`\sigma'(0) = 0` and
:math:`\sigma'' = 0`, as in automatic differentiation.

With :math:`g_n = \partial \ell_n / \partial f` and :math:`A_n = \partial^2 \ell_n / \partial f \partial f^\top`, which
are :math:`p_n - e_{y_n}` and :math:`\mathrm{diag}(p_n) - p_n p_n^\top` under CE, :math:`2 (f(x_n) - e_{y_n})` and
:math:`2 I` under MSE, with :math:`s_n = \sigma(W x_n)`, :math:`a_{nk} = 1(w_k^\top x_n > 0)` and the columns
:math:`v_{\cdot k}` of V, both losses read

.. math::

    H_{v_i v_j} &= \tfrac1N \textstyle\sum_n A_{n,ij}\, x_n x_n^\top
        && \text{linear model, (3) and (5); } s_n s_n^\top \text{ with a hidden layer, (9) and (15)} \\
    H_{w_k w_l} &= \tfrac1N \textstyle\sum_n (v_{\cdot k}^\top A_n v_{\cdot l})\, a_{nk} a_{nl}\, x_n x_n^\top
        && \text{(8) and (14)} \\
    H_{w_k v_j} &= \tfrac1N \textstyle\sum_n \big[ g_{nj} a_{nk}\, x_n e_k^\top
        + (A_n v_{\cdot k})_j a_{nk}\, x_n s_n^\top \big] && \text{(11) and (18)}

What belongs to one sample (:math:`p_n, A_n v_{\cdot k}, \dots`) is computed in float64 wherever it could cancel, as
:math:`1 - p` does for a trained model that is sure of its answers; the sums over samples run in the precision of X.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Loss = Literal["CE", "MSE"]
Part = Literal["full", "ww", "vv", "wv"]
Pool = Literal["mean", "max"]
Piece = tuple[slice, slice, Tensor]  # rows, columns, values

_SAMPLES = 4096  # samples gathered at a time: bounds memory and keeps the factors of a product in the cache
_ENTRIES = 2**23  # entries of a chunk of results, 32 MiB in float32
_PRODUCTS = 2**26  # entries of the largest Khatri-Rao matrix, 256 MiB in float32
_GRAM = 2**27  # entries of the largest Gram matrix of the samples, 512 MiB in float32


# ---------------------------------------------------------------------------------------------------------------------
# Weighted Gram matrices and their norms


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
    """
    d = X.shape[1]
    gram = X.new_zeros(d, d)
    panels = max(1, min(8, d // 128))
    edges = [d * k // panels for k in range(panels + 1)]
    if samples is None:
        factors = zip(X.split(_SAMPLES), weights.split(_SAMPLES), strict=True)
    else:
        factors = ((X.index_select(0, n), weights.index_select(0, n)) for n in samples.split(_SAMPLES))
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
    """
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
    """
    return _block_norms(X, weights.shape[1])(weights)


def _block_norms(X: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    """:func:`weighted_block_norms` of any weights, prepared for this many blocks."""
    N, d = X.shape
    if KhatriRao.fits(N, d) and d * (d + 1) // 2 <= N:
        products = KhatriRao(X)
        return lambda weights: products.squared_norms(weights.to(X.dtype)) / N**2
    if N * N <= _GRAM and N * (d + count) < d * d * count:
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
        return d <= 256 and N * d * (d + 1) // 2 <= _PRODUCTS

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


# ---------------------------------------------------------------------------------------------------------------------
# Images of matrices too large to form


class _PooledImage:
    """Mean or maximum of |H| over the pixels of an image; entries are added in any order, each exactly once."""

    def __init__(self, rows: int, columns: int, pixels: int, pool: Pool, device: torch.device):
        if pixels < 1:
            raise ValueError(f"the number of pixels must be at least 1, got {pixels}")
        if pool not in ("mean", "max"):
            raise ValueError(f"pool must be 'mean' or 'max', got {pool!r}")
        self.pool = pool
        self._pixel, counts = [], []
        for length in (rows, columns):
            size = min(length, max(1, round(pixels * length / max(rows, columns))))
            self._pixel.append(torch.arange(length, device=device) * size // length)
            counts.append(torch.bincount(self._pixel[-1], minlength=size).to(torch.float64))
        self._count = torch.outer(*counts)
        self._total = torch.zeros_like(self._count)

    def add(self, rows: slice, columns: slice, values: Tensor) -> None:
        """Add the entries of these rows and columns; ``values`` is overwritten by its moduli."""
        row_pixel, top, height = self._pixels(0, rows)
        strip = values.new_zeros(height, values.shape[1])
        self._reduce(strip, 0, row_pixel, values.abs_())
        self._add_strip(top, columns, strip, factor=0.5 if rows == columns else 1.0)

    def add_unique(self, rows: slice, columns: slice, a: Tensor, b: Tensor, values: Tensor) -> None:
        """Add B symmetric blocks of order d side by side, from their unique entries (a, b), shape (entries, B).

        The rows are d and the columns B d. The d entries with a = b come first. Overwrites ``values`` by its moduli.
        """
        (row_pixel, top, height), d = self._pixels(0, rows), int(b[-1]) + 1
        strip = values.new_zeros(height * d, values.shape[1])
        self._reduce(strip, 0, row_pixel[a] * d + b, values.abs_())
        self._reduce(strip, 0, row_pixel[b[d:]] * d + a[d:], values[d:])
        self._add_strip(top, columns, strip.view(height, d, -1).transpose(1, 2).flatten(1))

    def _pixels(self, axis: int, which: slice) -> tuple[Tensor, int, int]:
        """Pixels of some rows or columns counted from the first one, the first one, and how many they are."""
        pixel = self._pixel[axis][which]
        first = int(pixel[0])
        return pixel - first, first, int(pixel[-1]) - first + 1

    def _add_strip(self, top: int, columns: slice, strip: Tensor, factor: float = 1.0) -> None:
        column_pixel, left, width = self._pixels(1, columns)
        patch = strip.new_zeros(len(strip), width)
        self._reduce(patch, 1, column_pixel, strip)
        region = self._total[top : top + len(strip), left : left + width]
        if self.pool == "mean":
            region.add_(patch, alpha=factor)
        else:
            region.copy_(torch.maximum(region, patch))

    def _reduce(self, target: Tensor, dim: int, pixel: Tensor, values: Tensor) -> None:
        index = (pixel[:, None] if dim == 0 else pixel).expand(values.shape)
        if self.pool == "mean":
            target.scatter_add_(dim, index, values)
        else:
            target.scatter_reduce_(dim, index, values, "amax")

    def finish(self, mirror: bool) -> Tensor:
        """Return the image; ``mirror`` adds the transpose of what was added, pieces with rows = columns apart."""
        if self.pool == "max":
            return torch.maximum(self._total, self._total.T) if mirror else self._total
        return (self._total + self._total.T if mirror else self._total) / self._count


# ---------------------------------------------------------------------------------------------------------------------
# The models


class MeanNorms(NamedTuple):
    """Mean squared Frobenius norm of the diagonal and of the off-diagonal blocks of one layer (NaN if it has none)."""

    diagonal: float
    off_diagonal: float


class StripeEnergy(NamedTuple):
    r"""Squared Frobenius norm of the stripes of :math:`H_{wv}`, and of all of it."""

    stripes: float
    total: float


@dataclass(frozen=True, eq=False)
class LinearHessian:
    r"""Hessian of the linear model :math:`f(x) = V x`, of order Cd with parameters :math:`v_1, \dots, v_C`; (3), (5).

    It depends on the labels under neither loss. With hidden activations for X this is the output layer's block
    :math:`H_{vv}` of a deeper network, (9), (15).

    Parameters
    ----------
    X
        Samples, shape (N, d), float32 or float64; the results have its precision and device.
    V
        Weights, shape (C, d).
    loss
        ``"CE"`` or ``"MSE"``, as the module states them.

    Raises
    ------
    ValueError
        If a size is zero, shapes do not agree, a value is not finite, or the loss is unknown.

    Examples
    --------
    Two classes, one feature: :math:`p_1 p_2 x^2` with signs.

    >>> H = LinearHessian(torch.tensor([[2.0]]), torch.zeros(2, 1), "CE")
    >>> H.matrix()
    tensor([[ 1., -1.],
            [-1.,  1.]])
    """

    X: Float[Tensor, "N d"]
    V: Float[Tensor, "C d"]
    loss: Loss

    def __post_init__(self):
        _detach(self, "X", "V")
        _check(self.X, {"V": self.V}, self.loss)
        if self.V.shape[1] != self.d:
            raise ValueError(f"V has {self.V.shape[1]} columns but the samples have {self.d} features")

    @property
    def N(self) -> int:
        """Number of samples."""
        return self.X.shape[0]

    @property
    def d(self) -> int:
        """Number of features."""
        return self.X.shape[1]

    @property
    def C(self) -> int:
        """Number of classes."""
        return self.V.shape[0]

    @property
    def order(self) -> int:
        """Number of parameters, C d."""
        return self.C * self.d

    def v(self, i: int) -> slice:
        """Where the weights of class i lie among the parameters."""
        return _nth(i, self.d, self.C, 0, "class")

    @cached_property
    def p(self) -> Float[Tensor, "N C"]:
        """Probabilities p_{n,i}, shape (N, C), in float64."""
        return _in_float64(self.X, self.V).softmax(dim=1)

    @cached_property
    def top(self) -> tuple[Int[Tensor, "N 1"], Float[Tensor, "N 1"], Float[Tensor, "N 1"]]:
        """Likeliest class of each sample, its p and, to full relative precision, its 1 - p; each (N, 1), in float64."""
        p, top = self.p.max(dim=1, keepdim=True)
        return top, p, self.p.scatter(1, top, 0).sum(dim=1, keepdim=True)

    @cached_property
    def _p(self) -> Tensor:
        return self.p.to(self.X.dtype)

    @cached_property
    def _own(self) -> Tensor:
        """A_{n,ii}, shape (N, C)."""
        if self.loss == "MSE":
            return self.X.new_full((1, 1), 2).expand(self.N, self.C)
        top, p, complement = self.top
        return ((1 - self._p) * self._p).scatter_(1, top, (p * complement).to(self.X.dtype))

    def _strips(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Under CE, classes j > i and the weights A_{n,ij} / N of the blocks (i, j), shape (N, B), for every i."""
        for i in range(self.C):
            for classes in _ranges(i + 1, self.C, max(self.d**2, self.N)):
                yield i, classes, self._p[:, classes] * (-self._p[:, i : i + 1] / self.N)

    def _sheets(self) -> Iterator[tuple[int, int, Tensor]]:
        """Under CE, entries [(i, k), (j, l)] for each pair k ≤ l of features as a matrix over i and j, shape (C, C).

        Each is a product over the samples where neither feature is zero: after a ReLU that is a quarter of them.
        """
        nonzero = self.X != 0
        for k in range(self.d):
            for l in range(k, self.d):
                samples = (nonzero[:, k] & nonzero[:, l]).nonzero().squeeze(1)
                product = self.X[:, k] * self.X[:, l]
                sheet = weighted_gram(self._p, product / -self.N, samples)
                sheet.diagonal().copy_(product @ self._own / self.N)
                yield k, l, sheet

    @property
    def _few_features(self) -> bool:
        """Whether sheets, one for each pair of features, serve better than blocks, one for each pair of classes."""
        return self.d <= min(16, self.C / 8)

    def _grams(self, khatri_rao: KhatriRao | None, weights: Tensor) -> Tensor:
        if khatri_rao is not None:
            return khatri_rao.grams(weights)
        return torch.stack([weighted_gram(self.X, column) for column in weights.T])

    def _khatri_rao(self) -> KhatriRao | None:
        return KhatriRao(self.X) if self.loss == "CE" and KhatriRao.fits(self.N, self.d) else None

    def _own_blocks(self, khatri_rao: KhatriRao | None) -> Iterator[Piece]:
        """Blocks on the diagonal."""
        if self.loss == "MSE":
            block = self._grams(None, self.X.new_full((self.N, 1), 2 / self.N))[0]
            yield from ((self.v(i), self.v(i), block) for i in range(self.C))
            return
        for classes in _ranges(0, self.C, max(self.d**2, self.N)):
            for i, block in enumerate(self._grams(khatri_rao, self._own[:, classes] / self.N), start=classes.start):
                yield self.v(i), self.v(i), block

    def _pieces(self) -> Iterator[Piece]:
        """Pieces that with their transposes make up the matrix."""
        if self.loss == "CE" and self._few_features:
            for k, l, sheet in self._sheets():
                yield slice(k, self.order, self.d), slice(l, self.order, self.d), sheet
            return
        khatri_rao = self._khatri_rao()
        yield from self._own_blocks(khatri_rao)
        if self.loss == "CE":
            for i, classes, weights in self._strips():
                blocks = self._grams(khatri_rao, weights)
                yield slice(classes.start * self.d, classes.stop * self.d), self.v(i), blocks.flatten(0, 1)

    def matrix(self, out: Tensor | None = None) -> Float[Tensor, "Cd Cd"]:
        """Return the whole Hessian, shape (C d, C d), exactly symmetric.

        Parameters
        ----------
        out
            Where to write it, if it is there already, shape (C d, C d).
        """
        H = _new_matrix(self.X, self.order, self.order) if out is None else out
        if self.loss == "MSE":
            H.zero_()
        return _write(H, self._pieces())

    def tile(self, rows: slice | Tensor, columns: slice | Tensor) -> Float[Tensor, "R S"]:
        """Any tile of the Hessian, such as the block ``H.tile(H.v(i), H.v(j))``.

        Parameters
        ----------
        rows, columns
            Which parameters: slices or tensors of indices.

        Returns
        -------
        Tensor, shape (R, S)
        """
        rows, columns = _indices(rows, self.order, self.X), _indices(columns, self.order, self.X)
        (i, a), (j, b) = _divmod(rows, self.d), _divmod(columns, self.d)
        tile = self.X.new_zeros(len(rows), len(columns))
        if self.loss == "CE":
            for n in _ranges(0, self.N, len(rows) + len(columns)):
                left, right = self.X[n][:, a].mul_(self._p[n][:, i]), self.X[n][:, b].mul_(self._p[n][:, j])
                tile.addmm_(left.T, right, alpha=-1 / self.N)
        for c in np.intersect1d(i.cpu(), j.cpu()):  # the blocks on the diagonal, written anew
            own = self._own[:, c, None] / self.N
            r, s = (i == c).nonzero().squeeze(1), (j == c).nonzero().squeeze(1)
            tile[r[:, None], s] = (self.X[:, a[r]] * own).T @ self.X[:, b[s]]
        return tile

    def squared_norms(self) -> Float[Tensor, "C C"]:
        """Squared Frobenius norms of all blocks, shape (C, C), without forming them; (3), (5)."""
        if self.loss == "MSE":
            block = weighted_gram(self.X, self.X.new_full((self.N,), 2 / self.N))
            return torch.diag(block.square().sum().expand(self.C))
        norms = self.X.new_zeros(self.C, self.C)
        if self._few_features:
            for k, l, sheet in self._sheets():
                norms += sheet.square_().mul_(1 if k == l else 2)
            return norms
        norms_of = _block_norms(self.X, self.C * (self.C + 1) // 2)
        norms.diagonal().copy_(norms_of(self._own))
        for i, classes, weights in self._strips():
            norms[i, classes] = norms[classes, i] = norms_of(weights.mul_(self.N))
        return norms

    def mean_squared_norms(self) -> MeanNorms:
        r"""Mean squared Frobenius norm of the diagonal blocks, and of the off-diagonal ones in closed form.

        .. math:: \sum_{i \ne j} \|H_{v_i v_j}\|_F^2 = \tfrac1{N^2} \sum_{nm} K_{nm}^2
            \Big[(p_n^\top p_m)^2 - \sum_i p_{ni}^2 p_{mi}^2\Big]

        takes N² C products of numbers instead of C² blocks and is used, in float64, where it is the cheaper way.
        """
        N, d, C = self.N, self.d, self.C
        if self.loss == "CE" and N * (4 * C + d) < C * C / 2 * min(N, d * (d + 1) / 2):
            total = 0.0
            for n in _ranges(0, N, N):
                K2 = (self.X[n] @ self.X.T).double().square_()
                overlap = (self.p[n] @ self.p.T).square_() - self.p[n].square() @ self.p.T.square()
                total += torch.sum(K2 * overlap).item()
            return MeanNorms(
                weighted_block_norms(self.X, self._own).double().mean().item(), total / N**2 / (C * (C - 1))
            )
        return _mean_norms(self.squared_norms())

    def image(self, pixels: int = 1000, pool: Pool = "mean") -> Float[Tensor, "pixels pixels"]:
        """Image of |H|, however large: one block row at a time.

        Parameters
        ----------
        pixels
            Width of the image, at most C d of which are used. It need not divide C d: parameter r belongs to the pixel
            floor(r · pixels / (C d)).
        pool
            ``"mean"`` or ``"max"`` of the moduli of the entries in each pixel.

        Returns
        -------
        Tensor, shape (pixels, pixels)
            In float64.
        """
        image = _PooledImage(self.order, self.order, pixels, pool, self.X.device)
        self._draw(image, offset=0)
        return image.finish(mirror=True)

    def _draw(self, image: _PooledImage, offset: int) -> None:
        khatri_rao = None if self._few_features else self._khatri_rao()
        if khatri_rao is None:
            _draw(image, self._pieces(), offset, offset)
            return
        _draw(image, self._own_blocks(khatri_rao), offset, offset)
        for i, classes, weights in self._strips():
            columns = slice(classes.start * self.d + offset, classes.stop * self.d + offset)
            unique = khatri_rao.unique(weights)
            image.add_unique(_shift(self.v(i), offset), columns, khatri_rao.a, khatri_rao.b, unique)


@dataclass(frozen=True, eq=False)
class HiddenLayerHessian:
    r"""Hessian of :math:`f(x) = V \sigma(W x)`, of order md + Cm, parameters :math:`w_1, ..., w_m, v_1, ..., v_C`.

    Equations (8), (9), (11) under MSE, (14), (15), (18) under CE.

    Parameters
    ----------
    X
        Samples, shape (N, d), float32 or float64; the results have its precision and device.
    W
        Hidden weights, shape (m, d).
    V
        Output weights, shape (C, m).
    y
        Labels 0, ..., C - 1, shape (N,); only :math:`H_{wv}` depends on them.
    loss
        ``"CE"`` or ``"MSE"``, as the module states them.

    Raises
    ------
    ValueError
        If a size is zero, shapes do not agree, a value is not finite, a label is out of range, or the loss is unknown.
    """

    X: Float[Tensor, "N d"]
    W: Float[Tensor, "m d"]
    V: Float[Tensor, "C m"]
    y: Int[Tensor, "N"]
    loss: Loss

    def __post_init__(self):
        _detach(self, "X", "W", "V")
        _check(self.X, {"W": self.W, "V": self.V}, self.loss)
        if self.W.shape[1] != self.d:
            raise ValueError(f"W has {self.W.shape[1]} columns but the samples have {self.d} features")
        if self.V.shape[1] != self.m:
            raise ValueError(f"V has {self.V.shape[1]} columns but W has {self.m} rows")
        if self.y.shape != (self.N,) or self.y.is_floating_point():
            raise ValueError(f"y must hold {self.N} integer labels, got {self.y.dtype} of shape {tuple(self.y.shape)}")
        low, high = int(self.y.min()), int(self.y.max())
        if low < 0 or high >= self.C:
            raise ValueError(f"labels must lie in 0, ..., {self.C - 1}, got {low if low < 0 else high}")

    @property
    def N(self) -> int:
        """Number of samples."""
        return self.X.shape[0]

    @property
    def d(self) -> int:
        """Number of features."""
        return self.X.shape[1]

    @property
    def m(self) -> int:
        """Number of hidden neurons."""
        return self.W.shape[0]

    @property
    def C(self) -> int:
        """Number of classes."""
        return self.V.shape[0]

    @property
    def order(self) -> int:
        """Number of parameters, m d + C m."""
        return self.m * (self.d + self.C)

    def w(self, k: int) -> slice:
        """Where the weights of hidden neuron k lie among the parameters."""
        return _nth(k, self.d, self.m, 0, "neuron")

    def v(self, j: int) -> slice:
        """Where the output weights of class j lie among the parameters."""
        return _nth(j, self.m, self.C, self.m * self.d, "class")

    # What belongs to one sample ...............................................................................

    @cached_property
    def _preactivations(self) -> Tensor:
        return _in_float64(self.X, self.W)

    @cached_property
    def active(self) -> Tensor:
        r"""Which neurons are active, :math:`a_{nk} = 1(w_k^\top x_n > 0)`, shape (N, m)."""
        return self._preactivations > 0

    @cached_property
    def output_layer(self) -> LinearHessian:
        r"""The linear model on the hidden activations, whose Hessian is :math:`H_{vv}`; (9), (15)."""
        activations = self._preactivations.relu()
        layer = LinearHessian(activations.to(self.X.dtype), self.V, self.loss)
        if self.loss == "CE":
            layer.__dict__["p"] = _in_float64(activations, self.V).softmax(dim=1)  # before rounding the activations
        return layer

    @property
    def _S(self) -> Tensor:
        return self.output_layer.X

    @cached_property
    def _v_mean(self) -> Tensor:
        """Σ_c p_nc v_ck, shape (N, m), in float64."""
        return self.output_layer.p @ self.V.double()

    def _curvature(self, k: Tensor, l: Tensor) -> Tensor:
        """v_kᵀ A_n v_l a_nk a_nl for B pairs of neurons, shape (N, B), in float64: the scalars of (8) and (14)."""
        pair = self.V[:, k].double() * self.V[:, l].double()
        if self.loss == "MSE":
            curvature = 2 * pair.sum(dim=0)
        else:
            curvature = self.output_layer.p @ pair - self._v_mean[:, k] * self._v_mean[:, l]
        return curvature * (self.active[:, k] & self.active[:, l])

    @cached_property
    def _residual(self) -> Tensor:
        """g_nj: p - e_y under CE, 2 (f - e_y) under MSE; shape (N, C)."""
        layer, label = self.output_layer, self.y[:, None]
        if self.loss == "MSE":
            outputs = _in_float64(self._preactivations.relu(), self.V)
            return outputs.scatter_add_(1, label, -torch.ones_like(label, dtype=outputs.dtype)).mul_(2).to(self.X.dtype)
        top, _, complement = layer.top
        own = torch.where(label == top, complement, 1 - layer.p.gather(1, label))
        return layer._p.scatter(1, label, -own.to(self.X.dtype))

    def _response(self, k: int, samples: Tensor) -> Tensor:
        """(A_n v_k)_j = p_nj (v_jk - Σ_c p_nc v_ck) under CE for some samples, shape (n, C)."""
        mean = self._v_mean[samples, k, None]
        top, p, _ = (of_top[samples] for of_top in self.output_layer.top)
        response = (self.V[:, k].to(self.X.dtype) - mean.to(self.X.dtype)).mul_(
            self.output_layer._p.index_select(0, samples)
        )
        return response.scatter_(1, top, (p * (self.V[:, k].double()[top] - mean)).to(self.X.dtype))

    # The blocks ...............................................................................................

    def _ww_pieces(self) -> Iterator[Piece]:
        """H_{w_k w_l} for k ≤ l, shape (d, d), from the samples where both neurons are active."""
        pairs = torch.triu_indices(self.m, self.m, device=self.X.device)
        for chunk in _ranges(0, pairs.shape[1], self.N):
            curvature = self._curvature(*pairs[:, chunk]).div_(self.N).to(self.X.dtype)
            for (k, l), weights in zip(pairs[:, chunk].T.tolist(), curvature.T, strict=True):
                both = (self.active[:, k] & self.active[:, l]).nonzero().squeeze(1)
                yield self.w(k), self.w(l), weighted_gram(self.X, weights, both)

    def _wv_pieces(self) -> Iterator[Piece]:
        """Rows w_k and columns v_{1l}, ..., v_{Cl} of H_wv for all k and l, shape (d, C)."""
        for k, l, sheet in self._wv_sheets():
            yield self.w(k), slice(l, self.C * self.m, self.m), sheet

    def _wv_sheets(self) -> Iterator[tuple[int, int, Tensor]]:
        """Rows w_k and columns v_{1l}, ..., v_{Cl} of H_wv for all k and l, shape (d, C)."""
        for k in range(self.m):
            sheets = self.X.new_zeros(self.m, self.d, self.C)
            for samples in self.active[:, k].nonzero().squeeze(1).split(_SAMPLES):
                X, S = self.X.index_select(0, samples), self._S.index_select(0, samples) / self.N
                residual = self._residual.index_select(0, samples).div_(self.N)
                if self.loss == "MSE":  # A_n v_k is 2 v_k for every sample
                    sheets.addcmul_((S.T @ X)[:, :, None], self.V[:, k].to(X.dtype), value=2)
                    sheets[k].addmm_(X.T, residual)
                    continue
                response = self._response(k, samples)
                for l in range(self.m):
                    both = self.active[samples, l].nonzero().squeeze(1)
                    factor = response.index_select(0, both).mul_(S[both, l, None])
                    if l == k:
                        factor += residual
                    sheets[l].addmm_(X.index_select(0, both).T, factor)
            yield from ((k, l, sheets[l]) for l in range(self.m))

    def matrix(self, out: Tensor | None = None) -> Float[Tensor, "P P"]:
        """Return the whole Hessian, shape (m d + C m, m d + C m), exactly symmetric.

        Parameters
        ----------
        out
            Where to write it, if it is there already, shape (m d + C m, m d + C m).
        """
        H = _new_matrix(self.X, self.order, self.order) if out is None else out
        split = self.m * self.d
        self.ww(out=H[:split, :split])
        self.vv(out=H[split:, split:])
        for rows, columns, sheet in self._wv_pieces():
            H[:split, split:][rows, columns] = sheet
            H[split:, :split][columns, rows] = sheet.T
        return H

    def ww(self, out: Tensor | None = None) -> Float[Tensor, "md md"]:
        """Hidden layer's Hessian H_ww, shape (m d, m d); (8), (14). ``out`` as for :meth:`matrix`."""
        H = _new_matrix(self.X, self.m * self.d, self.m * self.d) if out is None else out
        return _write(H, self._ww_pieces())

    def vv(self, out: Tensor | None = None) -> Float[Tensor, "Cm Cm"]:
        """Output layer's Hessian H_vv, shape (C m, C m); (9), (15). ``out`` as for :meth:`matrix`."""
        return self.output_layer.matrix(out)

    def wv(self) -> Float[Tensor, "md Cm"]:
        """Cross-layer Hessian H_wv, shape (m d, C m); (11), (18)."""
        H = _new_matrix(self.X, self.m * self.d, self.C * self.m)
        for rows, columns, sheet in self._wv_pieces():
            H[rows, columns] = sheet
        return H

    def tile(self, rows: slice | Tensor, columns: slice | Tensor) -> Float[Tensor, "R S"]:
        """Any tile of the Hessian, such as the blocks ``H.tile(H.w(k), H.v(j))``.

        Parameters
        ----------
        rows, columns
            Which parameters: slices or tensors of indices.

        Returns
        -------
        Tensor, shape (R, S)
        """
        rows, columns = _indices(rows, self.order, self.X), _indices(columns, self.order, self.X)
        split = self.m * self.d
        r_w, r_v = (rows < split).nonzero().squeeze(1), (rows >= split).nonzero().squeeze(1)
        c_w, c_v = (columns < split).nonzero().squeeze(1), (columns >= split).nonzero().squeeze(1)
        tile = self.X.new_empty(len(rows), len(columns))
        tile[r_w[:, None], c_w] = self._ww_tile(rows[r_w], columns[c_w])
        tile[r_w[:, None], c_v] = self._wv_tile(rows[r_w], columns[c_v] - split)
        tile[r_v[:, None], c_w] = self._wv_tile(columns[c_w], rows[r_v] - split).T
        tile[r_v[:, None], c_v] = self.output_layer.tile(rows[r_v] - split, columns[c_v] - split)
        return tile

    def _ww_tile(self, rows: Tensor, columns: Tensor) -> Tensor:
        (k_of, a), (l_of, b) = _divmod(rows, self.d), _divmod(columns, self.d)
        tile = self.X.new_empty(len(rows), len(columns))
        for k in k_of.unique():
            r = (k_of == k).nonzero().squeeze(1)
            for l in l_of.unique():
                s = (l_of == l).nonzero().squeeze(1)
                weights = self._curvature(k[None], l[None]).div_(self.N).to(self.X.dtype)
                tile[r[:, None], s] = (self.X[:, a[r]] * weights).T @ self.X[:, b[s]]
        return tile

    def _wv_tile(self, rows: Tensor, columns: Tensor) -> Tensor:
        (k_of, a), (j, l) = _divmod(rows, self.d), _divmod(columns, self.m)
        tile = self.X.new_zeros(len(rows), len(columns))
        for k in k_of.unique().tolist():
            r = (k_of == k).nonzero().squeeze(1)
            for samples in self.active[:, k].nonzero().squeeze(1).split(_SAMPLES):
                response = 2 * self.V[:, k].to(self.X.dtype) if self.loss == "MSE" else self._response(k, samples)
                factor = response[..., j] * self._S.index_select(0, samples)[:, l]
                factor += self._residual.index_select(0, samples)[:, j] * (l == k)
                tile[r] += self.X.index_select(0, samples)[:, a[r]].T @ factor.div_(self.N)
        return tile

    # Norms and images .........................................................................................

    def squared_norms(self, part: Literal["ww", "vv"]) -> Tensor:
        """Squared Frobenius norms of all blocks of one layer without forming them, shape (m, m) or (C, C)."""
        if part == "vv":
            return self.output_layer.squared_norms()
        if part != "ww":
            raise ValueError(f"part must be 'ww' or 'vv', got {part!r}")
        k, l = torch.triu_indices(self.m, self.m, device=self.X.device)
        chunks = _ranges(0, len(k), self.N)
        weights = torch.cat([self._curvature(k[pairs], l[pairs]).to(self.X.dtype) for pairs in chunks], dim=1)
        norms = self.X.new_empty(self.m, self.m)
        norms[k, l] = norms[l, k] = weighted_block_norms(self.X, weights)
        return norms

    def mean_squared_norms(self, part: Literal["ww", "vv"]) -> MeanNorms:
        """Mean squared Frobenius norms of the diagonal and of the off-diagonal blocks of one layer."""
        if part == "vv":
            return self.output_layer.mean_squared_norms()
        return _mean_norms(self.squared_norms(part))

    def stripe_energy(self) -> StripeEnergy:
        r"""Squared norm of H_wv and of its stripes, the columns :math:`v_{\cdot k}` in the rows :math:`w_k`.

        Only there the first term of (11) and (18) lives, the leading one by (20): the block-circulant pattern of
        Figure 3.
        """
        energy = torch.zeros(self.m, self.m, dtype=torch.float64)
        for k, l, sheet in self._wv_sheets():
            energy[k, l] = sheet.square().sum().double()
        return StripeEnergy(energy.trace().item(), energy.sum().item())

    def image(self, pixels: int = 1000, part: Part = "full", pool: Pool = "mean") -> Tensor:
        """Image of |H| or of a part of it, however large: one pair of neurons at a time.

        Parameters
        ----------
        pixels
            Length of the longer side of the image, at most one per parameter. It need not divide the number of
            parameters n: parameter r belongs to the pixel floor(r · pixels / n).
        part
            ``"full"``, ``"ww"``, ``"vv"`` or ``"wv"``.
        pool
            ``"mean"`` or ``"max"`` of the moduli of the entries in each pixel.

        Returns
        -------
        Tensor, shape (pixels, pixels), or smaller on the shorter side of H_wv
            In float64.
        """
        split, C_m = self.m * self.d, self.C * self.m
        sizes = {"full": (self.order, self.order), "ww": (split, split), "vv": (C_m, C_m), "wv": (split, C_m)}
        if part not in sizes:
            raise ValueError(f"part must be one of {', '.join(sizes)}, got {part!r}")
        image = _PooledImage(*sizes[part], pixels, pool, self.X.device)
        offset = split if part == "full" else 0
        if part in ("full", "ww"):
            _draw(image, self._ww_pieces())
        if part in ("full", "wv"):
            _draw(image, self._wv_pieces(), 0, offset)
        if part in ("full", "vv"):
            self.output_layer._draw(image, offset)
        return image.finish(mirror=part != "wv")


# ---------------------------------------------------------------------------------------------------------------------
# Small print


def _detach(model, *names: str) -> None:
    for name in names:
        object.__setattr__(model, name, getattr(model, name).detach())


def _check(X: Tensor, weights: dict[str, Tensor], loss: str) -> None:
    for name, tensor in {"X": X, **weights}.items():
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be a matrix, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64, got {tensor.dtype}")
    sizes = {"samples N": X.shape[0], "features d": X.shape[1], "classes C": weights["V"].shape[0]}
    if "W" in weights:
        sizes["hidden neurons m"] = weights["W"].shape[0]
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"the number of {name} must be at least 1, got {size}")
    for name, tensor in {"X": X, **weights}.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    if loss not in ("CE", "MSE"):
        raise ValueError(f"the loss must be 'CE' or 'MSE', got {loss!r}")


def _write(H: Tensor, pieces: Iterator[Piece]) -> Tensor:
    """Write the pieces and their transposes."""
    for rows, columns, values in pieces:
        H[rows, columns] = values
        if rows != columns:
            H[columns, rows] = values.T
    return H


def _draw(image: _PooledImage, pieces: Iterator[Piece], row_offset: int = 0, column_offset: int = 0) -> None:
    for rows, columns, values in pieces:
        image.add(_shift(rows, row_offset), _shift(columns, column_offset), values)


def _shift(which: slice, offset: int) -> slice:
    return slice(which.start + offset, which.stop + offset, which.step)


def _nth(i: int, size: int, count: int, offset: int, what: str) -> slice:
    if not 0 <= i < count:
        raise ValueError(f"{what} must lie in 0, ..., {count - 1}, got {i}")
    return slice(offset + i * size, offset + (i + 1) * size)


def _indices(which: slice | Tensor, order: int, like: Tensor) -> Tensor:
    index = torch.arange(order, device=like.device)
    return index[which]


def _divmod(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return index // size, index % size


def _ranges(start: int, stop: int, entries: int) -> Iterator[slice]:
    """Slices that cover start, ..., stop - 1, in steps that keep ``entries`` for each within bounds."""
    step = max(1, _ENTRIES // max(1, entries))
    for low in range(start, stop, step):
        yield slice(low, min(low + step, stop))


def _in_float64(X: Tensor, weights: Tensor) -> Tensor:
    """X weightsᵀ in float64, without a copy of X."""
    weights = weights.double()
    return torch.cat([X[n].double() @ weights.T for n in _ranges(0, len(X), X.shape[1])])


def _mean_norms(norms: Tensor) -> MeanNorms:
    norms, count = norms.double(), len(norms)
    off = (norms.triu(1) + norms.tril(-1)).sum().item()
    return MeanNorms(norms.diagonal().mean().item(), off / (count * (count - 1)) if count > 1 else math.nan)


def _new_matrix(like: Tensor, rows: int, columns: int) -> Tensor:
    """Return an uninitialized matrix; NumPy asks the kernel for huge pages, which saves most of the first writing."""
    if like.device.type == "cpu":
        return torch.from_numpy(np.empty((rows, columns), dtype=str(like.dtype).removeprefix("torch.")))
    return like.new_empty(rows, columns)
