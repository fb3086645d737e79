"""How the size of the weights at initialization decides gradients and steps: Li, Section 5.2 and App F.

With zero biases T is homogeneous of degree 1 in the weights of every one of its L layers. So for weights √c times fixed
ones, and as long as every sample lies inside the margin, the gradient with respect to all weights is c^{(L−1)/2}
times that at c = 1, and the Hessian c^{(L−2)/2} times. With respect to biases the powers are smaller: layer l leaves
c^{(L−l)/2} of the gradient.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.li_adaptive.training import HingeLoss, outputs


@dataclass(frozen=True)
class Gradient:
    """Size of a gradient.

    Attributes
    ----------
    weights, biases
        Sum of squares over all weights, and over all biases.
    inside
        Whether every sample lies inside the margin, y T(x) < 1.
    """

    weights: float
    biases: float
    inside: bool


def gradient_size(network: nn.Module, x: Tensor, y: Tensor) -> Gradient:
    """Squared norm of the gradient of the mean hinge loss, dropout off."""
    network.eval()
    parameters = list(network.parameters())
    T = network(x)
    parts = torch.autograd.grad(HingeLoss()(T, y), parameters)
    sums = {True: 0.0, False: 0.0}
    for parameter, part in zip(parameters, parts, strict=True):
        sums[parameter.ndim > 1] += float(part.double().square().sum())
    return Gradient(sums[True], sums[False], bool((y * T < 1).all()))


@dataclass(frozen=True)
class Steps:
    """A short training.

    Attributes
    ----------
    risk, step
        (K,) mean hinge loss of the batch before each step, and the size of the step; both end where a number stopped
        being finite.
    exploded
        Whether it ended so.
    accuracy
        (K',) accuracy on the test images every ``every`` steps.
    """

    risk: Float[np.ndarray, " K"]
    step: Float[np.ndarray, " K"]
    exploded: bool
    accuracy: Float[np.ndarray, " E"]


def take_steps(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], test: tuple[Tensor, Tensor], *,
    constant: float | None = None, dynamic: float | None = None, every: int = 20,
) -> Steps:  # fmt: skip
    """Plain gradient steps, dropout off, of a ``constant`` size or of size ``dynamic`` / ‖∇R‖² (Section 5.2).

    A gradient that vanishes makes no step; the first risk, gradient or step that is not finite ends the training.

    Raises
    ------
    ValueError
        If not just one of the two sizes is given.
    """
    if (constant is None) == (dynamic is None):
        raise ValueError("either a constant or a dynamic step size is needed")
    network.eval()
    parameters, loss = list(network.parameters()), HingeLoss()
    risks, sizes, accuracy = [], [], []
    for k, (x, y) in enumerate(batches):
        if k % every == 0:
            accuracy.append(float((test[1] * outputs(network, test[0]) > 0).float().mean()))
        value = loss(network(x), y)
        gradient = torch.autograd.grad(value, parameters)
        squared = sum(float(g.double().square().sum()) for g in gradient)
        size = constant if constant is not None else (dynamic / squared if squared > 0 else 0.0)
        if not np.isfinite([float(value.detach()), squared, size]).all():
            return Steps(np.array(risks), np.array(sizes), True, np.array(accuracy))
        risks.append(float(value.detach()))
        sizes.append(size)
        with torch.no_grad():
            for parameter, part in zip(parameters, gradient, strict=True):
                parameter -= size * part
    return Steps(np.array(risks), np.array(sizes), False, np.array(accuracy))
