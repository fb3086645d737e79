"""The largest eigenvalues of a symmetric operator and their vectors: block Lanczos with full reorthogonalization.

And all of those of a small matrix.
"""

import math
from dataclasses import dataclass
from operator import index
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from common.hessian.convergence import ConvergenceError
from common.hessian.operators import PyTorchLinearOperator

#: Of the spectral norm, in units of the precision: what products are taken to be exact to.
ROUNDING = 16
#: Norm of what is added to each start vector, of norm 1, so that no eigenvector is orthogonal to all of them.
NOISE = 1.0
#: Blocks that a Krylov space has at least: by then it has seen what the start vectors have little of.
BLOCKS = 12
#: Of vectors, whose products are summed in their own precision.
ROWS_AT_ONCE = 2**12


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues of a symmetric operator.

    Attributes
    ----------
    values
        (k,) descending; 0 where they are below the rounding of the products.
    vectors
        (d, k) orthonormal.
    residuals
        (k,) ‖Hv − λv‖, from the products of the operator with these vectors.
    products
        (1,) number of vectors that the operator was applied to.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "d k"]
    residuals: Float[Tensor, " k"]
    products: Float[Tensor, "1"]


def top_eigenpairs(
    operator: PyTorchLinearOperator, k: SupportsIndex, *, start: Float[Tensor, "d b"], tolerance: float = 1e-4,
    most: int | None = None,
) -> Eigenpairs:  # fmt: skip
    """The k largest eigenpairs, by block Lanczos with full reorthogonalization.

    A Krylov space from b vectors has at most b of the eigenvectors of a multiple eigenvalue. Where b or more of those
    found are equal within the tolerance, more may be missing, and all is done again with twice as many vectors.

    Parameters
    ----------
    operator
        Symmetric, d × d, on flat vectors.
    k
        Of the largest, with their signs: beyond the rank of a positive semidefinite operator there are zeros.
    start
        As many vectors as a block shall have; the nearer to the wanted space the better. As much noise is added.
    tolerance
        Of every residual, relative to its eigenvalue; none needs to be below :data:`ROUNDING` times the precision times
        ‖H‖, and eigenvalues below that are 0.
    most
        Largest dimension of the Krylov space, rounded up to whole blocks; 3 k + 40 blocks if not given.

    Raises
    ------
    ValueError
        If k is not between 1 and the dimension, ``most`` is less, the tolerance is not between 0 and 1, or the start
        vectors do not fit or are not finite.
    FloatingPointError
        If a product is not finite.
    ConvergenceError
        If the space has that dimension and some residual is too large, or the products are less exact than that.
    """
    k, size = index(k), operator.shape[0]
    if not 1 <= k <= size:
        raise ValueError(f"the number of eigenpairs must lie in 1..{size}, got {k}")
    if not 0 < tolerance < 1 or not k <= (most or size):
        raise ValueError(f"a tolerance in 0..1 and most ≥ {k} are needed, got {tolerance} and {most}")
    fits = start.ndim == 2 and len(start) == size and start.shape[1] > 0 and start.dtype == operator.dtype
    if not fits or not start.isfinite().all():
        given = f"{tuple(start.shape)} of {start.dtype}"
        raise ValueError(f"finite start vectors are needed, ({size}, b) of {operator.dtype}; got {given}")
    generator, products = torch.Generator(start.device).manual_seed(0), 0
    block = torch.nn.functional.normalize(start[:, :size], dim=0)
    block = block + NOISE * size**-0.5 * _normal(block, block.shape[1], generator)
    while True:
        found, allowed = _block_lanczos(operator, k, block, tolerance, most, generator)
        products += int(found.products)
        width = block.shape[1]
        if width == size or not _crowded(found.values, allowed, width):
            values = torch.where(found.values.abs() <= allowed.min(), 0, found.values)
            return Eigenpairs(values, found.vectors, found.residuals, torch.tensor([float(products)]))
        block = torch.cat([block, _normal(block, min(width, size - width), generator)], 1)


