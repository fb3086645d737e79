"""The factors of Kronecker's product alone: E[xxᵀ] of all layers, and both along training; kept in files, by network.

Wu et al. (2022), App F.1, Tables 6, 7, and App F.4, Figures 19, 20.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.cache import cached
from common.devices import default_device
from common.hessian.block_lanczos import descending_eigh
from common.hessian.layer import effective_number, layer_hessian
from common.hessian.modes import evaluating, in_chunks
from common.wu_dissecting.eigenspaces import dominance_of_mean
from common.wu_dissecting.networks import layer_names
from common.wu_dissecting.trained import Dissected, State, network_of

#: Entries of the unfolded inputs of a layer that are held at once.
UNFOLDED_AT_ONCE = 2**25


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


def measured_inputs(name: str, classes: int, state: State, X: Float[Tensor, "N *shape"]) -> dict[str, Tensor]:
    """What :func:`dominance_of_inputs` says of one network; (L,) each, of all L layers but the first."""
    network, device = network_of(name, classes, X.shape[1:], state), default_device()
    moments = input_moments(network, layer_names(network)[1:], X.to(device))
    rows = [(*dominance_of_mean(one), one.mean_over_covariance, one.effective) for one in moments.values()]
    columns = torch.tensor(rows, dtype=torch.float64).T
    return dict(zip(("dot", "ratio", "of_mean", "effective"), columns.contiguous(), strict=True))


def dominance_of_inputs(case: Dissected, epoch: int | None = None) -> dict[str, Float[np.ndarray, "E L"]]:
    """How much the mean of the inputs outweighs their covariance in all layers but the first: App F.1, Tables 6, 7.

    Over all training samples; kept in files, by network.

    Parameters
    ----------
    epoch
        After which; the last by default.

    Returns
    -------
    dict
        Of E networks and L layers, in the order of ``case.layers[1:]``: ``dot``, (v₁ᵀÊ[x])²; ``ratio``, λ₁/λ₂;
        ``of_mean``, ‖E[x]E[x]ᵀ‖/‖Σ‖; ``effective``, n_eff of E[xxᵀ].
    """
    fixed = {"name": case.name, "classes": case.classes, "X": case.X}
    states = [case.ensemble.state(member, epoch) for member in range(case.members)]
    found = [cached(measured_inputs, fixed | {"state": state}) for state in states]
    return {part: np.array([one[part].numpy() for one in found]) for part in found[0]}


def measured_factors(
    name: str, classes: int, state: State, X: Float[Tensor, "N *shape"], layer: str, samples: int
) -> dict[str, Tensor]:
    """What :func:`factors_along_training` says of one network at one time."""
    network, device = network_of(name, classes, X.shape[1:], state), default_device()
    X = X.to(device)
    (moments,) = input_moments(network, [layer], X).values()
    H = layer_hessian(network, layer, X[: samples or None])
    return {
        "gamma": moments.input_basis[0], "tau": H.output_basis[0].double().cpu(),
        "effective": torch.tensor(H.effective_samples),
    }  # fmt: skip


def factors_along_training(
    case: Dissected, layer: str, samples: int, epochs: Sequence[int]
) -> dict[str, Float[np.ndarray, "K E *_"]]:
    """Eigenvalues of the factors of one layer's Hessian at K times of the training: App F.4, Figures 19, 20.

    Kept in files, by network and time.

    Parameters
    ----------
    samples
        The first so many training samples make E[M], 0 for all; all of them make E[xxᵀ].
    epochs
        Kept ones.

    Returns
    -------
    dict
        ``gamma`` (K, E, n) of E[xxᵀ] and ``tau`` (K, E, m) of E[M], descending; ``effective`` (K, E), n_eff of the
        layer's Hessian over ``samples``.
    """
    fixed = {"name": case.name, "classes": case.classes, "X": case.X, "layer": layer, "samples": samples}
    found = [
        [cached(measured_factors, fixed | {"state": case.ensemble.state(k, epoch)}) for k in range(case.members)]
        for epoch in epochs
    ]
    return {part: np.array([[one[part].numpy() for one in row] for row in found]) for part in found[0][0]}
