r"""Limiting spectrum of the Hessian of any G-GLM, its density, support and mass: Theorem 1 of Liao & Mahoney (2021).

The Hessian :math:`H = \frac1n \sum_i g_i x_i x_i^\top`, :math:`x_i \sim N(\mu, C)`, :math:`p/n \to c`, has a spectrum
that depends on the law :math:`\nu` of g, on the spectrum :math:`\tilde\nu` of C and on c alone: (5) and (7),

.. math:: \delta = F(\delta) = c \int \frac{t\, \tilde\nu(dt)}{t \kappa(\delta) - z}, \qquad
    \kappa(\delta) = E\Big[\frac{g}{1 + g \delta}\Big], \qquad m(z) = \int \frac{\tilde\nu(dt)}{t \kappa - z}.

**Upper half plane.** For Im z > 0, F maps the upper half plane into a bounded part of itself: it has exactly one fixed
point there, whatever the sign of g. (The paper's footnote 6 asks for z m(z) < 0 on the real axis instead, which fails
as soon as H is indefinite.)

**Outlying eigenvalues of C.** The limit :math:`\tilde\nu` knows shares of the p eigenvalues, not single ones. Those
that stand apart from all others and are together at most one in 25 (a bulk of their own would have at most a fifth of
the width of the whole's) are taken to be of finite rank: no part of the law, they may make spikes. They stand apart
where :math:`c \int t^2 / (t - x)^2\, \tilde\nu(dt)` falls below 2 between them and the rest; where it falls below 1 the
covariance of the samples has a gap.

**Real axis.** With :math:`\zeta = -1/\delta`, :math:`B(\zeta) = E[g / (g - \zeta)]` and
:math:`T(x) = \int t / (t - x)\, \tilde\nu(dt)` the equation is :math:`B(\zeta) = c\,T(x)` at
:math:`z = -\zeta x B(\zeta)`. A real z lies outside the support if and only if such a pair exists with
:math:`\zeta \notin \mathrm{supp}\,\nu`, :math:`x \notin \mathrm{supp}\,\tilde\nu` and :math:`F'(\delta) < 1`: then
dδ/dz > 0, so the solution continues into the upper half plane, where it is the only one. The edges of the support are
the points where :math:`F' = 1`, that is dz/dδ = 0.

**Distribution function.** The derivatives in δ and κ of

.. math:: J(z) = \int \log(t \kappa - z)\, \tilde\nu(dt) + \frac1c \Big(E[\log(1 + g \delta)] - \delta \kappa\Big)

vanish by (7), and that in z is -m(z): J is :math:`\int \log(\lambda - z)\, \mu(d\lambda)`, with every logarithm on its
principal branch for Im z > 0. So :math:`\mu((-\infty, x]) = -\mathrm{Im}\, J(x + i0) / \pi` without an integral over
x, to the second order of an error in δ.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Complex, Float
from numpy.typing import ArrayLike
from scipy.interpolate import CubicHermiteSpline

from common.hessian.convergence import ConvergenceError
from common.liao_eigenspectra.glm import Features, finite_array, positive_number, whole_number
from common.liao_eigenspectra.law import SMALLEST, Interval, Law, groups, merged

_BISECTIONS = 60
_CLOSE = 1e-8  # to which a distribution function is known between two points
_HALVINGS = 16
_FEW = 1 / 25

#: Points of the complex plane or of the real axis, in any shape; a single number too.
Points = ArrayLike | complex | float | int

#: κ(δ) and its derivative.
_Kappa = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Opening:
    """An open interval of the real axis outside the support.

    Attributes
    ----------
    low, high
        Its ends; may be infinite.
    zeta
        Values of ζ that make it, graded from one end to the other, z rising, shape (Z,).
    branch
        Of x: 0 outside the eigenvalues of C, otherwise the number of different ones below it.
    """

    low: float
    high: float
    zeta: Float[np.ndarray, " Z"]
    branch: int


class LimitingSpectrum:
    """Limiting spectrum of the Hessian (4) without its isolated eigenvalues.

    Parameters
    ----------
    law
        Law of g.
    features
        The features, of which the eigenvalues of C count here.
    c
        Limit of p/n.

    Attributes
    ----------
    t, pi
        The K different eigenvalues of C, rising, and their shares, each of shape (K,), without the outlying ones.
    outlying
        Which of the p eigenvalues of C are of finite rank and no part of the limiting law, shape (p,).
    place
        Which of the K each of the p is, or is nearest to, shape (p,).

    Raises
    ------
    ValueError
        If c is not positive, or the spectrum, or its edge next to zero, is so large or small that its squares are no
        floating-point numbers.

    Examples
    --------
    The Marčenko-Pastur law, whose support is [(1 - √c)², (1 + √c)²]:

    >>> H = LimitingSpectrum(Law.discrete([1.0]), Features(p=1), 0.25)
    >>> np.round(H.support, 9).tolist()
    [[0.25, 2.25]]
    """

    def __init__(self, law: Law, features: Features, c: float | int):
        self.law, self.features, self.c = law, features, positive_number("the ratio c = p/n", c)
        size = float(np.abs(law.g).max() * features.eigenvalues.max())
        if size and not 1e-100 < size < 1e100:
            raise ValueError(f"the curvatures times the eigenvalues of C go up to {size:.0e}: choose other units")
        nonzero, large = (law.q[np.abs(law.g) > least * np.abs(law.g).max()].sum() for least in (0.0, 2 * SMALLEST))
        if nonzero - large > 1e-12 and large <= self.c < nonzero:
            raise ValueError(
                f"{nonzero - large:.0%} of the curvatures are below {SMALLEST} times the largest, but not zero, and so "
                f"is the edge of the spectrum: choose a smaller w"
            )
        order = np.argsort(features.eigenvalues)
        t = features.eigenvalues[order]
        group = groups(t)
        t, share = np.bincount(group, t) / np.bincount(group), np.bincount(group) / features.p
        few = _apart(t, share, self.c)
        self.t, self.pi = t[~few], share[~few] / share[~few].sum()
        self.place, self.outlying = np.empty(features.p, dtype=int), np.empty(features.p, dtype=bool)
        self.place[order] = np.searchsorted((self.t[1:] + self.t[:-1]) / 2, t)[group]
        self.outlying[order] = few[group]

    # Theorem 1 ............................................................................................

    def delta(self, z: Points) -> Complex[np.ndarray, "..."]:
        """δ(z) of (5), (7), at any z off the real axis or, as a limit from above, on it; same shape as z.

        Newton's method on the fixed-point equation, continued from far above the real axis; where it leaves the upper
        half plane or does not improve, damped fixed-point steps, which always converge.

        Raises
        ------
        ConvergenceError
            If δ and F(δ) differ by more than 1e-8 of δ; the message has z and the residual.
        """
        return self._solve(z)[0]

    def _solve(self, z: Points) -> tuple[np.ndarray, np.ndarray]:
        """δ and κ at z, each of its shape."""
        z = np.asarray(z, dtype=complex)
        if not np.isfinite(z).all():
            raise ValueError("z must be finite")
        if (z == 0).any() and self._full_at_zero:
            raise ValueError("z must not be zero where P(g ≠ 0) is at most c: δ and m have a pole there")
        flat = np.where(z.imag < 0, z.conj(), z).ravel()
        size, coarse = self._scale, self.law.compressed(384)
        delta = -self.c * (self.pi @ self.t) / (flat + 4j * size)
        for height in size * 4.0 ** np.arange(1, -8, -1):
            lifted = flat.real + 1j * np.maximum(flat.imag, height)
            delta = self._iterate(coarse.kappa, lifted, delta, tolerance=1e-3, steps=20)[0]
        lifted = flat.real + 1j * np.maximum(flat.imag, 1e-5 * size)
        delta = self._iterate(self.law.kappa, lifted, delta, tolerance=1e-3, steps=20)[0]
        residual, kappa = np.empty(len(flat)), np.empty_like(flat)
        smeared = self._unresolved(delta)
        for which, kappa_of in ((~smeared, self.law.kappa), (smeared, self.law.smeared_kappa)):
            if which.any():
                solved, off = self._iterate(kappa_of, flat[which], delta[which], tolerance=1e-13, steps=200)
                hard = off > 1e-8
                if hard.any():
                    solved[hard], off[hard] = self._descend(kappa_of, flat[which][hard], solved[hard])
                delta[which], residual[which], kappa[which] = solved, off, kappa_of(solved)[0]
        if residual.size and not residual.max() <= 1e-8:
            worst = int(residual.argmax())
            raise ConvergenceError(f"no solution for δ at z = {flat[worst]:g}: relative residual {residual[worst]:.1e}")
        return tuple(np.where(z.imag < 0, x.conj().reshape(z.shape), x.reshape(z.shape)) for x in (delta, kappa))

    def _descend(self, kappa_of: _Kappa, z: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Solve at z after continuation in small steps, as where the spectrum is of very different sizes."""
        for height in self._scale * 2.0 ** np.arange(2, -60, -1):
            lifted = z.real + 1j * np.maximum(z.imag, height)
            delta = np.where(delta.imag > 0, delta, delta.real + 1j * self._floor(lifted))
            delta = self._iterate(kappa_of, lifted, delta, tolerance=1e-6, steps=60)[0]
        return self._iterate(kappa_of, z, delta, tolerance=1e-13, steps=400)

    def _floor(self, z: np.ndarray) -> np.ndarray:
        """A hundredth of the usual size of δ at z; δ itself may pass through zero between two bulks."""
        return 0.01 * self.c * (self.pi @ self.t) / (self._scale + np.abs(z))

    @property
    def _scale(self) -> float:
        """Size of the spectrum: about the root of its second moment."""
        t2 = self.pi @ self.t**2
        second = (self.law.q @ self.law.g) ** 2 * t2 + self.c * (self.law.q @ self.law.g**2) * (self.pi @ self.t) ** 2
        return math.sqrt(second) or 1.0

    def _unresolved(self, delta: np.ndarray) -> np.ndarray:
        """Whether -1/δ is nearer to the real axis than three times the distance of the nodes of g there."""
        zeta = -1 / delta
        spacing = np.concatenate([[0.0], self.law.spacing, [0.0]])
        return zeta.imag < 3 * spacing[np.searchsorted(self.law.g, zeta.real)]

    def _map(self, kappa_of: _Kappa, z: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """F(δ) and F'(δ) at z."""
        kappa, slope = kappa_of(delta)
        value, derivative = np.zeros_like(delta), np.zeros_like(delta)
        for t, pi in zip(self.t, self.pi, strict=True):
            ratio = t / (t * kappa - z)
            value += self.c * pi * ratio
            derivative -= self.c * pi * slope * ratio**2
        return value, derivative

    def _iterate(
        self, kappa_of: _Kappa, z: np.ndarray, start: np.ndarray, tolerance: float, steps: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Solve δ = F(δ) at every z in the closed upper half plane; returns δ and the relative residuals."""
        delta, residual, best = start.copy(), np.full(len(z), np.inf), start.copy()
        floor = self._floor(z)
        active, damped = np.arange(len(z)), np.zeros(len(z), dtype=int)
        for _ in range(steps):
            now = delta[active]
            value, derivative = self._map(kappa_of, z[active], now)
            size = np.abs(value - now) / np.maximum(np.abs(now), floor[active])
            wrong = (size < 1e-10) & (np.abs(derivative) > 1 + 1e-5)  # a solution, but not from above the real axis
            size[wrong] = np.inf
            improved = size < residual[active]
            residual[active] = np.where(improved, size, residual[active])
            best[active] = np.where(improved, now, best[active])
            newton = now + (value - now) / (1 - derivative)
            on_axis = z[active].imag == 0  # where δ is real outside the support
            newton = np.where(on_axis & (newton.imag < 1e-9 * np.abs(newton)), newton.real + 0j, newton)
            fine = np.isfinite(newton) & ((newton.imag > 0) | on_axis) & (improved | (damped[active] > 0))
            # After a step of Newton's that failed, a few damped steps of the map itself, from above the axis.
            damped[active] = np.where(fine, np.maximum(damped[active] - 1, 0), 5)
            lifted = (now + value) / 2 + np.where(on_axis & ((now.imag <= 0) | wrong), 1e-3j * np.abs(now), 0)
            delta[active] = np.where(fine & (damped[active] == 0), newton, lifted)
            active = active[residual[active] > tolerance]
            if not active.size:
                break
        residual[np.abs(self._map(kappa_of, z, best)[1]) > 1 + 1e-5] = np.inf
        return best, residual

    def stieltjes_transform(self, z: Points) -> Complex[np.ndarray, "..."] | complex:
        """m(z) = ∫ (t - z)⁻¹ μ(dt) of Theorem 1, on the real axis its limit from above; same shape as z."""
        z, (_, kappa) = np.asarray(z, dtype=complex), self._solve(z)
        return sum(pi / (t * kappa - z) for t, pi in zip(self.t, self.pi, strict=True))

    def density(self, x: Points) -> Float[np.ndarray, "..."] | float:
        """Density of the limiting spectrum at real x, without the mass at zero; same shape as x; infinite at a pole."""
        x = finite_array("x", x, np.shape(x)) if np.size(x) else np.asarray(x, dtype=float)
        pole = (x == 0) & self._full_at_zero
        m = self.stieltjes_transform(np.where(pole, self._scale, x))
        at_pole = math.inf if any(low <= 0 <= high for low, high in self.support) and pole.any() else 0.0
        return np.where(pole, at_pole, np.maximum(m.imag, 0) / math.pi)

    @property
    def _full_at_zero(self) -> bool:
        """Whether P(g ≠ 0) ≤ c, so that δ(0) is infinite."""
        return bool(self.law.q[self.law.g != 0].sum() <= self.c * (1 + 1e-12))

    @property
    def mass_at_zero(self) -> float:
        """Share of eigenvalues that are zero: max(0, 1 - P(g ≠ 0)/c), above zero for c < 1 too if g often is."""
        mass = 1 - self.law.q[self.law.g != 0].sum() / self.c
        return float(mass) if mass > 1e-12 else 0.0

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
        B, squares = self.law.B(zeta)
        B = np.where(B == 0, 1e-150, B)
        x = self._branch(B / self.c, branch)
        T2 = (self.pi * (self.t / (self.t - x[:, None])) ** 2).sum(axis=1)
        return -zeta * x * B, -zeta * B, self.c * squares / B**2 * T2

    def _pieces(self) -> list[Interval]:
        """Intervals of ζ outside the support of g, cut at zero, where δ is infinite."""
        ends = [(-math.inf, -math.inf), *merged(self.law.support), (math.inf, math.inf)]
        pieces = [(a[1], b[0]) for a, b in pairwise(ends) if a[1] < b[0]]
        return _cut_at_zero(pieces)

    def _grade(self, low: float, high: float, count: int = 400) -> np.ndarray:
        """Points inside an interval, dense at its ends; equal steps in the logarithm towards infinity.

        An end nearer to zero than that is approached through all orders of magnitude that g has there.
        """
        size = max(abs(x) for x in [*self.law.g[[0, -1]].tolist(), self._scale])
        if math.isinf(low) or math.isinf(high):
            end = high if math.isinf(low) else low
            sizes = np.abs(self.law.g[self.law.g != 0])
            least = 1e-10 * (
                size if abs(end) > 1e-10 * size else max(abs(end), min(size, sizes.min()), SMALLEST * size)
            )
            steps = np.geomspace(least, 1e6 * size, round(count / 8 * math.log10(1e6 * size / least)))
            points = (high - steps)[::-1] if math.isinf(low) else low + steps
        else:
            near = np.geomspace(1e-10, 0.5, count)
            points = low + (high - low) * np.concatenate([near, 1 - near[-2::-1]])
        return points[(points > low) & (points < high)]  # some are rounded to an end

    @cached_property
    def openings(self) -> tuple[Opening, ...]:
        """All open intervals outside the support, z rising; see the module's text."""
        if not self.law.g.any():
            nothing = np.empty(0)
            return Opening(-math.inf, 0.0, nothing, 0), Opening(0.0, math.inf, nothing, 0)
        openings = []
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
                        openings.append(Opening(float(low), float(high), inner, branch))
        return tuple(sorted(openings, key=lambda opening: opening.low))

    def _limit(self, zeta: float, branch: int, near: float) -> float:
        """The z at an end of a piece, given one near it."""
        if zeta == 0:
            return 0.0
        if math.isfinite(zeta):
            return near
        if branch == 0:
            return zeta
        return (self.law.q @ self.law.g) * self._branch(np.zeros(1), branch)[0]  # δ = 0, where κ = E[g] and T = 0

    def _span(self, left: float, right: float, piece: Interval) -> np.ndarray:
        """Values of ζ from one edge to the other, dense at both and reaching far where the piece is infinite."""
        if math.isinf(piece[0]) or math.isinf(piece[1]):
            far, near = (left, right) if math.isinf(piece[0]) else (right, left)
            least = 1e-13 * min(1.0, abs(near / (far - near)) or 1.0)
            return near + (far - near) * np.concatenate([[0.0], np.geomspace(least, 1, round(-46 * math.log10(least)))])
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
    def support(self) -> tuple[Interval, ...]:
        """The bulks as closed intervals, in order; an end is infinite if g is unbounded. A mass at zero is not listed.

        The edges are the points where dz/dδ = 0.
        """
        ends = [-math.inf, *(x for opening in self.openings for x in (opening.low, opening.high)), math.inf]
        pairs = zip(ends[::2], ends[1::2], strict=True)
        return tuple((low, high) for low, high in pairs if low < high)

    # The distribution function .............................................................................

    def _cumulated(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The distribution function -Im J / π and the density at real x where neither jumps, each of shape (Z,)."""
        delta, kappa = self._solve(x)
        phase, smeared = self.law.phase(delta), self._unresolved(delta)
        if smeared.any():
            phase[smeared] = self.law.smeared_phase(delta[smeared])
        value, m = (phase - (delta * kappa).imag) / self.c, np.zeros_like(delta)
        for t, pi in zip(self.t, self.pi, strict=True):
            value -= pi * np.arctan2(np.abs(t * kappa.imag), t * kappa.real - x)
            m += pi / (t * kappa - x)
        return -value / math.pi, np.maximum(m.imag, 0) / math.pi

    def _between(self, opening: Opening) -> float:
        """The distribution function in an opening, where δ is real and every phase 0 or ±π."""
        zeta = opening.zeta[len(opening.zeta) // 2 : len(opening.zeta) // 2 + 1]
        z, kappa, _ = self._real(zeta, opening.branch)
        passed = (zeta - self.law.g) / zeta < 0
        return float(self.pi @ (self.t * kappa < z) - self.law.q @ (np.sign(self.law.g) * passed) / self.c)

    @cached_property
    def _bulks(self) -> tuple["_Bulk", ...]:
        """The distribution function over every bulk, cut at zero, where the density may have a pole."""
        if not self.support:
            return ()
        ends = [(-math.inf, 0.0), *((x, F) for o in self.openings for F in [self._between(o)] for x in (o.low, o.high))]
        ends += [(math.inf, 1.0)]
        bulks = []
        for (low, below), (high, above) in zip(ends[::2], ends[1::2], strict=True):
            if low >= high:
                continue
            if low < 0 < high:
                under = self._below_zero
                bulks.append(self._bulk(low, 0.0, below, under))
                bulks.append(self._bulk(0.0, high, under + self.mass_at_zero, above))
            else:
                bulks.append(self._bulk(low, high, below, above))
        return tuple(bulks)

    @property
    def _below_zero(self) -> float:
        """Share of negative eigenvalues, zero being in a bulk; by Sylvester's law of inertia where δ(0) is infinite."""
        if self._full_at_zero:
            signs = self.law.smeared_phase(np.array([1e150j]))[0] * 2 / math.pi  # P(g > 0) - P(g < 0)
            return float((self.law.q[self.law.g != 0].sum() - signs) / 2 / self.c)
        return float(self._cumulated(np.zeros(1))[0][0])

    def _bulk(self, low: float, high: float, below: float, above: float) -> "_Bulk":
        """The distribution function from ``below`` to ``above``, in cells halved until a halving changes nothing."""
        bulk = _Bulk(low, high, self._scale, self._reach)
        u = np.linspace(*bulk.ends, 65)
        pending = u[:-1]
        F, slope = self._along(bulk, u[1:-1])
        F, slope = np.r_[below, F, above], np.r_[0.0, slope, 0.0]
        for _ in range(_HALVINGS):
            bulk = bulk.through(u, F, slope)
            cell = np.searchsorted(u, pending)
            middle = (u[cell] + u[cell + 1]) / 2
            more_F, more_slope = self._along(bulk, middle)
            wrong = np.abs(bulk.spline(middle) - more_F) > _CLOSE
            pending = np.concatenate([u[cell][wrong], middle[wrong]])
            order = np.argsort(np.concatenate([u, middle]))
            u, F, slope = (np.concatenate(x)[order] for x in ((u, middle), (F, more_F), (slope, more_slope)))
            if not pending.size:
                break
        return bulk.through(u, F, slope)

    def _along(self, bulk: "_Bulk", u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The distribution function and its slope in u."""
        x, stretch = bulk.place(u)
        F, density = self._cumulated(x)
        return F, density * stretch

    @property
    def _reach(self) -> float:
        """Where an unbounded spectrum is cut: an eigenvalue that one g alone could make, of chance 1e-9."""
        order = np.argsort(np.abs(self.law.g))
        tail = np.cumsum(self.law.q[order][::-1])[::-1]
        largest = np.abs(self.law.g[order])[np.searchsorted(-tail, -1e-9) - 1]
        return largest * self.t[-1] * self.c * 2 + 4 * self._scale

    @property
    def total_mass(self) -> float:
        """Integral of the density plus the mass at zero: 1 up to the error of the numbers here.

        By Gauss's rule between the points at which the distribution function is known.
        """
        mass, (node, weight) = self.mass_at_zero, np.polynomial.legendre.leggauss(3)
        for bulk in self._bulks:
            u, half = bulk.spline.x, np.diff(bulk.spline.x) / 2
            x, stretch = bulk.place((u[:-1, None] + half[:, None] * (1 + node)).ravel())
            mass += float((self.density(x) * stretch) @ np.outer(half, weight).ravel())
        return mass

    def cdf(self, x: Points) -> Float[np.ndarray, "..."] | float:
        """Distribution function of the limiting spectrum, same shape as x."""
        x = np.asarray(x, dtype=float)
        if np.isnan(x).any():
            raise ValueError("x must not be NaN")
        value = self.mass_at_zero * (x >= 0)
        for bulk in self._bulks:
            value = value + bulk.spline(bulk.coordinate(x)) - bulk.spline(bulk.ends[0])
        return value

    def quantiles(self, count: SupportsIndex) -> Float[np.ndarray, " {count}"]:
        """Points that share out the spectrum into equal parts, half a part before the first, shape (count,).

        A mass at zero gives as many zeros as belong to it.
        """
        count = whole_number("count", count)
        levels, points = (np.arange(count) + 0.5) / count, np.zeros(count)
        for bulk in self._bulks:
            inside = (bulk.spline(bulk.ends[0]) < levels) & (levels < bulk.spline(bulk.ends[1]))
            low, high = (np.full(inside.sum(), end) for end in bulk.ends)
            for _ in range(_BISECTIONS):
                middle = (low + high) / 2
                under = bulk.spline(middle) < levels[inside]
                low, high = np.where(under, middle, low), np.where(under, high, middle)
            points[inside] = bulk.place((low + high) / 2)[0]
        return points

    def distance(self, eigenvalues: Float[np.ndarray, " p"]) -> float:
        """Kolmogorov-Smirnov distance of a sample of eigenvalues, shape (p,), in any order, from the limiting law.

        Eigenvalues below 1e-9 of the largest count as zero.
        """
        values = np.sort(finite_array("the eigenvalues", eigenvalues, (None,)))
        values[np.abs(values) < 1e-9 * np.abs(values).max()] = 0.0
        points, counts = np.unique(values, return_counts=True)
        after = np.cumsum(counts) / len(values)
        above, atom = self.cdf(points), self.mass_at_zero * (points == 0)
        return float(max(np.abs(after - above).max(), np.abs(after - counts / len(values) - (above - atom)).max()))


def _apart(t: Float[np.ndarray, " K"], share: Float[np.ndarray, " K"], c: float) -> Bool[np.ndarray, " K"]:
    """Which of the different eigenvalues of C, rising, are outlying; see the module's text."""
    if (share > _FEW).all():
        return np.zeros(len(t), dtype=bool)
    x = t[:-1, None] + np.diff(t)[:, None] * np.linspace(0, 1, 66)[1:-1]
    spread = sum(c * s * (u / (u - x)) ** 2 for u, s in zip(t, share, strict=True))
    group = np.cumsum(np.r_[False, (spread < 2).any(axis=1)])
    shares = np.bincount(group, share)
    few = shares <= _FEW
    return few[group] & (shares[few].sum() <= _FEW)


@dataclass(frozen=True, eq=False)
class _Bulk:
    """The distribution function F over a bulk, a cubic spline in a coordinate u in which it is smooth at the ends."""

    low: float
    high: float  # one of the two may be infinite
    scale: float
    reach: float
    spline: CubicHermiteSpline | None = None

    @property
    def ends(self) -> tuple[float, float]:
        far = math.asinh(math.sqrt(self.reach / self.scale))
        return (0.0, far) if math.isinf(self.high) else (-far, 0.0) if math.isinf(self.low) else (0.0, math.pi)

    def place(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """X and dx/du."""
        if math.isinf(self.high) or math.isinf(self.low):
            x = self.scale * np.sinh(u) ** 2
            stretch = self.scale * np.abs(np.sinh(2 * u))
            return (self.low + x if math.isinf(self.high) else self.high - x), stretch
        span, sine, cosine = self.high - self.low, np.sin(u / 2), np.cos(u / 2)
        x = np.where(u < math.pi / 2, self.low + span * sine**2, self.high - span * cosine**2)
        return x, span * sine * cosine

    def coordinate(self, x: np.ndarray) -> np.ndarray | float:
        """The u of x, and the nearer end for any x beyond an end."""
        under, over = np.maximum(x - self.low, 0), np.maximum(self.high - x, 0)
        if math.isinf(self.high):
            return np.minimum(np.arcsinh(np.sqrt(under / self.scale)), self.ends[1])
        if math.isinf(self.low):
            return np.maximum(-np.arcsinh(np.sqrt(over / self.scale)), self.ends[0])
        return 2 * np.arctan2(np.sqrt(under), np.sqrt(over))

    def through(self, u: np.ndarray, F: np.ndarray, slope: np.ndarray) -> "_Bulk":
        """The same with a spline through points of F, which rises: slopes of at most three secants keep it so."""
        F = np.maximum.accumulate(F)
        secant = np.diff(F) / np.diff(u)
        slope = slope.copy()
        slope[[0, -1]] = np.maximum(2 * secant[[0, -1]] - slope[[1, -2]], 0)
        slope = np.minimum(slope, 3 * np.minimum(np.r_[secant, np.inf], np.r_[np.inf, secant]))
        return replace(self, spline=CubicHermiteSpline(u, F, slope))


def _cut_at_zero(intervals: Iterable[Interval]) -> list[Interval]:
    """Open intervals, those that hold zero in two."""
    cut = [((low, 0.0), (0.0, high)) if low < 0 < high else ((low, high),) for low, high in intervals]
    return [part for parts in cut for part in parts]
