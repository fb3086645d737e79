r"""Gradients of the logits by a layer's output, averaged by class: Wu et al. (2022), App G.5.

With A = QᵀQ and G the Jacobian of the logits by the output of a layer p, row j of QG is one vector for each logit j.
Its means over the samples of a class i, and those of its products with the input x, are

    Δ_ij = E[(QG)_j ⊗ x | y = i],        Γ_ij = E[(QG)_j | y = i].                                      (269), (270)

At initialization half of the units after each later layer are active on average, so that the paper takes G for
S = W⁽ᴸ⁾ ⋯ W⁽ᵖ⁺¹⁾ over 2^(L − p): both cluster by logit around (E[Q] S)_j/2^(L − p) and its product with E[x], (273),
whatever the class. But E[G] is about S with the means of the gates in it, unit by unit: see
:mod:`common.wu_dissecting.gates`. Where Q and G are uncorrelated the centres are the rows of E[Q]E[G].
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.hessian.layer import LayerHessian
from common.hessian.modes import evaluating
from common.wu_dissecting.gates import gate_means, gated_weights, jacobian_means, kernel_means, pair_kernels
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
    mean_root
        (c, c) E[Q].
    """

    gamma: Float[Tensor, "c c m"]
    delta: Float[Tensor, "c c mn"]
    gamma_centres: Float[Tensor, "c m"]
    delta_centres: Float[Tensor, "c mn"]
    mean_root: Float[Tensor, "c c"]


def mean_cosine(found: Float[Tensor, "c c d"], centres: Float[Tensor, "c d"]) -> float:
    """Cosine between predicted centres and the true ones, means over classes, averaged over logits."""
    return float(nn.functional.cosine_similarity(found.mean(0), centres, dim=1).mean())


def own_centres(found: Float[Tensor, "c c d"], centres: Float[Tensor, "c d"]) -> float:
    """Share of logits whose true centre has a larger cosine with its own predicted one than with any other."""
    true, predicted = (nn.functional.normalize(part, dim=1) for part in (found.mean(0), centres))
    return float(((true @ predicted.T).argmax(1) == torch.arange(len(true))).double().mean())


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
    root = _mean_root(network, X)
    centres = root @ later_weights(network, layer)
    return LogitGradients(gamma, delta, centres, (centres[:, :, None] * H.X.mean(0)).flatten(1), root)


def probabilities(network: nn.Module, X: Float[Tensor, "N *shape"]) -> Float[Tensor, "N c"]:
    """Softmax of the logits, a thousand samples at a time."""
    with torch.no_grad(), evaluating(network):
        return torch.cat([network(x.clone()) for x in X.split(1000)]).softmax(1)


def _mean_root(network: nn.Module, X: Float[Tensor, "N *shape"]) -> Float[Tensor, "c c"]:
    """E[Q], Q = diag(√p)(I − 1pᵀ)."""
    p = probabilities(network, X)
    root = p.sqrt()
    return torch.diag(root.mean(0)) - root.T @ p / len(p)


class CorrectedCentres(NamedTuple):
    """Centres of the logits with the means of the gates in the place of 1/2, by logit.

    Attributes
    ----------
    gamma, delta
        (c, m) E[Q] S_Q and (c, mn) its product with E[x].
    gamma_joint, delta_joint
        E[Q] E[G] and E[Q] E[G ⊗ x], with what the gates of different layers, and gates and inputs, have in common.
    """

    gamma: Float[Tensor, "c m"]
    delta: Float[Tensor, "c mn"]
    gamma_joint: Float[Tensor, "c m"]
    delta_joint: Float[Tensor, "c mn"]


def corrected_centres(
    network: nn.Module, layer: str, H: LayerHessian, root: Float[Tensor, "c c"]
) -> CorrectedCentres:  # fmt: skip
    """What (273) becomes with the means of the gates over the samples of H.

    Parameters
    ----------
    root
        E[Q] over these, :attr:`LogitGradients.mean_root`.

    Raises
    ------
    ValueError
        If anything but linear layers with ReLU after each is between the layer and the logits.
    """
    x = H.X.mean(0)
    gamma = root @ gated_weights(network, layer, gate_means(network, layer, H.X).plain)
    mean, products = jacobian_means(network, layer, H.X)
    delta_joint = torch.einsum("jk,kmn->jmn", root, products).flatten(1)
    return CorrectedCentres(gamma, (gamma[:, :, None] * x).flatten(1), root @ mean, delta_joint)


