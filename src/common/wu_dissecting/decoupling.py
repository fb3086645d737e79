"""The decoupling conjecture, :math:`E[M\\otimes xx^\\top]\\approx E[M]\\otimes E[xx^\\top]`: Wu et al. (2022), (3).

And E[xxᵀ] alone, over all samples, from forward passes (App F.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.hessian.block_lanczos import ROUNDING, descending_eigh
from common.hessian.convergence import ConvergenceError
from common.hessian.layer import LayerHessian, WeightSharingHessian, effective_number
from common.hessian.modes import evaluating, in_chunks
from common.hessian.operators import KroneckerProduct
from common.hessian.spectral_measure import extreme_eigenpairs

#: Entries of the unfolded inputs of a layer that are held at once.
UNFOLDED_AT_ONCE = 2**25


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


@dataclass(frozen=True)
class InputMoments:
    """First and second moments of a layer's inputs over samples, in double precision: App A.2, F.1.

    Attributes
    ----------
    autocorrelation
        (n, n) E[XXᵀ], X the n × P inputs at all P positions; E[xxᵀ] of a fully connected layer, P = 1.
    mean
        (n, P) E[X].
    effective
        n_eff of E[XXᵀ]: (Σw)²/Σw², w = ‖X‖²_F of every sample.
    """

    autocorrelation: Float[Tensor, "n n"]
    mean: Float[Tensor, "n P"]
    effective: float

    @cached_property
    def input_basis(self) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
        """Eigenvalues of E[XXᵀ], descending, and eigenvectors."""
        return descending_eigh(self.autocorrelation)

    @cached_property
    def mean_input(self) -> Float[Tensor, " n"]:
        """First left singular vector of E[X], E[x]/‖E[x]‖ up to its sign if P = 1."""
        return torch.linalg.svd(self.mean, full_matrices=False).U[:, 0]

    @cached_property
    def mean_over_covariance(self) -> float:
        """‖E[X]E[X]ᵀ‖/‖Σ‖, Σ = E[XXᵀ] − E[X]E[X]ᵀ: the right side of (264) without its −1.

        λ₁/λ₂ is never below it if P = 1 (Weyl). With more positions E[X]E[X]ᵀ has a second eigenvalue, and may be.
        """
        of_mean = self.mean @ self.mean.T
        return float(torch.linalg.eigvalsh(of_mean)[-1] / torch.linalg.eigvalsh(self.autocorrelation - of_mean)[-1])


@torch.no_grad()
def input_moments(
    network: nn.Module, layers: Sequence[str], X: Float[Tensor, "N *shape"], *, at_once: int = 500
) -> dict[str, InputMoments]:
    """Moments of the inputs of several layers, linear or convolutions with zeros around, from one pass of the samples.

    Raises
    ------
    ValueError
        If a name is none of such a layer, or there are no layers or samples.
    """
    every = dict(network.named_modules())
    modules = {layer: every.get(layer) for layer in layers}
    for layer, module in modules.items():
        convolution = isinstance(module, nn.Conv2d) and module.groups == 1 and not isinstance(module.padding, str)
        if not isinstance(module, nn.Linear) and not (convolution and module.padding_mode == "zeros"):
            raise ValueError(f"{layer!r} is no linear layer and no convolution of one group with zeros around")
    if not modules or not len(X):
        raise ValueError(f"layers and samples are needed, got {list(layers)} and {len(X)} samples")
    second: dict[str, Tensor | int] = dict.fromkeys(layers, 0)
    first: dict[str, Tensor | int] = dict.fromkeys(layers, 0)
    weights: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def note(layer: str, module: nn.Module, inputs: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size, module.dilation, module.padding, module.stride
            size = inputs[0].numel() * module.kernel_size[0] * module.kernel_size[1]
            parts = [nn.functional.unfold(x, *kernel) for x in inputs.split(max(1, UNFOLDED_AT_ONCE // size))]
        else:
            parts = [inputs[:, :, None].double()]  # cheap there
        for part in parts:
            flat = part.transpose(0, 1).flatten(1)
            second[layer] = second[layer] + (flat @ flat.T).double()
            first[layer] = first[layer] + part.sum(0, dtype=torch.float64)
            weights[layer].append(part.square().sum((1, 2), dtype=torch.float64))

    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, layer=layer: note(layer, module, inputs[0]))
        for layer, module in modules.items()
    ]
    try:
        with evaluating(network):
            for x in in_chunks(X, at_once):
                network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        layer: InputMoments(
            (second[layer] / len(X)).cpu(), (first[layer] / len(X)).cpu(), effective_number(torch.cat(weights[layer]))
        )
        for layer in layers
    }
