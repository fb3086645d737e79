r"""The exact Hessian of linear and one-hidden-layer ReLU models, block by block: the formulas, and what both share.

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
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.hessian.image import PooledImage

LossName = Literal["CE", "MSE"]
Tile = tuple[slice, slice, Tensor]  # rows, columns, values

#: Entries of a chunk of results, 32 MiB in float32.
ENTRIES_AT_ONCE = 2**23


class MeanNorms(NamedTuple):
    """Mean squared Frobenius norm of the diagonal and of the off-diagonal blocks of one layer (NaN if it has none)."""

    diagonal: float
    off_diagonal: float

    @classmethod
    def of(cls, norms: Float[Tensor, "B B"]) -> "MeanNorms":
        """Of the squared norms of all blocks."""
        norms, count = norms.double(), len(norms)
        off = (norms.triu(1) + norms.tril(-1)).sum().item()
        return cls(norms.diagonal().mean().item(), off / (count * (count - 1)) if count > 1 else math.nan)

    def total(self, count: int) -> float:
        """Squared norm of the whole layer, of so many blocks on the diagonal."""
        return count * (self.diagonal + ((count - 1) * self.off_diagonal if count > 1 else 0))


def check_model(X: Tensor, weights: dict[str, Tensor], loss: str) -> None:
    """See to it that samples and weights are matrices of finite numbers that fit each other, and the loss is known.

    The weights are those of all layers by their names, from the input to the output.

    Raises
    ------
    ValueError
        If not.
    """
    for name, tensor in {"X": X, **weights}.items():
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be a matrix, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64, got {tensor.dtype}")
    *hidden, classes = (len(tensor) for tensor in weights.values())
    sizes = {"samples N": X.shape[0], "features d": X.shape[1], "classes C": classes}
    if hidden:
        sizes["hidden neurons m"] = min(hidden)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"the number of {name} must be at least 1, got {size}")
    for name, tensor in {"X": X, **weights}.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    if loss not in ("CE", "MSE"):
        raise ValueError(f"the loss must be 'CE' or 'MSE', got {loss!r}")
    width, before = X.shape[1], f"the samples have {X.shape[1]} features"
    for name, tensor in weights.items():
        if tensor.shape[1] != width:
            raise ValueError(f"{name} has {tensor.shape[1]} columns but {before}")
        width, before = len(tensor), f"{name} has {len(tensor)} rows"


def write_tiles(H: Tensor, tiles: Iterable[Tile]) -> Tensor:
    """Write the tiles and their transposes into H, and return it."""
    for rows, columns, values in tiles:
        H[rows, columns] = values
        if rows != columns:
            H[columns, rows] = values.T
    return H


def draw_tiles(image: PooledImage, tiles: Iterable[Tile], row_offset: int = 0, column_offset: int = 0) -> None:
    """Add the tiles to an image, so many rows and columns further on."""
    for rows, columns, values in tiles:
        image.add(shifted(rows, row_offset), shifted(columns, column_offset), values)


def shifted(which: slice, offset: int) -> slice:
    """The slice so many places further on."""
    return slice(which.start + offset, which.stop + offset, which.step)


def nth_slice(i: int, size: int, count: int, offset: int, what: str) -> slice:
    """Where the i-th of ``count`` groups of parameters lies, each of so many, the first at ``offset``.

    Raises
    ------
    ValueError
        If there is none such; ``what`` says of what.
    """
    if not 0 <= i < count:
        raise ValueError(f"{what} must lie in 0, ..., {count - 1}, got {i}")
    return slice(offset + i * size, offset + (i + 1) * size)


def indices(which: slice | Tensor, order: int, device: torch.device) -> Int[Tensor, " R"]:
    """The numbers of some of ``order`` parameters."""
    return torch.arange(order, device=device)[which].flatten()


def ranges(start: int, stop: int, entries: int) -> Iterator[slice]:
    """Slices that cover start, ..., stop - 1, in steps that keep ``entries`` for each within bounds."""
    step = max(1, ENTRIES_AT_ONCE // max(1, entries))
    for low in range(start, stop, step):
        yield slice(low, min(low + step, stop))


def in_float64(X: Float[Tensor, "N d"], weights: Float[Tensor, "C d"]) -> Float[Tensor, "N C"]:
    """X weightsᵀ in float64, without a copy of X."""
    weights = weights.double()
    return torch.cat([X[n].double() @ weights.T for n in ranges(0, len(X), X.shape[1])])


def new_matrix(
    like: Tensor, rows: int, columns: int, out: Tensor | None = None
) -> Float[Tensor, "{rows} {columns}"]:  # fmt: skip
    """Return ``out``, or an uninitialized matrix of the same type.

    NumPy asks the kernel for huge pages, which saves most of the first writing.

    Raises
    ------
    ValueError
        If ``out`` has another shape, or cannot hold such numbers.
    """
    if out is not None:
        if out.shape != (rows, columns) or not out.is_floating_point():
            given = f"{out.dtype} of shape {tuple(out.shape)}"
            raise ValueError(f"out must be a floating-point matrix of shape ({rows}, {columns}), got {given}")
        return out
    if like.device.type == "cpu":
        return torch.from_numpy(np.empty((rows, columns), dtype=str(like.dtype).removeprefix("torch.")))
    return like.new_empty(rows, columns)
