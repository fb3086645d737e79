r"""Limiting spectrum, spikes and eigenvectors of the Hessian of any G-GLM: Theorems 1 to 4 of Liao & Mahoney (2021).

The Hessian :math:`H = \frac1n \sum_i g_i x_i x_i^\top`, :math:`x_i \sim N(\mu, C)`, :math:`p/n \to c`, has a spectrum
that depends on the law :math:`\nu` of g, on the spectrum :math:`\tilde\nu` of C and on c alone: (5) and (7),

.. math:: \delta = F(\delta) = c \int \frac{t\, \tilde\nu(dt)}{t \kappa(\delta) - z}, \qquad
    \kappa(\delta) = E\Big[\frac{g}{1 + g \delta}\Big], \qquad m(z) = \int \frac{\tilde\nu(dt)}{t \kappa - z}.

**Upper half plane.** For Im z > 0, F maps the upper half plane into a bounded part of itself: it has exactly one fixed
point there, whatever the sign of g. (The paper's footnote 6 asks for z m(z) < 0 on the real axis instead, which fails
as soon as H is indefinite.)

**Real axis.** With :math:`\zeta = -1/\delta`, :math:`B(\zeta) = E[g / (g - \zeta)]` and
:math:`T(x) = \int t / (t - x)\, \tilde\nu(dt)` the equation is :math:`B(\zeta) = c\,T(x)` at
:math:`z = -\zeta x B(\zeta)`. A real z lies outside the support if and only if such a pair exists with
:math:`\zeta \notin \mathrm{supp}\,\nu`, :math:`x \notin \mathrm{supp}\,\tilde\nu` and :math:`F'(\delta) < 1`: then
dδ/dz > 0, so the solution continues into the upper half plane, where it is the only one. The edges of the support are
the points where :math:`F' = 1`, that is dz/dδ = 0.

**Spikes.** Let :math:`t \in \mathbb{R}^k` be the standard normal coordinates of :math:`C^{-1/2}(x - \mu)` along an
orthonormal basis R of span{C^{1/2} w, C^{1/2} w*}, k = 0, 1, 2. Then Theorem 4 reads
:math:`\bar Q^{-1} = \bar Q_b^{-1} + V \Lambda V^\top` with :math:`V = [\mu, C^{1/2} R]` and

.. math:: \Lambda = E\Big[\frac{g}{1 + g \delta}
    \begin{pmatrix} 1 & t^\top \\ t & t t^\top - I \end{pmatrix}\Big],

which is (8), (9) without a pseudo-inverse. (At n → ∞, δ = 0, it gives E[H]; the upper left entry of the paper's matrix
there should be E[g], not 1.) In an orthonormal basis O of span{μ, w, w*, Cw, Cw*} let
:math:`S = O^\top \bar Q_b O` and :math:`L = O^\top V \Lambda V^\top O`. As
:math:`M = O^\top \bar Q O = (S^{-1} + L)^{-1}` is a Stieltjes transform of a positive matrix measure, all eigenvalues
of :math:`M^{-1}` fall along the real axis, and spikes are their zeros. The number of positive eigenvalues of
:math:`\begin{pmatrix} L & I \\ I & -S \end{pmatrix}` falls by one at each of them and nowhere else, so that spikes are
counted, with multiplicity, and not searched for. The residue of M is minus the matrix of alignments
:math:`O^\top \hat u \hat u^\top O` of Theorem 3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Complex, Float
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator
from scipy.special import wofz

from common.liao_eigenspectra.glm import GLM, DiscreteResponse, Features, curvature

_TAIL = 10.0  # standard deviations at which Gaussian integrals end; the rest is below 1e-22
_PANEL = 16  # Gauss-Legendre nodes in a panel
_CHUNK = 2**19  # entries of a matrix over z and the nodes of g
_BISECTIONS = 60


class ConvergenceError(RuntimeError):
    """The fixed-point equation was not solved; the message holds z and the residual."""


# ---------------------------------------------------------------------------------------------------------------------
# The law of g


@dataclass(frozen=True, eq=False)
class Law:
    """The joint law of the curvature g and of the k Gaussian coordinates t that it depends on, as a quadrature.

    Attributes
    ----------
    g, q
        Nodes in rising order and their weights, shape (J,); the weights add up to 1.
    first, second
        E[t; node] and E[t tᵀ; node], shapes (J, k) and (J, k, k), weights included.
    support
        Closed intervals, disjoint and in order, that hold the support of g; an end may be infinite.
    """

    g: Float[np.ndarray, " J"]
    q: Float[np.ndarray, " J"]
    first: Float[np.ndarray, "J k"]
    second: Float[np.ndarray, "J k k"]
    support: tuple[tuple[float, float], ...]

    @property
    def bounded(self) -> bool:
        """Whether g is bounded, and with it the spectrum (Remark 1)."""
        return math.isfinite(self.support[0][0]) and math.isfinite(self.support[-1][1])

    @cached_property
    def spacing(self) -> Float[np.ndarray, " J-1"]:
        """Distances of neighbouring nodes in the same interval of the support, zero between two intervals."""
        inner = np.zeros(len(self.g) - 1, dtype=bool)
        for low, high in self.support:
            inner |= (self.g[:-1] >= low) & (self.g[1:] <= high)
        return np.where(inner, np.diff(self.g), 0.0)

    @cached_property
    def widths(self) -> Float[np.ndarray, " J"]:
        """Distances of the nodes from their neighbours, zero for atoms."""
        return np.where(self._atoms, 0.0, np.maximum(np.r_[0.0, self.spacing], np.r_[self.spacing, 0.0]))

    @property
    def _atoms(self) -> np.ndarray:
        """Nodes of more than a thousandth of the weight, unless all are like that."""
        heavy = self.q > 1e-3
        return heavy & (heavy.sum() < 64)

    @classmethod
    def discrete(cls, g: ArrayLike, q: ArrayLike | None = None) -> "Law":
        """Law of a g that is independent of the features.

        Parameters
        ----------
        g, q
            Values and probabilities, shape (J,); equal probabilities if left out.
        """
        g = np.atleast_1d(np.asarray(g, dtype=float))
        q = np.full(len(g), 1 / len(g)) if q is None else np.asarray(q, dtype=float)
        order = np.argsort(g)
        if q.shape != g.shape or not np.isclose(q.sum(), 1) or (q < 0).any() or not np.isfinite(g).all():
            raise ValueError("the law of g needs finite values, and as many probabilities, which add up to 1")
        none = np.zeros((len(g), 0))
        return cls(g[order], q[order], none, none[:, :, None], tuple((x, x) for x in np.unique(g)))

    @classmethod
    def sampled(cls, g: Float[np.ndarray, " J"], t: Float[np.ndarray, "J k"], *, bounded: bool) -> "Law":
        """Law of independent samples of g and of the coordinates t that it depends on; :meth:`coordinates` gives t.

        Parameters
        ----------
        g, t
            Samples, shapes (J,) and (J, k).
        bounded
            Whether g is bounded; the range of the samples is then taken for its support.
        """
        q = np.full(len(g), 1 / len(g))
        support = (float(g.min()), float(g.max())) if bounded else (-math.inf, math.inf)
        order = np.argsort(g)
        return cls(g[order], q, q[:, None] * t[order], q[:, None, None] * _outer(t[order]), (support,))

    @classmethod
    def of(cls, glm: GLM, nodes: int = 4096) -> "Law":
        """Law of g for a G-GLM by Gauss-Legendre panels in the Gaussian directions; exact sums over a discrete y.

        Parameters
        ----------
        glm
            The model.
        nodes
            Largest number of different values of g. What a density can resolve is the distance between two of them:
            only far out in the tail of an unbounded law, where x times the density of H falls below some 1e-3, does
            that matter.

        Raises
        ------
        ValueError
            If g is not finite somewhere.
        """
        basis, along_w, along_w_star = coordinates(glm)
        m, m_star, k = glm.w @ glm.mean, glm.w_star @ glm.mean, basis.shape[1]
        discrete, has_w = isinstance(glm.response, DiscreteResponse), bool(glm.w.any())
        other = along_w_star[has_w:]  # the coordinate of w* that w does not have: none, or one
        both = has_w and other.size == 1 and not discrete
        count = 6 * math.isqrt(nodes) if both else nodes
        t1, q1, pieces = _gaussian_panels(count, [(x - m) / along_w[0] for x in glm.kinks] if has_w else None)
        h = m + (along_w[0] * t1 if has_w else 0 * t1)
        eta_kinks = glm.response.kinks if other.size and (not has_w or not along_w_star[0]) else ()
        t2, q2, _ = _gaussian_panels(
            (400 if discrete else count) if other.size else 1,
            [(x - m_star) / other[0] for x in eta_kinks] if other.size else None,
        )
        eta = m_star + (along_w_star[0] * t1 if has_w else 0 * t1)[:, None] + (other[0] if other.size else 0) * t2
        weight = q1[:, None] * q2
        t = np.stack([np.broadcast_to(x, eta.shape) for x in [t1[:, None]] * has_w + [t2] * other.size] or [eta], -1)
        t = t[..., :k]
        parts = []
        if discrete:
            for y in glm.response.values:
                chance = weight * glm.response.probability(y, torch.from_numpy(eta)).numpy()
                moments = [np.einsum("ab,ab...->a...", chance, x) for x in (np.ones(eta.shape), t, _outer(t))]
                parts.append((_curvature(glm, np.full(len(h), y), h), *moments, pieces))
        else:
            if glm.response.noise:
                noise, chance = np.polynomial.hermite_e.hermegauss(24)
                chance /= chance.sum()
            else:
                noise, chance = np.zeros(1), np.ones(1)
            mean = glm.response.function(torch.from_numpy(eta)).numpy()
            h = np.broadcast_to(h[:, None], eta.shape)
            for e, share in zip(glm.response.noise * noise, chance, strict=True):
                w = (share * weight).ravel()
                g, flat = _curvature(glm, (mean + e).ravel(), h.ravel()), t.reshape(mean.size, k)
                parts.append((g, w, w[:, None] * flat, w[:, None, None] * _outer(flat), [slice(None)]))
        support = _merge([(float(g[s].min()), float(g[s].max())) for g, *_, pieces in parts for s in pieces])
        low, high = _unbounded(glm, m, m_star, along_w, along_w_star, support)
        support = ((low, support[0][1]), *support[1:]) if not math.isfinite(low) else support
        support = (*support[:-1], (support[-1][0], high)) if not math.isfinite(high) else support
        g, q, first, second = (np.concatenate(x) for x in list(zip(*parts, strict=True))[:4])
        return cls(g, q, first, second, support)._distinct().compressed(nodes)

    def _distinct(self) -> "Law":
        """The same law with equal values of g added up, and without nodes of no weight."""
        mantissa, exponent = np.frexp(self.g)  # equal up to rounding
        g, place = np.unique(np.ldexp(np.round(mantissa * 2.0**44) / 2.0**44, exponent), return_inverse=True)
        q, first, second = (_add_up(place, len(g), x) for x in (self.q, self.first, self.second))
        keep = q > 1e-25
        return Law(g[keep], q[keep] / q[keep].sum(), first[keep], second[keep], self.support)

    def compressed(self, nodes: int) -> "Law":
        """A law with fewer values of g, spread by local cubic interpolation; the moments of g up to the third stay.

        A value that carries more than a thousandth of the weight is an atom and stays as it is.
        """
        if len(self.g) <= nodes:
            return self
        atoms = np.flatnonzero(self._atoms)
        rest = np.setdiff1d(np.arange(len(self.g)), atoms)
        g, order = self.g[rest], np.cumsum(self.q[rest])
        low, middle, high = np.interp([0.25, 0.5, 0.75], order / order[-1], g)
        width = (high - low) / 2 or 1.0
        grid = middle + width * np.sinh(np.linspace(*np.arcsinh((g[[0, -1]] - middle) / width), nodes - len(atoms)))
        start = np.clip(np.searchsorted(grid, g) - 2, 0, len(grid) - 4)
        moments, spread = (self.q[rest], self.first[rest], self.second[rest]), []
        share = np.ones((4, len(g)))
        for a in range(4):
            for b in range(4):
                if a != b:
                    share[a] *= (g - grid[start + b]) / (grid[start + a] - grid[start + b])
        for x, whole in zip(moments, (self.q, self.first, self.second), strict=True):
            shape = (-1, *[1] * (x.ndim - 1))
            added = sum(_add_up(start + a, len(grid), share[a].reshape(shape) * x) for a in range(4))
            spread.append(np.concatenate([added, whole[atoms]]))
        nodes = np.concatenate([grid, self.g[atoms]])
        order = np.argsort(nodes)
        return Law(nodes[order], *(x[order] for x in spread), self.support)


def _sum_over(law: Law):
    """κ(δ) and its derivative as functions of complex δ, shape (Z,)."""

    def sums(delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kappa, slope = np.empty_like(delta), np.empty_like(delta)
        step = max(1, _CHUNK // len(law.g))
        for k in range(0, len(delta), step):
            ratio = law.g / (1 + law.g * delta[k : k + step, None])
            kappa[k : k + step] = ratio @ law.q
            slope[k : k + step] = -(np.square(ratio, out=ratio) @ law.q)
        return kappa, slope

    return sums


def _smeared_sum_over(law: Law):
    r"""The same with each node of g spread to a normal law as wide as the nodes lie apart.

    It is :math:`\kappa = -\zeta - \zeta^2 s(\zeta)`, with a Faddeeva function for the transform s of a normal law.
    """
    width = math.sqrt(2) * np.maximum(law.widths, 1e-12 * np.abs(law.g).max())

    def sums(delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        zeta = -1 / delta
        s, slope = np.empty_like(delta), np.empty_like(delta)
        step = max(1, _CHUNK // len(law.g))
        for k in range(0, len(delta), step):
            u = (zeta[k : k + step, None] - law.g) / width
            w = wofz(u)
            s[k : k + step] = 1j * math.sqrt(math.pi) * (w @ (law.q / width))
            slope[k : k + step] = 1j * math.sqrt(math.pi) * ((2j / math.sqrt(math.pi) - 2 * u * w) @ (law.q / width**2))
        return -zeta - zeta**2 * s, zeta**2 * (-1 - 2 * zeta * s - zeta**2 * slope)

    return sums


def coordinates(features: Features) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Orthonormal basis R of span{C^{1/2} w, C^{1/2} w*} and the coordinates of both in it.

    Returns
    -------
    basis : array, shape (p, k)
        In the basis of C's eigenvectors; the first column is along C^{1/2} w unless that is zero; k = 0, 1 or 2.
    along_w, along_w_star : array, shape (k,)
    """
    root = np.sqrt(features.eigenvalues)
    w, w_star = root * features.to_eigenbasis(features.w), root * features.to_eigenbasis(features.w_star)
    basis = _orthonormal([w, w_star])
    return basis, basis.T @ w, basis.T @ w_star


