"""How the size of the weights at initialization decides gradients, spectra and steps: Li, Section 5.2 and App F.

With zero biases T is homogeneous of degree 1 in the weights of every one of its L layers. So for weights √c times fixed
ones, and as long as every sample lies inside the margin, the gradient with respect to all weights is c^{(L−1)/2}
times that at c = 1, and the Hessian c^{(L−2)/2} times. With respect to biases the powers are smaller: layer l leaves
c^{(L−l)/2} of the gradient.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import index

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from common.cache import cached
from common.devices import default_device
from common.hessian.modes import evaluation_copy
from common.hessian.spectral_measure import LanczosMeasures, lanczos_measures
from common.li_adaptive.data import BinaryData
from common.li_adaptive.hinge_hessian import check_outputs, hinge_hessian
from common.li_adaptive.networks import BatchStandardize, initialize, perceptron, vgg
from common.li_adaptive.training import BATCH_SIZE, HingeLoss, outputs


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


def shape_distance(one: LanczosMeasures, other: LanczosMeasures) -> float:
    """Wasserstein distance of two spectra scaled to ‖H‖ = 1, over E|λ| of the first."""
    nodes, others = (m.nodes.numpy().ravel() / m.bound for m in (one, other))
    weights = one.weights.numpy().ravel()
    distance = wasserstein_distance(others, nodes, other.weights.numpy().ravel(), weights)
    return float(distance / (np.abs(nodes) @ weights) * weights.sum())


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


def homogeneous_sizes(
    x: Tensor, y: Tensor, factors: Sequence[float], *, layers: int, width: float, networks: int, samples: int,
    iterations: int, seed: int,
) -> tuple[Float[np.ndarray, "networks c"], Float[np.ndarray, " c"]]:  # fmt: skip
    """‖∇R‖² by the weights of :func:`initialized_vgg` at each c, and the range of the first network's Hessian by them.

    Parameters
    ----------
    factors
        c of the initialization.
    samples, iterations
        First images that the Hessian is over, and steps of Lanczos.

    Raises
    ------
    ValueError
        If a sample is beyond its margin, where neither is a power of c.
    """
    squares, ranges = np.empty((networks, len(factors))), np.empty(len(factors))
    for k, j in np.ndindex(*squares.shape):
        network = initialized_vgg(factors[j], width=width, seed=seed + k, layers=layers)
        found = gradient_size(network, x, y)
        if not found.inside:
            raise ValueError(f"a sample is beyond its margin at c = {factors[j]:g}; a smaller c is needed")
        squares[k, j] = found.weights
        if k == 0:
            names = [name for name, parameter in network.named_parameters() if parameter.ndim > 1]
            H = hinge_hessian(network, x[:samples], y[:samples], names=names)
            ranges[j] = lanczos_measures(H, iterations=iterations, starts=1, seed=seed).bound
    return squares, ranges


def layer_factor(depths: Sequence[int], squares: Float[np.ndarray, "networks depths"]) -> float:
    """exp of the slope of ln(E‖∇T‖²/L) against L: what each layer multiplies the squared gradient norm by."""
    return float(np.exp(np.polyfit(depths, np.log(squares.mean(0) / np.asarray(depths)), 1)[0]))


def expected_gradient(n: int, L: int, c: float) -> float:
    """E‖∇T‖² = L n (c/2)^{L−1} of a perceptron (3) with weights N(0, c/n) at an input of n entries of variance 1.

    Exact at any width. A column of weights may change its sign, which turns its gate: gates are fair coins, and what is
    even in the column does not know them. So every layer passes on c/2 of the squared norm, forwards and backwards. The
    gradient by the weights of layer p is the product of the signal that enters it, n (c/2)^{p−1}, and of the one that
    comes back, (c/2)^{L−p}.
    """
    return L * n * (c / 2) ** (L - 1)


def single_gradients(
    widths: Sequence[int], depths: Sequence[int], *, networks: int, seed: int, scale: float = 2.0
) -> Float[np.ndarray, "networks depths widths"]:
    """‖∇T‖² by the weights of random perceptrons at one Gaussian input as wide as the layers.

    Parameters
    ----------
    widths, depths
        n, and the numbers L of layers.
    networks, seed
        Perceptrons of each shape; number k has its weights and its input from the seed ``seed`` + k.
    scale
        The c of their weights.
    """
    squares = np.empty((networks, len(depths), len(widths)))
    for k, i, j in np.ndindex(*squares.shape):
        generator = torch.Generator().manual_seed(index(seed) + k)
        network = perceptron([widths[j]] * depths[i])
        initialize(network, "fan-in", generator, scale=scale)
        x = torch.randn(1, widths[j], generator=generator)
        # a label of 1e-6 keeps the sample inside the margin: the gradient is 1e-6 times that of −T
        squares[k, i, j] = 1e12 * gradient_size(network, x, torch.tensor([1e-6])).weights
    return squares


class HeldDeviation(BatchStandardize):
    """The same values, but the deviation of the batch is a constant where derivatives are taken: Section 5.2's Σ."""

    def forward(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """Standardized ``x``, same shape."""
        axes = [axis for axis in range(x.ndim) if axis != 1]
        centred = x - x.mean(axes, keepdim=True)
        return centred * (centred.square().mean(axes, keepdim=True) + self.eps).rsqrt().detach()


@dataclass(frozen=True)
class BatchNormGradient:
    """The gradient of S = Σ_i a_i T(x_i) for a network with batch norm, a random; L layers with weights.

    Attributes
    ----------
    true, held
        (L − 1,) ⟨W_p, ∂S/∂W_p⟩/S for the layers that a batch norm follows: 0 by what S is, since no factor of W_p
        changes it, and 1 with the deviations held constant, since S is then linear in W_p.
    difference
        Norm of the difference of the two gradients by all weights, over that of the true one.
    """

    true: Float[np.ndarray, " p"]
    held: Float[np.ndarray, " p"]
    difference: float


def batch_norm_gradient(widths: Sequence[int], x: Float[Tensor, "N d"], seed: int) -> BatchNormGradient:
    """Of a random perceptron of :func:`~common.li_adaptive.networks.perceptron` with batch norm, at double precision.

    Parameters
    ----------
    widths
        d and the widths of the hidden layers.
    x
        The batch.
    seed
        Of the weights and of a.
    """
    generator, x = torch.Generator().manual_seed(index(seed)), x.double()
    network = perceptron(widths, standardize=True).double()
    initialize(network, "fan-in", generator)
    a = torch.randn(len(x), generator=generator, dtype=torch.float64)
    names = [name for name, module in network.named_children() if isinstance(module, BatchStandardize)]
    weights = list(network.parameters())
    found = []
    for kind in (BatchStandardize, HeldDeviation):
        for name in names:
            setattr(network, name, kind(eps=0.0))
        S = a @ network(x)
        parts = torch.autograd.grad(S, weights)
        euler = [float((w.detach() * g).sum() / S.detach()) for w, g in zip(weights[:-1], parts[:-1], strict=True)]
        found.append((np.array(euler), torch.cat([g.flatten() for g in parts])))
    (true, gradient), (held, other) = found
    return BatchNormGradient(true, held, float((other - gradient).norm() / gradient.norm()))


def random_batches(x: Tensor, y: Tensor, number: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """So many batches of 64 images with their labels, drawn with replacement; equal seeds mean equal batches."""
    order = torch.Generator().manual_seed(index(seed))
    for _ in range(number):
        rows = torch.randint(len(y), (BATCH_SIZE,), generator=order).to(x.device)
        yield x[rows], y[rows]


@dataclass(frozen=True)
class Course:
    """How a short training went.

    Attributes
    ----------
    risk, step
        (K,) mean hinge loss of the batch before each step, and the size of the step; both end where a number stopped
        being finite.
    exploded
        Whether it ended so.
    accuracy
        (E,) accuracy on the test images every ``every`` steps.
    """

    risk: Float[np.ndarray, " K"]
    step: Float[np.ndarray, " K"]
    exploded: bool
    accuracy: Float[np.ndarray, " E"]


@dataclass(frozen=True)
class Steps(Course):
    """A short training.

    Attributes
    ----------
    network
        Where it ended.
    """

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


def steps_of_vgg(
    c: float, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, width: float, standardize: bool, steps: int,
    seed: int, constant: float | None, dynamic: float | None,
) -> dict[str, Tensor]:  # fmt: skip
    """What :func:`course_of_vgg` says, as tensors."""
    device = default_device()
    network = initialized_vgg(c, width=width, seed=seed, standardize=standardize)
    batches = random_batches(x.to(device), y.to(device), steps, seed)
    test = x_test.to(device), y_test.to(device)
    found = take_steps(network, batches, test, constant=constant, dynamic=dynamic)
    return {key: torch.as_tensor(getattr(found, key)) for key in ("risk", "step", "exploded", "accuracy")}


def course_of_vgg(
    c: float, train: BinaryData, test: BinaryData, *, width: float, steps: int, seed: int, standardize: bool = False,
    constant: float | None = None, dynamic: float | None = None,
) -> Course:  # fmt: skip
    """:func:`take_steps` of :func:`initialized_vgg` on :func:`random_batches`, made once and kept.

    The accuracy is that on the first 1000 test images.

    Raises
    ------
    ValueError
        As :func:`take_steps`.
    """
    images = {"x": train.x, "y": train.y, **{f"{part}_test": tensor for part, tensor in test.first(1000).items()}}
    settings = {"width": width, "standardize": standardize, "steps": steps, "seed": seed}
    kept = cached(steps_of_vgg, {"c": c, **images, **settings, "constant": constant, "dynamic": dynamic})
    return Course(*(kept[key].numpy() for key in ("risk", "step")), bool(kept["exploded"]), kept["accuracy"].numpy())
