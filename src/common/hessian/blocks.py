r"""The exact Hessian of linear and one-hidden-layer ReLU models, block by block and in closed form.

Section 4 of Dong, Zhang, Yao & Sun (2025), "Towards Quantifying the Hessian Structure of Neural Networks". Samples
:math:`x_1, \dots, x_N \in \mathbb{R}^d` with labels :math:`y_n \in \{1, \dots, C\}`, no biases, and

- the linear model :math:`f(x) = V x` with :math:`V \in \mathbb{R}^{C \times d}`, parameters :math:`v_1, \dots, v_C`;
- one hidden layer, :math:`f(x) = V \sigma(W x)`, :math:`W \in \mathbb{R}^{m \times d}`,
  :math:`V \in \mathbb{R}^{C \times m}`, parameters :math:`w_1, \dots, w_m, v_1, \dots, v_C`; all vectors are rows.

The losses are means over the samples:

- ``"CE"``, (4) and (13): :math:`\frac1N \sum_n -\log p_{n, y_n}` with :math:`p_n = \mathrm{softmax}(f(x_n))`;
- ``"MSE"``, (2) and (7): :math:`\frac1N \sum_n \|f(x_n) - e_{y_n}\|^2`, neither halved nor divided by C.

We differentiate the losses as they stand. **Under MSE every block carries the factor 2**, as (11) of the paper does; its
(3), (8) and (9) lack it. The kink of the ReLU contributes nothing: :math:`\sigma'(0) = 0` and :math:`\sigma'' = 0`, as in
automatic differentiation.

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

What belongs to one sample (:math:`p_n, A_n v_{\cdot k}, \dots`) is computed in float64, so that nothing cancels when a
trained model is sure of its answers; the sums over samples run in the precision of X.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Loss = Literal["CE", "MSE"]
Part = Literal["full", "ww", "vv", "wv"]
Pool = Literal["mean", "max"]

_SAMPLES = 4096  # samples gathered at a time: bounds memory and keeps the factors of a product in the cache
_ENTRIES = 2**23  # entries of a chunk of results, 32 MiB in float32
_PRODUCTS = 2**26  # largest Khatri-Rao matrix, 256 MiB in float32


# ---------------------------------------------------------------------------------------------------------------------
# Weighted Gram matrices and their norms


def weighted_gram(
    X: Float[Tensor, "N d"], weights: Float[Tensor, "N"], samples: Int[Tensor, "n"] | None = None
) -> Float[Tensor, "d d"]:
    r"""Sum :math:`\sum_n \lambda_n x_n x_n^\top`, exactly symmetric, at little more than half the cost of the product.

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
    N, d = X.shape
    gram = X.new_zeros(d, d)
    panels = max(1, min(8, d // 128))
    edges = [d * k // panels for k in range(panels + 1)]
    count = N if samples is None else len(samples)
    for start in range(0, count, _SAMPLES):
        chunk = slice(start, min(start + _SAMPLES, count)) if samples is None else samples[start : start + _SAMPLES]
        left = X[chunk]
        right = left * weights[chunk, None].to(X.dtype)
        for low, high in zip(edges, edges[1:], strict=False):
            gram[low:high, low:].addmm_(left[:, low:high].T, right[:, low:])
    for low, high in zip(edges, edges[1:], strict=False):
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
    N, d = X.shape
    weights = weights.to(X.dtype)
    if KhatriRao.fits(N, d) and d * (d + 1) // 2 <= N:
        return KhatriRao(X).squared_norms(weights) / N**2
    if N * (d + weights.shape[1]) < d * d * weights.shape[1] and N <= _ENTRIES**0.5 * 4:
        return weighted_gram_norms(squared_gram(X), weights)
    return torch.stack([weighted_gram(X, column).square_().sum() for column in weights.T]) / N**2


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
        d = X.shape[1]
        a, b = torch.triu_indices(d, d, device=X.device)
        self.products = X[:, a].mul_(X[:, b])
        self.multiplicity = torch.where(a == b, 1, 2).to(X.dtype)
        self._unfold = torch.empty(d, d, dtype=torch.long, device=X.device)
        self._unfold[a, b] = self._unfold[b, a] = torch.arange(len(a), device=X.device)

    @staticmethod
    def fits(N: int, d: int) -> bool:
        """Whether the matrix is small enough, and d small enough for it to be better than :func:`weighted_gram`."""
        return d <= 256 and N * d * (d + 1) // 2 <= _PRODUCTS

    def grams(self, weights: Float[Tensor, "N B"]) -> Float[Tensor, "d d B"]:
        r"""The matrices :math:`\sum_n \lambda_n x_n x_n^\top`, one for each column of the weights, shape (d, d, B)."""
        unique = self.products.T @ weights
        d = len(self._unfold)
        return unique.index_select(0, self._unfold.flatten()).view(d, d, -1)

    def squared_norms(self, weights: Float[Tensor, "N B"]) -> Float[Tensor, "B"]:
        """Their squared Frobenius norms, shape (B,)."""
        return self.multiplicity @ (self.products.T @ weights).square_()


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

    def add(self, rows: Tensor, columns: Tensor, values: Tensor, factor: float = 1.0) -> None:
        """Add the entries with these indices; ``values`` of shape (rows, columns) is overwritten by its modulus."""
        row_pixel, column_pixel = self._pixel[0][rows], self._pixel[1][columns]
        top, left = int(row_pixel.min()), int(column_pixel.min())
        height, width = int(row_pixel.max()) - top + 1, int(column_pixel.max()) - left + 1
        strip = values.new_zeros(height, values.shape[1])
        patch = values.new_zeros(width, height)
        self._reduce(strip, row_pixel - top, values.abs_())
        self._reduce(patch, column_pixel - left, strip.T)
        region = self._total[top : top + height, left : left + width]
        if self.pool == "mean":
            region.add_(patch.T, alpha=factor)
        else:
            region.copy_(torch.maximum(region, patch.T))

    def _reduce(self, target: Tensor, pixel: Tensor, values: Tensor) -> None:
        if self.pool == "mean":
            target.index_add_(0, pixel, values)
        else:
            target.scatter_reduce_(0, pixel[:, None].expand(values.shape), values, "amax")

    def finish(self, mirror: bool) -> Tensor:
        """Return the image; ``mirror`` completes a symmetric matrix of which one triangle of blocks was added.

        Blocks on the diagonal were added whole, with the factor 1/2.
        """
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
    r"""Squared Frobenius norm of :math:`H_{wv}`: of the columns :math:`v_{\cdot k}` in the rows :math:`w_k`, and of all."""

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
    def outputs(self) -> Float[Tensor, "N C"]:
        """Outputs V x_n, shape (N, C), in float64."""
        return _in_float64(self.X, self.V)

    @cached_property
    def p(self) -> Float[Tensor, "N C"]:
        """Probabilities p_{n,i}, shape (N, C), in float64."""
        return self.outputs.softmax(dim=1)

    @cached_property
    def p_complement(self) -> Float[Tensor, "N C"]:
        """Complements 1 - p_{n,i}, shape (N, C), in float64, to full relative precision even where p is almost 1."""
        top = self.p.argmax(dim=1, keepdim=True)
        return (1 - self.p).scatter_(1, top, self.p.scatter(1, top, 0).sum(dim=1, keepdim=True))

    @cached_property
    def _p(self) -> Tensor:
        return self.p.to(self.X.dtype)

    def _own_weights(self, classes: slice) -> Tensor:
        """A_{n,ii} / N for some classes, shape (N, B)."""
        if self.loss == "MSE":
            return self.X.new_full(self.p[:, classes].shape, 2 / self.N)
        return (self.p[:, classes] * self.p_complement[:, classes] / self.N).to(self.X.dtype)

    def _grams(self, chunk: slice | None = None):
        if KhatriRao.fits(self.N, self.d):
            return KhatriRao(self.X).grams
        return lambda weights: torch.stack([weighted_gram(self.X, column) for column in weights.T], dim=-1)

    def _diagonal_blocks(self, grams) -> Iterator[tuple[int, Tensor]]:
        if self.loss == "MSE":
            block = weighted_gram(self.X, self.X.new_full((self.N,), 2 / self.N))
            yield from ((i, block) for i in range(self.C))
            return
        for classes in _ranges(0, self.C, self.d**2):
            yield from zip(
                range(self.C)[classes], grams(self._own_weights(classes)).unbind(dim=-1), strict=True
            )

    def _strips(self, grams) -> Iterator[tuple[int, slice, Tensor]]:
        """Blocks (i, j) for a range of j > i, shape (d, d, B), until all above the diagonal were served; CE only."""
        for i in range(self.C):
            for classes in _ranges(i + 1, self.C, max(self.d**2, self.N)):
                yield i, classes, grams(self._p[:, classes] * (-self._p[:, i : i + 1] / self.N))

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
            for i, block in self._diagonal_blocks(None):
                H[self.v(i), self.v(i)] = block
        elif 8 * self.d <= self.C:
            self._write_sheets(H)
        else:
            grams = self._grams()
            H4 = H.unflatten(1, (self.C, self.d)).unflatten(0, (self.C, self.d))
            for i, block in self._diagonal_blocks(grams):
                H[self.v(i), self.v(i)] = block
            for i, j, strip in self._strips(grams):
                H4[i, :, j, :] = strip.transpose(1, 2)
                H4[j, :, i, :] = strip.permute(2, 0, 1)
        return H

    def _write_sheets(self, H: Tensor) -> None:
        """Under CE with few features: a product of order C for each pair of features, where neither is zero.

        H[(i, k), (j, l)] = (1/N) Σ_n x_nk x_nl p_ni (δ_ij - p_nj). After a ReLU that is a quarter of the samples.
        """
        nonzero = self.X != 0
        own = self._own_weights(slice(None))
        for k in range(self.d):
            for l in range(k, self.d):  # noqa: E741
                samples = (nonzero[:, k] & nonzero[:, l]).nonzero().squeeze(1)
                product = self.X[:, k] * self.X[:, l]
                sheet = weighted_gram(self._p, product / -self.N, samples)
                sheet.diagonal().copy_(product @ own)
                H[k :: self.d, l :: self.d] = sheet
                if l > k:
                    H[l :: self.d, k :: self.d] = sheet

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
            own = self._own_weights(slice(c, c + 1))
            r, s = (i == c).nonzero().squeeze(1), (j == c).nonzero().squeeze(1)
            tile[r[:, None], s] = (self.X[:, a[r]] * own).T @ self.X[:, b[s]]
        return tile

    def squared_norms(self) -> Float[Tensor, "C C"]:
        """Squared Frobenius norms of all blocks, shape (C, C), without forming them; (3), (5)."""
        if self.loss == "MSE":
            block = weighted_gram(self.X, self.X.new_full((self.N,), 2 / self.N))
            return torch.diag(block.square().sum().expand(self.C))
        norms = self.X.new_empty(self.C, self.C)
        norms.diagonal().copy_(self._own_norms())
        i, j = torch.triu_indices(self.C, self.C, offset=1, device=self.X.device)
        for pairs in _ranges(0, len(i), self.N + self.d**2):
            weights = self._p[:, i[pairs]].mul_(self._p[:, j[pairs]])
            norms[i[pairs], j[pairs]] = norms[j[pairs], i[pairs]] = weighted_block_norms(self.X, weights)
        return norms

    def _own_norms(self) -> Tensor:
        return weighted_block_norms(self.X, self._own_weights(slice(None)) * self.N)

    def mean_squared_norms(self) -> MeanNorms:
        r"""Mean squared Frobenius norm of the diagonal blocks, and of the off-diagonal ones in closed form.

        .. math:: \sum_{i \ne j} \|H_{v_i v_j}\|_F^2 = \tfrac1{N^2} \sum_{nm} K_{nm}^2
            \Big[(p_n^\top p_m)^2 - \sum_i p_{ni}^2 p_{mi}^2\Big]

        costs as much as N² C products of numbers, not C² blocks; it is used where it is the cheaper way. In float64.
        """
        N, d, C = self.N, self.d, self.C
        if self.loss == "CE" and N * (2 * C + d) < C * C / 2 * min(N, d * (d + 1) / 2):
            total = 0.0
            for n in _ranges(0, N, N):
                K2 = (self.X[n].double() @ self.X.T.double()).square_()
                overlap = (self.p[n] @ self.p.T).square_() - self.p[n].square() @ self.p.T.square()
                total += torch.sum(K2 * overlap).item()
            return MeanNorms(self._own_norms().double().mean().item(), total / N**2 / (C * (C - 1)))
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
        index = torch.arange(self.order, device=self.X.device).add_(offset).view(self.C, self.d)
        grams = self._grams()
        for i, block in self._diagonal_blocks(grams):
            image.add(index[i], index[i], block, factor=0.5)
        if self.loss == "CE":
            for i, j, strip in self._strips(grams):
                image.add(index[i], index[j].T.flatten(), strip.flatten(1))


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
        layer = LinearHessian(self._preactivations.relu().to(self.X.dtype), self.V, self.loss)
        layer.__dict__["outputs"] = self._preactivations.relu() @ self.V.double().T
        return layer

    @property
    def _S(self) -> Tensor:
        return self.output_layer.X

    @cached_property
    def _v_mean(self) -> Tensor:
        """Σ_c p_nc v_ck, shape (N, m), in float64."""
        return self.output_layer.p @ self.V.double()

    def _curvature(self, k: int) -> Tensor:
        """v_kᵀ A_n v_l a_nk a_nl for all l, shape (N, m), in float64: the scalars of (8) and (14)."""
        V = self.V.double()
        if self.loss == "MSE":
            curvature = (2 * V[:, k] @ V).expand(self.N, self.m)
        else:
            curvature = self.output_layer.p @ (V[:, k : k + 1] * V) - self._v_mean[:, k : k + 1] * self._v_mean
        return curvature * (self.active[:, k : k + 1] & self.active)

    def _residual(self, samples: Tensor) -> Tensor:
        """g_nj: p - e_y under CE, 2 (f - e_y) under MSE; shape (n, C), in float64."""
        layer = self.output_layer
        residual = layer.p[samples] if self.loss == "CE" else layer.outputs[samples]
        residual[torch.arange(len(samples), device=samples.device), self.y[samples]] -= 1
        return residual if self.loss == "CE" else residual.mul_(2)

    def _response(self, k: int, samples: Tensor) -> Tensor:
        """(A_n v_k)_j, shape (n, C), in float64."""
        v = self.V[:, k].double()
        if self.loss == "MSE":
            return (2 * v).expand(len(samples), self.C)
        return (v - self._v_mean[samples, k, None]).mul_(self.output_layer.p[samples])

    # The blocks ...............................................................................................

    def _ww_blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """H_{w_k w_l} for k ≤ l, shape (d, d), from the samples where both neurons are active."""
        for k in range(self.m):
            curvature = self._curvature(k).div_(self.N).to(self.X.dtype)
            for l in range(k, self.m):  # noqa: E741
                samples = (self.active[:, k] & self.active[:, l]).nonzero().squeeze(1)
                yield k, l, weighted_gram(self.X, curvature[:, l], samples)

    def _wv_sheets(self) -> Iterator[tuple[int, int, Tensor]]:
        """Rows w_k and columns v_{1l}, ..., v_{Cl} of H_wv for all k and l, shape (d, C)."""
        for k in range(self.m):
            sheets = self.X.new_zeros(self.m, self.d, self.C)
            for samples in self.active[:, k].nonzero().squeeze(1).split(_SAMPLES):
                X, S = self.X[samples], self._S[samples] / self.N
                sheets[k].addmm_(X.T, self._residual(samples).div_(self.N).to(X.dtype))
                if self.loss == "MSE":
                    sheets.addcmul_((S.T @ X)[:, :, None], self.V[:, k].to(X.dtype), value=2)
                    continue
                response = self._response(k, samples).to(X.dtype)
                for l in range(self.m):  # noqa: E741
                    both = S[:, l].nonzero().squeeze(1)
                    sheets[l].addmm_(X[both].T, response[both].mul_(S[both, l, None]))
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
        for k, l, sheet in self._wv_sheets():
            H[self.w(k), split + l :: self.m] = sheet
            H[split + l :: self.m, self.w(k)] = sheet.T
        return H

    def ww(self, out: Tensor | None = None) -> Float[Tensor, "md md"]:
        """Hidden layer's Hessian H_ww, shape (m d, m d); (8), (14). ``out`` as for :meth:`matrix`."""
        H = _new_matrix(self.X, self.m * self.d, self.m * self.d) if out is None else out
        for k, l, block in self._ww_blocks():
            H[self.w(k), self.w(l)] = H[self.w(l), self.w(k)] = block
        return H

    def vv(self, out: Tensor | None = None) -> Float[Tensor, "Cm Cm"]:
        """Output layer's Hessian H_vv, shape (C m, C m); (9), (15). ``out`` as for :meth:`matrix`."""
        return self.output_layer.matrix(out)

    def wv(self) -> Float[Tensor, "md Cm"]:
        """Cross-layer Hessian H_wv, shape (m d, C m); (11), (18)."""
        H = _new_matrix(self.X, self.m * self.d, self.C * self.m)
        for k, l, sheet in self._wv_sheets():
            H[self.w(k), l :: self.m] = sheet
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
        for k in k_of.unique().tolist():
            r, curvature = (k_of == k).nonzero().squeeze(1), self._curvature(k).div_(self.N).to(self.X.dtype)
            for l in l_of.unique().tolist():  # noqa: E741
                s = (l_of == l).nonzero().squeeze(1)
                tile[r[:, None], s] = (self.X[:, a[r]] * curvature[:, l, None]).T @ self.X[:, b[s]]
        return tile

    def _wv_tile(self, rows: Tensor, columns: Tensor) -> Tensor:
        (k_of, a), (j, l) = _divmod(rows, self.d), _divmod(columns, self.m)
        tile = self.X.new_zeros(len(rows), len(columns))
        for k in k_of.unique().tolist():
            r = (k_of == k).nonzero().squeeze(1)
            for samples in self.active[:, k].nonzero().squeeze(1).split(_SAMPLES):
                factor = self._response(k, samples)[:, j] * self._S[samples][:, l]
                factor += self._residual(samples)[:, j] * (l == k)
                tile[r] += self.X[samples][:, a[r]].T @ factor.div_(self.N).to(self.X.dtype)
        return tile

    # Norms and images .........................................................................................

    def squared_norms(self, part: Literal["ww", "vv"]) -> Tensor:
        """Squared Frobenius norms of all blocks of one layer without forming them, shape (m, m) or (C, C)."""
        if part == "vv":
            return self.output_layer.squared_norms()
        if part != "ww":
            raise ValueError(f"part must be 'ww' or 'vv', got {part!r}")
        k, l = torch.triu_indices(self.m, self.m, device=self.X.device)  # noqa: E741
        weights = torch.cat([self._curvature(k)[:, k:].to(self.X.dtype) for k in range(self.m)], dim=1)
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

        Only there the first term of (11) and (18) lives, the leading one, (20): the block-circulant pattern of Figure 3.
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
        split = self.m * self.d
        index = torch.arange(self.order, device=self.X.device)
        parts = {"full": (index, index), "ww": (index[:split],) * 2, "vv": (index[split:],) * 2}
        parts["wv"] = (index[:split], index[split:])
        if part not in parts:
            raise ValueError(f"part must be one of {', '.join(parts)}, got {part!r}")
        rows, columns = parts[part]
        image = _PooledImage(len(rows), len(columns), pixels, pool, self.X.device)
        if part in ("full", "ww"):
            for k, l, block in self._ww_blocks():
                image.add(index[self.w(k)], index[self.w(l)], block, factor=0.5 if k == l else 1.0)
        if part in ("full", "wv"):
            for k, l, sheet in self._wv_sheets():
                image.add(index[self.w(k)], index[split + l :: self.m] - columns[0], sheet)
        if part in ("full", "vv"):
            self.output_layer._draw(image, offset=split if part == "full" else 0)
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
    step = max(1, _ENTRIES // entries)
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