def cosines_at_initialization(x: Float[Tensor, "N n"], layers: int) -> dict[str, float]:
    """What the cosines of (273) with the true centres are in wide layers at initialization, by the inputs alone.

    Q and G are uncorrelated there. So Γ's true centres are the rows of E[Q]E[G], and with E[GG'ᵀ] = k I for a pair of
    inputs, :func:`~common.wu_dissecting.gates.kernel_means`, and E[G]Sᵀ = 2^(p − L) I, the cosines are 2^(p − L)/√E[k]
    for Γ and 2^(p − L) ‖E[x]‖/√E[k x·x'] for Δ.

    Parameters
    ----------
    x
        Inputs of layer p.
    layers
        L − p.
    """
    of_k, of_product = (float(part[-1]) for part in kernel_means(x, layers))
    return {"Γ": 0.5**layers / of_k**0.5, "Δ": 0.5**layers * float(x.mean(0).norm()) / of_product**0.5}


def share_between(points: Float[Tensor, "c c d"], axis: int) -> float:
    """Variance between the means over an axis of points, of all of it; 1/(c + 1) on average if nothing clusters.

    NaN where all points are equal.
    """
    mean = points.mean((0, 1))
    between = (points.mean(axis) - mean).square().sum() * points.shape[axis]
    return float(between / (points - mean).square().sum())


class TraceParts(NamedTuple):
    """Traces in (271), classes with equal weights.

    Attributes
    ----------
    total
        Of E[M] = E_x Σ_j (QG)_jᵀ (QG)_j.
    within
        Its part within classes: E_i Σ_j of the covariance of (QG)_j given class i.
    mean
        Of the mean of Γ_ijᵀ Γ_ij over classes i and logits j, to which (271) sets E[M] equal. By the law of total
        variance total = within + c mean.
    """

    total: float
    within: float
    mean: float

    @property
    def between(self) -> float:
        """Share of the trace of E[M] between classes."""
        return 1 - self.within / self.total


def trace_parts(H: LayerHessian, y: Int[Tensor, " N"], gamma: Float[Tensor, "c c m"]) -> TraceParts:
    """The traces of a layer whose Γ is ``gamma`` over the samples of its Hessian."""
    total, within = torch.zeros(2, dtype=torch.float64)
    for i, mean in enumerate(gamma):
        B = H.B[y == i]
        total += B.square().sum(dtype=torch.float64) / len(B)
        within += (B - mean.T).square().sum(dtype=torch.float64) / len(B)
    c = len(gamma)
    return TraceParts(float(total) / c, float(within) / c, float(gamma.square().sum(2).mean(dtype=torch.float64)))


def share_between_classes(x: Float[Tensor, "N n"], y: Int[Tensor, " N"], p: Float[Tensor, "N c"], layers: int) -> float:
    """What :attr:`TraceParts.between` is about in wide layers at initialization.

    E[GG'ᵀ] = k I for a pair of inputs, :func:`~common.wu_dissecting.gates.pair_kernels`, and 2^(−layers) I for a single
    one. So the share between classes is 2^layers E[k tr QQ'ᵀ]/E[tr A], the first mean over pairs of one class.

    Parameters
    ----------
    x, y
        Inputs of layer p and their classes.
    p
        Probabilities.
    layers
        L − p.
    """
    root = p.sqrt()
    Q = (torch.diag_embed(root) - root[:, :, None] * p[:, None, :]).flatten(1)
    of_class = []
    for i in y.unique():
        rows = y == i
        *_, k = pair_kernels(x[rows], x[rows], layers)
        of_class.append(float((k * (Q[rows] @ Q[rows].T)).mean(dtype=torch.float64)))
    trace = float(Q.square().sum(dtype=torch.float64)) / len(Q)  # tr A = tr QQᵀ
    return 2.0**layers * sum(of_class) / len(of_class) / trace
