r"""Layer-wise Hessians of ReLU perceptrons of any depth, block by block.

The network is piecewise linear in the weights of any one layer, so the Hessian of that layer is exactly

.. math:: \frac1N \sum_n M_n \otimes h_n h_n^\top, \qquad M_n = G_n^\top A_n G_n,

with :math:`h_n` the layer's input, :math:`G_n = \partial f/\partial z` the Jacobian of the outputs by its
preactivations and :math:`A_n` the Hessian of the loss by the outputs: :math:`\mathrm{diag}(p) - pp^\top` under
cross-entropy, 2I under the MSE loss :math:`\frac1N\sum_n\|f(x_n)-e_{y_n}\|^2` of Dong et al. (2025), (7).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from common.hessian.closed_form import LossName, check_model
from common.hessian.gram import weighted_block_norms


def neuron_block_norms(
    weights: Sequence[Float[Tensor, "_ _"]], X: Float[Tensor, "N d"], loss: LossName, layer: int, neurons: int
) -> Float[Tensor, "k k"]:
    """Squared Frobenius norms of the blocks of one layer's Hessian that belong to pairs of its first neurons.

    Parameters
    ----------
    weights
        Weight matrices from the first layer to the output, (n_l, n_{l-1}); ReLU between them, no biases.
    X
        Inputs, (N, d).
    loss
        ``"CE"`` or ``"MSE"``, as :mod:`common.hessian.closed_form` states them.
    layer
        Index into ``weights``; the last one is the output layer.
    neurons
        How many of the layer's neurons to take, at least 1; k = min(neurons, n_l).

    Returns
    -------
    Tensor
        (k, k); entry (i, j) is ||H_{w_i w_j}||² for the rows w_i, w_j of the layer's matrix.

    Raises
    ------
    ValueError
        If a size is zero, shapes do not agree, a value is not finite, the loss is unknown, or there is no such layer.
    """
    if not 0 <= layer < len(weights):
        raise ValueError(f"layer must be between 0 and {len(weights) - 1}, got {layer}")
    if neurons < 1:
        raise ValueError(f"the number of neurons must be at least 1, got {neurons}")
    check_model(X, {f"weights[{place}]": W for place, W in enumerate(weights)}, loss)
    weights = [W.detach().to(X) for W in weights]
    inputs, masks, h = [], [], X.detach()
    for W in weights:
        inputs.append(h)
        z = h @ W.T
        masks.append((z > 0).to(X.dtype))
        h = z.clamp(min=0)
    outputs = z
    k = min(neurons, len(weights[layer]))
    # Jacobian of the outputs by the first k preactivations of the layer, (N, C, k), from the layer upwards.
    jacobian = torch.eye(len(weights[layer]), dtype=X.dtype, device=X.device)[:, :k].expand(len(X), -1, -1)
    for W, mask in zip(weights[layer + 1 :], masks[layer:-1], strict=True):
        jacobian = W @ (mask[:, :, None] * jacobian)
    if loss == "MSE":
        M = 2 * jacobian.mT @ jacobian
    else:
        p = outputs.softmax(dim=1)
        centred = jacobian - p[:, None, :] @ jacobian  # a difference of products would lose what p leaves to be seen
        M = centred.mT @ (p[:, :, None] * centred)
    return weighted_block_norms(inputs[layer], M.reshape(len(X), k * k)).reshape(k, k)
