r"""The exact Hessian of the linear model, block by block: (3) and (5) of :mod:`common.hessian.closed_form`."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.hessian.closed_form import (
    LossName,
    MeanNorms,
    Tile,
    check_model,
    draw_tiles,
    in_float64,
    indices,
    new_matrix,
    nth_slice,
    ranges,
    shifted,
    write_tiles,
)
from common.hessian.gram import KhatriRao, block_norms, weighted_block_norms, weighted_gram
from common.hessian.image import Pool, PooledImage


@dataclass(eq=False)
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
        ``"CE"`` or ``"MSE"``, as :mod:`common.hessian.closed_form` states them.
    probabilities
        softmax(V x), shape (N, C), in float64, where more is known of x than X has digits for.

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
    loss: LossName
    probabilities: Float[Tensor, "N C"] | None = None

    def __post_init__(self):
        self.X, self.V = self.X.detach(), self.V.detach()
        check_model(self.X, {"V": self.V}, self.loss)
        if self.probabilities is not None and self.probabilities.shape != (self.N, self.C):
            given = tuple(self.probabilities.shape)
            raise ValueError(f"probabilities must have the shape ({self.N}, {self.C}), got {given}")

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
        return nth_slice(i, self.d, self.C, 0, "class")

    @cached_property
    def p(self) -> Float[Tensor, "N C"]:
        """Probabilities p_{n,i}, shape (N, C), in float64."""
        return in_float64(self.X, self.V).softmax(dim=1) if self.probabilities is None else self.probabilities

    @cached_property
    def top(self) -> tuple[Int[Tensor, "N 1"], Float[Tensor, "N 1"], Float[Tensor, "N 1"]]:
        """Likeliest class of each sample, its p and, to full relative precision, its 1 - p; each (N, 1), in float64."""
        p, top = self.p.max(dim=1, keepdim=True)
        return top, p, self.p.scatter(1, top, 0).sum(dim=1, keepdim=True)

    @cached_property
    def others(self) -> Float[Tensor, "N C"]:
        """Probabilities with 0 for the likeliest class of each sample, shape (N, C), in float64."""
        return self.p.scatter(1, self.top[0], 0)

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
            for classes in ranges(i + 1, self.C, max(self.d**2, self.N)):
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

    def _own_tiles(self, khatri_rao: KhatriRao | None) -> Iterator[Tile]:
        """Blocks on the diagonal."""
        if self.loss == "MSE":
            block = self._grams(None, self.X.new_full((self.N, 1), 2 / self.N))[0]
            yield from ((self.v(i), self.v(i), block) for i in range(self.C))
            return
        for classes in ranges(0, self.C, max(self.d**2, self.N)):
            for i, block in enumerate(self._grams(khatri_rao, self._own[:, classes] / self.N), start=classes.start):
                yield self.v(i), self.v(i), block

    def _tiles(self) -> Iterator[Tile]:
        """Tiles that with their transposes make up the matrix."""
        if self.loss == "CE" and self._few_features:
            for k, l, sheet in self._sheets():
                yield slice(k, self.order, self.d), slice(l, self.order, self.d), sheet
            return
        khatri_rao = self._khatri_rao()
        yield from self._own_tiles(khatri_rao)
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

        Raises
        ------
        ValueError
            If ``out`` has another shape, or is not of floating point.
        """
        H = new_matrix(self.X, self.order, self.order, out)
        if self.loss == "MSE":
            H.zero_()
        return write_tiles(H, self._tiles())

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
        rows, columns = indices(rows, self.order, self.X.device), indices(columns, self.order, self.X.device)
        (i, a), (j, b) = (rows // self.d, rows % self.d), (columns // self.d, columns % self.d)
        tile = self.X.new_zeros(len(rows), len(columns))
        if self.loss == "CE":
            for n in ranges(0, self.N, len(rows) + len(columns)):
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
        norms_of = block_norms(self.X, self.C * (self.C + 1) // 2)
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
            for n in ranges(0, N, N):
                K2 = (self.X[n] @ self.X.T).double().square_()
                overlap = (self.p[n] @ self.p.T).square_() - self.p[n].square() @ self.p.T.square()
                total += torch.sum(K2 * overlap).item()
            return MeanNorms(
                weighted_block_norms(self.X, self._own).double().mean().item(), total / N**2 / (C * (C - 1))
            )
        return MeanNorms.of(self.squared_norms())

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
        image = PooledImage(self.order, self.order, pixels, pool, self.X.device)
        self.add_to(image, offset=0)
        return image.finish(mirror=True)

    def add_to(self, image: PooledImage, offset: int) -> None:
        """Add |H| to an image, the first entry at row and column ``offset``."""
        khatri_rao = None if self._few_features else self._khatri_rao()
        if khatri_rao is None:
            draw_tiles(image, self._tiles(), offset, offset)
            return
        draw_tiles(image, self._own_tiles(khatri_rao), offset, offset)
        for i, classes, weights in self._strips():
            columns = slice(classes.start * self.d + offset, classes.stop * self.d + offset)
            unique = khatri_rao.unique(weights)
            image.add_unique(shifted(self.v(i), offset), columns, khatri_rao.a, khatri_rao.b, unique)
