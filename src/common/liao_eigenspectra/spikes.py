r"""Spikes of the Hessian of any G-GLM and what their eigenvectors align with: Theorems 2 to 4 of Liao & Mahoney (2021).

In the coordinates t and the basis R of :mod:`common.liao_eigenspectra.law`, Theorem 4 reads
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

Outlying eigenvalues of C, with eigenvectors E, are one more term of low rank. With :math:`C_0` the matrix C in which
each of them is moved to the nearest of the others, O spans E too, S is made with :math:`C_0`, and L has
:math:`\kappa\, O^\top (C - C_0)\, O` added. Alone it puts spikes where an outlying t solves :math:`\kappa t = z`, the
transition of Baik, Ben Arous and Péché; with μ, w or w* along E the terms move each other's.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Complex, Float

from common.liao_eigenspectra.glm import GLM, Features, finite_array
from common.liao_eigenspectra.law import Directions, Law, add_up, orthonormal_basis, unit_vector
from common.liao_eigenspectra.spectrum import LimitingSpectrum, Opening, Points

_NEAR_ZERO = 1e-6  # of the size of the spectrum


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
    side: Literal["left", "right", "between"]
    cosines: dict[str, float]
    alignment: Float[np.ndarray, "3 3"]


class Eigenspectrum(LimitingSpectrum):
    """Limiting spectrum of the Hessian (4), with its isolated eigenvalues and their eigenvectors.

    Parameters
    ----------
    law
        Law of g, with the coordinates of :class:`~common.liao_eigenspectra.law.Directions`; or one independent of the
        features.
    features
        The features with w and w*, such as a :class:`~common.liao_eigenspectra.glm.GLM`.
    c
        Limit of p/n.

    Raises
    ------
    ValueError
        If c is not positive, or the law has other coordinates than the features.

    Examples
    --------
    Corollary 1: for g = 1/4 a mean of squared length ρ > √c makes a spike at (1 + ρ)(1 + c/ρ)/4.

    >>> H = Eigenspectrum(Law.discrete([0.25]), Features(p=2, mean=[1.0, 0.0]), 0.25)
    >>> [round(spike.eigenvalue, 9) for spike in H.spikes]
    [0.625]
    """

    def __init__(self, law: Law, features: Features, c: float | int):
        super().__init__(law, features, c)
        named = {"mean": features.mean, "w": features.w, "w_star": features.w_star}
        named = {name: features.to_eigenbasis(v) for name, v in named.items()}
        C_named = {f"C {name}": features.eigenvalues * v for name, v in named.items() if name != "mean"}
        outliers = np.flatnonzero(self.outlying)
        axes = (outliers[:, None] == np.arange(features.p)).astype(float)
        self._basis = orthonormal_basis([*named.values(), *C_named.values(), *axes])  # O, shape (p, r)
        self._named = {name: self._basis.T @ v for name, v in (named | C_named).items()}
        self._block = self._by_eigenvalue(self._basis, self._basis)
        R = Directions.of(features).basis * np.sqrt(features.eigenvalues)[:, None]
        k = law.first.shape[1]
        if k != R.shape[1] and k > 0:
            raise ValueError(f"the law has {k} coordinates t, the features have {R.shape[1]}")
        E = self._basis[outliers].T  # OᵀE
        self._excess = E * (features.eigenvalues - self.t[self.place])[outliers] @ E.T
        self._loading = self._basis.T @ np.column_stack([named["mean"], R[:, :k]])  # OᵀV, shape (r, 1 + k)

    @classmethod
    def of(cls, glm: GLM, c: float | int) -> "Eigenspectrum":
        """The spectrum for a G-GLM at p/n = c, with the law of g by quadrature."""
        return cls(Law.of(glm), glm, c)

    def _by_eigenvalue(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Products aᵀ Π_k b over the eigenspaces of C, shape (K, ...), for a and b of shape (p, ...)."""
        products = a[:, :, None] * b[:, None, :]
        return add_up(self.place, len(self.t), products)

    # Theorems 2 and 3 .....................................................................................

    def _L(self, delta: np.ndarray) -> np.ndarray:
        """L and its derivative in δ, shape (2, Z, r, r)."""
        Lambda = self.law.Lambda(delta)
        return self._loading @ Lambda @ self._loading.T + Lambda[..., :1, :1] * self._excess

    def _bulk_resolvent(self, kappa: np.ndarray, z: np.ndarray, block: np.ndarray) -> np.ndarray:
        """Forms aᵀ Q̄_b b, shape (Z, ...), from the products over C's eigenspaces, shape (K, ...)."""
        return np.tensordot(1 / (np.multiply.outer(kappa, self.t) - z[:, None]), block, axes=1)

    @cached_property
    def spikes(self) -> tuple[Spike, ...]:
        """All isolated eigenvalues, left, between and right of the bulks, in rising order."""
        return tuple(spike for opening in self.openings for spike in self._spikes_in(opening))

    def _positive(self, zeta: np.ndarray, branch: int) -> np.ndarray:
        """Number of positive eigenvalues of [[L, I], [I, -S]], which falls by one at every spike.

        Of [[sL, I], [I, -S/s]], which has as many; with s the size of S neither block drowns in the other's rounding.
        """
        z, kappa, _ = self._real(zeta, branch)
        r = self._basis.shape[1]
        S = self._bulk_resolvent(kappa, z, self._block)
        size = np.abs(S).max(axis=(1, 2), keepdims=True)
        K = np.zeros((len(zeta), 2 * r, 2 * r))
        K[:, :r, :r] = size * self._L(-1 / zeta)[0]
        K[:, :r, r:] = K[:, r:, :r] = np.eye(r)
        K[:, r:, r:] = -S / size
        return (np.linalg.eigvalsh(K) > 0).sum(axis=1)

    def _spikes_in(self, opening: Opening) -> list[Spike]:
        """Bisect wherever the number falls, into both halves if it falls in both."""
        if not self._basis.size or not opening.zeta.size:
            return []
        zeta, zeros = opening.zeta, []
        if self.mass_at_zero:  # so near to zero rounding decides the number; the eigenvalue there is that mass
            zeta = zeta[np.abs(self._real(zeta, opening.branch)[0]) > _NEAR_ZERO * self._scale]
        positive = self._positive(zeta, opening.branch)
        for k in np.flatnonzero(np.diff(positive) < 0):
            pending = [(zeta[k], zeta[k + 1], positive[k], positive[k + 1])]
            while pending:
                low, high, above, below = pending.pop()
                middle = (low + high) / 2
                if not low < middle < high or high - low <= 1e-12 * max(abs(low), abs(high)):
                    zeros.append([middle, int(above - below)])
                    continue
                between = self._positive(np.array([middle]), opening.branch)[0]
                if between > below:
                    pending.append((middle, high, between, below))
                if above > between:
                    pending.append((low, middle, above, between))
        spikes = []
        for place, multiplicity in sorted(zeros):
            if spikes and place - spikes[-1][0] <= 1e-9 * abs(place):  # one, that rounding took apart
                spikes[-1][1] += multiplicity
            else:
                spikes.append([place, multiplicity])
        found = [self._spike(opening, place, multiplicity) for place, multiplicity in spikes]
        return sorted(found, key=lambda spike: spike.eigenvalue)

    def _spike(self, opening: Opening, zeta: float, multiplicity: int) -> Spike:
        """The eigenvalue and eigenvectors at a zero of the determinant."""
        z, kappa, slope_of_map = self._real(np.array([zeta]), opening.branch)
        delta = -1 / zeta
        kappa_slope = -(self.law.q @ (self.law.g / (1 + self.law.g * delta)) ** 2)
        ratio = 1 / (kappa[0] * self.t - z[0])
        z_slope = (1 - slope_of_map[0]) / (self.c * (self.pi * self.t) @ ratio**2)  # dz/dδ
        L, L_slope = self._L(np.array([delta]))[:, 0]
        S = np.tensordot(ratio, self._block, axes=1)
        S_slope = -np.tensordot(ratio**2 * (kappa_slope * self.t - z_slope), self._block, axes=1)
        v = np.linalg.svd(np.eye(len(S)) + S @ L)[2][-multiplicity:].T  # null vectors of S⁻¹ + L
        y = -L @ v
        fall = (y.T @ S_slope @ y - v.T @ L_slope @ v) / z_slope
        alignment = v @ np.linalg.solve(fall, v.T)
        cosines = {
            name: float(unit_vector(e) @ alignment @ unit_vector(e))
            for name, e in self._named.items()
            if not name.startswith("C ") and e.any()
        }
        V = np.column_stack([self._named["mean"], self._named["C w_star"], self._named["C w"]])
        edges = [x for bulk in self.support for x in bulk]
        side = "left" if z[0] < edges[0] else "right" if z[0] > edges[-1] else "between"
        distance = min(abs(z[0] - x) for x in edges)
        return Spike(float(z[0]), multiplicity, float(distance), side, cosines, V.T @ alignment @ V)

    def without_spikes(self, eigenvalues: Float[np.ndarray, " p"]) -> Float[np.ndarray, " b"]:
        """Eigenvalues of a sample, shape (p,), without the nearest one to each predicted spike."""
        eigenvalues = finite_array("the eigenvalues", eigenvalues, (None,))
        return np.delete(eigenvalues, [np.abs(eigenvalues - spike.eigenvalue).argmin() for spike in self.spikes])

    def separation(self, eigenvalues: Float[np.ndarray, " p"], x: float | int) -> float:
        """Distance between the two eigenvalues of a sample next to x, on either side of it.

        The eigenvalue nearest to each predicted spike is left out, so that across a gap of the support this is the
        distance of two bulks.

        Parameters
        ----------
        eigenvalues
            Of a sample, shape (p,), some on each side of x.

        Raises
        ------
        ValueError
            If there are none on one side.
        """
        rest = self.without_spikes(eigenvalues)
        if not rest.size or not rest.min() < x < rest.max():
            raise ValueError(f"the eigenvalues must have some below and some above x = {x:g}, spikes left out")
        return float(rest[rest > x].min() - rest[rest < x].max())

    # Theorem 4 ............................................................................................

    def resolvent(
        self, z: Points, a: Float[np.ndarray, " p"], b: Float[np.ndarray, " p"]
    ) -> Complex[np.ndarray, "..."]:
        """What aᵀ (H - z)⁻¹ b tends to, for fixed vectors a and b, shape (p,), by Theorem 4; same shape as z."""
        z = np.asarray(z, dtype=complex)
        flat = z.ravel()
        a, b = (finite_array(name, v, (self.features.p,)) for name, v in (("a", a), ("b", b)))
        a, b = self.features.to_eigenbasis(a)[:, None], self.features.to_eigenbasis(b)[:, None]
        delta, kappa = self._solve(flat)
        ab, aO, Ob, S = (
            self._bulk_resolvent(kappa, flat, self._by_eigenvalue(x, y))
            for x, y in ((a, b), (a, self._basis), (self._basis, b), (self._basis, self._basis))
        )
        L = self._L(delta)[0]
        middle = L @ np.linalg.inv(np.eye(S.shape[1]) + S @ L)
        return (ab - aO @ middle @ Ob)[:, 0, 0].reshape(z.shape)