def _normal(like: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(len(like), columns, generator=generator, dtype=like.dtype, device=like.device)


def _crowded(values: Float[Tensor, " k"], allowed: Float[Tensor, " k"], width: int) -> bool:
    """Whether ``width`` values in a row are as good as equal, and larger than the last."""
    ends = values[width - 1 :]
    equal = values[: len(ends)] - ends <= 4 * allowed[: len(ends)]
    return bool((equal & (ends > values[-1] + allowed[-1])).any())


def _block_lanczos(
    operator: PyTorchLinearOperator, k: int, start: Tensor, tolerance: float, most: int | None,
    generator: torch.Generator,
) -> tuple[Eigenpairs, Float[Tensor, " k"]]:  # fmt: skip
    """The k largest eigenpairs in a Krylov space that has them, and what their residuals may be."""
    size, block = start.shape
    most = min(size, -((most or 3 * k + 40 * block) // -block) * block)
    Q = torch.empty(most, size, dtype=start.dtype, device=start.device)  # the basis, a vector a row
    T = torch.zeros(most, most, dtype=torch.float64, device=start.device)  # Q H Qᵀ
    filled, scale, unit = 0, 0.0, 0.0
    new, _ = _orthonormal(start, Q[:0], 0.0, generator)
    while True:
        new = new[:, : most - filled]
        near = slice(max(0, filled - block), filled + new.shape[1])  # all others are orthogonal but for rounding
        last = slice(filled, near.stop)
        Q[last], filled = new.T, near.stop
        image, basis = operator @ new, Q[:filled]
        if not image.isfinite().all():
            raise FloatingPointError("a product with the operator is not finite")
        unit = unit or _power_of_two(image)  # squares of small and of large numbers leave the range of single precision
        image /= unit
        scale = max(scale, float(torch.linalg.vector_norm(image, dim=0).max()))
        floor = ROUNDING * torch.finfo(start.dtype).eps * scale
        coefficients = _inner(Q[near], image)
        T[near, last], T[last, near] = coefficients, coefficients.T
        new, outside = _orthonormal(image - _combined(Q[near], coefficients), basis, floor, generator)
        exhausted = filled == size or float(torch.linalg.matrix_norm(outside)) <= floor
        checked = exhausted or filled <= 8 * block or filled == most or filled % (4 * block) < block
        if not checked or filled < (k if exhausted else min(most, max(k + 4 * block, BLOCKS * block))):
            continue
        values, C = torch.linalg.eigh((T[:filled, :filled] + T[:filled, :filled].T) / 2)
        floor = ROUNDING * torch.finfo(start.dtype).eps * float(values.abs().max())
        values, C = values.flip(0), C.flip(1)
        residuals = torch.linalg.vector_norm(outside @ C[last], dim=0)
        allowed = (tolerance * values[:k].abs()).clamp(min=floor)
        below = values[k:] + residuals[k:] <= values[k - 1] + allowed[-1]  # none of them will rise above
        if ((residuals[:k] <= allowed).all() and below.all()) or filled == size:
            break
        if filled == most:
            worst = (residuals / values.abs().clamp(min=floor))[: k + 1].max()
            raise ConvergenceError(f"after {filled} products the largest relative residual is {worst:.1e}")
    values, C = values[:k], C[:, :k]
    vectors = _polished(_combined(basis, C))
    images = torch.cat([operator @ part for part in vectors.split(block, 1)], 1) / unit
    values = values.to(start.dtype)
    residuals, allowed = torch.linalg.vector_norm(images - vectors * values, dim=0), allowed.to(start.dtype)
    if not (residuals <= allowed + floor).all():
        worst = (residuals / values.abs().clamp(min=floor)).max()
        raise ConvergenceError(f"in {start.dtype} products are not exact enough: a relative residual is {worst:.1e}")
    found = Eigenpairs(values * unit, vectors, residuals * unit, torch.tensor([float(filled + k)]))
    return found, allowed * unit


def _power_of_two(image: Tensor) -> float:
    """One near the largest entry, 1 for zeros."""
    largest = float(image.abs().max())
    return 2.0 ** math.floor(math.log2(largest)) if largest else 1.0


def _orthonormal(
    block: Float[Tensor, "d b"], basis: Float[Tensor, "f d"], floor: float, generator: torch.Generator
) -> tuple[Float[Tensor, "d c"], Float[Tensor, "b b"]]:
    """Columns N, orthonormal and orthogonal to the rows of a basis, and R, with block = N R outside of the basis.

    Directions in which the block has no more than ``floor`` are rounding: random ones take their place, as far as there
    is room, c ≤ b.
    """
    N, R = _qr(block)
    U, lengths, rows = torch.linalg.svd(R)
    N, weak = N @ U.to(N.dtype), lengths <= floor
    room = len(block) - len(basis)
    N, fresh = N[:, :room], weak[:room]
    while True:
        N[:, fresh] = _normal(N, int(fresh.sum()), generator)
        N, S = _qr(N - _combined(basis, _inner(basis, N)))
        left = S.diagonal().abs()
        # Twice is enough: what a projection has taken less than half of is orthogonal to the basis.
        if not ((left < 0.5) | fresh).any():
            return N, lengths[:, None] * rows
        fresh = left < 1e-6


def _qr(block: Float[Tensor, "d b"]) -> tuple[Float[Tensor, "d b"], Float[Tensor, "b b"]]:
    """Q, and R in double precision; all is done in it, as LAPACK has four digits of long columns in single."""
    Q, R = torch.linalg.qr(block.double())
    return Q.to(block.dtype), R


def _polished(V: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """V (3 − VᵀV)/2: nearly orthonormal columns, orthonormal to the precision that they are held in."""
    gram = _inner(V.T, V)
    return V - V @ ((gram - torch.eye(V.shape[1], dtype=gram.dtype, device=gram.device)) / 2).to(V.dtype)


def _inner(A: Float[Tensor, "a d"], B: Float[Tensor, "d b"]) -> Float[Tensor, "a b"]:
    """A B, parts of it summed in double precision: a million terms of one sign in single have four right digits."""
    parts = zip(A.split(ROWS_AT_ONCE, 1), B.T.contiguous().split(ROWS_AT_ONCE, 1), strict=True)
    return sum((other @ part.T).double() for part, other in parts).T


def _combined(basis: Float[Tensor, "f d"], coefficients: Float[Tensor, "f b"]) -> Float[Tensor, "d b"]:
    """basisᵀ coefficients, from rows: the product of a transposed matrix with few columns is ten times slower."""
    return (coefficients.T.to(basis.dtype).contiguous() @ basis).T


def descending_eigh(matrix: Float[Tensor, "n n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """All eigenvalues, descending, and eigenvectors of a symmetric matrix.

    Raises
    ------
    ValueError
        If there are no entries, or some are not finite.
    """
    if not matrix.numel() or not matrix.isfinite().all():
        raise ValueError(f"eigenvalues need finite entries, got {tuple(matrix.shape)} with some that are not")
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # some matrices of low rank in single precision
        values, vectors = (part.to(matrix.dtype) for part in torch.linalg.eigh(matrix.double()))
    return values.flip(0), vectors.flip(1)
