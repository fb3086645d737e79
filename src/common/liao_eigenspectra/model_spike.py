r"""The left spike of Corollary 2 of Liao & Mahoney (2021) at any ‖w‖, in closed form and in graded matrices.

Logistic loss, :math:`\mu = 0`, :math:`C = I`: :math:`g = 1/(2 + e^r + e^{-r})` with :math:`r = \|w\| t`, t standard
normal along w. Left of the bulk :math:`\delta = e^Y > 0`. With :math:`h = \delta g / (1 + \delta g)` and the sums

.. math:: A = E[h], \quad A' = dA/dY = E[h (1 - h)], \quad D = E[h t^2], \quad D' = dD/dY

Theorem 1 is :math:`z = (A - c)\, e^{-Y}` and Theorem 4 :math:`1 / (\hat w^\top \bar Q \hat w) = D e^{-Y} - z`. So the
left edge, where dz/dY = 0, is :math:`\lambda_- = A' e^{-Y}` at :math:`A - A' = c`; the spike is
:math:`\lambda_w = D e^{-Y}` at :math:`A - D = c`, and it is there if and only if A' > D at the edge; by Theorem 3

.. math:: \cos^2 = \frac{c - A + A'}{c - A + A' + D - D'}.

A'/A falls in Y and D/A rises, so that A' = D has one root: the spike is there for c below the A - D of that root,
:func:`threshold`. This goes to zero for small and for large ‖w‖: every c below the maximum has a spike between two
finite norms, :func:`norms_with_spike`, and a larger c never.

As c falls, the upper one goes up, where g falls so fast with \|t\| that h is 1 up to \|t\| = τ = Y/‖w‖ and 0 beyond:
:math:`A = 2 \Phi(\tau) - 1`, :math:`A - D = 2 \tau \varphi(\tau)`. Let A = c at τ_c and A - D = c at τ_w. Close to τ_c,
with :math:`v = \|w\| (\tau - \tau_c)` and :math:`k = 2 \varphi(\tau_c) / \|w\|`,

.. math:: A - c = k v, \qquad A' = k, \qquad z \propto v e^{-v},

so that the edge is at v = 1 and the spike at :math:`x = \|w\| (\tau_w - \tau_c)`, if this is less than 1: they meet at
the norm :math:`s_* = 1 / (\tau_w - \tau_c)`, :func:`merging_norm`, x is the norm over it, the gap over the edge is
:math:`1 - x e^{1 - x}`, and as D = A - c = k x there and D' = τ² A' is small, the squared cosine is
:math:`k (1 - x) / (k (1 - x) + k x) = 1 - x`. By :math:`2 \Phi(\tau) - 1 = \sqrt{2 / \pi} (\tau - \tau^3 / 6)` and
:math:`2 \tau \varphi(\tau) = \sqrt{2 / \pi} (\tau - \tau^3 / 2)` the two τ are :math:`\tau^3 / 3` apart,
:math:`\tau = c \sqrt{\pi / 2}`: :math:`s_* = 3 (2 / \pi)^{3/2} / c^3`. Near it the gap over the edge is
:math:`(1 - x)^2 / 2 = \cos^4 / 2`.

All this holds for the t of one sample too, with E the mean over it and c = (p - 1)/n, as the other coordinates of the
features are independent of t. Large ‖w‖ asks for that: the edge moves with the sample's quantiles of \|t\| much more
than the spike moves from the edge.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import SupportsIndex

import numpy as np
import scipy.linalg
from jaxtyping import Float
from scipy import stats
from scipy.optimize import brentq, minimize_scalar
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.special import expit

from common.liao_eigenspectra.glm import finite_array, positive_number, whole_number

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(20)
_TAIL = 13.0  # standard deviations at which Gaussian integrals end
_NEGLIGIBLE = 45.0  # exponent of e below which a sample adds nothing to the smallest eigenvalue


@dataclass(frozen=True)
class LeftEnd:
    """The left end of a spectrum.

    Attributes
    ----------
    log_edge
        Logarithm of the left edge of the bulk.
    relative_gap
        Distance of the spike from the edge, over the edge; 0 if there is no spike.
    cosine
        Squared cosine of the spike's eigenvector with w; 0 if there is no spike.
    """

    log_edge: float
    relative_gap: float
    cosine: float


def log_curvature(r: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Logarithm of the curvature of the logistic loss at r = wᵀx, shape (n,)."""
    return -2 * np.logaddexp(r / 2, -r / 2)


