"""Output Hessians: what the full Hessian has of them, and their form in the weights: Wu et al. (2022), App C, G.1."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.hessian.layer import LayerHessian
from common.wu_dissecting.networks import layer_names


@dataclass(frozen=True)
class OutputApproximation:
    """Eigenpairs of the full Hessian from those of the full output Hessian.

    Attributes
    ----------
    values
        (k,) σ_i ‖w_i‖², (263), descending.
    basis
        (P, k) the w_i/‖w_i‖ of (261), (262) in that order, orthonormalized.
    """

    values: Float[Tensor, " k"]
    basis: Float[Tensor, "P k"]


def output_approximation(layers: Sequence[LayerHessian], k: int) -> OutputApproximation:
    """App C for a fully connected network with biases.

    Parameters
    ----------
    layers
        Of all layers from the input on, over the same samples.
    k
        Number of eigenpairs, at most the number of all outputs.

    Raises
    ------
    ValueError
        If there are no layers, they are over different samples, or have not so many outputs.
    """
    _check_samples(layers)
    outputs = sum(layer.B.shape[1] for layer in layers)
    if not 1 <= k <= outputs:
        raise ValueError(f"the number k of eigenpairs must lie in 1..{outputs}, that of all outputs; got {k}")
    N = len(layers[0].X)
    stacked = torch.cat([layer.B for layer in layers], 1)  # the factors of the full output Hessian
    flat = stacked.transpose(0, 1).reshape(stacked.shape[1], -1)
    sigma, U = torch.linalg.eigh(flat @ flat.T / N)
    sigma, U = sigma[-k:].flip(0), U[:, -k:].flip(1)
    parts = []
    for layer, u in zip(layers, U.split([layer.B.shape[1] for layer in layers]), strict=True):
        parts += [(u[:, None] * layer.X.mean(0)[:, None]).reshape(-1, k), u]  # weights, and biases whose input is 1
    w = torch.cat(parts)
    values = sigma * w.square().sum(0)
    order = values.argsort(descending=True)
    return OutputApproximation(values[order], torch.linalg.qr(w[:, order]).Q)


def _check_samples(layers: Sequence[LayerHessian]) -> None:
    if len({len(layer.X) for layer in layers}) != 1:
        raise ValueError(f"layers over the same samples are needed, got {[len(layer.X) for layer in layers]} samples")


def gauss_newton_forms(layers: Sequence[LayerHessian], V: Float[Tensor, "P k"]) -> Float[Tensor, " k"]:
    """vᵀ E[FᵀAF] v for each column: what the first term of (251) contributes to vᵀHv.

    ``layers`` as in :func:`output_approximation`.

    Raises
    ------
    ValueError
        If the layers have no, or other, samples, or other parameters than V has rows.
    """
    _check_samples(layers)
    count = sum(layer.shape[0] + layer.B.shape[1] for layer in layers)
    if V.ndim != 2 or len(V) != count:
        raise ValueError(f"V needs a row for each of {count} weights and biases, ({count}, k); got {tuple(V.shape)}")
    V = V.to(layers[0].X.dtype)
    k, total, start = V.shape[1], 0, 0
    for layer in layers:
        m, n = layer.B.shape[1], layer.X.shape[1]
        weights, biases = V[start : start + m * n].reshape(m, n, k), V[start + m * n : start + m * n + m]
        outputs = torch.einsum("zn,mnk->zmk", layer.X, weights) + biases
        total = total + layer.B.mT @ outputs
        start += m * n + m
    return total.square().sum((0, 1)) / len(total)


def halved_products(weights: Sequence[Float[Tensor, "_ _"]]) -> list[Float[Tensor, "c _"]]:
    """S⁽ᵖ⁾/2^(L − p) of all layers p = 1, ..., L, with S⁽ᵖ⁾ = W⁽ᴸ⁾ ⋯ W⁽ᵖ⁺¹⁾ the product of the later weights.

    Around A they give M̃⁽ᵖ⁾ = 4^(p − L) S⁽ᵖ⁾ᵀ A S⁽ᵖ⁾, (272): about the output Hessian of a network at initialization,
    where half of the units after each layer are active.

    Parameters
    ----------
    weights
        W⁽¹⁾, ..., W⁽ᴸ⁾ of fully connected layers, without biases; the first one does not enter.

    Raises
    ------
    ValueError
        If there are none, or one does not take what the one before gives.
    """
    chained = all(b.ndim == 2 and b.shape[1] == len(a) for a, b in pairwise(weights))
    if not len(weights) or not chained:
        given = [tuple(W.shape) for W in weights]
        raise ValueError(f"weights of fully connected layers are needed, as many columns as rows before; got {given}")
    products = [torch.eye(len(weights[-1]), dtype=weights[-1].dtype, device=weights[-1].device)]
    for W in reversed(weights[1:]):
        products.append(products[-1] @ W / 2)
    return products[::-1]


def later_weights(network: nn.Module, layer: str) -> Float[Tensor, "c m"]:
    """S⁽ᵖ⁾/2^(L − p), :func:`halved_products`, of a fully connected layer by its name.

    Raises
    ------
    ValueError
        If there is no such layer, or a later one is not fully connected.
    """
    names = layer_names(network)
    if layer not in names:
        raise ValueError(f"there is no layer {layer!r} with weights; there are {names}")
    later = names[names.index(layer) :]
    return halved_products([network.get_submodule(name).weight.detach() for name in later])[0]


def row_space_without_sum(S: Float[Tensor, "c m"]) -> Float[Tensor, "m c-1"]:
    """Orthonormal basis of R(S) ∖ {1ᵀS}, the orthogonal complement of the sum of the rows of S in their span.

    App G.1 and Theorem 4.2 put it in the place of the top c − 1 eigenspace of E[M]. The range of SᵀAS of (272) differs
    from it a little unless the rows are orthonormal.

    Raises
    ------
    ValueError
        If there are more rows than columns, which are not independent, or some are not finite.
    """
    if len(S) > S.shape[1] or not S.isfinite().all():
        raise ValueError(f"S needs finite rows, no more than columns; got the shape {tuple(S.shape)}")
    total = nn.functional.normalize(S.sum(0), dim=0)
    return torch.linalg.svd(S - (S @ total)[:, None] * total, full_matrices=False).Vh[: len(S) - 1].T


def range_of_contrasts(S: Float[Tensor, "c m"]) -> Float[Tensor, "m c-1"]:
    """Orthonormal basis of {Sᵀa : a ⟂ 1}, the range of SᵀAS for any A of rank c − 1 with A1 = 0.

    With the gates in S it is the top c − 1 eigenspace of E[M] in the limit of wide layers, at initialization; with
    S = E[AG], whose columns have sum 0, near the minimum too. :func:`row_space_without_sum` is another space unless the
    rows are orthonormal.

    Raises
    ------
    ValueError
        If there are more rows than columns, or some are not finite.
    """
    if len(S) > S.shape[1] or not S.isfinite().all():
        raise ValueError(f"S needs finite rows, no more than columns; got the shape {tuple(S.shape)}")
    return torch.linalg.svd(S - S.mean(0), full_matrices=False).Vh[: len(S) - 1].T


def mean_curvature(p: Float[Tensor, "*more N c"]) -> Float[Tensor, "*more c c"]:
    """E[A], A = diag(p) − ppᵀ, over samples of probabilities."""
    return torch.diag_embed(p.mean(-2)) - p.mT @ p / p.shape[-2]


def mean_gradient(H: LayerHessian, p: Float[Tensor, "N c"]) -> Float[Tensor, "c m"]:
    """E[AG], from the factors B = GᵀS of M, A = SSᵀ: AG = diag(√p) Bᵀ, as √p is in the null space of S.

    M = E[AG]ᵀ E[A]⁺ E[AG] + E[(G − G₀)ᵀ A (G − G₀)] with G₀ = E[A]⁺ E[AG], for any network, so that the rows of E[AG]
    span the top c − 1 eigenspace as far as the second term is small.

    Parameters
    ----------
    p
        Probabilities of the samples of H.
    """
    return torch.einsum("zmk,zk->km", H.B, p.sqrt()) / len(p)
