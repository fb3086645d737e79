"""The largest eigenvalues of a symmetric operator and their vectors: block Lanczos with full reorthogonalization."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from common.hessian.convergence import ConvergenceError
from common.hessian.operators import PyTorchLinearOperator


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues of a symmetric operator.

    Attributes
    ----------
    values
        (k,) descending.
    vectors
        (d, k) orthonormal.
    residuals
        (k,) ‖Hv − λv‖/|λ|, as the last step of the iteration gives them.
    products
        (1,) number of vectors that the operator was applied to.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "d k"]
    residuals: Float[Tensor, " k"]
    products: Float[Tensor, "1"]


def top_eigenpairs(
    operator: PyTorchLinearOperator, k: int, *, start: Float[Tensor, "d b"], tolerance: float = 1e-4,
    most: int | None = None,
) -> Eigenpairs:  # fmt: skip
    """The k largest eigenpairs, by block Lanczos with full reorthogonalization.

    Parameters
    ----------
    operator
        Symmetric, d × d, on flat vectors.
    start
        As many vectors as a block shall have; the nearer to the wanted space the better.
    tolerance
        Of every residual, relative to its eigenvalue.
    most
        Largest dimension of the Krylov space, rounded up to whole blocks; 3 k + 40 blocks if not given.

    Raises
    ------
    ValueError
        If k is not between 1 and the dimension.
    ConvergenceError
        If the space has that dimension and some residual is too large.
    """
    size, block = start.shape
    if not 1 <= k <= size:
        raise ValueError(f"the number of eigenpairs must lie in 1..{size}, got {k}")
    most = min(size, -((most or 3 * k + 40 * block) // -block) * block)
    Q = torch.empty(most, size, dtype=start.dtype, device=start.device)  # the basis, a vector a row
    T = torch.zeros(most, most, dtype=start.dtype, device=start.device)  # Q H Qᵀ
    new, filled = torch.linalg.qr(start).Q, 0
    while True:
        new = new[:, : most - filled]
        Q[filled : filled + new.shape[1]] = new.T
        filled += new.shape[1]
        last, basis = slice(filled - new.shape[1], filled), Q[:filled]
        image = operator @ new
        near = slice(max(0, filled - 2 * block), filled)  # all others are orthogonal but for rounding
        coefficients = Q[near] @ image
        T[near, last], T[last, near] = coefficients, coefficients.T
        new, R = torch.linalg.qr(image - Q[near].T @ coefficients)
        new, again = torch.linalg.qr(new - ((new.T @ basis.T) @ basis).T)  # twice is enough
        checked = filled <= 8 * block or filled == most or filled % (4 * block) < block
        if checked and filled >= min(most, k + 2 * block):
            projected = T[:filled, :filled]
            values, C = torch.linalg.eigh((projected + projected.T) / 2)
            values, C = values[-k:].flip(0), C[:, -k:].flip(1)
            residuals = torch.linalg.vector_norm(again @ R @ C[last], dim=0) / values.abs()
            if residuals.max() <= tolerance or filled == size:
                return Eigenpairs(values, basis.T @ C, residuals, torch.tensor([float(filled)]))
            if filled == most:
                raise ConvergenceError(f"after {filled} products the largest residual is {residuals.max():.1e}")
