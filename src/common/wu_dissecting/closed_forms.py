"""The top c − 1 eigenspace of E[M] in the weights, as Wu et al. (2022), App G.1, print it and corrected."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.cache import cached
from common.devices import default_device
from common.hessian.layer import LayerHessian, layer_hessians
from common.wu_dissecting.eigenspaces import overlap
from common.wu_dissecting.gates import gate_means, gated_weights, overlap_at_initialization
from common.wu_dissecting.networks import layer_names
from common.wu_dissecting.output_hessian import (
    later_weights,
    mean_curvature,
    mean_gradient,
    range_of_contrasts,
    row_space_without_sum,
)
from common.wu_dissecting.schedule import Snapshot
from common.wu_dissecting.trained import Dissected, State, network_of


class ClosedForms(NamedTuple):
    """Overlaps with the top c − 1 eigenspace of E[M] of one layer, and what belongs to them.

    Attributes
    ----------
    printed
        Of R(S) ∖ {1ᵀS}, (272): 1/2 for the mean of every gate.
    gates, weighted
        Of {S_Qᵀa : a ⟂ 1}, with the means of the gates over all samples, and over samples weighted by tr A.
    gradient
        Of the rows of E[AG], which no theory of gates enters.
    explained
        Share of the trace of M in its part E[AG]ᵀ E[A]⁺ E[AG].
    predicted
        What ``printed`` is in wide layers at initialization, by the inputs of the layer alone.
    effective
        n_eff of the layer's Hessian.
    """

    printed: float
    gates: float
    weighted: float
    gradient: float
    explained: float
    predicted: float
    effective: float


def closed_forms(network: nn.Module, layer: str, H: LayerHessian, pairs: int = 2000) -> ClosedForms:
    """Closed forms of one fully connected layer, over the samples of its Hessian.

    Parameters
    ----------
    pairs
        The prediction is over all pairs of the first so many samples.

    Raises
    ------
    ValueError
        If anything but linear layers with ReLU after each is between the layer and the logits.
    """
    means = gate_means(network, layer, H.X)
    p = means.probabilities
    top = H.output_basis[1][:, : p.shape[1] - 1]
    of_gates, weighted = (gated_weights(network, layer, gates) for gates in (means.plain, means.weighted))
    gradient, p = mean_gradient(H, p).double(), nn.functional.normalize(p.double(), 1.0, 1)
    inverse = torch.linalg.pinv(mean_curvature(p), hermitian=True, rtol=1e-9)
    between = torch.trace(gradient.T @ inverse @ gradient)
    names = layer_names(network)
    behind = len(names) - 1 - names.index(layer)
    return ClosedForms(
        printed=overlap(top, row_space_without_sum(later_weights(network, layer))),
        gates=overlap(top, range_of_contrasts(of_gates)), weighted=overlap(top, range_of_contrasts(weighted)),
        gradient=overlap(top, range_of_contrasts(gradient)),
        explained=float(between / torch.trace(H.output_hessian.double())),
        predicted=overlap_at_initialization(H.X[:pairs], behind) if behind else 1.0,
        effective=H.effective_samples,
    )  # fmt: skip


def measured_closed_forms(
    name: str, classes: int, state: State, X: Float[Tensor, "N *shape"], layers: Sequence[str]
) -> dict[str, Tensor]:
    """What :func:`closed_forms_along_training` says of one network at one time, (L,) each."""
    network = network_of(name, classes, X.shape[1:], state)
    found = layer_hessians(network, layers, X.to(default_device()))
    network = network.cpu()
    rows = [closed_forms(network, layer, found.pop(layer).to("cpu")) for layer in layers]
    columns = torch.tensor(rows, dtype=torch.float64).T.contiguous()
    return dict(zip(ClosedForms._fields, columns, strict=True))


def closed_forms_along_training(case: Dissected, layers: Sequence[str], snapshots: Sequence[Snapshot]) -> ClosedForms:
    """Closed forms of fully connected layers of all networks at K times of the training, kept in files.

    Parameters
    ----------
    snapshots
        Kept epochs, and over how many training samples E[M] is.

    Returns
    -------
    ClosedForms
        Of arrays (K, E, L).
    """
    fixed = {"name": case.name, "classes": case.classes, "layers": list(layers)}
    found = [
        [
            cached(
                measured_closed_forms, fixed | {"X": case.X[: images or None], "state": case.ensemble.state(k, epoch)}
            )
            for k in range(case.members)
        ]
        for epoch, images in snapshots
    ]
    return ClosedForms(*(np.array([[one[key].numpy() for one in row] for row in found]) for key in ClosedForms._fields))
