r"""Spectra of single Hessian blocks at initialization: Lemma 1 and Propositions 2 and 4 of Dong et al. (2025).

A block :math:`\frac1N \sum_n \lambda_n x_n x_n^\top` with standard Gaussian features and weights that depend on the
features through finitely many projections has, as :math:`d/N \to \gamma`, the spectrum whose Stieltjes transform solves

.. math:: s(z) = \frac{1}{E\big[\frac{\lambda}{1 + \gamma s(z) \lambda}\big] - z}, \qquad \mathrm{Im}\, z > 0,

which is (55), (56), (81) and (82) with :math:`\lambda = p_1 (1 - p_1)`, :math:`p_1 p_2`, ξ and η. **The sign**: by (5)
the weights of :math:`H_{ij}` are :math:`-p_i p_j`, so that (56) is the equation of the spectrum of :math:`-H_{ij}`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from common.dong_quantifying.block_norms import check_least
from common.hessian.convergence import ConvergenceError


def stieltjes_transform(
    z: Complex[np.ndarray, " Z"], weights: Float[np.ndarray, " J"], gamma: float, *, tolerance: float = 1e-10
) -> Complex[np.ndarray, " Z"]:
    """Solve (55), or its like, at points of the upper half plane, for equally likely weights.

    For Im z > 0 the right-hand side maps the upper half plane into a bounded part of itself, so that half steps towards
    it converge to its only fixed point there, whatever the sign of the weights.

    Parameters
    ----------
    z
        Points with Im z > 0, shape (Z,).
    weights
        A sample of the law of λ, shape (J,).
    gamma
        Limit of d/N.

    Raises
    ------
    ValueError
        If a point does not lie in the upper half plane, or gamma is not positive.
    ConvergenceError
        If the fixed point is not found within 10,000 steps.
    """
    if not (z.imag > 0).all() or not gamma > 0:
        raise ValueError("the points must lie in the upper half plane, and gamma must be positive")
    s = -1 / z
    for _ in range(10_000):
        step = 1 / ((weights / (1 + gamma * s[:, None] * weights)).mean(1) - z) - s
        s = s + step / 2
        if (np.abs(step) <= tolerance * np.abs(s)).all():
            return s
    raise ConvergenceError(f"no fixed point of (55): residual {np.abs(step / s).max():.1e}")


def resolvent_trace(eigenvalues: Float[Tensor, "d"], z: Complex[np.ndarray, " Z"]) -> Complex[np.ndarray, " Z"]:
    """Stieltjes transform of a matrix with these eigenvalues, (1/d) tr (H - z)⁻¹, at points off the real axis."""
    return (1 / (eigenvalues.double().numpy() - z[:, None])).mean(1)


class Weights(NamedTuple):
    """Weights λ of a block on the diagonal and of one beside it, shape (N,) each."""

    own: Float[Tensor, "N"]
    pair: Float[Tensor, "N"]


def linear_weights(logits: Float[Tensor, "N C"]) -> Weights:
    r""":math:`p_1 (1 - p_1)` and :math:`-p_1 p_2` of the linear model under CE, (5), by its logits, shape (N, C)."""
    p = logits.double().softmax(1)
    return Weights(p[:, 0] * (1 - p[:, 0]), -p[:, 0] * p[:, 1])


def hidden_weights(z: Float[Tensor, "N m"], V: Float[Tensor, "C m"]) -> Weights:
    """ξ and η of Proposition 4 by the preactivations z, shape (N, m), and the output weights V, shape (C, m)."""
    z, V = z.double(), V.double()
    p = (z.clamp(min=0) @ V.T).softmax(1)
    active, mean = (z > 0).double(), p @ V
    own = p @ V[:, 0] ** 2 - mean[:, 0] ** 2
    pair = p @ (V[:, 0] * V[:, 1]) - mean[:, 0] * mean[:, 1]
    return Weights(own * active[:, 0], pair * active[:, 0] * active[:, 1])


def block_eigenvalues(X: Float[Tensor, "N d"], weights: Float[Tensor, "N"]) -> Float[Tensor, "d"]:
    """Eigenvalues of (1/N) Σ λ_n x_n x_nᵀ, shape (d,), in float64."""
    X = X.double()
    return torch.linalg.eigvalsh((X * weights[:, None]).T @ X / len(X))


class BlockSpectra(NamedTuple):
    """Eigenvalues of four blocks of one realization, (d,) each: linear model, hidden layer; own and pair."""

    linear_own: Float[Tensor, "d"]
    linear_pair: Float[Tensor, "d"]
    hidden_own: Float[Tensor, "d"]
    hidden_pair: Float[Tensor, "d"]


def simulated_spectra(
    d: int, N: int, C: int, V: Float[Tensor, "C m"], realizations: int, generator: torch.Generator
) -> Iterator[BlockSpectra]:
    """Spectra of the blocks (1, 1) and (1, 2) of the linear model, (5), and of the hidden layer, (14), under CE.

    Parameters
    ----------
    V
        Output weights of the network with a hidden layer, fixed as in Proposition 4. All else is drawn anew.

    Raises
    ------
    ValueError
        If d, N or the number of realizations is below 1, or there are fewer than two classes or neurons.
    """
    m = V.shape[1]
    check_least(1, d=d, N=N, realizations=realizations)
    check_least(2, C=C, m=m)
    for _ in range(realizations):
        X = torch.randn(N, d, generator=generator)
        linear = linear_weights(X @ torch.randn(d, C, generator=generator) / math.sqrt(d))
        hidden = hidden_weights(X @ torch.randn(d, m, generator=generator) / math.sqrt(d), V)
        yield BlockSpectra(*(block_eigenvalues(X, weights) for weights in (*linear, *hidden)))


def decoupling_gap(
    d: int, N: int, C: int, z: Complex[np.ndarray, " Z"], realizations: int, generator: torch.Generator
) -> Complex[np.ndarray, "R Z"]:
    r"""Differences of Lemma 1, (43): :math:`s_{H_{11}}(z) - s_{\tilde H_{11}}(z)` of independent realizations.

    The weights of :math:`\tilde H_{11}` come from a copy of the features that is independent of them; V is the same.

    Raises
    ------
    ValueError
        If d, N or the number of realizations is below 1, or C < 2.
    """
    check_least(1, d=d, N=N, realizations=realizations)
    check_least(2, C=C)
    gaps = []
    for _ in range(realizations):
        X, copy = torch.randn(2, N, d, generator=generator)
        V = torch.randn(d, C, generator=generator) / math.sqrt(d)
        own, decoupled = (
            resolvent_trace(block_eigenvalues(X, linear_weights(features @ V).own), z) for features in (X, copy)
        )
        gaps.append(own - decoupled)
    return np.stack(gaps)
