r"""The law of the curvature g of a G-GLM together with the two directions that it depends on, as a quadrature.

The curvature :math:`g = \partial^2 \ell(y, h) / \partial h^2`, (6) of Liao & Mahoney (2021), sees a sample x through
:math:`h = w^\top x` and through :math:`\eta = w_*^\top x`, which y is drawn for, and through nothing else. With t the
k = 0, 1 or 2 standard normal coordinates of :math:`C^{-1/2}(x - \mu)` along an orthonormal basis R of
span{C^{1/2} w, C^{1/2} w*},

.. math:: h = w^\top \mu + \sigma t_1, \qquad \eta = w_*^\top \mu + a t_1 + b t_2,

:math:`t_1` along C^{1/2} w. All that the limits of Theorems 1 to 4 ask of the model are expectations of functions of g
times 1, t or t tᵀ; :class:`Law` holds nodes for g and takes these expectations.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Complex, Float, Int, Shaped
from numpy.typing import ArrayLike
from scipy.linalg import solve_banded
from scipy.special import roots_hermitenorm

from common.liao_eigenspectra.glm import (
    GLM,
    DiscreteResponse,
    Features,
    curvature,
    finite_array,
    finite_curvature,
    whole_number,
)

#: A closed interval of the real axis.
Interval = tuple[float, float]

_TAIL = 10.0  # standard deviations at which Gaussian integrals end; the rest is below 1e-22
_FAR = 30.0  # standard deviations at which g is looked at to tell whether it is bounded
_PANEL = 16  # Gauss-Legendre nodes in a panel
#: Relative to the largest; no curvature between two kinks is taken to be smaller.
SMALLEST = 1e-140
_STEEP = 20.0  # change of log |g| within a panel up to which it is resolved
_MOST = 2**16  # nodes in the first direction
_INNER = 400  # nodes in the second direction where a sum over them is all that is needed
_NOISE = 24  # Gauss-Hermite nodes for the noise of a response, where they resolve it
_MOST_POINTS = 2**25  # of the two directions and the noise
_CHUNK = 2**19  # entries of a matrix over many points and the nodes of g


# The two directions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Directions:
    """An orthonormal basis R of span{C^{1/2} w, C^{1/2} w*} and the coordinates of both in it.

    Attributes
    ----------
    basis
        R in the basis of C's eigenvectors, shape (p, k), k = 0, 1 or 2; the first column is along C^{1/2} w unless
        that is zero.
    along_w, along_w_star
        Rᵀ C^{1/2} w and Rᵀ C^{1/2} w*, shape (k,).
    """

    basis: Float[np.ndarray, "p k"]
    along_w: Float[np.ndarray, " k"]
    along_w_star: Float[np.ndarray, " k"]

    @classmethod
    def of(cls, features: Features) -> "Directions":
        """The directions that the features' w and w* span."""
        root = np.sqrt(features.eigenvalues)
        w, w_star = root * features.to_eigenbasis(features.w), root * features.to_eigenbasis(features.w_star)
        basis = orthonormal_basis([w, w_star])
        return cls(basis, basis.T @ w, basis.T @ w_star)


def orthonormal_basis(vectors: Sequence[Float[np.ndarray, " p"]]) -> Float[np.ndarray, "p k"]:
    """Gram-Schmidt, twice over; directions that are there already are left out, shape (p, k)."""
    columns = np.zeros((len(vectors[0]), 0))
    for v in vectors:
        v = unit_vector(v)
        rest = v - columns @ (columns.T @ v)
        rest -= columns @ (columns.T @ rest)
        if np.linalg.norm(rest) > 1e-10:
            columns = np.column_stack([columns, unit_vector(rest)])
    return columns


def unit_vector(v: Float[np.ndarray, " p"]) -> Float[np.ndarray, " p"]:
    """v/‖v‖, shape (p,), also where the square of v is too small for a number; zeros stay zeros."""
    v = v / (np.abs(v).max(initial=0.0) or 1.0)
    return v / (np.linalg.norm(v) or 1.0)


