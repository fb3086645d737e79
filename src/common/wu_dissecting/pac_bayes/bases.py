"""Kronecker eigenbases of a network's layers, and weights written in them: Wu et al. (2022), App H, (279), (280).

The Hessian of a layer is nearly E[M] ⊗ E[xxᵀ], of its outputs and its inputs. Its eigenvectors are then u ⊗ v, and a
weight matrix W has the coordinates Uᵀ W V in them. Biases have no part in E[xxᵀ]: they are rotated by U alone.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from common.hessian.block_lanczos import descending_eigh
from common.hessian.layer import layer_hessian
from common.wu_dissecting.output_hessian import halved_products

#: Of every layer (m, n + 1), the bias last.
Weights = Sequence[Float[Tensor, "_ _"]]


def rotate(W: Float[Tensor, "m n1"], U: Float[Tensor, "m m"], V: Float[Tensor, "n n"]) -> Float[Tensor, "m n1"]:
    """TOHESSIAN, (279): Uᵀ W V and, for the bias, Uᵀ b; in double precision, as it is done again and again."""
    turned = U.double().T @ W.double()
    return torch.cat([turned[:, :-1] @ V.double(), turned[:, -1:]], 1).to(W.dtype)


def turn_back(M: Float[Tensor, "m n1"], U: Float[Tensor, "m m"], V: Float[Tensor, "n n"]) -> Float[Tensor, "m n1"]:
    """TOSTANDARD, (280): U M Vᵀ."""
    return rotate(M, U.T, V.T)


def kronecker_factors(
    weights: Weights, X: Float[Tensor, "N n"], *, approximated: bool = False
) -> list[tuple[Float[Tensor, "_ _"], Float[Tensor, "_ _"]]]:
    """E[M], or M̃ of (272), (m, m), and E[xxᵀ], (n, n), of every layer of the network with these weights."""
    network = nn.Sequential()
    for k, W in enumerate(weights, start=1):
        layer = skip_init(nn.Linear, W.shape[1] - 1, len(W), dtype=W.dtype, device=W.device)
        layer.load_state_dict({"weight": W[:, :-1], "bias": W[:, -1]})
        network.add_module(f"fc{k}", layer)
        if k < len(weights):
            network.add_module(f"relu_fc{k}", nn.ReLU())
    layers = [layer_hessian(network, f"fc{k}", X) for k in range(1, len(weights) + 1)]
    outputs = [layer.output_hessian for layer in layers]
    if approximated:
        products = halved_products([W[:, :-1] for W in weights])
        outputs = [*(S.T @ outputs[-1] @ S for S in products[:-1]), outputs[-1]]
    return [(output, layer.autocorrelation) for output, layer in zip(outputs, layers, strict=True)]


def eigenvectors(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Eigenvectors, those of the largest eigenvalues first, orthogonal to the last digit of their type.

    Raises
    ------
    ValueError
        If there are no entries, or some are not finite.
    """
    return descending_eigh(matrix.double())[1].to(matrix.dtype)
