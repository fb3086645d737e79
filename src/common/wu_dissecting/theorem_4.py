"""Two layers at initialization, as Theorems 4.1 and 4.2 of Wu et al. (2022) take them."""

from typing import NamedTuple

import torch

from common.hessian.layer import layer_hessian
from common.wu_dissecting.eigenspaces import overlap
from common.wu_dissecting.networks import classifier
from common.wu_dissecting.output_hessian import later_weights, row_space_without_sum


class Distances(NamedTuple):
    """What the theorems say goes to 0 as the width grows.

    Attributes
    ----------
    overlap
        1 − Overlap(V₁, V₂) of the top c − 1 eigenspaces of the first layer's Hessian and of its Kronecker product (5).
    closed_form
        1 − overlap of the top c − 1 eigenspace of E[M] with the rows of W⁽²⁾ less their sum.
    ratio, ratio_of_m
        λ_c/λ_{c−1} of the Hessian, (6), and of E[M], (7).
    """

    overlap: float
    closed_form: float
    ratio: float
    ratio_of_m: float


def distances_at_width(n: int, d: int, c: int, *, samples: int, generator: torch.Generator) -> Distances:
    """One draw of weights and inputs.

    Inputs max(0, N(0, 1)), W⁽¹⁾ ~ N(0, 1/d), W⁽²⁾ ~ N(0, 1/n), no biases; ReLU and cross-entropy.

    Parameters
    ----------
    n, d, c
        Numbers of hidden units, inputs and classes.
    samples
        Inputs that expectations are means of.
    generator
        Of inputs and weights, drawn in this order.

    Raises
    ------
    ValueError
        If there are fewer than 2 classes, no inputs or samples, or fewer hidden units than classes.
    """
    if not 2 <= c <= n or d < 1 or samples < 1:
        given = f"n = {n}, d = {d}, c = {c}, {samples} samples"
        raise ValueError(f"2 classes, as many hidden units, an input and a sample are needed at least, got {given}")
    X = torch.randn(samples, d, generator=generator).relu()
    W1, W2 = torch.randn(n, d, generator=generator) / d**0.5, torch.randn(c, n, generator=generator) / n**0.5
    network = classifier(f"F-{n}", (d, 1, 1), c)
    biases = {"fc1.bias": torch.zeros(n), "fc2.bias": torch.zeros(c)}
    network.load_state_dict({"fc1.weight": W1, "fc2.weight": W2} | biases)
    H = layer_hessian(network, "fc1", X)
    found = H.top_eigenpairs(c)
    values, vectors = H.output_basis
    return Distances(
        1 - overlap(found.vectors[:, : c - 1], H.kronecker_eigenpairs(c - 1)[1]),
        1 - overlap(vectors[:, : c - 1], row_space_without_sum(later_weights(network, "fc1"))),
        float(found.values[-1] / found.values[-2]),
        float(values[c - 1] / values[c - 2]),
    )
