r"""Curvatures that a function is applied to before the spectrum is looked at: Remark 1 of Liao & Mahoney (2021).

Where g is not bounded, Theorems 2 and 3 say nothing of :math:`\frac1n \sum_i g_i x_i x_i^\top`; with f(g) for g and
f bounded they do, by :meth:`common.liao_eigenspectra.law.Law.mapped`. The trimming of phase retrieval (Chen and Candès,
2015) keeps small g and drops large ones, :math:`f(g) = g\, 1\{|g| < \epsilon\}`; the printed
:math:`\delta_{|t| < \epsilon}` keeps the indicator alone.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float

from common.hessian.gram import weighted_gram

#: A bounded function of curvatures, elementwise.
Preprocessing = Callable[[np.ndarray], np.ndarray]


def trimmed(bound: float) -> Preprocessing:
    """The function g 1{|g| < bound}."""
    return lambda g: np.where(np.abs(g) < bound, g, 0.0)


def clipped(bound: float) -> Preprocessing:
    """The function that leaves g between -bound and bound and moves what is beyond to the nearer of them."""
    return lambda g: np.clip(g, -bound, bound)


def indicator(bound: float) -> Preprocessing:
    """The function 1{|g| < bound}, as Remark 1 has it."""
    return lambda g: (np.abs(g) < bound).astype(float)


def preprocessed_hessian(
    X: Float[torch.Tensor, "n p"], g: Float[torch.Tensor, " n"], function: Preprocessing
) -> Float[torch.Tensor, "p p"]:
    """The matrix of f(g) in place of g at given features, shape (p, p)."""
    return weighted_gram(X, torch.from_numpy(function(g.numpy())) / len(X))
