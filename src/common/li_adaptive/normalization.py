"""How the size of the weights at initialization decides gradients, spectra and steps: Li, Section 5.2 and App F.

With zero biases T is homogeneous of degree 1 in the weights of every one of its L layers. So for weights √c times fixed
ones, and as long as every sample lies inside the margin, the gradient with respect to all weights is c^{(L−1)/2}
times that at c = 1, and the Hessian c^{(L−2)/2} times. With respect to biases the powers are smaller: layer l leaves
c^{(L−l)/2} of the gradient.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.cache import cached
from common.devices import default_device
from common.hessian.modes import evaluation_copy
from common.hessian.spectral_measure import LanczosMeasures, lanczos_measures
from common.li_adaptive.data import BinaryData
from common.li_adaptive.hinge_hessian import check_outputs, hinge_hessian
from common.li_adaptive.networks import initialize, perceptron, vgg
from common.li_adaptive.training import HingeLoss, outputs


def initialized_vgg(c: float, *, width: float, seed: int, standardize: bool = False, layers: int = 12) -> nn.Sequential:
    """The VGG of Section 5.2 with weights N(0, c/n), n the fan-in, and no dropout; equal seeds mean equal noise."""
    network = vgg(width=width, standardize=standardize, dropout=False, layers=layers).to(default_device())
    initialize(network, "fan-in", torch.Generator().manual_seed(index(seed)), scale=c)
    return network


def initial_measures(
    c: float, x: Tensor, y: Tensor, width: float, iterations: int, starts: int, seed: int
) -> LanczosMeasures:
    """Lanczos measures of the Hessian of :func:`initialized_vgg` on the images x with labels y."""
    device = default_device()
    operator = hinge_hessian(initialized_vgg(c, width=width, seed=seed), x.to(device), y.to(device))
    return lanczos_measures(operator, iterations=iterations, starts=starts, seed=seed)


def initial_spectrum(
    c: float, train: BinaryData, *, width: float, samples: int, iterations: int, starts: int, seed: int
) -> LanczosMeasures:
    """:func:`initial_measures` on the first training images, made once and kept.

    Raises
    ------
    ValueError
        If there are to be no images.
    """
    settings = {"width": width, "iterations": iterations, "starts": starts, "seed": seed}
    return LanczosMeasures(**cached(initial_measures, {"c": c, **train.first(samples), **settings}))


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
    """Squared norm of the gradient of the mean hinge loss, dropout off.

    Raises
    ------
    ValueError
        If there is not one output and one label a sample.
    """
    network = evaluation_copy(network).requires_grad_()
    parameters = list(network.parameters())
    with torch.enable_grad():
        T = network(x.clone())
        check_outputs(T, y)
        parts = torch.autograd.grad(HingeLoss()(T, y), parameters, materialize_grads=True)
    sums = {True: 0.0, False: 0.0}
    for parameter, part in zip(parameters, parts, strict=True):
        sums[parameter.ndim > 1] += float(part.double().square().sum())
    return Gradient(sums[True], sums[False], bool((y * T < 1).all()))


def single_gradients(
    widths: Sequence[int], depths: Sequence[int], *, networks: int, seed: int
) -> Float[np.ndarray, "networks depths widths"]:
    """‖∇T‖² by the weights of random perceptrons at c = 2, at one Gaussian input as wide as the layers.

    Parameters
    ----------
    widths, depths
        n, and the numbers L of layers.
    networks, seed
        Perceptrons of each shape; number k has its weights and its input from the seed ``seed`` + k.
    """
    squares = np.empty((networks, len(depths), len(widths)))
    for k, i, j in np.ndindex(*squares.shape):
        generator = torch.Generator().manual_seed(index(seed) + k)
        network = perceptron([widths[j]] * depths[i])
        initialize(network, "fan-in", generator, scale=2.0)
        x = torch.randn(1, widths[j], generator=generator)
        # a label of 1e-6 keeps the sample inside the margin: the gradient is 1e-6 times that of −T
        squares[k, i, j] = 1e12 * gradient_size(network, x, torch.tensor([1e-6])).weights
    return squares


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
        (E,) accuracy on the test images every ``every`` steps.
    network
        Where it ended.
    """

    risk: Float[np.ndarray, " K"]
    step: Float[np.ndarray, " K"]
    exploded: bool
    accuracy: Float[np.ndarray, " E"]
    network: nn.Module


def take_steps(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], test: tuple[Tensor, Tensor], *,
    constant: float | None = None, dynamic: float | None = None, every: int = 20,
) -> Steps:  # fmt: skip
    """Plain gradient steps, dropout off, of a ``constant`` size or of size ``dynamic`` / ‖∇R‖² (Section 5.2).

    A gradient that vanishes makes no step; the first risk, gradient or step that is not finite ends the training.

    Parameters
    ----------
    network
        Where to start; left as it is.
    batches
        Images and labels of each step.
    test
        Images and labels on which the accuracy is taken, every ``every`` steps.

    Raises
    ------
    ValueError
        If not just one of the two sizes is given, ``every`` is below 1, or there is not one output and one label a
        sample.
    """
    if (constant is None) == (dynamic is None):
        raise ValueError("either a constant or a dynamic step size is needed")
    if every < 1:
        raise ValueError(f"the accuracy can be taken every 1, 2, ... steps, got {every}")
    network, loss = evaluation_copy(network).requires_grad_(), HingeLoss()
    parameters = list(network.parameters())
    risks, sizes, accuracy, exploded = [], [], [], False
    for k, (x, y) in enumerate(batches):
        if k % every == 0:
            found = outputs(network, test[0].clone())
            check_outputs(found, test[1])
            accuracy.append(float((test[1] * found > 0).float().mean()))
        with torch.enable_grad():
            T = network(x.clone())
            check_outputs(T, y)
            risk = loss(T, y)
            gradient = torch.autograd.grad(risk, parameters, materialize_grads=True)
        squared = sum(float(g.double().square().sum()) for g in gradient)
        size = constant if constant is not None else (dynamic / squared if squared > 0 else 0.0)
        exploded = not np.isfinite([float(risk.detach()), squared, size]).all()
        if exploded:
            break
        risks.append(float(risk.detach()))
        sizes.append(size)
        with torch.no_grad():
            for parameter, part in zip(parameters, gradient, strict=True):
                parameter -= size * part
    return Steps(np.array(risks), np.array(sizes), exploded, np.array(accuracy), network)