def _sums(Y: float, norm: float, t: Float[np.ndarray, " n"] | None) -> tuple[float, float, float, float]:
    """A, A', D and D', for the normal law of t or for that of a sample."""
    if t is None:
        wide, r_max = 0.5 * norm, _TAIL * norm
        near = max(Y, 0.0) + np.arange(-45, 46, 1.5)
        ends = np.unique(np.r_[0.0, r_max, np.arange(0, r_max, wide), near[(near > 0) & (near < r_max)]])
        ends = ends[np.r_[True, np.diff(ends) > 1e-9]]
        half, middle = np.diff(ends)[:, None] / 2, (ends[1:, None] + ends[:-1, None]) / 2
        t = ((middle + half * _POINTS) / norm).ravel()
        q = (half * _WEIGHTS).ravel() * 2 * stats.norm.pdf(t) / norm
    else:
        q = np.full(len(t), 1 / len(t))
    x = Y + log_curvature(norm * t)
    h = expit(x)
    k = h * expit(-x)
    return q @ h, q @ k, q @ (h * t * t), q @ (k * t * t)


def left_end(norm: float, c: float, t: Float[np.ndarray, " n"] | None = None) -> LeftEnd:
    """Left edge, spike and alignment in the limit, or given the coordinates along w of one sample.

    Parameters
    ----------
    norm
        ‖w‖.
    c
        Limit of p/n, below 1; (p - 1)/n for a sample.
    t
        wᵀx/‖w‖ of a sample, shape (n,); their normal law if left out.

    Raises
    ------
    ValueError
        If ‖w‖ is not positive, or c not between 0 and 1, where zero is no eigenvalue.
    """
    norm, c = positive_number("the norm of w", norm), positive_number("the ratio c = p/n", c)
    if c >= 1:
        raise ValueError(f"the ratio c = p/n must be below 1, where the bulk starts above zero, got {c:g}")
    t = None if t is None else finite_array("t", t, (None,))
    far = norm * (_TAIL if t is None else np.abs(t).max()) + 60

    def edge(Y: float) -> float:
        A, slope, _, _ = _sums(Y, norm, t)
        return A - slope - c

    def spike(Y: float) -> float:
        A, _, D, _ = _sums(Y, norm, t)
        return A - D - c

    Y = brentq(edge, -60, far, xtol=1e-12, rtol=1e-14)
    log_edge = math.log(_sums(Y, norm, t)[1]) - Y
    if spike(Y) <= 0:
        return LeftEnd(log_edge, 0.0, 0.0)
    Y = brentq(spike, -80, Y, xtol=1e-12, rtol=1e-14)
    A, slope, D, D_slope = _sums(Y, norm, t)
    above = c - A + slope
    cosine = float(above / (above + D - D_slope))
    return LeftEnd(log_edge, -math.expm1(math.log(D) - Y - log_edge), cosine)


def threshold(norm: float) -> float:
    """The c below which there is a spike at a given ‖w‖."""
    norm = positive_number("the norm of w", norm)

    def excess(Y: float) -> float:
        _, slope, D, _ = _sums(Y, norm, None)
        return math.log(slope + 1e-300) - math.log(D + 1e-300)

    A, _, D, _ = _sums(brentq(excess, -40, 24 * math.sqrt(norm) + 4 * norm + 30, xtol=1e-12), norm, None)
    return float(A - D)


@cache
def critical_ratio() -> tuple[float, float]:
    """The c from which on no ‖w‖ makes a left spike, and the ‖w‖ at which the last one goes."""
    found = minimize_scalar(lambda s: -threshold(s), bounds=(5, 12), method="bounded", options={"xatol": 1e-8})
    return float(-found.fun), float(found.x)


def norms_with_spike(c: float) -> tuple[float, float]:
    """The two ‖w‖ between which there is a left spike: its onset and where it merges into the bulk.

    Raises
    ------
    ValueError
        If there is none at this c, or c is below 0.001.
    """
    largest, turning = critical_ratio()
    if not 1e-3 <= positive_number("the ratio c = p/n", c) < largest:
        raise ValueError(f"c must be between 0.001 and {largest:.4f}, from where on there is no left spike, got {c:g}")
    ends = (1e-3, turning), (turning, 10 / c**3)
    return tuple(brentq(lambda s: threshold(s) - c, *bracket, xtol=1e-9) for bracket in ends)


