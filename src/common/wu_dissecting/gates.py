r"""Which ReLU units are active: the law of the gates at initialization, and their means in any network.

A unit of Gaussian weights is active on both of two inputs of cosine κ with probability k₀(κ) = 1/4 + arcsin(κ)/(2π),
and of inputs that all have this cosine with one another it is active on a share q = Φ(g √(κ/(1 − κ))), g ~ N(0, 1): 1/2
on average over weights, but not for each. Wu et al. (2022) take 1/2 everywhere: Theorem 4.2, (8), (272), (273).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from scipy.special import ndtr, roots_hermitenorm
from torch import Tensor, nn

from common.wu_dissecting.networks import layer_names

#: Cosine κ of two independent rectified Gaussian inputs of many entries.
COSINE = 1 / np.pi
#: Mean and variance of max(0, N(0, 1)).
RECTIFIED = (1 / (2 * np.pi)) ** 0.5, (np.pi - 1) / (2 * np.pi)


def both_active(cosine: ArrayLike) -> np.ndarray:
    """k₀(κ) = 1/4 + arcsin(κ)/(2π): how often a unit of Gaussian weights is active on both of two inputs."""
    return np.asarray(0.25 + np.arcsin(np.clip(cosine, -1, 1)) / (2 * np.pi))


def next_cosine(cosine: ArrayLike) -> np.ndarray:
    """(√(1 − κ²) + κ (π − arccos κ))/π: cosine of two inputs after a wide ReLU layer without biases."""
    cosine = np.clip(cosine, -1, 1)
    return np.asarray((np.sqrt(1 - cosine**2) + cosine * (np.pi - np.arccos(cosine))) / np.pi)


def gate_moment(power: int, cosine: float = COSINE) -> float:
    """E[q^k] over the weights, q the share of inputs on which a unit is active; by Gauss-Hermite quadrature.

    Raises
    ------
    ValueError
        If the cosine is not in [0, 1).
    """
    if not 0 <= cosine < 1:
        raise ValueError(f"the cosine of two inputs must lie in [0, 1), got {cosine}")
    g, weights = roots_hermitenorm(64)
    return float(weights @ ndtr(g * (cosine / (1 - cosine)) ** 0.5) ** power / weights.sum())


def limit_of_overlap(cosine: float = COSINE, layers: int = 1) -> float:
    """Limit of the overlap of the top c − 1 space of E[M] with R(S) ∖ {1ᵀS}: ∏ 1/(1 + (2/π) arcsin κ_l), for every c.

    Parameters
    ----------
    cosine
        κ of the inputs of the layer.
    layers
        Of gates between its output and the logits; κ_{l+1} is :func:`next_cosine` of κ_l.
    """
    value = 1.0
    for _ in range(layers):
        value *= 0.25 / float(both_active(cosine))
        cosine = float(next_cosine(cosine))
    return value


def overlap_at_width(n: ArrayLike, c: int, cosine: float = COSINE) -> np.ndarray:
    """Mean overlap of {QWᵀa : a ⟂ 1} with R{W_i} ∖ {1ᵀW} over weights of n units, to first order in 1/n.

    o (1 + (b (c + 1) − 1)/n) with o = :func:`limit_of_overlap` and b = E[q⁴]/r² + 4r − 4 E[q³]/r, r = E[q²]; b is 0.122
    at κ = 1/π. Not in the paper, where Theorem 4.2 has 1 for it.

    Derivation: let V be k = c − 1 orthonormal contrasts of the rows of W and v₀ their normed sum, all independent
    N(0, I/n). The overlap is tr(B⁻¹(A C⁻¹Aᵀ − aaᵀ/‖v₀‖²))/k with A = VQ[V, v₀]ᵀ, a its last column, B = VQ²Vᵀ and
    C = [V, v₀][V, v₀]ᵀ. These are their means [I/2, 0], rI and I and fluctuations of order n^(−1/2). Of two of these,
    X by f(q) and Y by h(q), Σ_ij E[X_ij Y_ij] is (E[fh] k (c + 1) − E[f]E[h] k)/n within the contrasts, and E[fh] k/n
    between them and v₀. That leaves, to second order in the fluctuations, k/4r + (k (c + 1) b − k)/4rn for the trace.
    """
    r, third, fourth = (gate_moment(k, cosine) for k in (2, 3, 4))
    b = fourth / r**2 + 4 * r - 4 * third / r
    return np.asarray(limit_of_overlap(cosine) * (1 + (b * (c + 1) - 1) / np.asarray(n, dtype=float)))


def pair_kernels(
    x: Float[Tensor, "M n"], X: Float[Tensor, "N n"], layers: int
) -> Iterator[Float[Tensor, "M N"]]:  # fmt: skip
    """k = ∏ k₀(κ_l) over the first 1, 2, ... layers of gates, for every pair of inputs.

    In wide layers without biases the Jacobians G, G' of the logits by the output of the layer that takes x and x' have
    E[GG'ᵀ] = k I up to the weights' scale, k with the gates from that layer on; it is 2^(−layers) for x = x'. Cosines
    go from layer to layer by :func:`next_cosine`.
    """
    cosine = (nn.functional.normalize(x, dim=1) @ nn.functional.normalize(X, dim=1).T).numpy()
    k = np.ones_like(cosine)
    for _ in range(layers):
        k, cosine = k * both_active(cosine), next_cosine(cosine)
        yield torch.from_numpy(k)


def kernel_means(
    X: Float[Tensor, "N n"], layers: int, rows: int = 500
) -> tuple[Float[Tensor, " layers"], Float[Tensor, " layers"]]:
    """E[k] and E[k x·x'] over all pairs of inputs, k of :func:`pair_kernels`.

    Parameters
    ----------
    layers
        Number of layers of gates from the one that takes X on.
    rows
        Of the N × N kernel, held at once.
    """
    of_k, of_product = torch.zeros(2, layers, dtype=torch.float64)
    for x in X.split(rows):
        products = x @ X.T
        for layer, k in enumerate(pair_kernels(x, X, layers)):
            of_k[layer] += k.sum(dtype=torch.float64)
            of_product[layer] += (k * products).sum(dtype=torch.float64)
    return of_k / len(X) ** 2, of_product / len(X) ** 2


def overlap_at_initialization(X: Float[Tensor, "N n"], layers: int) -> float:
    """4^(−layers)/E[k], :func:`kernel_means`: what R(S) ∖ {1ᵀS} of (272) has of the top c − 1 space of E[M].

    At initialization A and the gates are uncorrelated, so that E[AG]E[AG]ᵀ = E[k AA'] is near E[k] E[A]², and
    E[AG]Sᵀ = 2^(−layers) E[A]: the rows of E[AG] span the top space, S = W⁽ᴸ⁾ ⋯ W⁽ᵖ⁺¹⁾. For inputs that all have one
    cosine it is :func:`limit_of_overlap`.

    Parameters
    ----------
    X
        Inputs of layer p.
    layers
        L − p.
    """
    return float(0.25**layers / kernel_means(X, layers)[0][-1])


def later_gates(
    network: nn.Module, layer: str, x: Float[Tensor, "N n"], rows: int = 1000
) -> Iterator[tuple[list[Bool[Tensor, "rows _"]], Float[Tensor, "rows c"]]]:
    """Gates of the fully connected layer p and of all after it but the last, and probabilities, part by part.

    Parameters
    ----------
    x
        Inputs of the layer, as its Hessian holds them.

    Raises
    ------
    ValueError
        If there is no such layer, or between it and the logits is anything but linear layers with ReLU after each.
    """
    names = layer_names(network)
    if layer not in names:
        raise ValueError(f"there is no layer {layer!r} with weights; there are {names}")
    modules = list(network.children()) if isinstance(network, nn.Sequential) else []
    behind = modules[modules.index(network.get_submodule(layer)) :] if modules else []
    pattern = "".join({nn.Linear: "l", nn.ReLU: "r"}.get(type(module), "x") for module in behind)
    if pattern != "lr" * (len(pattern) // 2) + "l":
        kinds = [type(module).__name__ for module in behind]
        raise ValueError(f"linear layers with ReLU after each are needed from {layer!r} on, got {kinds}")
    with torch.no_grad():
        for y in x.split(rows):
            gates = []
            for module in behind[:-1:2]:
                u = module(y)
                gates.append(u > 0)
                y = u.relu()
            yield gates, behind[-1](y).softmax(1)


class GateMeans(NamedTuple):
    """What :func:`gate_means` finds of a layer p and of all after it but the last.

    Attributes
    ----------
    plain
        E[D]: the share of samples on which each unit is active.
    weighted
        The same with samples weighted by tr A = 1 − ‖p‖².
    probabilities
        (N, c) of the samples.
    """

    plain: list[Float[Tensor, " _"]]
    weighted: list[Float[Tensor, " _"]]
    probabilities: Float[Tensor, "N c"]


def gate_means(network: nn.Module, layer: str, x: Float[Tensor, "N n"]) -> GateMeans:
    """Means of the gates behind the output of a layer that takes the inputs x, from one pass.

    Raises
    ------
    ValueError
        As :func:`later_gates`.
    """
    sums: list[Tensor] | None = None
    parts = []
    for gates, p in later_gates(network, layer, x):
        weights = torch.stack([torch.ones(len(p), dtype=torch.float64), 1 - p.double().square().sum(1)])
        found = [weights @ D.double() for D in gates] + [weights.sum(1, keepdim=True)]
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
        parts.append(p)
    *sums, total = sums
    plain, weighted = ([(part[k] / total[k]).to(x.dtype) for part in sums] for k in range(2))
    return GateMeans(plain, weighted, torch.cat(parts))


def gated_weights(network: nn.Module, layer: str, gates: Sequence[Float[Tensor, " _"]]) -> Float[Tensor, "c m"]:
    """S_Q = W⁽ᴸ⁾ Q⁽ᴸ⁻¹⁾ W⁽ᴸ⁻¹⁾ ⋯ Q⁽ᵖ⁾, with the gates' means on the diagonals; (272) and (273) have 1/2 in all places.

    Parameters
    ----------
    gates
        Q⁽ᵖ⁾, ..., Q⁽ᴸ⁻¹⁾, as :func:`gate_means` gives them.

    Raises
    ------
    ValueError
        If there are not as many as layers after this one.
    """
    names = layer_names(network)
    last, *later = [network.get_submodule(name).weight.detach() for name in reversed(names[names.index(layer) :])]
    if len(gates) != len(later):
        raise ValueError(f"means of the gates of {len(later)} layers are needed, got {len(gates)}")
    S = torch.eye(len(last), dtype=last.dtype)
    for W, q in zip([last, *later], reversed(gates), strict=False):  # the layer's own weights do not enter
        S = S @ W * q
    return S


def jacobian_means(
    network: nn.Module, layer: str, x: Float[Tensor, "N n"]
) -> tuple[Float[Tensor, "c m"], Float[Tensor, "c m n"]]:
    """E[G] and E[G ⊗ xᵀ], G the Jacobian of the logits by the output of a layer p and x its inputs.

    Raises
    ------
    ValueError
        As :func:`later_gates`.
    """
    names, start = layer_names(network), 0
    weights = [network.get_submodule(name).weight.detach() for name in names[names.index(layer) + 1 :]]
    first = torch.eye(network.get_submodule(names[-1]).out_features, dtype=x.dtype)
    mean, products = 0.0, 0.0
    for gates, p in later_gates(network, layer, x):
        G = first.expand(len(p), -1, -1)
        for W, D in zip(reversed(weights), reversed(gates), strict=True):
            G = G @ W * D[:, None]
        inputs = x[start : start + len(p)]
        mean = mean + G.sum(0, dtype=torch.float64)
        products, start = products + (G.flatten(1).T @ inputs).view(*G.shape[1:], -1), start + len(p)
    return (mean / len(x)).to(x.dtype), products / len(x)
