"""Features that are not Gaussian, with the mean and covariance of Gaussian ones: Liao & Mahoney (2021), Section 3.1.

The paper conjectures that Theorem 1 needs no Gaussian features. Entries here have mean 0 and variance 1 as far as they
have a variance; a finite population, such as photographs, is moved and rotated until it has mean 0 and covariance I.
"""

import numpy as np
from jaxtyping import Float
from scipy import stats


def random_signs(n: int, p: int, rng: np.random.Generator) -> Float[np.ndarray, "n p"]:
    """Independent entries ±1 of equal chance, shape (n, p)."""
    return rng.choice([-1.0, 1.0], (n, p))


def student_t(degrees: float | int, n: int, p: int, rng: np.random.Generator) -> Float[np.ndarray, "n p"]:
    """Independent Student t entries, shape (n, p), of variance 1.

    Parameters
    ----------
    degrees
        Degrees of freedom: moments below this order are finite. With 2 or fewer there is no variance, and the sample
        is scaled to a standard deviation of 1.
    """
    X = stats.t.rvs(degrees, size=(n, p), random_state=rng)
    return X / (np.sqrt(degrees / (degrees - 2)) if degrees > 2 else X.std())


def whitened(X: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "n p"]:
    """A population, shape (n, p), moved and rotated to mean 0 and covariance I, both over the population itself."""
    eigenvalues, basis = np.linalg.eigh(np.cov(X.T, bias=True))
    return (X - X.mean(0)) @ basis / np.sqrt(eigenvalues)
