r"""The Hessian of all parameters, and the eigenvectors that the output Hessian gives it: Wu et al. (2022), App C."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from common.hessian.layer import LayerHessian

#: Samples that pass through a network at once, for a block of vectors together.
SAMPLES_AT_ONCE = 2000


class FullHessian:
    """Hessian of the mean cross-entropy loss by all parameters of a network, as an operator.

    Vectors have the parameters in the order of ``network.parameters()``. A product is the derivative of the gradient
    along each vector, forward over reverse, for all of a block in the same matrix products.

    Parameters
    ----------
    network
        Batch norm is taken with its running statistics.
    X, y
        Samples (N, ...) and labels (N,).
    """

    def __init__(self, network: nn.Module, X: Float[Tensor, "N *shape"], y: Int[Tensor, " N"]):
        self._network, self._X, self._y = network.eval(), X, y
        self._parameters = {name: p.detach() for name, p in network.named_parameters()}
        self._sizes = [p.numel() for p in self._parameters.values()]

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return sum(self._sizes), sum(self._sizes)

    def __matmul__(self, V: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """Product with k vectors."""
        batches = zip(self._X.split(SAMPLES_AT_ONCE), self._y.split(SAMPLES_AT_ONCE), strict=True)
        return sum(self._summed(V, X, y) for X, y in batches) / len(self._y)

    def _summed(self, V: Tensor, X: Tensor, y: Tensor) -> Tensor:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(functional_call(self._network, parameters, (X,)), y, reduction="sum")

        def along(v: Tensor) -> Tensor:
            parts = zip(self._parameters.items(), v.split(self._sizes), strict=True)
            tangent = {name: part.view_as(p) for (name, p), part in parts}
            return torch.cat([g.flatten() for g in jvp(grad(loss), (self._parameters,), (tangent,))[1].values()])

        return vmap(along, in_dims=1, out_dims=1)(V)


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


def output_approximation(layers: list[LayerHessian], k: int) -> OutputApproximation:
    """App C for a fully connected network with biases.

    Parameters
    ----------
    layers
        Of all layers from the input on, over the same samples.
    k
        Number of eigenpairs, at most the number of all outputs.
    """
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


def gauss_newton_forms(layers: list[LayerHessian], V: Float[Tensor, "P k"]) -> Float[Tensor, " k"]:
    """vᵀ E[FᵀAF] v for each column: what the first term of (251) contributes to vᵀHv.

    ``layers`` as in :func:`output_approximation`.
    """
    k, total, start = V.shape[1], 0, 0
    for layer in layers:
        m, n = layer.B.shape[1], layer.X.shape[1]
        weights, biases = V[start : start + m * n].view(m, n, k), V[start + m * n : start + m * n + m]
        outputs = torch.einsum("zn,mnk->zmk", layer.X, weights) + biases
        total = total + layer.B.mT @ outputs
        start += m * n + m
    return total.square().sum((0, 1)) / len(total)