def groups(values: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Which of the different values each is, for values in rising order, shape (n,); equal up to rounding is equal."""
    return np.cumsum(np.r_[False, np.diff(values) > 1e-10 * np.abs(values[1:])])


# The law ------------------------------------------------------------------------------------------------------------


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
    support: tuple[Interval, ...]

    @classmethod
    def discrete(cls, g: ArrayLike | float | int, q: ArrayLike | None = None) -> "Law":
        """Law of a g that is independent of the features.

        Parameters
        ----------
        g, q
            Values and probabilities, shape (J,); equal probabilities if left out.

        Raises
        ------
        ValueError
            If a value is not finite, or the probabilities are not as many, negative, or do not add up to 1.
        """
        g = finite_array("g", np.atleast_1d(g), (None,))
        q = np.full(len(g), 1 / len(g)) if q is None else finite_array("q", q, (len(g),))
        if not np.isclose(q.sum(), 1) or (q < 0).any():
            raise ValueError(f"the probabilities q of g must not be negative and add up to 1, got {q.tolist()}")
        order = np.argsort(g)
        g, q = g[order], q[order] / q.sum()
        place = groups(g)
        g, q = g[np.r_[True, np.diff(place) > 0]], np.bincount(place, q)
        return cls(g, q, np.zeros((len(g), 0)), np.zeros((len(g), 0, 0)), tuple((x, x) for x in g.tolist()))

    @classmethod
    def sampled(cls, g: Float[np.ndarray, " J"], t: Float[np.ndarray, "J k"], *, bounded: bool) -> "Law":
        """Law of independent samples of g and of the coordinates t that it depends on, along :class:`Directions`.

        Parameters
        ----------
        g, t
            Samples, shapes (J,) and (J, k).
        bounded
            Whether g is bounded; the range of the samples is then taken for its support.

        Raises
        ------
        ValueError
            If a sample is not finite, or there are not as many of t as of g.
        """
        g = finite_array("g", g, (None,))
        t = np.reshape(t, (len(g), 0)) if np.shape(t) == (len(g), 0) else finite_array("t", t, (len(g), None))
        q = np.full(len(g), 1 / len(g))
        support = (float(g.min()), float(g.max())) if bounded else (-math.inf, math.inf)
        order = np.argsort(g)
        return cls(g[order], q, q[:, None] * t[order], q[:, None, None] * _outer(t[order]), (support,))._distinct()

    @classmethod
    def of(cls, glm: GLM, nodes: SupportsIndex = 4096) -> "Law":
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
            If g is not finite somewhere, or for a discrete response jumps at a place that is not among the kinks; if g
            or P(y | η) changes so fast that no quadrature of affordable size resolves it; or if the nodes are fewer
            than 128.
        """
        nodes = whole_number("nodes", nodes, least=128)
        predictions = _Predictions.of(glm)
        parts_of = _discrete_parts if isinstance(glm.response, DiscreteResponse) else _continuous_parts
        parts = parts_of(glm, predictions, nodes)
        law = cls(
            g=np.concatenate([part.g for part in parts]),
            q=np.concatenate([part.q for part in parts]),
            first=np.concatenate([part.first for part in parts]),
            second=np.concatenate([part.second for part in parts]),
            support=_stretched(merged([x for part in parts for x in part.ranges]), _far_curvatures(glm, predictions)),
        )._distinct()
        return law if law._wide else law.compressed(nodes)

    # Its nodes ............................................................................................

    @property
    def bounded(self) -> bool:
        """Whether g is bounded, and with it the spectrum (Remark 1)."""
        return math.isfinite(self.support[0][0]) and math.isfinite(self.support[-1][1])

    @cached_property
    def spacing(self) -> Float[np.ndarray, " spaces"]:
        """Distances of neighbouring nodes in the same interval of the support, zero between two; shape (J - 1,)."""
        inner = np.zeros(len(self.g) - 1, dtype=bool)
        for low, high in self.support:
            inner |= (self.g[:-1] >= low) & (self.g[1:] <= high)
        return np.where(inner, np.diff(self.g), 0.0)

    @cached_property
    def _hats(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the hat round each node begins and ends: at its neighbours; both at the node itself for an atom."""
        left, right = np.r_[0.0, self.spacing], np.r_[self.spacing, 0.0]
        left, right = np.maximum(left, 1e-3 * right), np.maximum(right, 1e-3 * left)
        return self.g - np.where(self._atoms, 0, left), self.g + np.where(self._atoms, 0, right)

    @cached_property
    def _hat_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean of g' - g and of its square over the hat round each node g."""
        left, right = self.g - self._hats[0], self._hats[1] - self.g
        return (right - left) / 3, (left**2 + right**2 - left * right) / 6

    @cached_property
    def _hat_weights(self) -> Float[np.ndarray, " J"]:
        """Weights of the hats with which E[f(g)] stays what it is for f quadratic round each node, linear at ends.

        Where the weights of the nodes are too rough for that, as those of samples, E[f(g)] stays for constant f; where
        some are negative, all are smoothed until none is.
        """
        shift, spread = self._hat_moments
        atom = self._hats[0] == self._hats[1]
        left, right = (np.where(atom, 1.0, x) for x in (self.g - self._hats[0], self._hats[1] - self.g))
        end = np.maximum(left, right) > 100 * np.minimum(left, right)
        if (self.q < 0).any():  # few points a node, as far out in two directions
            share, weights = np.where(atom | end, 0.0, 0.25), self.q
            while (weights < 0).any() and share.any():
                part = share * weights
                weights = weights - 2 * part + np.r_[part[1:], 0.0] + np.r_[0.0, part[:-1]]
            return weights
        before = np.where(end, np.maximum(-shift, 0) / left, (spread - right * shift) / (left * (left + right)))
        after = np.where(end, np.maximum(shift, 0) / right, (spread + left * shift) / (right * (left + right)))
        before[atom], after[atom] = 0.0, 0.0
        while True:
            weights = solve_banded((1, 1), [np.r_[0, before[1:]], 1 - before - after, np.r_[after[:-1], 0]], self.q)
            rough = (np.abs(weights - self.q) > self.q / 2) & (before + after != 0)
            if not rough.any():
                return weights
            before[rough], after[rough] = 0.0, 0.0

    @property
    def _atoms(self) -> np.ndarray:
        """Nodes of more than a thousandth of the weight, unless all are like that."""
        heavy = self.q > 1e-3
        return heavy & (heavy.sum() < 64)

    @property
    def _wide(self) -> bool:
        """Whether more than a hundredth of g goes over so many orders of magnitude that none may be left out."""
        size = np.abs(self.g)
        order = np.argsort(size)
        low, high = np.interp([0.01, 0.9], np.cumsum(self.q[order]), size[order])
        return bool(0 < low < 1e-5 * high)

    def _distinct(self) -> "Law":
        """The same law with equal values of g added up, and without nodes of no weight."""
        mantissa, exponent = np.frexp(self.g)  # equal up to rounding
        g, place = np.unique(np.ldexp(np.round(mantissa * 2.0**44) / 2.0**44, exponent), return_inverse=True)
        q, first, second = (add_up(place, len(g), x) for x in (self.q, self.first, self.second))
        keep = q > 1e-25
        return Law(g[keep], q[keep] / q[keep].sum(), first[keep], second[keep], self.support)

    def mapped(self, function: Callable[[np.ndarray], np.ndarray]) -> "Law":
        """The law of f(g), with the same coordinates, node by node.

        Where f jumps and two directions make g, probabilities are off by some 2e-4, less with more nodes.

        Parameters
        ----------
        function
            f, bounded and elementwise.

        Raises
        ------
        ValueError
            If f is not finite somewhere.
        """
        g = finite_array("f(g)", function(self.g), (len(self.g),))
        order, support = np.argsort(g), ((float(g.min()), float(g.max())),)
        return Law(g[order], self.q[order], self.first[order], self.second[order], support)._distinct()

    def compressed(self, nodes: int) -> "Law":
        """A law with fewer values of g, spread by local cubic interpolation; the moments of g up to the third stay.

        A value that carries more than a thousandth of the weight is an atom and stays as it is. No other node is
        exactly zero, as what a node there gathers from its neighbours is no part of P(g = 0).
        """
        if len(self.g) <= nodes:
            return self
        atoms = np.flatnonzero(self._atoms)
        rest = np.setdiff1d(np.arange(len(self.g)), atoms)
        g, order = self.g[rest], np.cumsum(self.q[rest])
        low, middle, high = np.interp([0.25, 0.5, 0.75], order / order[-1], g)
        width = (high - low) / 2 or 1.0
        grid = middle + width * np.sinh(np.linspace(*np.arcsinh((g[[0, -1]] - middle) / width), nodes - len(atoms)))
        grid = np.clip(grid, g[0], g[-1])  # some are rounded beyond an end
        start, share = _cubic_shares(g, grid)

        def spread(moment: np.ndarray) -> np.ndarray:
            columns = (-1, *[1] * (moment.ndim - 1))
            added = sum(add_up(start + a, len(grid), share[a].reshape(columns) * moment[rest]) for a in range(4))
            return np.concatenate([added, moment[atoms]])

        grid = np.where(grid == 0, math.copysign(1e-300, middle), grid)
        places = np.concatenate([grid, self.g[atoms]])
        order = np.argsort(places)
        return Law(places[order], *(spread(x)[order] for x in (self.q, self.first, self.second)), self.support)

    # Expectations over it .................................................................................

    def _chunks(self, points: int) -> Iterator[slice]:
        """Slices of so many points that a matrix over them and the nodes of g stays small."""
        step = max(1, _CHUNK // len(self.g))
        return (slice(start, start + step) for start in range(0, points, step))

    def kappa(self, delta: Complex[np.ndarray, " Z"]) -> tuple[Complex[np.ndarray, " Z"], Complex[np.ndarray, " Z"]]:
        """κ(δ) = E[g / (1 + g δ)] of (7) and its derivative, each of shape (Z,)."""
        kappa, slope = np.empty_like(delta), np.empty_like(delta)
        for chunk in self._chunks(len(delta)):
            ratio = self.g / (1 + self.g * delta[chunk, None])
            kappa[chunk] = ratio @ self.q
            slope[chunk] = -(np.square(ratio, out=ratio) @ self.q)
        return kappa, slope

    def smeared_kappa(
        self, delta: Complex[np.ndarray, " Z"]
    ) -> tuple[Complex[np.ndarray, " Z"], Complex[np.ndarray, " Z"]]:
        r"""The same as :meth:`kappa` with the nodes of g, but for atoms, spread to a density linear between them.

        It is :math:`\kappa = -\zeta - \zeta^2 s(\zeta)`, :math:`\zeta = -1/\delta`, with s the Stieltjes transform.
        """
        zeta = -1 / delta
        s, slope = np.empty_like(delta), np.empty_like(delta)
        for chunk in self._chunks(len(delta)):
            x = self.g - zeta[chunk, None]
            near, inverse = self._near(x), 1 / x
            shift, spread = self._hat_moments
            far = inverse * (1 - inverse * (shift - inverse * spread))
            s[chunk] = self._by_hats(far, x, near, lambda x, log: x * log) @ self._hat_weights
            far = inverse**2 * (1 - inverse * (2 * shift - inverse * 3 * spread))
            slope[chunk] = self._by_hats(far, x, near, lambda x, log: -log) @ self._hat_weights
        return -zeta - zeta**2 * s, zeta**2 * (-1 - 2 * zeta * s - zeta**2 * slope)

    def phase(self, delta: Complex[np.ndarray, " Z"]) -> Float[np.ndarray, " Z"]:
        """E[arg(1 + g δ)] for δ in the closed upper half plane, shape (Z,)."""
        phase = np.empty(len(delta))
        for chunk in self._chunks(len(delta)):
            real, imaginary = delta.real[chunk, None], np.maximum(delta.imag[chunk, None], 0.0)
            phase[chunk] = np.arctan2(self.g * imaginary, 1 + self.g * real) @ self.q
        return phase

    def smeared_phase(self, delta: Complex[np.ndarray, " Z"]) -> Float[np.ndarray, " Z"]:
        """The same as :meth:`phase` with the nodes spread as in :meth:`smeared_kappa`."""
        zeta = -1 / delta
        phase = np.empty(len(delta))
        for chunk in self._chunks(len(delta)):
            x = self.g - zeta[chunk, None]
            shift, spread = self._hat_moments
            far = _log_below(x) + (shift - spread / x / 2) / x
            logs = self._by_hats(far, x, self._near(x), lambda x, log: x**2 * (log / 2 - 0.75))
            phase[chunk] = (logs.imag - _log_below(-zeta[chunk, None]).imag) @ self._hat_weights
        return phase

    def _near(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places in a matrix of g - ζ where the hat round the node g is not seen from afar."""
        low, high = self._hats
        return np.nonzero((high > low) & (np.abs(x) < 50 * (high - low)))

    def _by_hats(self, far: np.ndarray, x: np.ndarray, near: tuple, primitive: Callable) -> np.ndarray:
        """Means of a function of g - ζ over the hat round each node: as given, but where near from a second primitive.

        The mean over a hat from l over g to r is twice the primitive's second divided difference.
        """
        node = near[1]
        left, right = (self.g - self._hats[0])[node], (self._hats[1] - self.g)[node]
        l, m, r = (primitive(y, _log_below(y)) for y in (x[near] - left, x[near], x[near] + right))
        far[near] = 2 * ((l - m) / left + (r - m) / right) / (left + right)
        return far

    def B(self, zeta: Float[np.ndarray, " Z"]) -> tuple[Float[np.ndarray, " Z"], Float[np.ndarray, " Z"]]:
        """B(ζ) = E[g / (g - ζ)] and E[(g / (g - ζ))²] at real ζ outside the support of g, each of shape (Z,)."""
        B, squares = np.empty_like(zeta), np.empty_like(zeta)
        for chunk in self._chunks(len(zeta)):
            ratio = self.g / (self.g - zeta[chunk, None])
            B[chunk], squares[chunk] = ratio @ self.q, np.square(ratio, out=ratio) @ self.q
        return B, squares

    def Lambda(self, delta: Shaped[np.ndarray, " Z"]) -> Shaped[np.ndarray, "2 Z r r"]:
        r"""Λ(δ) and its derivative, each of shape (Z, 1 + k, 1 + k), for real or complex δ.

        .. math:: \Lambda = E\Big[\frac{g}{1 + g \delta}
            \begin{pmatrix} 1 & t^\top \\ t & t t^\top - I \end{pmatrix}\Big].
        """
        k = self.first.shape[1]
        result = np.empty((2, len(delta), 1 + k, 1 + k), dtype=delta.dtype)
        columns = np.column_stack([self.q, self.first, self.second.reshape(len(self.g), -1)])
        for chunk in self._chunks(len(delta)):
            ratio = self.g / (1 + self.g * delta[chunk, None])
            for order, factor in enumerate((ratio, -(ratio**2))):
                moments = factor @ columns
                block = result[order, chunk]
                block[:, 0, 0] = moments[:, 0]
                block[:, 0, 1:] = block[:, 1:, 0] = moments[:, 1 : 1 + k]
                block[:, 1:, 1:] = moments[:, 1 + k :].reshape(len(moments), k, k)
                block[:, 1:, 1:] -= moments[:, 0, None, None] * np.eye(k)
        return result


# The quadrature of a G-GLM ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Predictions:
    """h = mean_h + σ t₁ and η = mean_η + a t₁ + b t₂; σ = a = 0 without w, b = 0 without a part of w* beside it."""

    directions: Directions
    mean_h: float
    mean_eta: float
    has_first: bool  # whether there is a t₁: w is not zero
    has_second: bool  # whether there is a t₂: C^{1/2} w* is not along C^{1/2} w
    sigma: float
    a: float
    b: float

    @classmethod
    def of(cls, glm: GLM) -> "_Predictions":
        directions = Directions.of(glm)
        has_first = bool(glm.w.any())
        rest = directions.along_w_star[has_first:]  # of w*, beside w: none or one
        return cls(
            directions=directions,
            mean_h=float(glm.w @ glm.mean),
            mean_eta=float(glm.w_star @ glm.mean),
            has_first=has_first,
            has_second=rest.size == 1,
            sigma=directions.along_w[0] if has_first else 0.0,
            a=directions.along_w_star[0] if has_first else 0.0,
            b=rest[0] if rest.size else 0.0,
        )


@dataclass(frozen=True, eq=False)
class _Rule:
    """A quadrature rule for a standard normal coordinate, and where its nodes between two kinks begin and end."""

    nodes: np.ndarray
    weights: np.ndarray
    pieces: list[slice]

    @classmethod
    def absent(cls) -> "_Rule":
        """For a coordinate that nothing depends on."""
        return cls(np.zeros(1), np.ones(1), [slice(0, 1)])

    @classmethod
    def panels(cls, count: int, kinks: Sequence[float]) -> "_Rule":
        """Gauss-Legendre panels between the kinks, with some ``count`` nodes."""
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
        return cls(t, q / q.sum(), pieces)


@dataclass(frozen=True, eq=False)
class _Grid:
    """The product of a rule for t₁, with A nodes, and one for t₂, with B nodes."""

    predictions: _Predictions
    t1: _Rule
    t2: _Rule

    @classmethod
    def of(cls, glm: GLM, x: _Predictions, first: int, second: int) -> "_Grid":
        """Some ``first`` nodes for t₁ and ``second`` for t₂, where the model depends on them.

        The kinks in η are places in t₂ only where η depends on t₂ alone.
        """
        t1, t2 = _Rule.absent(), _Rule.absent()
        if x.has_first:
            t1 = _Rule.panels(first, [(h - x.mean_h) / x.sigma for h in glm.kinks])
        if x.has_second:
            t2 = _Rule.panels(second, [(eta - x.mean_eta) / x.b for eta in (() if x.a else glm.response.kinks)])
        return cls(x, t1, t2)

    def rows(self) -> Iterator["_Grid"]:
        """The same in parts, each with all B nodes for some of the A."""
        step = max(1, 2 * _CHUNK // len(self.t2.nodes))
        for start in range(0, len(self.t1.nodes), step):
            some = slice(start, start + step)
            yield _Grid(self.predictions, _Rule(self.t1.nodes[some], self.t1.weights[some], []), self.t2)

    @property
    def pieces(self) -> list[slice]:
        """Of the A nodes, between the kinks in h."""
        return self.t1.pieces

    @property
    def h(self) -> Float[np.ndarray, " A"]:
        """The predictions w'x at the A nodes."""
        return self.predictions.mean_h + self.predictions.sigma * self.t1.nodes

    @property
    def eta(self) -> Float[np.ndarray, "A B"]:
        """The predictions w*'x."""
        along_w = self.predictions.mean_eta + self.predictions.a * self.t1.nodes
        return along_w[:, None] + self.predictions.b * self.t2.nodes

    @property
    def weight(self) -> Float[np.ndarray, "A B"]:
        """The product of the weights."""
        return self.t1.weights[:, None] * self.t2.weights

    @property
    def t(self) -> Float[np.ndarray, "A B k"]:
        """The coordinates that the model has."""
        shape = len(self.t1.nodes), len(self.t2.nodes)
        along = [self.t1.nodes[:, None]] * self.predictions.has_first + [self.t2.nodes] * self.predictions.has_second
        return np.stack([np.broadcast_to(t, shape) for t in along], -1) if along else np.zeros((*shape, 0))


@dataclass(frozen=True, eq=False)
class _Part:
    """What one value of y, or of its noise, adds to the law; see :class:`Law`."""

    g: np.ndarray
    q: np.ndarray
    first: np.ndarray
    second: np.ndarray
    ranges: list[Interval]  # of g, between the kinks


def _discrete_parts(glm: GLM, predictions: _Predictions, nodes: int) -> list[_Part]:
    """One part for each value of y: g depends on t₁ alone, and t₂ and P(y | η) are summed over at each t₁."""
    grid = _resolving_grid(glm, predictions, nodes)
    parts = []
    for y in glm.response.values:
        g = _nonzero(_finite_curvature(glm, np.full(len(grid.h), y), grid.h), grid.pieces)
        sums = []
        for rows in grid.rows():
            chance, t = rows.weight * glm.response.probability(y, torch.from_numpy(rows.eta)).numpy(), rows.t
            sums.append([np.einsum("ab,ab...->a...", chance, x) for x in (np.ones(t.shape[:2]), t, _outer(t))])
        q, first, second = (np.concatenate(x) for x in zip(*sums, strict=True))
        parts.append(_Part(g, q, first, second, [_range(g[piece]) for piece in grid.pieces]))
    return parts


def _resolving_grid(glm: GLM, predictions: _Predictions, nodes: int) -> _Grid:
    """So many nodes; twice as many where g is the same for all y; more where it falls through orders of magnitude.

    What Theorem 1 takes of g at large δ is whether it is above or below 1/δ: all orders of magnitude count alike.
    """
    values, places = glm.response.values, np.array([0.0, predictions.mean_h])
    while True:
        grid, steepest = _Grid.of(glm, predictions, first=nodes, second=1), 0.0
        curvatures = [_finite_curvature(glm, np.full(len(grid.h), y), grid.h) for y in values]
        for y, found in zip(values, curvatures, strict=True) if predictions.has_first else ():
            g = _nonzero(found, grid.pieces)
            _refuse_jump(glm, y, (grid.h - predictions.mean_h) / predictions.sigma, g, grid.pieces, predictions)
            size = np.where((g != 0) & (grid.weight.sum(axis=1) > 1e-16), np.abs(g), math.nan).reshape(-1, _PANEL)
            steepest = max(steepest, float(np.nansum(np.abs(np.diff(np.log(size), axis=1)), axis=1).max()))
            if np.abs(_finite_curvature(glm, np.full(2, y), places)).max() > 2 * np.abs(g).max():
                steepest = math.inf  # a peak between two nodes
        if steepest <= _STEEP:
            alike = len(values) > 1 and all(np.allclose(g, curvatures[0], rtol=1e-12, atol=0) for g in curvatures)
            first = nodes * (2 if alike else 1)
            return _Grid.of(glm, predictions, first, _resolving_second(glm, predictions))
        nodes = math.ceil(nodes * min(steepest / _STEEP + 0.1, 8.0))
        if nodes > _MOST:
            step = predictions.sigma * 2 * _TAIL / nodes
            raise ValueError(
                f"the curvature of the loss changes by orders of magnitude while w'x moves by {step:.1e}, a small part "
                f"of its standard deviation {predictions.sigma:.1e}: no quadrature resolves that; choose a smaller w"
            )


def _resolving_second(glm: GLM, predictions: _Predictions) -> int:
    """So many nodes in the second direction that half as many more change no moment of P(y | η)."""

    def moments(second: int) -> np.ndarray:
        grid = _Grid.of(glm, predictions, first=_INNER, second=second)
        chances = [glm.response.probability(y, torch.from_numpy(grid.eta)).numpy() for y in glm.response.values]
        return np.array([(grid.weight * p**power).sum() for p in chances for power in (1, 2)])

    return _resolving(moments, _INNER, 16 * _INNER, "P(y | η) changes so fast with w*'x", "w_star")


def _nonzero(g: np.ndarray, pieces: list[slice]) -> np.ndarray:
    """The curvatures, those that fall below what can be squared being as large as that, between two kinks each."""
    g, least = g.copy(), SMALLEST * np.abs(g).max()
    for piece in pieces:
        part = g[piece]  # a view
        size = np.abs(part)
        if 0 < size[size > 0].min(initial=math.inf) < least:
            part[size < least] = least * (1.0 if part[size.argmax()] > 0 else -1.0)
    return g


def _continuous_parts(glm: GLM, predictions: _Predictions, nodes: int) -> list[_Part]:
    """One part for each node of the noise: every pair of t₁ and t₂ gives a value of g."""
    count, noise = _resolving_counts(glm, predictions, nodes)
    grid, y, h = _responses(glm, predictions, count)
    t = grid.t.reshape(len(h), -1)
    parts = []
    for shift, share in zip(*_noise(glm, noise), strict=True):
        g, q = _finite_curvature(glm, y + shift, h), (share * grid.weight).ravel()
        parts.append(_Part(g, q, q[:, None] * t, q[:, None, None] * _outer(t), [_range(g)]))
    return parts


def _resolving_counts(glm: GLM, predictions: _Predictions, nodes: int) -> tuple[int, int]:
    """So many nodes in each direction, and of the noise, that half as many more change no moment of g."""
    directions = predictions.has_first + predictions.has_second
    few = 6 if glm.response.noise else 16  # for every node of g there is more than one point
    count = few * math.isqrt(nodes) if directions == 2 else nodes
    noise = _NOISE if glm.response.noise else 1

    def moments(count: int, noise: int) -> np.ndarray:
        grid, y, h = _responses(glm, predictions, count)
        weight, total = grid.weight.ravel(), 0.0
        for shift, share in zip(*_noise(glm, noise), strict=True):
            size = np.abs(_finite_curvature(glm, y + shift, h))
            total = total + share * np.array([weight @ np.sqrt(size), weight @ size, weight @ size**2])
        return total

    what = "the curvature of the loss changes so fast with w'x, w*'x or the noise of the response", "w, w_star or noise"
    count = _resolving(lambda n: moments(n, noise), count, (_MOST_POINTS / noise) ** (1 / max(directions, 1)), *what)
    if glm.response.noise:
        noise = _resolving(lambda n: moments(count, n), noise, _MOST_POINTS / count ** max(directions, 1), *what)
    return count, noise


def _resolving(moments: Callable[[int], np.ndarray], count: int, most: float, what: str, which: str) -> int:
    """The first of ``count``, 3/2 ``count``, ... of which the next changes no moment by more than a part in 10,000.

    Jumps that no kinks name resolve slowly: where none up to ``most`` does, a part in 1000 is enough.
    """
    before, finer, enough = moments(count), count * 3 // 2, None
    while True:
        after = moments(finer)
        if np.allclose(before, after, rtol=1e-4, atol=0):
            return count
        enough = (enough or count) if np.allclose(before, after, rtol=1e-3, atol=0) else None
        count, before, finer = finer, after, finer * 3 // 2
        if finer > most:
            break
    if enough is None:
        raise ValueError(
            f"{what} that no quadrature of affordable size resolves it: name the places where it jumps in kinks, or "
            f"choose a smaller {which}"
        )
    return enough


def _responses(glm: GLM, predictions: _Predictions, count: int) -> tuple[_Grid, np.ndarray, np.ndarray]:
    """The grid with so many nodes in each direction, and y without noise and h at its points, in one row each."""
    grid = _Grid.of(glm, predictions, first=count, second=count)
    y = glm.response.function(torch.from_numpy(grid.eta)).numpy().ravel()
    return grid, y, np.broadcast_to(grid.h[:, None], grid.eta.shape).flatten()


def _noise(glm: GLM, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for the noise of the response, of which one is none."""
    nodes, weights = roots_hermitenorm(count)
    return glm.response.noise * nodes, weights / weights.sum()


def _finite_curvature(glm: GLM, y: np.ndarray, h: np.ndarray) -> np.ndarray:
    """The curvatures of the loss, shape (n,); refused if they are not finite."""
    return finite_curvature(glm.loss, torch.from_numpy(y), torch.from_numpy(h)).numpy()


def _refuse_jump(glm: GLM, y: float, t: np.ndarray, g: np.ndarray, pieces: list[slice], x: _Predictions) -> None:
    """Refuse a curvature that jumps between two kinks: halve the step in which it changes most."""
    for piece in pieces:
        if len(t[piece]) < 2 or np.ptp(g[piece]) == 0:
            continue
        k = piece.start + np.abs(np.diff(g[piece])).argmax()
        (low, high), (left, right) = t[k : k + 2], g[k : k + 2]
        step = abs(right - left)
        for _ in range(30):
            middle = (low + high) / 2
            between = _finite_curvature(glm, np.full(1, y), np.full(1, x.mean_h + x.sigma * middle))[0]
            if abs(between - left) > abs(right - between):
                high, right = middle, between
            else:
                low, left = middle, between
        if abs(right - left) > max(step / 4, 1e-12 * np.abs(g).max()):  # less is rounding
            left, right, place = left + 0.0, right + 0.0, x.mean_h + x.sigma * low
            raise ValueError(
                f"the curvature of the loss jumps from {left:g} to {right:g} at h = {place:g} for y = {y:g}: name each "
                f"such place in kinks"
            )


def _far_curvatures(glm: GLM, predictions: _Predictions) -> np.ndarray:
    """The curvatures at all t with coordinates 0 and ±30, and noise of as many standard deviations."""
    along_w, along_w_star = predictions.directions.along_w, predictions.directions.along_w_star
    k = len(along_w)
    far = torch.tensor([-_FAR, 0.0, _FAR], dtype=torch.float64)
    t = torch.cartesian_prod(*[far] * k).reshape(-1, k) if k else far.new_zeros(1, 0)
    h = predictions.mean_h + t @ torch.from_numpy(along_w)
    eta = predictions.mean_eta + t @ torch.from_numpy(along_w_star)
    if isinstance(glm.response, DiscreteResponse):
        y = torch.tensor(glm.response.values, dtype=torch.float64).repeat_interleave(len(h))
        h = h.repeat(len(glm.response.values))
    else:
        noise = _FAR * glm.response.noise
        y = torch.cat([glm.response.function(eta) + e for e in (-noise, 0.0, noise)])
        h = h.repeat(3)
    return curvature(glm.loss, y, h).numpy()


def _stretched(support: tuple[Interval, ...], far: np.ndarray) -> tuple[Interval, ...]:
    """The support of g with an infinite end where the far curvatures pass all that g is within the quadrature."""
    low, high = support[0][0], support[-1][1]
    slack = 0.5 * max(abs(low), abs(high))
    first = -math.inf if far.min() < low - slack else low
    last = math.inf if far.max() > high + slack else high
    inner = [x for interval in support for x in interval][1:-1]
    ends = [first, *inner, last]
    return tuple(zip(ends[::2], ends[1::2], strict=True))


def merged(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """The union of closed intervals, as disjoint ones in order."""
    union: list[Interval] = []
    for low, high in sorted(intervals):
        if union and low <= union[-1][1]:
            union[-1] = (union[-1][0], max(high, union[-1][1]))
        else:
            union.append((low, high))
    return tuple(union)


def _range(g: np.ndarray) -> Interval:
    return float(g.min()) + 0.0, float(g.max()) + 0.0  # no zero is negative


def _outer(t: np.ndarray) -> np.ndarray:
    """t tᵀ over the last axis."""
    return t[..., :, None] * t[..., None, :]


def _log_below(x: np.ndarray) -> np.ndarray:
    """Logarithm in the closed lower half plane, with argument -π on the negative axis."""
    return np.log(np.abs(x)) - 1j * np.arctan2(np.abs(x.imag), x.real)


def _cubic_shares(x: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first of the four grid points around each x, shape (J,), and their Lagrange polynomials at x, (4, J)."""
    start = np.clip(np.searchsorted(grid, x) - 2, 0, len(grid) - 4)
    share = np.ones((4, len(x)))
    for a in range(4):
        for b in range(4):
            if a != b:
                share[a] *= (x - grid[start + b]) / (grid[start + a] - grid[start + b])
    return start, share


def add_up(
    place: Int[np.ndarray, " n"], size: int, values: Float[np.ndarray, "n ..."]
) -> Float[np.ndarray, "{size} ..."]:
    """Sums of the rows of ``values``, shape (n, ...), that go to the same of ``size`` places."""
    columns = values.reshape(len(values), math.prod(values.shape[1:]))
    sums = [np.bincount(place, weights=column, minlength=size) for column in columns.T]
    return np.stack(sums, axis=-1).reshape(size, *values.shape[1:]) if sums else np.zeros((size, *values.shape[1:]))
