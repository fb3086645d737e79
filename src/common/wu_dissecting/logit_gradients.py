r"""Gradients of the logits by a layer's output, averaged by class: Wu et al. (2022), App G.5.

With A = QᵀQ and G the Jacobian of the logits by the output of a layer p, row j of QG is one vector for each logit j.
Its means over the samples of a class i, and those of its products with the input x, are

    Δ_ij = E[(QG)_j ⊗ x | y = i],        Γ_ij = E[(QG)_j | y = i].                                      (269), (270)

At initialization about half of the units after each later layer are active, so that G is about S = W⁽ᴸ⁾ ⋯ W⁽ᵖ⁺¹⁾ over
2^(L − p), and both cluster by logit around (E[Q] S)_j/2^(L − p) and its product with E[x], (273), whatever the class.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.hessian.layer import LayerHessian
from common.hessian.modes import evaluating
from common.wu_dissecting.output_hessian import later_weights


@dataclass(frozen=True)
class LogitGradients:
    """Γ and Δ of one layer, and what (273) predicts of them.

    Attributes
    ----------
    gamma, delta
        (c, c, m) and (c, c, mn), by class and logit; an outer product row by row.
    gamma_centres, delta_centres
        (c, m) and (c, mn), by logit: the centres that are predicted at initialization.
    """

    gamma: Float[Tensor, "c c m"]
    delta: Float[Tensor, "c c mn"]
    gamma_centres: Float[Tensor, "c m"]
    delta_centres: Float[Tensor, "c mn"]

    def cosines(self) -> dict[str, float]:
        """Of Γ and Δ the cosine between predicted and true centres, the means over classes, averaged over logits."""
        return {
            name: float(nn.functional.cosine_similarity(found.mean(0), predicted, dim=1).mean())
            for name, found, predicted in (
                ("Γ", self.gamma, self.gamma_centres), ("Δ", self.delta, self.delta_centres)
            )
        }  # fmt: skip


def logit_gradients(
    network: nn.Module, layer: str, H: LayerHessian, X: Float[Tensor, "N *shape"], y: Int[Tensor, " N"]
) -> LogitGradients:
    """Γ and Δ of a fully connected layer of a network.

    Parameters
    ----------
    H
        Hessian of that layer over the samples.
    X, y
        The samples and their classes, of each class at least one.

    Raises
    ------
    ValueError
        If a class has no sample, a label is none of the classes, samples, labels and Hessian do not fit each other, or
        there is no such layer.
    """
    c = H.B.shape[2]
    if not (y.shape == (len(X),) == H.X.shape[:1]):
        given = f"{len(X)} samples, labels of shape {tuple(y.shape)}, a Hessian over {len(H.X)}"
        raise ValueError(f"one label a sample of the Hessian is needed, got {given}")
    if not ((y >= 0) & (y < c)).all():
        raise ValueError(f"labels y must lie in 0..{c - 1}, got {sorted(set(y.tolist()))}")
    of_class = [y == i for i in range(c)]
    if not all(rows.any() for rows in of_class):
        raise ValueError(f"samples of all {c} classes are needed, got {sorted(set(y.tolist()))}")
    gamma = torch.stack([H.B[rows].mean(0).T for rows in of_class])
    delta = torch.stack([
        torch.einsum("zmj,zn->jmn", H.B[rows], H.X[rows]).flatten(1) / rows.sum() for rows in of_class
    ])  # fmt: skip
    with torch.no_grad(), evaluating(network):
        p = torch.cat([network(x.clone()) for x in X.split(1000)]).softmax(1)
    root = p.sqrt()
    mean_root = (torch.diag_embed(root) - root[:, :, None] * p[:, None, :]).mean(0)  # E[Q]
    centres = mean_root @ later_weights(network, layer)
    return LogitGradients(gamma, delta, centres, (centres[:, :, None] * H.X.mean(0)).flatten(1))


def share_between(points: Float[Tensor, "c c d"], axis: int) -> float:
    """Variance between the means over an axis of points, of all of it; 1/(c + 1) on average if nothing clusters.

    NaN where all points are equal.
    """
    mean = points.mean((0, 1))
    between = (points.mean(axis) - mean).square().sum() * points.shape[axis]
    return float(between / (points - mean).square().sum())