def _orthonormal(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Gram-Schmidt, twice over; directions that are there already are left out."""
    columns = np.zeros((len(vectors[0]), 0))
    for v in vectors:
        rest = v - columns @ (columns.T @ v)
        rest -= columns @ (columns.T @ rest)
        if np.linalg.norm(rest) > 1e-10 * np.linalg.norm(v):
            columns = np.column_stack([columns, rest / np.linalg.norm(rest)])
    return columns


def _gaussian_panels(count: int, kinks: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray, list[slice]]:
    """Nodes and weights of the standard normal law, and the pieces between the kinks; one node if there is no t."""
    if kinks is None:
        return np.zeros(1), np.ones(1), [slice(0, 1)]
    ends = [-_TAIL, *sorted(x for x in set(kinks) if abs(x) < _TAIL), _TAIL]
    x, w = np.polynomial.legendre.leggauss(_PANEL)
    nodes, weights, pieces = [], [], []
    for low, high in pairwise(ends):
        panels = max(1, round(count / _PANEL * (high - low) / (2 * _TAIL)))
        edges = np.linspace(low, high, panels + 1)
        half = np.diff(edges)[:, None] / 2
        nodes.append((edges[:-1, None] + half * (1 + x)).ravel())
        weights.append((half * w).ravel())
        begin = sum(map(len, nodes[:-1]))
        pieces.append(slice(begin, begin + len(nodes[-1])))
    t = np.concatenate(nodes)
    q = np.concatenate(weights) * np.exp(-(t**2) / 2)
    return t, q / q.sum(), pieces


def _outer(t: np.ndarray) -> np.ndarray:
    return t[..., :, None] * t[..., None, :]


def _add_up(place: np.ndarray, size: int, values: np.ndarray) -> np.ndarray:
    """Sum of the rows of ``values`` that go to the same place."""
    columns = values.reshape(len(values), math.prod(values.shape[1:]))
    sums = [np.bincount(place, weights=column, minlength=size) for column in columns.T]
    return np.stack(sums, axis=-1).reshape(size, *values.shape[1:]) if sums else np.zeros((size, *values.shape[1:]))


def _curvature(glm: GLM, y: np.ndarray, h: np.ndarray) -> np.ndarray:
    g = curvature(glm.loss, torch.from_numpy(y), torch.from_numpy(np.ascontiguousarray(h))).numpy()
    if not np.isfinite(g).all():
        raise ValueError(f"the curvature of the loss is not finite at h = {h[~np.isfinite(g)][0]:g}")
    return g


def _unbounded(glm, m, m_star, along_w, along_w_star, support) -> tuple[float, float]:
    """Ends of the support, infinite where g at up to 30 standard deviations exceeds all that it is within 10."""
    far = torch.tensor([-30.0, 0.0, 30.0], dtype=torch.float64)
    t = torch.cartesian_prod(*[far] * len(along_w)).reshape(-1, len(along_w)) if len(along_w) else far.new_zeros(1, 0)
    h, eta = m + t @ torch.from_numpy(along_w), m_star + t @ torch.from_numpy(along_w_star)
    if isinstance(glm.response, DiscreteResponse):
        y = torch.tensor(glm.response.values, dtype=torch.float64).repeat_interleave(len(h))
        h = h.repeat(len(glm.response.values))
    else:
        ends = 30 * glm.response.noise
        y = torch.cat([glm.response.function(eta) + e for e in (-ends, 0.0, ends)])
        h = h.repeat(3)
    g = curvature(glm.loss, y, h).numpy()
    low, high = support[0][0], support[-1][1]
    slack = 0.5 * max(abs(low), abs(high))
    return (-math.inf if g.min() < low - slack else low), (math.inf if g.max() > high + slack else high)


def _merge(intervals: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    merged: list[tuple[float, float]] = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


# ---------------------------------------------------------------------------------------------------------------------
# The spectrum


@dataclass(frozen=True, eq=False)
class Spike:
    """An isolated eigenvalue of H in the limit, Theorem 2, and its eigenvectors, Theorem 3.

    Attributes
    ----------
    eigenvalue
        λ.
    multiplicity
        Number of independent eigenvectors.
    gap
        Distance from the support.
    side
        ``"left"``, ``"right"`` or ``"between"`` bulks.
    cosines
        Squared length of the projection of the unit vectors along ``mean``, ``w`` and ``w_star`` onto the
        eigenvectors; vectors that are zero are left out.
    alignment
        Limit of Vᵀ û ûᵀ V, V = [μ, C w*, C w], shape (3, 3).
    """

    eigenvalue: float
    multiplicity: int
    gap: float
    side: str
    cosines: dict[str, float]
    alignment: Float[np.ndarray, "3 3"]


@dataclass(frozen=True)
class _Gap:
    """An open interval of the real axis outside the support, with the values of ζ and the branch of x that make it."""

    low: float
    high: float
    zeta: np.ndarray  # graded from one end to the other, z rising
    branch: int


class Eigenspectrum:
    """Limiting spectrum of the Hessian (4).

    Parameters
    ----------
    law
        Law of g, with the coordinates of :func:`coordinates`; or one independent of the features.
    features
        The features with w and w*, such as a :class:`~common.liao_eigenspectra.glm.GLM`.
    c
        Limit of p/n.

    Raises
    ------
    ValueError
        If c is not positive.

    Examples
    --------
    The Marčenko-Pastur law, whose support is [(1 - √c)², (1 + √c)²]:

    >>> Eigenspectrum(Law.discrete([1.0]), Features(p=1), 0.25).support
    ((0.25, 2.25),)
    """

    def __init__(self, law: Law, features: Features, c: float):
        if not 0 < c < math.inf:
            raise ValueError(f"the ratio c = p/n must be positive, got {c}")
        self.law, self.features, self.c = law, features, float(c)
        self.t, self._place, counts = np.unique(features.eigenvalues, return_inverse=True, return_counts=True)
        self.pi = counts / features.p
        named = {"mean": features.mean, "w": features.w, "w_star": features.w_star}
        named = {name: features.to_eigenbasis(v) for name, v in named.items()}
        C_named = {f"C {name}": features.eigenvalues * v for name, v in named.items() if name != "mean"}
        self._basis = _orthonormal([*named.values(), *C_named.values()])
        self._named = {name: self._basis.T @ v for name, v in (named | C_named).items()}
        self._block = self._by_eigenvalue(self._basis, self._basis)
        R = coordinates(features)[0] * np.sqrt(features.eigenvalues)[:, None]
        if law.first.shape[1] != R.shape[1] and law.first.shape[1] > 0:
            raise ValueError(f"the law has {law.first.shape[1]} coordinates t, the features have {R.shape[1]}")
        R = R[:, : law.first.shape[1]]
        self._loading = self._basis.T @ np.column_stack([named["mean"], R])  # O^T V, shape (r, 1 + k)

    @classmethod
    def of(cls, glm: GLM, c: float) -> "Eigenspectrum":
        """The spectrum for a G-GLM at p/n = c, with the law of g by quadrature."""
        return cls(Law.of(glm), glm, c)

    def _by_eigenvalue(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Products aᵀ Π_k b over the eigenspaces of C, shape (K, ...), for a and b of shape (p, ...)."""
        products = a[:, :, None] * b[:, None, :]
        return _add_up(self._place, len(self.t), products)

    # Theorem 1 ............................................................................................

    def delta(self, z: ArrayLike) -> Complex[np.ndarray, "..."]:
        """δ(z) of (5), (7), at any z off the real axis or, as a limit from above, on it; same shape as z.

        Newton's method on the fixed-point equation, continued from far above the real axis; where it leaves the upper
        half plane or does not improve, damped fixed-point steps, which always converge.

        Raises
        ------
        ConvergenceError
            If δ and F(δ) differ by more than 1e-8 of δ.
        """
        return self._solve(z)[0]

    def _solve(self, z: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """δ and κ at z, each of its shape."""
        z = np.asarray(z, dtype=complex)
        if not np.isfinite(z).all():
            raise ValueError("z must be finite")
        flat = np.where(z.imag < 0, z.conj(), z).ravel()
        size, coarse = self._scale, self.law.compressed(384)
        delta = -self.c * (self.pi @ self.t) / (flat + 4j * size)
        for height in size * 4.0 ** np.arange(1, -8, -1):
            lifted = flat.real + 1j * np.maximum(flat.imag, height)
            delta = self._iterate(_sum_over(coarse), lifted, delta, tolerance=1e-3, steps=20)[0]
        lifted = flat.real + 1j * np.maximum(flat.imag, 1e-5 * size)
        delta = self._iterate(_sum_over(self.law), lifted, delta, tolerance=1e-3, steps=20)[0]
        residual, kappa = np.empty(len(flat)), np.empty_like(flat)
        smeared = self._unresolved(delta)
        exact = (~smeared, _sum_over(self.law), 1e-13)
        for which, sum_over, tolerance in (exact, (smeared, _smeared_sum_over(self.law), 1e-9)):
            if which.any():
                start = delta[which]
                delta[which], residual[which] = self._iterate(sum_over, flat[which], start, tolerance, steps=200)
                kappa[which] = sum_over(delta[which])[0]
        if residual.size and not residual.max() <= 1e-8:
            worst = int(residual.argmax())
            raise ConvergenceError(f"no solution for δ at z = {flat[worst]:g}: relative residual {residual[worst]:.1e}")
        return tuple(np.where(z.imag < 0, x.conj().reshape(z.shape), x.reshape(z.shape)) for x in (delta, kappa))

    @property
    def _scale(self) -> float:
        """Size of the spectrum: about the root of its second moment."""
        t2 = self.pi @ self.t**2
        second = (self.law.q @ self.law.g) ** 2 * t2 + self.c * (self.law.q @ self.law.g**2) * (self.pi @ self.t) ** 2
        return math.sqrt(max(second, 1e-300))

    def _unresolved(self, delta: np.ndarray) -> np.ndarray:
        """Whether -1/δ is nearer to the real axis than twice the distance of the nodes of g there."""
        zeta = -1 / delta
        spacing = np.concatenate([[0.0], self.law.spacing, [0.0]])
        return zeta.imag < 2 * spacing[np.searchsorted(self.law.g, zeta.real)]

    def _map(self, sum_over, z: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """F(δ) and F'(δ) at z."""
        kappa, slope = sum_over(delta)
        value, derivative = np.zeros_like(delta), np.zeros_like(delta)
        for t, pi in zip(self.t, self.pi, strict=True):
            ratio = t / (t * kappa - z)
            value += self.c * pi * ratio
            derivative -= self.c * pi * slope * ratio**2
        return value, derivative

    def _iterate(self, sum_over, z, start, tolerance, steps) -> tuple[np.ndarray, np.ndarray]:
        """Solve δ = F(δ) at every z in the closed upper half plane; returns δ and the relative residuals."""
        delta, residual, best = start.copy(), np.full(len(z), np.inf), start.copy()
        floor = 0.01 * self.c * (self.pi @ self.t) / self._scale  # δ may pass through zero between two bulks
        active, damped = np.arange(len(z)), np.zeros(len(z), dtype=int)
        for _ in range(steps):
            now = delta[active]
            value, derivative = self._map(sum_over, z[active], now)
            size = np.abs(value - now) / np.maximum(np.abs(now), floor)
            improved = size < residual[active]
            residual[active] = np.where(improved, size, residual[active])
            best[active] = np.where(improved, now, best[active])
            newton = now + (value - now) / (1 - derivative)
            on_axis = z[active].imag == 0  # where δ is real outside the support
            newton = np.where(on_axis & (newton.imag < 1e-9 * np.abs(newton)), newton.real + 0j, newton)
            fine = np.isfinite(newton) & ((newton.imag > 0) | on_axis) & (improved | (damped[active] > 0))
            # After a step of Newton's that failed, a few damped steps of the map itself, from above the axis.
            damped[active] = np.where(fine, np.maximum(damped[active] - 1, 0), 5)
            lifted = (now + value) / 2 + np.where(on_axis & (now.imag <= 0), 1e-3j * np.abs(now), 0)
            delta[active] = np.where(fine & (damped[active] == 0), newton, lifted)
            active = active[residual[active] > tolerance]
            if not active.size:
                break
        return best, residual

    def stieltjes_transform(self, z: ArrayLike) -> Complex[np.ndarray, "..."]:
        """m(z) = ∫ (t - z)⁻¹ μ(dt) of Theorem 1, on the real axis its limit from above; same shape as z."""
        z, (_, kappa) = np.asarray(z, dtype=complex), self._solve(z)
        return sum(pi / (t * kappa - z) for t, pi in zip(self.t, self.pi, strict=True))

    def density(self, x: ArrayLike) -> Float[np.ndarray, "..."]:
        """Density of the limiting spectrum at real x, without the mass at zero; same shape as x."""
        return np.maximum(self.stieltjes_transform(np.asarray(x, dtype=float)).imag, 0) / math.pi

    @property
    def mass_at_zero(self) -> float:
        """Share of eigenvalues that are zero: max(0, 1 - P(g ≠ 0)/c), above zero for c < 1 too if g often is."""
        return max(0.0, 1 - self.law.q[self.law.g != 0].sum() / self.c)

    # The real axis ........................................................................................

    def _branch(self, tau: np.ndarray, branch: int) -> np.ndarray:
        """The x with T(x) = τ below, above (branch 0) or between (1, ..., K - 1) the eigenvalues of C, by bisection."""
        t, pi = self.t, self.pi
        mean = pi @ t
        if branch == 0:
            left = tau > 0
            anchor, share = np.where(left, t[0], t[-1]), np.where(left, pi[0] * t[0], pi[-1] * t[-1])
            low, high = np.log(share / np.abs(tau) * (1 - 1e-9)), np.log(mean / np.abs(tau) * (1 + 1e-9))
            place = lambda s: anchor + np.where(left, -1, 1) * np.exp(s)  # noqa: E731
        else:
            left = np.ones(tau.shape, dtype=bool)
            low, high = np.full(tau.shape, t[branch - 1]), np.full(tau.shape, t[branch])
            place = lambda s: s  # noqa: E731
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            T = (pi * t / (t - place(middle)[:, None])).sum(axis=1)
            # T falls with the distance on the left, and rises with it (towards zero) on the right and with x between.
            lower = (T > tau) if branch == 0 else (T < tau)
            lower = np.where(left, lower, T < tau)
            low, high = np.where(lower, middle, low), np.where(lower, high, middle)
        return place((low + high) / 2)

    def _real(self, zeta: np.ndarray, branch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """z, κ and F' at real ζ outside the support of g."""
        g, q = self.law.g, self.law.q
        B, squares = np.empty_like(zeta), np.empty_like(zeta)
        step = max(1, _CHUNK // len(g))
        for k in range(0, len(zeta), step):
            ratio = g / (g - zeta[k : k + step, None])
            B[k : k + step], squares[k : k + step] = ratio @ q, np.square(ratio, out=ratio) @ q
        x = self._branch(B / self.c, branch)
        T2 = (self.pi * (self.t / (self.t - x[:, None])) ** 2).sum(axis=1)
        return -zeta * x * B, -zeta * B, self.c * squares / B**2 * T2

    def _pieces(self) -> list[tuple[float, float]]:
        """Intervals of ζ outside the support of g, cut at zero, where δ is infinite."""
        ends = [(-math.inf, -math.inf), *_merge([*self.law.support]), (math.inf, math.inf)]
        pieces = [(a[1], b[0]) for a, b in pairwise(ends) if a[1] < b[0]]
        cut = [((low, 0.0), (0.0, high)) if low < 0 < high else ((low, high),) for low, high in pieces]
        return [piece for both in cut for piece in both]

    def _grade(self, low: float, high: float, count: int = 400) -> np.ndarray:
        """Points inside an interval, dense at its ends; equal steps in the logarithm towards infinity."""
        size = max(abs(x) for x in [*self.law.g[[0, -1]].tolist(), self._scale])
        if math.isinf(low) or math.isinf(high):
            steps = size * np.geomspace(1e-10, 1e6, 2 * count)
            return (high - steps)[::-1] if math.isinf(low) else low + steps
        near = np.geomspace(1e-10, 0.5, count)
        return low + (high - low) * np.concatenate([near, 1 - near[-2::-1]])

    @cached_property
    def _gaps(self) -> list[_Gap]:
        """All open intervals outside the support, z rising; see the module's text."""
        gaps = []
        for piece in self._pieces():
            zeta = self._grade(*piece)
            for branch in range(len(self.t)):
                if branch and not self._may_open(branch):
                    continue
                outside = self._real(zeta, branch)[2] < 1
                starts = np.flatnonzero(outside & ~np.r_[False, outside[:-1]])
                stops = np.flatnonzero(outside & ~np.r_[outside[1:], False])
                for first, last in zip(starts, stops, strict=True):
                    left = zeta[first] if first == 0 else self._edge(zeta[first], zeta[first - 1], branch)
                    right = zeta[last] if last == len(zeta) - 1 else self._edge(zeta[last], zeta[last + 1], branch)
                    inner = np.unique(np.clip(self._span(left, right, piece), min(left, right), max(left, right)))
                    low, high = self._real(np.array([left, right]), branch)[0]
                    low = self._limit(piece[0], branch, low) if first == 0 else low
                    high = self._limit(piece[1], branch, high) if last == len(zeta) - 1 else high
                    if low < high:
                        gaps.append(_Gap(float(low), float(high), inner, branch))
        return sorted(gaps, key=lambda gap: gap.low)

    def _limit(self, zeta: float, branch: int, near: float) -> float:
        """The z at an end of a piece, given one near it."""
        if zeta == 0:
            return 0.0
        if math.isfinite(zeta):
            return near
        if branch == 0:
            return zeta
        return (self.law.q @ self.law.g) * self._branch(np.zeros(1), branch)[0]  # δ = 0, where κ = E[g] and T = 0

    def _span(self, left: float, right: float, piece: tuple[float, float]) -> np.ndarray:
        """Values of ζ from one edge to the other, dense at both and reaching far where the piece is infinite."""
        if math.isinf(piece[0]) or math.isinf(piece[1]):
            far, near = (left, right) if math.isinf(piece[0]) else (right, left)
            return near + (far - near) * np.concatenate([[0.0], np.geomspace(1e-13, 1, 600)])
        near = np.geomspace(1e-13, 0.5, 300)
        return left + (right - left) * np.concatenate([[0.0], near, 1 - near[-2::-1], [1.0]])

    def _may_open(self, branch: int) -> bool:
        """Whether c ∫ t²/(t - x)² < 1 somewhere between two eigenvalues of C, without which F' < 1 cannot be."""
        t, low, high = self.t, self.t[branch - 1], self.t[branch]
        x = low + (high - low) * np.linspace(0, 1, 33)[1:-1]
        return bool((self.c * (self.pi * (t / (t - x[:, None])) ** 2).sum(axis=1) < 1.05).any())

    def _edge(self, outside: float, inside: float, branch: int) -> float:
        """The ζ with F' = 1 between one where F' < 1 and one where it is not."""
        for _ in range(_BISECTIONS):
            middle = (outside + inside) / 2
            if self._real(np.array([middle]), branch)[2][0] < 1:
                outside = middle
            else:
                inside = middle
        return outside

    @property
    def support(self) -> tuple[tuple[float, float], ...]:
        """The bulks as closed intervals, in order; an end is infinite if g is unbounded. A mass at zero is not listed.

        The edges are the points where dz/dδ = 0.
        """
        ends = [-math.inf, *(x for gap in self._gaps for x in (gap.low, gap.high)), math.inf]
        pairs = zip(ends[::2], ends[1::2], strict=True)
        return tuple((low, high) for low, high in pairs if low < high)

    # Theorems 2 and 3 .....................................................................................

    def _lambda(self, delta: np.ndarray) -> np.ndarray:
        """L and its derivative in δ, shape (2, Z, r, r)."""
        law, k = self.law, self.law.first.shape[1]
        size = len(delta)
        result = np.empty((2, size, 1 + k, 1 + k), dtype=delta.dtype)
        columns = np.column_stack([law.q, law.first, law.second.reshape(len(law.g), -1)])
        step = max(1, _CHUNK // len(law.g))
        for start in range(0, size, step):
            ratio = law.g / (1 + law.g * delta[start : start + step, None])
            for order, factor in enumerate((ratio, -(ratio**2))):
                moments = factor @ columns
                block = result[order, start : start + step]
                block[:, 0, 0] = moments[:, 0]
                block[:, 0, 1:] = block[:, 1:, 0] = moments[:, 1 : 1 + k]
                block[:, 1:, 1:] = moments[:, 1 + k :].reshape(len(moments), k, k)
                block[:, 1:, 1:] -= moments[:, 0, None, None] * np.eye(k)
        return self._loading @ result @ self._loading.T

    def _bulk_resolvent(self, kappa: np.ndarray, z: np.ndarray, block: np.ndarray) -> np.ndarray:
        """Forms aᵀ Q̄_b b, shape (Z, ...), from the products over C's eigenspaces, shape (K, ...)."""
        return np.tensordot(1 / (np.multiply.outer(kappa, self.t) - z[:, None]), block, axes=1)

    @cached_property
    def spikes(self) -> tuple[Spike, ...]:
        """All isolated eigenvalues, left, between and right of the bulks, in rising order."""
        return tuple(spike for gap in self._gaps for spike in self._spikes_in(gap))

    def _positive(self, zeta: np.ndarray, branch: int) -> np.ndarray:
        """Number of positive eigenvalues that falls by one at every spike."""
        z, kappa, _ = self._real(zeta, branch)
        r = self._basis.shape[1]
        K = np.zeros((len(zeta), 2 * r, 2 * r))
        K[:, :r, :r] = self._lambda(-1 / zeta)[0]
        K[:, :r, r:] = K[:, r:, :r] = np.eye(r)
        K[:, r:, r:] = -self._bulk_resolvent(kappa, z, self._block)
        return (np.linalg.eigvalsh(K) > 0).sum(axis=1)

    def _spikes_in(self, gap: _Gap) -> list[Spike]:
        if not self._basis.size:
            return []
        positive, spikes = self._positive(gap.zeta, gap.branch), []
        for k in np.flatnonzero(np.diff(positive) < 0):
            pending = [(gap.zeta[k], gap.zeta[k + 1], positive[k], positive[k + 1])]
            while pending:
                low, high, above, below = pending.pop()
                middle = (low + high) / 2
                if not low < middle < high or high - low <= 1e-12 * max(abs(low), abs(high)):
                    spikes.append(self._spike(gap, middle, int(above - below)))
                    continue
                between = self._positive(np.array([middle]), gap.branch)[0]
                if between > below:
                    pending.append((middle, high, between, below))
                if above > between:
                    pending.append((low, middle, above, between))
        return sorted(spikes, key=lambda spike: spike.eigenvalue)

    def _spike(self, gap: _Gap, zeta: float, multiplicity: int) -> Spike:
        """The eigenvalue and eigenvectors at a zero of the determinant."""
        z, kappa, slope_of_map = self._real(np.array([zeta]), gap.branch)
        delta = -1 / zeta
        kappa_slope = -(self.law.q @ (self.law.g / (1 + self.law.g * delta)) ** 2)
        ratio = 1 / (kappa[0] * self.t - z[0])
        z_slope = (1 - slope_of_map[0]) / (self.c * (self.pi * self.t) @ ratio**2)  # dz/dδ
        L, L_slope = self._lambda(np.array([delta]))[:, 0]
        S = np.tensordot(ratio, self._block, axes=1)
        S_slope = -np.tensordot(ratio**2 * (kappa_slope * self.t - z_slope), self._block, axes=1)
        v = np.linalg.svd(np.eye(len(S)) + S @ L)[2][-multiplicity:].T  # null vectors of S⁻¹ + L
        y = -L @ v
        fall = (y.T @ S_slope @ y - v.T @ L_slope @ v) / z_slope
        alignment = v @ np.linalg.solve(fall, v.T)
        cosines = {
            name: float(e @ alignment @ e / (e @ e))
            for name, e in self._named.items()
            if not name.startswith("C ") and e.any()
        }
        V = np.column_stack([self._named["mean"], self._named["C w_star"], self._named["C w"]])
        edges = [x for bulk in self.support for x in bulk]
        side = "left" if z[0] < edges[0] else "right" if z[0] > edges[-1] else "between"
        distance = min(abs(z[0] - x) for x in edges)
        return Spike(float(z[0]), multiplicity, float(distance), side, cosines, V.T @ alignment @ V)

    # Theorem 4 ............................................................................................

    def resolvent(self, z: ArrayLike, a: Float[np.ndarray, " p"], b: Float[np.ndarray, " p"]) -> np.ndarray:
        """What aᵀ (H - z)⁻¹ b tends to, for fixed vectors a and b, shape (p,), by Theorem 4; same shape as z."""
        z = np.asarray(z, dtype=complex)
        flat = z.ravel()
        a, b = self.features.to_eigenbasis(a)[:, None], self.features.to_eigenbasis(b)[:, None]
        delta, kappa = self._solve(flat)
        ab, aO, Ob, S = (
            self._bulk_resolvent(kappa, flat, self._by_eigenvalue(x, y))
            for x, y in ((a, b), (a, self._basis), (self._basis, b), (self._basis, self._basis))
        )
        L = self._lambda(delta)[0]
        middle = L @ np.linalg.inv(np.eye(S.shape[1]) + S @ L)
        return (ab - aO @ middle @ Ob)[:, 0, 0].reshape(z.shape)

    # The distribution function .............................................................................

    @cached_property
    def _distribution(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Points and cumulated masses of every bulk."""
        points, masses = [], []
        reach = self._reach
        bulks = self.support
        if self.mass_at_zero:  # the density may have a pole there
            halves = [((low, 0.0), (0.0, high)) if low < 0 < high else ((low, high),) for low, high in bulks]
            bulks = [half for both in halves for half in both]
        for low, high in bulks:
            # Substitutions after which the density is smooth at the edges, and the midpoint rule in the new variable.
            if math.isfinite(low) and math.isfinite(high):
                angle, middle, half = np.linspace(0, math.pi, 1025), (low + high) / 2, (high - low) / 2
                place, stretch = (lambda a, m=middle, h=half: m - h * np.cos(a)), (lambda a, h=half: h * np.sin(a))
            else:
                scale, ends = (
                    self._scale,
                    (low if math.isfinite(low) else -reach, high if math.isfinite(high) else reach),
                )
                angle = np.linspace(*(math.asinh(end / scale) for end in ends), 2049)
                place, stretch = (lambda a, s=scale: s * np.sinh(a)), (lambda a, s=scale: s * np.cosh(a))
            centres = (angle[1:] + angle[:-1]) / 2
            parts = self.density(place(centres)) * stretch(centres) * np.diff(angle)
            points.append(place(angle))
            masses.append(np.concatenate([[0.0], np.cumsum(parts)]))
        return points, masses

    @property
    def _reach(self) -> float:
        """Where an unbounded spectrum is cut: an eigenvalue that one g alone could make, of chance 1e-9."""
        order = np.argsort(np.abs(self.law.g))
        tail = np.cumsum(self.law.q[order][::-1])[::-1]
        largest = np.abs(self.law.g[order])[np.searchsorted(-tail, -1e-9) - 1]
        return largest * self.t[-1] * self.c * 2 + 4 * self._scale

    @property
    def total_mass(self) -> float:
        """Integral of the density plus the mass at zero: 1 up to the error of the numbers here."""
        return self.mass_at_zero + sum(float(m[-1]) for m in self._distribution[1])

    def cdf(self, x: ArrayLike) -> Float[np.ndarray, "..."]:
        """Distribution function of the limiting spectrum, same shape as x."""
        x = np.asarray(x, dtype=float)
        value = self.mass_at_zero * (x >= 0)
        for points, masses in zip(*self._distribution, strict=True):
            value = value + PchipInterpolator(points, masses)(np.clip(x, points[0], points[-1]))
        return value / self.total_mass

    def quantiles(self, count: int) -> Float[np.ndarray, " count"]:
        """Points that share out the spectrum into equal parts, half a part before the first, shape (count,).

        A mass at zero gives as many zeros as belong to it.
        """
        grid = np.unique(np.concatenate([*self._distribution[0], [-1e-12 * self._scale, 0.0]]))
        return np.interp((np.arange(count) + 0.5) / count, np.maximum.accumulate(self.cdf(grid)), grid)

    def distance(self, eigenvalues: Float[np.ndarray, " p"]) -> float:
        """Kolmogorov-Smirnov distance of a sample of eigenvalues, shape (p,), in any order, from the limiting law.

        Eigenvalues below 1e-9 of the largest count as zero.
        """
        values = np.sort(np.asarray(eigenvalues, dtype=float))
        values[np.abs(values) < 1e-9 * np.abs(values).max()] = 0.0
        points, counts = np.unique(values, return_counts=True)
        after = np.cumsum(counts) / len(values)
        above, atom = self.cdf(points), self.mass_at_zero / self.total_mass * (points == 0)
        return float(max(np.abs(after - above).max(), np.abs(after - counts / len(values) - (above - atom)).max()))
