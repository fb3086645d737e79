"""Features that are not Gaussian, with the mean and covariance of Gaussian ones: Liao & Mahoney (2021), Section 3.1.

The paper conjectures that Theorem 1 needs no Gaussian features. Entries here have mean 0 and variance 1 as far as they
have a variance; a finite population, such as photographs, is moved and rotated until it has mean 0 and covariance I.
"""

from typing import SupportsIndex

import numpy as np
from jaxtyping import Float
from scipy import stats

from common.liao_eigenspectra.glm import finite_array, positive_number, whole_number


def random_signs(n: SupportsIndex, p: SupportsIndex, rng: np.random.Generator) -> Float[np.ndarray, "n p"]:
    """Independent entries ±1 of equal chance, shape (n, p)."""
    return rng.choice([-1.0, 1.0], (whole_number("n", n), whole_number("p", p)))


def student_t(
    degrees: float | int, n: SupportsIndex, p: SupportsIndex, rng: np.random.Generator
) -> Float[np.ndarray, "n p"]:
    """Independent Student t entries, shape (n, p), of variance 1.

    Parameters
    ----------
    degrees
        Degrees of freedom: moments below this order are finite. With 2 or fewer there is no variance, and the sample
        is scaled to a standard deviation of 1.

    Raises
    ------
    ValueError
        If the degrees of freedom are not positive and finite, or n or p is no positive whole number.
    """
    degrees, size = positive_number("degrees", degrees), (whole_number("n", n), whole_number("p", p))
    X = stats.t.rvs(degrees, size=size, random_state=rng)
    return X / (np.sqrt(degrees / (degrees - 2)) if degrees > 2 else X.std())


def whitened(X: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "n p"]:
    """A population, shape (n, p), moved and rotated to mean 0 and covariance I, both over the population itself.

    Raises
    ------
    ValueError
        If its covariance is singular: n ≤ p, or columns that depend on each other linearly.
    """
    X = finite_array("X", X, (None, None))
    eigenvalues, basis = np.linalg.eigh(np.atleast_2d(np.cov(X.T, bias=True)))
    if eigenvalues[0] <= X.shape[1] * np.finfo(float).eps * eigenvalues[-1]:
        raise ValueError(f"X of shape {X.shape} has a singular covariance: leave out columns that others determine")
    return (X - X.mean(0)) @ basis / np.sqrt(eigenvalues)
