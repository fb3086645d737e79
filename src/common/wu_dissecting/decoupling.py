"""The decoupling conjecture, :math:`E[M\\otimes xx^\\top]\\approx E[M]\\otimes E[xx^\\top]`: Wu et al. (2022), (3)."""

import numpy as np
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

from common.hessian.convergence import ConvergenceError
from common.hessian.layer import LayerHessian, WeightSharingHessian
from common.hessian.operators import KroneckerProduct


def distance_from_kronecker(
    H: LayerHessian | WeightSharingHessian, *, seed: int, tolerance: float = 1e-3
) -> tuple[float, float]:
    """‖E[M] ⊗ E[xxᵀ] − H‖, the spectral norm, by SciPy's Lanczos iteration from a random vector, and a residual.

    The difference has eigenvalues of both signs; the norm is the modulus of the largest.

    Parameters
    ----------
    H
        In memory of the CPU.
    seed
        Of the start vector.
    tolerance
        Of the residual, relative to the norm.

    Returns
    -------
    float, float
        The norm θ and ‖Dv − θv‖/θ for the unit vector v that belongs to it: an eigenvalue of the difference D is as
        near as that to θ.

    Raises
    ------
    ConvergenceError
        If the residual is larger than the tolerance.
    """
    difference = KroneckerProduct(H.output_hessian, H.autocorrelation) - H
    dtype = H.autocorrelation.numpy().dtype
    D = difference.to_scipy(dtype)
    start = np.random.default_rng(seed).standard_normal(D.shape[0]).astype(dtype)
    try:
        (value,), vectors = eigsh(D, 1, which="LM", v0=start, tol=tolerance / 2)
    except ArpackNoConvergence as error:
        raise ConvergenceError(f"the norm of the difference is not found: {error}") from error
    v = vectors[:, 0] / np.linalg.norm(vectors[:, 0])
    residual = float(np.linalg.norm(D @ v - value * v) / abs(value))
    if residual > tolerance:
        raise ConvergenceError(f"the residual is {residual:.1e} of the norm")
    return float(abs(value)), residual
