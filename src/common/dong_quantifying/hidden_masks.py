r"""What the ReLU masks and the output weights make of H_ww at initialization, at any data and any number of classes.

Given the samples, :math:`W \sim N(0, I/d)` makes the masks :math:`a_{ni} = 1(w_i^\top x_n > 0)` of two samples at an
angle :math:`\theta_{nm}` agree to be active with probability :math:`\kappa_{nm} = (\pi - \theta_{nm}) / 2\pi`. The
matrices :math:`L_{ij} = \frac1N \sum_n a_{ni} a_{nj} x_n x_n^\top` of Section 7.2.2 of Dong et al. (2025) then have

.. math:: E\|L_{ii}\|_F^2 = \tfrac1{N^2} \sum_{nm} (x_n^\top x_m)^2 \kappa_{nm}, \qquad
    E\|L_{ij}\|_F^2 = \tfrac1{N^2} \sum_{nm} (x_n^\top x_m)^2 \kappa_{nm}^2,

exactly, and V is independent of them. Nothing tends to infinity here.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.integrate import quad
from torch import Tensor

from common.dong_quantifying.block_norms import check_least
from common.hessian.closed_form import ranges


class MaskNorms(NamedTuple):
    """E||L_ii||² and E||L_ij||² over W, given the samples."""

    ii: float
    ij: float


def mask_norms(X: Float[Tensor, "N d"]) -> MaskNorms:
    """Expected squared norms of L_ii and L_ij over W, given the samples X, shape (N, d); see the module.

    Raises
    ------
    ValueError
        If there is no sample, or one is zero, whose angles are none.
    """
    check_least(1, N=len(X))
    X = X.double()
    lengths = torch.linalg.vector_norm(X, dim=1)
    if not (lengths > 0).all():
        raise ValueError("a sample is zero: it has no angle with the others")
    ii = ij = 0.0
    for rows in ranges(0, len(X), len(X)):
        gram = X[rows] @ X.T
        cosine = (gram / lengths[rows, None] / lengths).clamp_(-1, 1)
        both = 0.5 - torch.acos(cosine) / (2 * math.pi)
        weights = gram.square_().mul_(both)
        ii += weights.sum().item()
        ij += weights.mul_(both).sum().item()
    return MaskNorms(ii / len(X) ** 2, ij / len(X) ** 2)


def block_ratio(masks: Sequence[MaskNorms], C: int, loss: str) -> float:
    r"""E||H_{w_i w_j}||² / E||H_{w_i w_i}||² at initialization, over W and V and one or more draws of the samples.

    Under MSE :math:`E(\sum_c V_{ci} V_{cj})^2 / E(\sum_c V_{ci}^2)^2 = 1 / (C + 2)` times that of the masks, exactly.
    Under CE with logits so small that :math:`p = 1/C`, the covariance of the C rows of V takes the place of their
    products: a Wishart matrix of C - 1 degrees of freedom, :math:`1 / (C + 1)`.

    Parameters
    ----------
    masks
        Of :func:`mask_norms`, one for each draw of the samples.
    C
        Number of classes, at least 1; at least 2 under CE.

    Raises
    ------
    ValueError
        If C is too small, the loss is unknown, or there are no samples.
    """
    if loss not in ("CE", "MSE"):
        raise ValueError(f"the loss must be 'CE' or 'MSE', got {loss!r}")
    check_least(2 if loss == "CE" else 1, C=C)
    check_least(1, draws=len(masks))
    return sum(x.ij for x in masks) / sum(x.ii for x in masks) / (C + 2 if loss == "MSE" else C + 1)


def shared_activity_variance(d: int, N: int) -> float:
    r"""Variance of the number of N samples on which two given neurons are active, over that of Binomial(N, 1/4).

    Given W, each of N independent symmetric samples in d dimensions is shared with probability
    :math:`q = (\pi - \theta) / 2\pi`, θ the angle of :math:`w_i` and :math:`w_j`, whose density is proportional to
    :math:`\sin^{d-2}\theta`: the number has the variance :math:`E[N q (1 - q)] + N^2 \mathrm{Var}\, q`. Lemma 3 (2) of
    Dong et al. says that it is binomial, which would make the ratio 1. It is
    :math:`1 + \frac{16}{3} (N - 1) \mathrm{Var}\, q \to 1 + 4 N / 3 \pi^2 d`.

    Raises
    ------
    ValueError
        If d < 2 or N < 1.
    """
    check_least(2, d=d)
    check_least(1, N=N)

    def weight(theta: float) -> float:
        return math.sin(theta) ** (d - 2)

    # Symmetric about π/2, where E q = 1/4
    top, _ = quad(lambda t: weight(t) * ((math.pi / 2 - t) / (2 * math.pi)) ** 2, 0, math.pi, points=[math.pi / 2])
    bottom, _ = quad(weight, 0, math.pi, points=[math.pi / 2])
    return 1 + 16 / 3 * (N - 1) * top / bottom
