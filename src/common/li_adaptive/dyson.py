"""The Matrix Dyson Equation, (9) of Li, for a random matrix given by samples.

For symmetric H with mean A and S[R] = E[(H − A) R (H − A)], the resolvent (H − z)⁻¹ is close to the one solution of

    1 + (z − A + S[M]) M = 0,     Im M > 0,     Im z > 0,

if N is large and the entries of H are weakly correlated, and then Im tr M(x + iη)/(πN) is the density of eigenvalues,
smoothed by a Cauchy law of width η. It is solved by M ← (M − (z − A + S[M])⁻¹)/2 (Helton, Rashidi Far and Speicher,
2007), which maps the matrices of positive imaginary part into themselves and converges from anywhere there.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex, Float, Inexact
from scipy import stats

from common.hessian.convergence import ConvergenceError


@dataclass(frozen=True)
class DysonEquation:
    """The equation of a random matrix of dimension N.

    Attributes
    ----------
    mean
        A, (N, N).
    covariance
        S as a matrix that acts on R written row by row, (N², N²): N² numbers squared, so N of a few dozens.
    """

    mean: Float[np.ndarray, "N N"]
    covariance: Float[np.ndarray, "N2 N2"]

    @classmethod
    def of_samples(cls, H: Float[np.ndarray, "n N N"]) -> "DysonEquation":
        """The equation with the sample mean and the unbiased sample covariance of symmetric matrices.

        Raises
        ------
        ValueError
            If there are fewer than two samples, or they are not square, symmetric and finite.
        """
        if H.ndim != 3 or len(H) < 2 or H.shape[1] != H.shape[2] or not H.size:
            raise ValueError(f"at least two square matrices are needed, got an array of shape {H.shape}")
        if not (np.isfinite(H).all() and np.abs(H - H.transpose(0, 2, 1)).max() <= 1e-4 * np.abs(H).max()):
            raise ValueError("the matrices H must be symmetric and finite")
        n, N, _ = H.shape
        A = H.mean(0)
        W = (H - A).reshape(n, N * N)
        pairs = (W.T @ W / (n - 1)).reshape(N, N, N, N)  # E[W_ik W_lj] at [i, k, l, j]
        return cls(A, np.ascontiguousarray(pairs.transpose(0, 3, 1, 2)).reshape(N * N, N * N))

    @property
    def dimension(self) -> int:
        """N."""
        return len(self.mean)

    def apply(self, R: Inexact[np.ndarray, "*stack N N"]) -> Inexact[np.ndarray, "*stack N N"]:
        """S[R] for one matrix or a stack of them, real or complex."""
        flat = R.reshape(-1, self.dimension**2)
        if np.iscomplexobj(R):
            image = flat.real @ self.covariance.T + 1j * (flat.imag @ self.covariance.T)
        else:
            image = flat @ self.covariance.T
        return image.reshape(R.shape)

    def solve(
        self, z: Inexact[np.ndarray, " K"], *, tolerance: float = 1e-8, iterations: int = 20_000
    ) -> Complex[np.ndarray, "K N N"]:
        """M(z) at several z above the real axis.

        Raises
        ------
        ValueError
            If some z is not above the real axis, or z is not flat.
        ConvergenceError
            If an iteration has not converged; close to the axis, at an edge, it may take long.
        """
        z = np.asarray(z, complex)
        if z.ndim != 1:
            raise ValueError(f"points z are needed, (K,); got the shape {z.shape}")
        if not (z.imag > 0).all():
            raise ValueError("z must lie above the real axis")
        identity = np.eye(self.dimension)
        M = -identity / z[:, None, None]
        todo = np.arange(len(z))
        change = np.inf
        for _ in range(iterations):
            new = -np.linalg.inv(z[todo, None, None] * identity - self.mean + self.apply(M[todo]))
            moved = np.abs(new - M[todo]).max((1, 2)) / np.abs(new).max((1, 2))
            M[todo] = (M[todo] + new) / 2
            todo, change = todo[moved > tolerance], moved.max(initial=0)
            if len(todo) == 0:
                return M
        raise ConvergenceError(f"{len(todo)} of {len(z)} points did not converge: relative change {change:.1e}")

    def density(self, x: Float[np.ndarray, " K"], eta: float) -> Float[np.ndarray, " K"]:
        """Im tr M(x + iη)/(πN).

        Raises
        ------
        ValueError
            If η is not positive.
        ConvergenceError
            As :meth:`solve`.
        """
        _check_width(eta)
        return np.trace(self.solve(x + 1j * eta), axis1=1, axis2=2).imag / (np.pi * self.dimension)

    def gaussian_samples(self, n: int, rng: np.random.Generator) -> Float[np.ndarray, "n N N"]:
        """Symmetric Gaussian matrices with this mean and covariance."""
        N = self.dimension
        pairs = self.covariance.reshape(N, N, N, N).transpose(0, 2, 3, 1)  # back to [i, k, l, j]
        i, k = np.triu_indices(N)
        values, vectors = np.linalg.eigh(pairs[i, k][:, i, k])
        entries = rng.standard_normal((n, len(values))) @ (np.sqrt(np.maximum(values, 0)) * vectors).T
        H = np.zeros((n, N, N))
        H[:, i, k] = H[:, k, i] = entries
        return H + self.mean

    def comparability(self, *, starts: int, rng: np.random.Generator) -> tuple[float, float]:
        """The constants c and C of Condition 4.5, as far as random starts and the unit vectors find them.

        c N⁻¹ tr T ≤ S[T] ≤ C N⁻¹ tr T for all positive T holds as soon as it holds for T = t tᵀ: the constants are N
        times the least and the greatest of uᵀS[t tᵀ]u over unit vectors u and t. Alternating between u and t lowers
        (or raises) it in every step. The true c is at most the one returned, the true C at least.
        """
        N = self.dimension
        extremes = []
        for pick in (0, -1):
            found = []
            for t in (*np.eye(N), *rng.standard_normal((starts, N))):
                t = t / np.linalg.norm(t)
                for _ in range(50):
                    values, vectors = np.linalg.eigh(self.apply(np.outer(t, t)))
                    t = vectors[:, pick]
                found.append(N * values[pick])
            extremes.append(min(found) if pick == 0 else max(found))
        return max(extremes[0], 0.0), extremes[1]


def _check_width(eta: float) -> None:
    if not eta > 0:
        raise ValueError(f"the width eta must be positive, got {eta}")


def smoothed_density(
    eigenvalues: Float[np.ndarray, "*shape"], x: Float[np.ndarray, " K"], eta: float
) -> Float[np.ndarray, " K"]:
    """Density of all eigenvalues at x, smoothed by a Cauchy law of width η as :meth:`DysonEquation.density` is.

    Raises
    ------
    ValueError
        If η is not positive or there are no eigenvalues.
    """
    _check_width(eta)
    values = eigenvalues.ravel()
    if not len(values):
        raise ValueError("a density needs at least one of the eigenvalues, got none")
    return np.array([np.mean(eta / ((values - at) ** 2 + eta**2)) / np.pi for at in x])


def distance(x: Float[np.ndarray, " K"], one: Float[np.ndarray, " K"], other: Float[np.ndarray, " K"]) -> float:
    """Half the L¹ distance ∫|p − q| dx / 2 of two densities on a grid: 0 if equal, 1 if apart.

    Raises
    ------
    ValueError
        If the grid does not increase.
    """
    if not (np.diff(x) > 0).all():
        raise ValueError("the grid x must increase")
    return float(0.5 * np.trapezoid(np.abs(one - other), x))


def mean_share(H: Float[np.ndarray, "n N N"]) -> float:
    """‖A‖²/E‖H‖² of samples of a random matrix, A their mean: 0 if Condition 4.3 holds, 1 if nothing fluctuates.

    What the finite number of samples adds to the square of their mean is taken off, so that the estimate of 0 is 0 on
    average and may be negative. NaN where all of them are zero, or there are fewer than two.
    """
    n = len(H)
    total = float((H**2).sum((1, 2)).mean()) if n > 1 else 0.0
    if not total:
        return math.nan
    square = float(np.linalg.norm(H.mean(0)) ** 2)
    return (square - (total - square) / (n - 1)) / total


def outside_remark_d4(equation: DysonEquation, eigenvalues: Float[np.ndarray, "*shape"]) -> float:
    """Share of eigenvalues outside Spec A + [−2‖S‖^{1/2}, 2‖S‖^{1/2}], where Remark D.4 has all of them.

    ‖S‖ is the norm that the operator norm induces; S is positive, so that it is ‖S[1]‖.
    """
    reach = 2 * np.linalg.norm(equation.apply(np.eye(equation.dimension)), 2) ** 0.5
    centres = np.linalg.eigvalsh(equation.mean)
    values = eigenvalues.ravel()
    edges = np.concatenate([[-np.inf], centres, [np.inf]])
    after = np.searchsorted(centres, values)  # the centres on either side
    near = np.minimum(values - edges[after], edges[after + 1] - values)
    return float((near > reach).mean())


def _entries_that_vary(H: Float[np.ndarray, "n N N"]) -> Float[np.ndarray, "n K"]:
    """The entries on and above the diagonal, but those that are the same in all samples."""
    rows, columns = np.triu_indices(H.shape[1])
    entries = H[:, rows, columns]
    return entries[:, (entries != entries[0]).any(0)]  # rounding gives constants a standard deviation


def correlated_entries(H: Float[np.ndarray, "n N N"]) -> float:
    """With how many others an entry of a symmetric random matrix is correlated, on average over those that vary.

    A sample correlation counts if it passes Student's t test, at a level at which one false one is expected among all
    pairs of a hundred such matrices without any. 0 where nothing varies.

    Raises
    ------
    ValueError
        If there are fewer than three samples, of which no correlation can be tested.
    """
    if len(H) < 3:
        raise ValueError(f"correlations of H need at least 3 samples, got {len(H)}")
    entries = _entries_that_vary(H)
    if not entries.shape[1]:
        return 0.0
    r = np.atleast_2d(np.corrcoef(entries.T))
    np.fill_diagonal(r, 0)
    free = len(H) - 2
    t = stats.t.isf(0.01 / r.size / 2, free)
    return float((np.abs(r) > t / np.sqrt(free + t**2)).sum(1).mean())


def excess_kurtosis(H: Float[np.ndarray, "n N N"]) -> float:
    """Mean modulus of the excess kurtosis of the entries that vary: 0 if they are Gaussian (Condition 4.1).

    NaN where nothing varies.
    """
    entries = _entries_that_vary(H)
    return float(np.abs(stats.kurtosis(entries)).mean()) if entries.size else math.nan
