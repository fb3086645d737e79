r"""The exact Hessian of one hidden ReLU layer, block by block: (8) to (18) of :mod:`common.hessian.closed_form`."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
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
    write_tiles,
)
from common.hessian.gram import SAMPLES_AT_ONCE, weighted_block_norms, weighted_gram
from common.hessian.image import Pool, PooledImage
from common.hessian.linear import LinearHessian

Part = Literal["full", "ww", "vv", "wv"]


class StripeEnergy(NamedTuple):
    r"""Squared Frobenius norm of the stripes of :math:`H_{wv}`, and of all of it."""

    stripes: float
    total: float


@dataclass(eq=False)
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
        ``"CE"`` or ``"MSE"``, as :mod:`common.hessian.closed_form` states them.

    Raises
    ------
    ValueError
        If a size is zero, shapes do not agree, a value is not finite, a label is out of range, or the loss is unknown.
    """

    X: Float[Tensor, "N d"]
    W: Float[Tensor, "m d"]
    V: Float[Tensor, "C m"]
    y: Int[Tensor, "N"]
    loss: LossName

    def __post_init__(self):
        self.X, self.W, self.V = self.X.detach(), self.W.detach(), self.V.detach()
        check_model(self.X, {"W": self.W, "V": self.V}, self.loss)
        if self.y.shape != (self.N,) or self.y.is_floating_point():
            raise ValueError(f"y must hold {self.N} integer labels, got {self.y.dtype} of shape {tuple(self.y.shape)}")
        low, high = int(self.y.min()), int(self.y.max())
        if low < 0 or high >= self.C:
            raise ValueError(f"labels must lie in 0, ..., {self.C - 1}, got {low if low < 0 else high}")
        self.y = self.y.long()

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
        return nth_slice(k, self.d, self.m, 0, "neuron")

    def v(self, j: int) -> slice:
        """Where the output weights of class j lie among the parameters."""
        return nth_slice(j, self.m, self.C, self.m * self.d, "class")

    # What belongs to one sample ...............................................................................

    @cached_property
    def _preactivations(self) -> Tensor:
        return in_float64(self.X, self.W)

    @cached_property
    def active(self) -> Bool[Tensor, "N m"]:
        r"""Which neurons are active, :math:`a_{nk} = 1(w_k^\top x_n > 0)`, shape (N, m)."""
        return self._preactivations > 0

    @cached_property
    def output_layer(self) -> LinearHessian:
        r"""The linear model on the hidden activations, whose Hessian is :math:`H_{vv}`; (9), (15)."""
        activations = self._preactivations.relu()
        # of the activations before they are rounded
        probabilities = in_float64(activations, self.V).softmax(dim=1) if self.loss == "CE" else None
        return LinearHessian(activations.to(self.X.dtype), self.V, self.loss, probabilities)

    @property
    def _S(self) -> Tensor:
        return self.output_layer.X

    @cached_property
    def _v_means(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """v of the likeliest class, Σ p v over the others, and Σ p v over all without and with the former off.

        Each (N, m), in float64; where the model is sure, the second and the last are small and have all their digits.
        """
        top, _, complement = self.output_layer.top
        likeliest = self.V.double()[top[:, 0]]
        others = self.output_layer.others @ self.V.double()
        change = others - complement * likeliest
        return likeliest, others, likeliest + change, change

    def _curvature(self, k: Tensor, l: Tensor) -> Tensor:
        """v_kᵀ A_n v_l a_nk a_nl for B pairs of neurons, shape (N, B), in float64: the scalars of (8) and (14)."""
        pair = self.V[:, k].double() * self.V[:, l].double()
        if self.loss == "MSE":
            curvature = 2 * pair.sum(dim=0)
        else:
            likeliest, others, mean, change = self._v_means
            curvature = self.output_layer.others @ pair - others[:, k] * likeliest[:, l] - mean[:, k] * change[:, l]
        return curvature * (self.active[:, k] & self.active[:, l])

    @cached_property
    def residual(self) -> Float[Tensor, "N C"]:
        """g_nj: p - e_y under CE, 2 (f - e_y) under MSE; shape (N, C), to full precision where p is almost 1."""
        layer, label = self.output_layer, self.y[:, None]
        if self.loss == "MSE":
            outputs = in_float64(self._preactivations.relu(), self.V)
            return outputs.scatter_add_(1, label, -torch.ones_like(label, dtype=outputs.dtype)).mul_(2).to(self.X.dtype)
        top, _, complement = layer.top
        own = torch.where(label == top, complement, 1 - layer.p.gather(1, label))
        return layer._p.scatter(1, label, -own.to(self.X.dtype))

    def _response(self, k: int, samples: Tensor) -> Tensor:
        """(A_n v_k)_j = p_nj (v_jk - Σ_c p_nc v_ck) under CE for some samples, shape (n, C)."""
        mean, change = (of_all[samples, k, None] for of_all in self._v_means[2:])
        top, p, _ = (of_top[samples] for of_top in self.output_layer.top)
        response = (self.V[:, k].to(self.X.dtype) - mean.to(self.X.dtype)).mul_(
            self.output_layer._p.index_select(0, samples)
        )
        return response.scatter_(1, top, (-p * change).to(self.X.dtype))

    # The blocks ...............................................................................................

    def _ww_tiles(self) -> Iterator[Tile]:
        """H_{w_k w_l} for k ≤ l, shape (d, d), from the samples where both neurons are active."""
        pairs = torch.triu_indices(self.m, self.m, device=self.X.device)
        for chunk in ranges(0, pairs.shape[1], self.N):
            curvature = self._curvature(*pairs[:, chunk]).div_(self.N).to(self.X.dtype)
            for (k, l), weights in zip(pairs[:, chunk].T.tolist(), curvature.T, strict=True):
                both = (self.active[:, k] & self.active[:, l]).nonzero().squeeze(1)
                yield self.w(k), self.w(l), weighted_gram(self.X, weights, both)

    def _wv_tiles(self) -> Iterator[Tile]:
        """Rows w_k and columns v_{1l}, ..., v_{Cl} of H_wv for all k and l, shape (d, C)."""
        for k, l, sheet in self._wv_sheets():
            yield self.w(k), slice(l, self.C * self.m, self.m), sheet

    def _wv_sheets(self) -> Iterator[tuple[int, int, Tensor]]:
        """Rows w_k and columns v_{1l}, ..., v_{Cl} of H_wv for all k and l, shape (d, C)."""
        for k in range(self.m):
            sheets = self.X.new_zeros(self.m, self.d, self.C)
            for samples in self.active[:, k].nonzero().squeeze(1).split(SAMPLES_AT_ONCE):
                X, S = self.X.index_select(0, samples), self._S.index_select(0, samples) / self.N
                residual = self.residual.index_select(0, samples).div_(self.N)
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

        Raises
        ------
        ValueError
            If ``out`` has another shape, or is not of floating point.
        """
        H = new_matrix(self.X, self.order, self.order, out)
        split = self.m * self.d
        self.ww(out=H[:split, :split])
        self.vv(out=H[split:, split:])
        for rows, columns, sheet in self._wv_tiles():
            H[:split, split:][rows, columns] = sheet
            H[split:, :split][columns, rows] = sheet.T
        return H

    def ww(self, out: Tensor | None = None) -> Float[Tensor, "md md"]:
        """Hidden layer's Hessian H_ww, shape (m d, m d); (8), (14). ``out`` as for :meth:`matrix`."""
        H = new_matrix(self.X, self.m * self.d, self.m * self.d, out)
        return write_tiles(H, self._ww_tiles())

    def vv(self, out: Tensor | None = None) -> Float[Tensor, "Cm Cm"]:
        """Output layer's Hessian H_vv, shape (C m, C m); (9), (15). ``out`` as for :meth:`matrix`."""
        return self.output_layer.matrix(out)

    def wv(self) -> Float[Tensor, "md Cm"]:
        """Cross-layer Hessian H_wv, shape (m d, C m); (11), (18)."""
        H = new_matrix(self.X, self.m * self.d, self.C * self.m)
        for rows, columns, sheet in self._wv_tiles():
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
        rows, columns = indices(rows, self.order, self.X.device), indices(columns, self.order, self.X.device)
        split = self.m * self.d
        r_w, r_v = (rows < split).nonzero().squeeze(1), (rows >= split).nonzero().squeeze(1)
        c_w, c_v = (columns < split).nonzero().squeeze(1), (columns >= split).nonzero().squeeze(1)
        tile = self.X.new_empty(len(rows), len(columns))
        tile[r_w[:, None], c_w] = self._ww_at(rows[r_w], columns[c_w])
        tile[r_w[:, None], c_v] = self._wv_at(rows[r_w], columns[c_v] - split)
        tile[r_v[:, None], c_w] = self._wv_at(columns[c_w], rows[r_v] - split).T
        tile[r_v[:, None], c_v] = self.output_layer.tile(rows[r_v] - split, columns[c_v] - split)
        return tile

    def _ww_at(self, rows: Tensor, columns: Tensor) -> Tensor:
        (k_of, a), (l_of, b) = (rows // self.d, rows % self.d), (columns // self.d, columns % self.d)
        tile = self.X.new_empty(len(rows), len(columns))
        for k in k_of.unique():
            r = (k_of == k).nonzero().squeeze(1)
            for l in l_of.unique():
                s = (l_of == l).nonzero().squeeze(1)
                weights = self._curvature(k[None], l[None]).div_(self.N).to(self.X.dtype)
                tile[r[:, None], s] = (self.X[:, a[r]] * weights).T @ self.X[:, b[s]]
        return tile

    def _wv_at(self, rows: Tensor, columns: Tensor) -> Tensor:
        (k_of, a), (j, l) = (rows // self.d, rows % self.d), (columns // self.m, columns % self.m)
        tile = self.X.new_zeros(len(rows), len(columns))
        for k in k_of.unique().tolist():
            r = (k_of == k).nonzero().squeeze(1)
            for samples in self.active[:, k].nonzero().squeeze(1).split(SAMPLES_AT_ONCE):
                response = 2 * self.V[:, k].to(self.X.dtype) if self.loss == "MSE" else self._response(k, samples)
                factor = response[..., j] * self._S.index_select(0, samples)[:, l]
                factor += self.residual.index_select(0, samples)[:, j] * (l == k)
                tile[r] += self.X.index_select(0, samples)[:, a[r]].T @ factor.div_(self.N)
        return tile

    # Norms and images .........................................................................................

    def squared_norms(self, part: Literal["ww", "vv"]) -> Float[Tensor, "B B"]:
        """Squared Frobenius norms of all blocks of one layer without forming them, shape (m, m) or (C, C)."""
        if part == "vv":
            return self.output_layer.squared_norms()
        if part != "ww":
            raise ValueError(f"part must be 'ww' or 'vv', got {part!r}")
        k, l = torch.triu_indices(self.m, self.m, device=self.X.device)
        chunks = ranges(0, len(k), self.N)
        weights = torch.cat([self._curvature(k[pairs], l[pairs]).to(self.X.dtype) for pairs in chunks], dim=1)
        norms = self.X.new_empty(self.m, self.m)
        norms[k, l] = norms[l, k] = weighted_block_norms(self.X, weights)
        return norms

    def mean_squared_norms(self, part: Literal["ww", "vv"]) -> MeanNorms:
        """Mean squared Frobenius norms of the diagonal and of the off-diagonal blocks of one layer."""
        if part == "vv":
            return self.output_layer.mean_squared_norms()
        return MeanNorms.of(self.squared_norms(part))

    def stripe_energy(self) -> StripeEnergy:
        r"""Squared norm of H_wv and of its stripes, the columns :math:`v_{\cdot k}` in the rows :math:`w_k`.

        Only there the first term of (11) and (18) lives, the leading one by (20): the block-circulant pattern of
        Figure 3.
        """
        energy = torch.zeros(self.m, self.m, dtype=torch.float64)
        for k, l, sheet in self._wv_sheets():
            energy[k, l] = sheet.square().sum().double()
        return StripeEnergy(energy.trace().item(), energy.sum().item())

    def image(self, pixels: int = 1000, part: Part = "full", pool: Pool = "mean") -> Float[Tensor, "rows columns"]:
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
        image = PooledImage(*sizes[part], pixels, pool, self.X.device)
        offset = split if part == "full" else 0
        if part in ("full", "ww"):
            draw_tiles(image, self._ww_tiles())
        if part in ("full", "wv"):
            draw_tiles(image, self._wv_tiles(), 0, offset)
        if part in ("full", "vv"):
            self.output_layer.add_to(image, offset)
        return image.finish(mirror=part != "wv")
