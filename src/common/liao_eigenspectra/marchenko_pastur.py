r"""Marčenko-Pastur laws, scaled and shifted, beside the limiting spectrum: Section 3.1 of Liao & Mahoney (2021).

With C = I and a constant g = s the spectrum tends to s MP(c), where MP(c) has its edges at :math:`(1 \pm \sqrt c)^2`.
How far any other spectrum is from this shape is asked of the whole family a + s MP(c).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float
from scipy import optimize

from common.liao_eigenspectra.glm import Features, finite_array, positive_number
from common.liao_eigenspectra.law import Law
from common.liao_eigenspectra.spectrum import LimitingSpectrum

_POINTS = 4000  # quantiles of a limiting law at which two distribution functions are compared


@cache
def _standard(c: float) -> LimitingSpectrum:
    """MP(c), the spectrum of g = 1 and C = I."""
    return LimitingSpectrum(Law.discrete([1.0]), Features(p=1), c)


@dataclass(frozen=True)
class MarchenkoPastur:
    """The law a + s MP(c).

    Attributes
    ----------
    c
        Ratio p/n.
    shift, scale
        a and s > 0.

    Raises
    ------
    ValueError
        If c or s is not positive, or a not finite.

    Examples
    --------
    The law whose edges are the extreme eigenvalues of a sample:

    >>> law = MarchenkoPastur.matched(np.array([1.0, 2.0, 5.0]), 0.25)
    >>> round(law.shift, 9), round(law.scale, 9)
    (0.5, 2.0)
    """

    c: float
    shift: float
    scale: float

    def __post_init__(self):
        for name in ("c", "scale"):
            object.__setattr__(self, name, positive_number(name, getattr(self, name)))
        finite_array("shift", self.shift, ())

    @classmethod
    def matched(cls, eigenvalues: Float[np.ndarray, " p"], c: float) -> "MarchenkoPastur":
        """The law whose edges are the extreme eigenvalues of a sample, shape (p,), which must not all be equal."""
        eigenvalues = finite_array("the eigenvalues", eigenvalues, (None,))
        if np.ptp(eigenvalues) == 0:
            raise ValueError(f"the eigenvalues are all {eigenvalues[0]:g}: no two edges can be matched to them")
        (low, high) = _standard(c).support[0]
        scale = (eigenvalues.max() - eigenvalues.min()) / (high - low)
        return cls(c, float(eigenvalues.min() - scale * low), float(scale))

    @classmethod
    def fitted(cls, H: LimitingSpectrum) -> "MarchenkoPastur":
        """The law of least Kolmogorov-Smirnov distance from a limiting spectrum, of the same c.

        Nelder and Mead's search over a and log s, from four places round s = E[g], a = 0; or where E[g] is not positive
        round s = E[g²]^(1/2), a + s = E[g].

        Raises
        ------
        ValueError
            If g, and with it the spectrum, is zero.
        """
        if not H.law.g.any():
            raise ValueError("the spectrum is zero: no Marčenko-Pastur law is nearest to it")
        points, mean = H.quantiles(_POINTS), H.law.q @ H.law.g
        size = mean if mean > 0 else np.sqrt(H.law.q @ H.law.g**2)
        cdf = H.cdf(points)

        def distance(x: np.ndarray) -> float:
            return np.abs(_standard(H.c).cdf((points - x[0]) / np.exp(x[1])) - cdf).max()

        starts = ([mean - size + size * shift, np.log(size * scale)] for shift in (0.0, 0.2) for scale in (1.0, 0.7))
        found = (optimize.minimize(distance, start, method="Nelder-Mead") for start in starts)
        best = min(found, key=lambda result: result.fun)
        return cls(H.c, float(best.x[0]), float(np.exp(best.x[1])))

    def density(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Density at real x, shape (n,)."""
        return _standard(self.c).density((x - self.shift) / self.scale) / self.scale

    def cdf(self, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Distribution function at real x, shape (n,)."""
        return _standard(self.c).cdf((np.asarray(x) - self.shift) / self.scale)

    def distance(self, eigenvalues: Float[np.ndarray, " p"]) -> float:
        """Kolmogorov-Smirnov distance of a sample of eigenvalues, shape (p,), from the law."""
        return _standard(self.c).distance((eigenvalues - self.shift) / self.scale)

    def distance_from_limit(self, H: LimitingSpectrum) -> float:
        """Kolmogorov-Smirnov distance from a limiting spectrum, at 4000 of its quantiles."""
        points = H.quantiles(_POINTS)
        return float(np.abs(_standard(self.c).cdf((points - self.shift) / self.scale) - H.cdf(points)).max())
