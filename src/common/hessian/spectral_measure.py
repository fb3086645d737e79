"""Spectral measures of symmetric matrices too large to form, by the Lanczos algorithm, and how symmetric they are.

A random start vector v gives the measure Σ_k ω_k δ(θ_k) whose moments up to 2m − 1 are those of vᵀHʲv: on average
over v, the spectral measure of H. Start vectors are the replicates that error bars are over.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor

from common.hessian.convergence import ConvergenceError
from common.hessian.operators import PyTorchLinearOperator


@dataclass(frozen=True)
class LanczosMeasures:
    """One discrete measure for each start vector.

    Attributes
    ----------
    nodes, weights
        (R, m) float64; the weights of a row add up to 1.
    """

    nodes: Float[Tensor, "R m"]
    weights: Float[Tensor, "R m"]

    @property
    def bound(self) -> float:
        """Largest modulus of a node: the spectral norm once Lanczos has converged there."""
        return float(self.nodes.abs().max())

    def moments(self, power: int) -> Float[np.ndarray, " R"]:
        """E λᵖ by each start vector."""
        return (self.weights * self.nodes**power).sum(1).numpy()

    def skewness(self) -> Float[np.ndarray, " R"]:
        """E λ³ / (E λ²)^{3/2}, the second moment the mean over start vectors; 0 for a zero matrix."""
        second = self.moments(2).mean()
        return self.moments(3) / second**1.5 if second > 0 else np.zeros(len(self.nodes))

    def asymmetry(self) -> Float[np.ndarray, " R"]:
        """Wasserstein distance between each measure and its mirror image, divided by 2 E|λ|.

        0 for a symmetric measure, 1 for one on one side of zero.
        """
        return np.array([asymmetry(*pair) for pair in zip(self.nodes.numpy(), self.weights.numpy(), strict=True)])

    def pooled_asymmetry(self) -> float:
        """The same for the mean of all measures, which has less noise to be asymmetric by."""
        return asymmetry(self.nodes.numpy().ravel(), self.weights.numpy().ravel() / len(self.nodes))

    def negative_share(self, floor: float) -> Float[np.ndarray, " R"]:
        """Share of λ < −``floor`` in the weight of |λ| > ``floor`` ≥ 0; NaN where nothing is so large."""
        if not floor >= 0:
            raise ValueError(f"the floor must not be negative, got {floor}")
        negative, positive = ((self.weights * (sign * self.nodes > floor)).sum(1).numpy() for sign in (-1, 1))
        total = negative + positive
        return np.where(total > 0, negative / np.where(total > 0, total, 1), np.nan)

    def density(
        self, *, points: int = 1024, kappa: float = 3.0, margin: float = 0.05
    ) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
        """Grid and density of the mean measure, smoothed by Gaussian bumps: Papyan (2020), Algorithm 3 and App D.2.

        Parameters
        ----------
        kappa
            A bump falls to 1/κ of its height half way to the next node, were m nodes equidistant.
        margin
            What the grid has on either side beyond the nodes, in units of their range.

        Raises
        ------
        ValueError
            If there are fewer than two points or iterations, κ is at most 1, the margin is negative, or all nodes are
            equal, as those of the zero matrix.
        """
        if points < 2 or self.nodes.shape[1] < 2 or not kappa > 1 or not margin >= 0:
            given = f"{points} points, {self.nodes.shape[1]} iterations, κ = {kappa}, margin {margin}"
            raise ValueError(f"a density needs 2 points and iterations, κ > 1 and no negative margin, got {given}")
        if self.nodes.min() == self.nodes.max():
            raise ValueError(f"all nodes are {self.bound:g}: the measure of a point has no density")
        nodes, weights = self.nodes.numpy().ravel(), self.weights.numpy().ravel() / len(self.nodes)
        padding = margin * (nodes.max() - nodes.min())
        grid = np.linspace(nodes.min() - padding, nodes.max() + padding, points)
        sigma = (grid[-1] - grid[0]) / (self.nodes.shape[1] - 1) / np.sqrt(8 * np.log(kappa))
        bumps = np.exp(-(((grid - nodes[:, None]) / sigma) ** 2) / 2) / (np.sqrt(2 * np.pi) * sigma)
        return grid, weights @ bumps


def asymmetry(nodes: Float[np.ndarray, " m"], weights: Float[np.ndarray, " m"]) -> float:
    """∫|F(x) − F̃(x)| dx / (2 ∫|x| dF) of a discrete measure F, F̃ its mirror image: 0 if symmetric, at most 1."""
    size = np.abs(nodes) @ weights
    if size == 0:
        return 0.0
    places = np.concatenate([nodes, -nodes])
    order = np.argsort(places)
    difference = np.cumsum(np.concatenate([weights, -weights])[order])[:-1]
    return float(np.abs(difference) @ np.diff(places[order]) / (2 * size))


def extreme_eigenpairs(
    operator: PyTorchLinearOperator, k: int, which: str, *, seed: int, tolerance: float
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "d k"]]:
    """Eigenvalues at an end of the spectrum, ascending, and their vectors, by SciPy's ``eigsh``.

    Of a matrix that has no more of them all are taken, by dense linear algebra.

    Parameters
    ----------
    k, which
        How many, and of which end, as ``eigsh`` has it.
    seed
        Of the start vector.
    tolerance
        Relative accuracy of the eigenvalues.

    Raises
    ------
    FloatingPointError
        If a product is not finite.
    ConvergenceError
        If they do not converge.
    """
    dtype = np.dtype(str(operator.dtype).removeprefix("torch."))
    d, rng = operator.shape[0], np.random.default_rng(seed)
    D, start = operator.to_scipy(dtype), rng.standard_normal(d).astype(dtype)
    few = k >= d
    image = D @ (np.eye(d, dtype=dtype) if few else start)
    if not np.isfinite(image).all():
        raise FloatingPointError("a product with the operator is not finite")
    if few:
        return np.linalg.eigh((image + image.T) / 2)
    if not image.any():  # ARPACK does not take the zero matrix
        return np.zeros(k, dtype), np.eye(d, k, dtype=dtype)
    try:
        values, vectors = eigsh(D, k, which=which, v0=start, tol=tolerance, rng=rng)
    except ArpackNoConvergence as error:
        raise ConvergenceError(f"eigenvalues do not converge: {error}".partition("\n")[0]) from error
    order = values.argsort()
    return values[order], vectors[:, order]


def edge_eigenvalues(
    operator: PyTorchLinearOperator, count: int, *, seed: int, tolerance: float = 1e-4
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """The ``count`` lowest eigenvalues, ascending, and the ``count`` highest, descending: :func:`extreme_eigenpairs`.

    They belong to the matrix and have no noise of start vectors.

    Parameters
    ----------
    tolerance
        Relative accuracy of the eigenvalues.

    Raises
    ------
    ValueError
        If ``count`` is not between 1 and the dimension.
    FloatingPointError, ConvergenceError
        As :func:`extreme_eigenpairs`.
    """
    if not 1 <= count <= operator.shape[0]:
        raise ValueError(f"the count of eigenvalues must lie in 1..{operator.shape[0]}, got {count}")
    values = extreme_eigenpairs(operator, 2 * count, "BE", seed=seed, tolerance=tolerance)[0].astype(float)
    return values[:count], values[: -count - 1 : -1]


def lanczos(
    operator: PyTorchLinearOperator, start: Float[Tensor, " d"], iterations: int
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Nodes, ascending, and weights, float64, of the measure of one start vector: Papyan (2020), Algorithm 2.

    That is m three-term recurrences without reorthogonalization, as curvlinops has them behind its densities. Rounding
    repeats eigenvalues that have converged and divides their weight among the copies: nodes are not eigenvalues, but
    the measure is right. Where the recurrence ends early, the nodes that are left have no weight.

    Parameters
    ----------
    operator
        Symmetric, d × d.
    iterations
        m.

    Raises
    ------
    ValueError
        If there is no iteration, or the start vector is not of the operator's type and length, or zero.
    FloatingPointError
        If a product is not finite.
    """
    if iterations < 1:
        raise ValueError(f"at least one Lanczos iteration is needed, got {iterations}")
    if start.shape != operator.shape[:1] or start.dtype != operator.dtype or not start.any():
        needed = f"({operator.shape[0]},) {operator.dtype}"
        raise ValueError(f"a start vector {needed} is needed, not zero; got {tuple(start.shape)} {start.dtype}")
    alpha, beta = start.new_zeros(iterations), start.new_zeros(iterations - 1)
    v, before = start / torch.linalg.vector_norm(start), None
    for m in range(iterations):
        new = operator @ v if m == 0 else operator @ v - beta[m - 1] * before
        alpha[m] = (new * v).sum()
        new = new - alpha[m] * v
        if m == iterations - 1:
            break
        beta[m] = torch.linalg.vector_norm(new)
        if beta[m] == 0:
            break
        before, v = v, new / beta[m]
    T = torch.diag_embed(alpha) + torch.diag_embed(beta, offset=1) + torch.diag_embed(beta, offset=-1)
    if not T.isfinite().all():
        raise FloatingPointError("a product with the operator is not finite")
    nodes, vectors = torch.linalg.eigh(T)
    return nodes.double(), vectors[0].double().square()


