"""The factors of Kronecker's product alone: E[xxᵀ] of all layers, and both along training; kept in files, by network.

Wu et al. (2022), App F.1, Tables 6, 7, and App F.4, Figures 19, 20.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from common.cache import cached
from common.devices import default_device
from common.hessian.layer import layer_hessian
from common.wu_dissecting.decoupling import input_moments
from common.wu_dissecting.eigenspaces import dominance_of_mean
from common.wu_dissecting.networks import layer_names
from common.wu_dissecting.trained import Dissected, State, network_of


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
