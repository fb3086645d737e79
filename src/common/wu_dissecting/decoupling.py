"""The decoupling conjecture, :math:`E[M\\otimes xx^\\top]\\approx E[M]\\otimes E[xx^\\top]`: Wu et al. (2022), (3)."""

import numpy as np

from common.hessian.block_lanczos import ROUNDING
from common.hessian.convergence import ConvergenceError
from common.hessian.layer import LayerHessian, WeightSharingHessian
from common.hessian.operators import KroneckerProduct
from common.hessian.spectral_measure import extreme_eigenpairs


def distance_from_kronecker(
    H: LayerHessian | WeightSharingHessian, *, seed: int, tolerance: float = 1e-3
) -> tuple[float, float]:
    """‖E[M] ⊗ E[xxᵀ] − H‖, the spectral norm, by SciPy's Lanczos iteration from a random vector, and a residual.

    The difference has eigenvalues of both signs; the norm is the modulus of the largest. What is rounding, as it is
    where all samples have equal inputs, counts as 0.

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
    FloatingPointError
        If a product is not finite.
    ConvergenceError
        If the residual is larger than the tolerance.
    """
    product = KroneckerProduct(H.output_hessian, H.autocorrelation)
    difference = product - H
    dtype = H.autocorrelation.numpy().dtype
    (value, *_), vectors = extreme_eigenpairs(difference, 1, "LM", seed=seed, tolerance=tolerance / 2)
    scale = np.prod([np.linalg.norm(factor) for factor in (H.output_hessian, H.autocorrelation)])
    if abs(value) <= ROUNDING * np.finfo(dtype).eps * scale:  # noise has no eigenvector
        return 0.0, 0.0
    v = vectors[:, 0] / np.linalg.norm(vectors[:, 0])
    residual = float(np.linalg.norm(difference.to_scipy(dtype) @ v - value * v) / abs(value))
    if residual > tolerance:
        raise ConvergenceError(f"the residual is {residual:.1e} of the norm")
    return float(abs(value)), residual