def lanczos_measures(operator: PyTorchLinearOperator, *, iterations: int, starts: int, seed: int) -> LanczosMeasures:
    """The measures of ``starts`` random start vectors, each by :func:`lanczos`.

    Parameters
    ----------
    operator
        Symmetric.
    iterations
        m, at most the dimension.
    seed
        Of the start vectors.

    Raises
    ------
    ValueError
        If the operator is smaller than ``iterations``, or there are no start vectors.
    FloatingPointError
        If a product is not finite.
    """
    dimension, device = operator.shape[0], operator.device
    if not 2 <= iterations <= dimension:
        raise ValueError(f"Lanczos iterations must be 2 to the dimension {dimension}, got {iterations}")
    if starts < 1:
        raise ValueError(f"at least one start vector is needed, got {starts}")
    found = []
    for start in range(starts):
        # a stream of its own: the weights of a network may come from a generator with the same seed
        own = int(np.random.SeedSequence((seed, start, 1950)).generate_state(1)[0])
        vector = torch.randn(
            dimension, generator=torch.Generator(device).manual_seed(own), device=device, dtype=operator.dtype
        )
        found.append([part.cpu() for part in lanczos(operator, vector, iterations)])
    nodes, weights = (torch.stack(part) for part in zip(*found, strict=True))
    return LanczosMeasures(nodes, weights / weights.sum(1, keepdim=True))
