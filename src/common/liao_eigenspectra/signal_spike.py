r"""The largest eigenpair of Corollary 1 of Liao & Mahoney (2021), drawn exactly in O(p) operations.

With g = 1/4 and :math:`x_i = \mu + z_i`, :math:`|\mu|^2 = \rho`, the Hessian is :math:`X^\top X / 4n`,
:math:`X = Z + 1 \mu^\top`. Turned so that μ is along the first feature and 1 along the first sample, Z is as normal as
before; Householder reflections of samples and features in turn, none of which touches the first feature, leave a lower
bidiagonal L with independent entries and :math:`X^\top X = L L^\top` in law:

.. math:: L_{00}^2 = (N + \sqrt{n \rho})^2 + \chi^2_{n-1}, \qquad L_{kk}^2 = \chi^2_{n-k}, \qquad
    L_{k+1,k}^2 = \chi^2_{p-1-k},

the model of Dumitriu and Edelman (2002) with one entry that is not central.
"""

from typing import SupportsIndex

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import eigh_tridiagonal

from common.liao_eigenspectra.glm import whole_number
from common.notebook.intervals import Estimate


def sample_top_eigenpair(
    p: SupportsIndex, n: SupportsIndex, strength: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Largest eigenvalue of one Hessian and its eigenvector's squared cosine with μ.

    Parameters
    ----------
    p, n
        Dimension, at least 2, and number of samples, more than p.
    strength
        ρ = ‖μ‖².

    Raises
    ------
    ValueError
        If n is not more than p, or the strength is negative.
    """
    p, n = whole_number("p", p, least=2), whole_number("n", n)
    if n <= p or strength < 0:
        raise ValueError(f"n must be more than p, and the strength not negative, got p={p}, n={n}, {strength:g}")
    diagonal = rng.chisquare(n - np.arange(p))
    diagonal[0] = (rng.standard_normal() + np.sqrt(n * strength)) ** 2 + rng.chisquare(n - 1)
    below = rng.chisquare(p - np.arange(1, p))
    gram = diagonal.copy()  # of L Lᵀ, tridiagonal
    gram[1:] += below
    values, vectors = eigh_tridiagonal(
        gram / (4 * n), np.sqrt(diagonal[:-1] * below) / (4 * n), select="i", select_range=(p - 1, p - 1)
    )
    return float(values[0]), float(vectors[0, 0] ** 2)


def extrapolated(p: ArrayLike, means: ArrayLike, errors: ArrayLike) -> tuple[Estimate, float]:
    """The limit of means that are linear in 1/p, and how well they are: a weighted least-squares line.

    Parameters
    ----------
    p, means, errors
        Dimensions, at least 3 of them, means there and their standard errors, shape (K,).

    Returns
    -------
    Estimate
        Intercept, with its 95 % interval for normal errors.
    float
        χ² over its degrees of freedom, K - 2.
    """
    x, weights = 1 / np.asarray(p, dtype=float), 1 / np.asarray(errors, dtype=float)
    line, covariance = np.polyfit(x, means, 1, w=weights, cov="unscaled")
    limit, half = float(line[1]), 1.96 * float(np.sqrt(covariance[1, 1]))
    misfit = weights * (np.asarray(means) - np.polyval(line, x))
    return Estimate(limit, (limit - half, limit + half)), float((misfit**2).sum() / (len(x) - 2))
