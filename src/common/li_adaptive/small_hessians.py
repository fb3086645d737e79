"""Hessians of random networks small enough to be formed: what (6) of Li says of them, and how symmetric they are.

T is linear in the weights of any one layer where no unit switches, so the diagonal blocks of (6) vanish. With two
layers the spectrum is then symmetric about zero; with more it is so in law at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.hessian.spectral_measure import asymmetry
from common.li_adaptive.hinge_hessian import formed_hessian, margins
from common.li_adaptive.networks import affine_layers, initialize, perceptron
from common.li_adaptive.training import HingeLoss


class FixedDropout(nn.Module):
    """Dropout by half with a mask that stays: every second unit, doubled."""

    def forward(self, x: Float[Tensor, "n units"]) -> Float[Tensor, "n units"]:
        """Masked ``x``."""
        return x * (2 * (torch.arange(x.shape[1]) % 2))


def masked_convnet(generator: torch.Generator) -> nn.Sequential:
    """A random network for 10 × 10 images with all that Remark D.3 allows: convolutions, biases, pooling, a mask."""
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), FixedDropout(), nn.Linear(6, 1, bias=False), nn.Flatten(0),
    ).double()  # fmt: skip
    initialize(network, "fan-in", generator)
    return network


def layer_sizes(network: nn.Module) -> list[int]:
    """Numbers of parameters of the layers with weights, biases counted with them."""
    return [sum(p.numel() for p in layer.parameters()) for layer in affine_layers(network)]


def random_hessians(
    widths: Sequence[int], number: int, x: Float[Tensor, "N d"], y: Float[Tensor, " N"], generator: torch.Generator, *,
    standardize: bool = False, scale: float = 0.2, inside: bool = True,
) -> tuple[Float[Tensor, "number P P"], list[int]]:  # fmt: skip
    """Hessians of random perceptrons, and the sizes of their diagonal blocks.

    Parameters
    ----------
    widths
        d and the widths of the hidden layers.
    number
        Of networks, drawn one after the other.
    x, y
        Features and labels ±1.
    generator
        Source of randomness.
    standardize
        Whether the networks standardize batches.
    scale
        The c of their weights.
    inside
        Whether every sample must be inside its margin; not asked of networks that standardize batches.

    Raises
    ------
    ValueError
        If a sample is beyond its margin and must not; if there is to be no network, or samples and
        labels do not fit it, as :func:`~common.li_adaptive.hinge_hessian.margins` says.
    """
    if number < 1:
        raise ValueError(f"the number of networks must be at least 1, got {number}")
    x, found = x.double(), []
    for _ in range(number):
        network = perceptron(widths, standardize=standardize).double()
        initialize(network, "fan-in", generator, scale=scale)
        if inside and not standardize and not (margins(network, x, y) < 1).all():
            raise ValueError("a sample x is beyond its margin; smaller ones are needed")
        found.append(formed_hessian(network, x, y))
    return torch.stack(found), layer_sizes(network)


@dataclass(frozen=True)
class Neighbourhood:
    """What the mean hinge loss is around a network.

    Attributes
    ----------
    risk
        (K,) at random networks none of whose weights differs from the one in the middle by more than a radius.
    gradient
        (K,) largest modulus of an entry of the gradient there.
    hessian
        Largest modulus of an entry of the Hessian in the middle.
    """

    risk: Float[np.ndarray, " K"]
    gradient: Float[np.ndarray, " K"]
    hessian: float


def around_a_dead_layer(
    widths: Sequence[int], x: Float[Tensor, "N d"], y: Float[Tensor, " N"], *, radius: float, points: int,
    generator: torch.Generator,
) -> Neighbourhood:  # fmt: skip
    """Around a random perceptron (3) all of whose weights of the second layer are negative.

    What enters that layer is not negative, so what its units see is negative wherever one unit of the first layer is
    on: no unit of the second layer is, T = 0, and so it stays in a neighbourhood. The risk is 1 there, the gradient 0.

    Parameters
    ----------
    widths
        d and the widths of at least two hidden layers.
    radius
        Half the side of the cube of weights in which ``points`` are drawn.

    Raises
    ------
    ValueError
        If there are fewer than two hidden layers, or a sample turns no unit of the first one on.
    """
    if len(widths) < 3:
        raise ValueError(f"two hidden layers are needed, got the widths {list(widths)}")
    network, x = perceptron(widths).double(), x.double()
    initialize(network, "fan-in", generator)
    layers = affine_layers(network)
    layers[1].weight.data.abs_().neg_()
    if not (layers[0](x) > radius * x.abs().sum(1, keepdim=True)).any(1).all():
        raise ValueError("a sample x turns no unit of the first layer on; wider layers are needed")
    centre = parameters_to_vector(network.parameters()).detach()
    H = formed_hessian(network, x, y)
    risks, gradients, loss = [], [], HingeLoss()
    for _ in range(points):
        shift = 2 * torch.rand(len(centre), generator=generator, dtype=torch.float64) - 1
        vector_to_parameters(centre + radius * shift, network.parameters())
        risk = loss(network(x), y.double())
        parts = torch.autograd.grad(risk, list(network.parameters()), materialize_grads=True)
        risks.append(float(risk.detach()))
        gradients.append(max(float(part.abs().max()) for part in parts))
    return Neighbourhood(np.array(risks), np.array(gradients), float(H.abs().max()))


@dataclass(frozen=True)
class NormBound:
    """The two sides of Theorem 1c for one network.

    Attributes
    ----------
    norm
        ‖H‖.
    largest
        λ₀, the largest norm of the Hessian of a sample's T.
    signed, modulus
        Means of ℓ' and of |ℓ'| over the samples.
    """

    norm: float
    largest: float
    signed: float
    modulus: float


def norm_bound(network: nn.Module, x: Float[Tensor, "N *shape"], y: Float[Tensor, " N"]) -> NormBound:
    """‖H‖ of the mean hinge loss, and what Theorem 1c bounds it by; ℓ' = −y inside the margin and 0 beyond.

    Raises
    ------
    ValueError
        As :func:`~common.li_adaptive.hinge_hessian.margins`.
    """
    active = (margins(network, x, y) < 1).double()
    H = torch.linalg.eigvalsh(formed_hessian(network, x, y)).abs().max()
    singles = []
    for one in x.split(1):
        # ∇²T up to its sign: the sample is inside the margin of one of the two labels
        label = torch.ones(1, dtype=y.dtype)
        label = label if float(margins(network, one, label)) < 1 else -label
        singles.append(float(torch.linalg.eigvalsh(formed_hessian(network, one, label)).abs().max()))
    return NormBound(float(H), max(singles), float((-y * active).mean()), float(active.mean()))


def _blocks(H: Float[Tensor, "*n P P"], sizes: Sequence[int]) -> list[Tensor]:
    """Diagonal blocks."""
    if sum(sizes) != H.shape[-1] or not sizes:
        raise ValueError(f"sizes must add up to the dimension {H.shape[-1]}, got {list(sizes)}")
    return [H[..., a:b, a:b] for a, b in pairwise(np.cumsum([0, *sizes]))]


def diagonal_share(H: Float[Tensor, "n P P"], sizes: Sequence[int]) -> Float[np.ndarray, " n"]:
    """Frobenius norm of the diagonal blocks of some sizes, over that of the matrix; NaN for a zero matrix.

    Raises
    ------
    ValueError
        If the sizes do not add up to P.
    """
    inner = sum(block.square().sum((1, 2)) for block in _blocks(H, sizes))
    return (inner / H.square().sum((1, 2))).sqrt().numpy()


def largest_diagonal_entry(H: Float[Tensor, "P P"], sizes: Sequence[int]) -> float:
    """Largest modulus in the diagonal blocks of some sizes, over the largest of the matrix; NaN for a zero matrix.

    Raises
    ------
    ValueError
        If the sizes do not add up to P.
    """
    return float(max(block.abs().max() for block in _blocks(H, sizes)) / H.abs().max())


def asymmetries(eigenvalues: Float[np.ndarray, "n N"]) -> Float[np.ndarray, " n"]:
    """:func:`~common.hessian.spectral_measure.asymmetry` of each spectrum, its eigenvalues weighted alike."""
    return np.array([asymmetry(row, np.full(len(row), 1 / len(row))) for row in eigenvalues])


def skewness(eigenvalues: Float[np.ndarray, "n N"]) -> Float[np.ndarray, " n"]:
    """Of each spectrum, E λ³ / (E λ²)^{3/2}: about zero, not about the mean; 0 where all eigenvalues are."""
    second = (eigenvalues**2).mean(1)
    return (eigenvalues**3).mean(1) / np.where(second > 0, second, 1) ** 1.5


def negative_share(eigenvalues: Float[np.ndarray, "n N"], floor: float = 1e-9) -> Float[np.ndarray, " n"]:
    """Share of negative eigenvalues among those of modulus above ``floor`` ≥ 0, of each spectrum; NaN if none is."""
    if not floor >= 0:
        raise ValueError(f"the floor must not be negative, got {floor}")
    large = (np.abs(eigenvalues) > floor).sum(1)
    return np.where(large > 0, (eigenvalues < -floor).sum(1) / np.maximum(large, 1), np.nan)


def goe_asymmetries(dimension: int, number: int, rng: np.random.Generator) -> Float[np.ndarray, " number"]:
    """Asymmetries of spectra of the Gaussian orthogonal ensemble.

    Raises
    ------
    ValueError
        If the dimension is below 1.
    """
    if dimension < 1:
        raise ValueError(f"the dimension must be at least 1, got {dimension}")
    G = rng.standard_normal((number, dimension, dimension))
    return asymmetries(np.linalg.eigvalsh(G + G.transpose(0, 2, 1)))