def merging_norm(c: float) -> float:
    """Where the spike merges, to the leading order for small c: 1 / (τ_w - τ_c)."""
    tau_w = brentq(lambda tau: 2 * tau * stats.norm.pdf(tau) - c, 0, 1)
    return float(1 / (tau_w - stats.norm.ppf((1 + c) / 2)))


def best_alignment(c: float) -> tuple[float, float]:
    """The ‖w‖ between :func:`norms_with_spike` at which the squared cosine is largest, and that squared cosine."""
    ends = np.log(norms_with_spike(c))
    found = minimize_scalar(
        lambda s: -left_end(math.exp(s), c).cosine, bounds=ends, method="bounded", options={"xatol": 1e-8}
    )
    return float(math.exp(found.x)), float(-found.fun)


def norms_aligned(c: float, cosine: float) -> tuple[float, float]:
    """The two ‖w‖ between which the squared cosine is above a value.

    Raises
    ------
    ValueError
        If it is nowhere, or the value is not above zero.
    """
    best, most = best_alignment(c)
    if not 0 < cosine < most:
        raise ValueError(f"the squared cosine must be between 0 and its largest value {most:.4f}, got {cosine:g}")
    onset, merging = norms_with_spike(c)
    return tuple(brentq(lambda s: left_end(s, c).cosine - cosine, *ends) for ends in ((onset, best), (best, merging)))


def alignment_at_infinite_norm(p: SupportsIndex, n: SupportsIndex, rng: np.random.Generator) -> float:
    """Squared cosine of the smallest eigenvalue's eigenvector with w for one sample, as ‖w‖ → ∞ at fixed n and p.

    The p - 1 samples of smallest t² have all of g, so that the eigenvector is their normal: a vector (1, v) with
    t + ξᵀv = 0 for each, v normal with squared length Σ t² / χ²₁.
    """
    p, n = whole_number("p", p, least=2), whole_number("n", n)
    t = np.sort(np.abs(rng.standard_normal(n)))[: p - 1]
    along = rng.chisquare(1)
    return float(along / (along + t @ t))


def smallest_eigenpair(
    X: Float[np.ndarray, "n p"], direction: Float[np.ndarray, " p"], norm: float
) -> tuple[float, float]:
    """Logarithm of the smallest eigenvalue of the Hessian, and its eigenvector's squared cosine with w.

    Of the Hessian itself rounding leaves no eigenvalue below 1e-16 of the largest. Here the triangular factor of
    :math:`D^{1/2} X`, its rows in falling order of g, is inverted, with g in units of the smallest eigenvalue.

    Parameters
    ----------
    X
        Features, shape (n, p), n > p.
    direction
        w/‖w‖, shape (p,).
    norm
        ‖w‖.

    Raises
    ------
    ValueError
        If there are no more samples than dimensions.
    """
    n, p = X.shape
    if n <= p:
        raise ValueError(f"the smallest eigenvalue is zero for n = {n} samples in p = {p} dimensions")
    log_g = log_curvature(norm * (X @ direction))
    order = np.argsort(-log_g)
    unit = log_g[order[p - 1]]
    count = max(int((log_g > unit - _NEGLIGIBLE).sum()), min(n, p + 50))
    order = order[:count]
    root = np.exp(np.minimum((log_g[order] - unit) / 2, 300)) / math.sqrt(n)
    (R,) = scipy.linalg.qr(X[order] * root[:, None], mode="r", overwrite_a=True, check_finite=False)
    R = np.asfortranarray(R[:p])

    def inverse(v: np.ndarray) -> np.ndarray:
        half = scipy.linalg.solve_triangular(R, v, trans="T", check_finite=False)
        return scipy.linalg.solve_triangular(R, half, check_finite=False)

    start = np.random.default_rng(0).standard_normal(p)
    values, vectors = eigsh(LinearOperator((p, p), matvec=inverse, dtype=float), k=1, tol=1e-10, v0=start)
    return float(unit - math.log(values[0])), float((vectors[:, 0] @ direction) ** 2)
