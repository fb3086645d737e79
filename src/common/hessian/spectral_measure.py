"""Spectra of Hessians too large to form, by the Lanczos algorithm of curvlinops, and how symmetric they are.

A random start vector v gives the measure Σ_k ω_k δ(θ_k) whose moments up to 2m − 1 are those of vᵀHʲv: on average
over v, the spectral measure of H. Start vectors are the replicates that error bars are over.
"""

from dataclasses import dataclass

import numpy as np
import torch
from curvlinops import HessianLinearOperator
from curvlinops.papyan2020traces.spectrum import fast_lanczos, lanczos_approximate_spectrum_from_iter
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from common.li_adaptive.networks import BatchStandardize
from common.li_adaptive.training import HingeLoss, outputs


class ZeroOperator:
    """The Hessian of a risk that is zero around the point: every sample lies beyond the margin."""

    def __init__(self, dimension: int, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = (dimension, dimension), dtype, device

    def __matmul__(self, v: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(v)


class Scaled:
    """``factor`` times an operator on flat vectors."""

    def __init__(self, operator: object, factor: float):
        self.operator, self.factor = operator, factor
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with a flat vector."""
        return (self.operator @ v) * self.factor


class BipartitePart:
    """(H − S H S)/2 with S = ±1 alternating from layer to layer: only the blocks between odd and even layers.

    Its spectrum is symmetric exactly, since S maps it to its negative.
    """

    def __init__(self, operator: object, network: nn.Module):
        self.operator = operator
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        signs, layer = [], 0
        for parameter in network.parameters():
            layer += parameter.ndim > 1  # a weight opens a layer, its bias follows
            signs.append(torch.full((parameter.numel(),), (-1.0) ** layer))
        self.signs = torch.cat(signs).to(self.device, self.dtype)

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with a flat vector."""
        return (self.operator @ v - self.signs * (self.operator @ (self.signs * v))) / 2


class TridiagonalGOE:
    """A tridiagonal matrix whose eigenvalues have the law of those of the Gaussian orthogonal ensemble.

    Dumitriu and Edelman (2002): normal entries of variance 2 on the diagonal, chi variables with N − 1, ..., 1 degrees
    of freedom beside it; here divided by √N. As large as wanted, and symmetric in law.
    """

    def __init__(self, dimension: int, seed: int):
        rng = np.random.default_rng(seed)
        self.diagonal = torch.from_numpy(rng.standard_normal(dimension) * np.sqrt(2 / dimension))
        self.beside = torch.from_numpy(np.sqrt(rng.chisquare(np.arange(dimension - 1, 0, -1)) / dimension))
        self.shape, self.dtype, self.device = (dimension, dimension), torch.float64, torch.device("cpu")

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with a flat vector."""
        product = self.diagonal * v
        product[:-1] += self.beside * v[1:]
        product[1:] += self.beside * v[:-1]
        return product


def hinge_hessian(network: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 256):
    """Hessian of the mean hinge loss of ``network``, dropout off, as a linear operator on flat vectors.

    A sample beyond its margin adds zero and is left out, unless the network standardizes batches: then all samples are
    one batch, as one changes the outputs of all others.

    Parameters
    ----------
    x, y
        Images and labels ±1.
    batch_size
        Samples that pass through the network at once.

    Returns
    -------
    operator with ``@``, ``shape``, ``dtype``, ``device``
        :class:`ZeroOperator` if the Hessian vanishes: no sample inside its margin, or a network whose units are dead.
    """
    network.eval()
    parameters = [p for p in network.parameters() if p.requires_grad]
    n = len(y)
    active = 1 - y * outputs(network, x) > 0
    if not active.any():
        return ZeroOperator(sum(p.numel() for p in parameters), parameters[0].dtype, x.device)
    if any(isinstance(module, BatchStandardize) for module in network.modules()):
        data = [(x, y)]
    else:
        x, y = x[active], y[active]
        data = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    operator = HessianLinearOperator(network, HingeLoss(), parameters, data, check_deterministic=False)
    scaled = Scaled(operator, len(y) / n)
    probe = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(0)).to(x.device, operator.dtype)
    return scaled if (scaled @ probe).any() else ZeroOperator(operator.shape[0], operator.dtype, x.device)


def formed_hessian(network: nn.Module, x: Tensor, y: Tensor) -> Float[Tensor, "P P"]:
    """The whole Hessian of the mean hinge loss, by torch.func.hessian: for networks of some hundred parameters."""
    names, shapes, sizes = zip(*((n, p.shape, p.numel()) for n, p in network.named_parameters()), strict=True)
    loss = HingeLoss()

    def risk(theta: Tensor) -> Tensor:
        parts = {n: t.view(s) for n, t, s in zip(names, theta.split(sizes), shapes, strict=True)}
        return loss(torch.func.functional_call(network, parts, (x,)), y)

    return torch.func.hessian(risk)(nn.utils.parameters_to_vector(network.parameters()).detach())


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
        """Share of λ < −``floor`` in the weight of |λ| > ``floor``; NaN where nothing is so large."""
        negative, positive = (
            (self.weights * (sign * self.nodes > floor)).sum(1).numpy() for sign in (-1, 1)
        )
        total = negative + positive
        return np.where(total > 0, negative / np.where(total > 0, total, 1), np.nan)

    def density(self, *, points: int = 1024, kappa: float = 3.0, margin: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
        """Grid and density of the mean measure, smoothed by Gaussian bumps: Algorithm 3 of Papyan in curvlinops.

        Returns
        -------
        (points,) and (points,)
        """
        boundaries = float(self.nodes.min()), float(self.nodes.max())
        curves = [
            lanczos_approximate_spectrum_from_iter((t, w.sqrt()[None]), boundaries, points, kappa, margin)
            for t, w in zip(self.nodes, self.weights, strict=True)
        ]
        return curves[0][0].numpy(), torch.stack([density for _, density in curves]).mean(0).numpy()


def asymmetry(nodes: Float[np.ndarray, " m"], weights: Float[np.ndarray, " m"]) -> float:
    """∫|F(x) − F̃(x)| dx / (2 ∫|x| dF) of a discrete measure F, F̃ its mirror image: 0 if symmetric, at most 1."""
    size = np.abs(nodes) @ weights
    if size == 0:
        return 0.0
    places = np.concatenate([nodes, -nodes])
    order = np.argsort(places)
    difference = np.cumsum(np.concatenate([weights, -weights])[order])[:-1]
    return float(np.abs(difference) @ np.diff(places[order]) / (2 * size))


def edge_eigenvalues(
    operator: object, count: int, *, seed: int, tolerance: float = 1e-4
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """The ``count`` lowest eigenvalues, ascending, and the ``count`` highest, descending, by SciPy's ``eigsh``.

    They belong to the matrix and have no noise of start vectors.

    Parameters
    ----------
    tolerance
        Relative accuracy of the eigenvalues.
    """
    if isinstance(operator, ZeroOperator):
        return np.zeros(count), np.zeros(count)
    size = operator.shape[0]

    def product(v: np.ndarray) -> np.ndarray:
        vector = torch.from_numpy(np.ascontiguousarray(v.reshape(-1))).to(operator.device, operator.dtype)
        return (operator @ vector).cpu().numpy()

    dtype = np.dtype(str(operator.dtype).removeprefix("torch."))
    scipy_operator = LinearOperator((size, size), matvec=product, dtype=dtype)
    start = np.random.default_rng(seed).standard_normal(size).astype(dtype)
    values = eigsh(scipy_operator, 2 * count, which="BE", v0=start, tol=tolerance, return_eigenvectors=False)
    values = np.sort(values.astype(float))
    return values[:count], values[:-count - 1 : -1]


def lanczos_measures(operator: object, *, iterations: int, starts: int, seed: int) -> LanczosMeasures:
    """The measures of ``starts`` random start vectors, Algorithm 2 of Papyan without reorthogonalization.

    Rounding repeats eigenvalues that have converged and divides their weight among the copies: nodes are not
    eigenvalues, but the measure is right.

    Parameters
    ----------
    operator
        Symmetric; has ``@``, ``shape``, ``dtype`` and ``device``.
    iterations
        m, at most the dimension.
    seed
        Of the start vectors; torch's global generator is left as it is.

    Raises
    ------
    ValueError
        If the operator is smaller than ``iterations``.
    FloatingPointError
        If a product is not finite.
    """
    if not 2 <= iterations <= operator.shape[0]:
        raise ValueError(f"Lanczos iterations must be 2 to the dimension {operator.shape[0]}, got {iterations}")
    if isinstance(operator, ZeroOperator):
        weights = torch.full((starts, iterations), 1 / iterations, dtype=torch.float64)
        return LanczosMeasures(torch.zeros_like(weights), weights)
    nodes, weights = [], []
    devices = [operator.device] if operator.device.type == "cuda" else []
    for start in range(starts):
        with torch.random.fork_rng(devices):
            # a stream of its own: the weights of a network may come from a generator with the same seed
            torch.manual_seed(int(np.random.SeedSequence((seed, start, 1950)).generate_state(1)[0]))
            ritz, vectors = fast_lanczos(operator, iterations)
        if not ritz.isfinite().all():
            raise FloatingPointError("a product with the Hessian is not finite")
        nodes.append(ritz.double().cpu())
        weights.append(vectors[0].double().cpu().square())
    stacked = torch.stack(weights)
    return LanczosMeasures(torch.stack(nodes), stacked / stacked.sum(1, keepdim=True))
