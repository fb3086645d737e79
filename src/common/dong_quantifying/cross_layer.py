r"""Along training: the cross-layer Hessian beside the diagonal parts, and its stripes; Section 4 of the paper.

The stripes of :math:`H_{wv}` are the first term of (11) and (18),
:math:`\frac1N\sum_n g_{nj} a_{nk} x_n e_k^\top`, with :math:`g = p - \delta` under CE and
:math:`2(f - \delta)` under MSE. The columns that it occupies hold a part of the
second term too, so that their share of :math:`\|H_{wv}\|_F^2` stays above 1/4 even where the first term is gone.
"""

import math
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from common.hessian.closed_form import LossName
from common.hessian.hidden_layer import HiddenLayerHessian


@dataclass(frozen=True)
class Structure:
    """The Hessian of a one-hidden-layer network in eight numbers.

    Attributes
    ----------
    ratio_ww, ratio_vv
        Block ratios of :math:`H_{ww}` and :math:`H_{vv}`: mean squared norm of the off-diagonal blocks over that of the
        diagonal ones. NaN where there is one block, or those on the diagonal vanish.
    first_term, stripe_columns, cross
        Squared norms of the first term of (11) or (18), of the columns that it occupies, and of all of :math:`H_{wv}`.
    ww, vv
        Squared norms of :math:`H_{ww}` and :math:`H_{vv}`.
    residual
        Root mean square over the samples of the Euclidean norm of p − δ under CE, of f − δ under MSE.
    """

    ratio_ww: float
    ratio_vv: float
    first_term: float
    stripe_columns: float
    cross: float
    ww: float
    vv: float
    residual: float


def structure(
    X: Float[Tensor, "N d"], y: Int[Tensor, "N"], W: Float[Tensor, "m d"], V: Float[Tensor, "C m"], loss: LossName
) -> Structure:
    """Block ratios, stripes and norms of the Hessian of f(x) = V σ(W x).

    Parameters
    ----------
    X, y
        Samples and labels.
    W, V
        Weights.
    loss
        ``"CE"`` or ``"MSE"``, as :mod:`common.hessian.closed_form` states them, factor 2 included.

    Raises
    ------
    ValueError
        As :class:`~common.hessian.hidden_layer.HiddenLayerHessian`.
    """
    H = HiddenLayerHessian(X, W, V, y, loss)
    ww, vv, wv = H.mean_squared_norms("ww"), H.mean_squared_norms("vv"), H.stripe_energy()
    residual = H.residual / (1 if loss == "CE" else 2)
    g = H.residual / H.N
    first_term = sum(((g * on[:, None]).T @ H.X).square().sum().item() for on in H.active.T)
    return Structure(
        ratio_ww=ww.off_diagonal / ww.diagonal if ww.diagonal else math.nan,
        ratio_vv=vv.off_diagonal / vv.diagonal if vv.diagonal else math.nan,
        first_term=first_term,
        stripe_columns=wv.stripes,
        cross=wv.total,
        ww=ww.total(H.m),
        vv=vv.total(H.C),
        residual=residual.square().sum(1).mean().sqrt().item(),
    )
