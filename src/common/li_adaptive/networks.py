"""The convolutional networks of Li, App G, with one output, and the standardization of a batch that they use.

Every layer with weights but the last has biases; the counts of parameters that the paper prints say so.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

#: Output channels of the VGG's twelve layers, App G.3: ten convolutions, two fully connected.
VGG_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 1)
#: Layers (from 1) after which the VGG pools, and the dropout rate after each layer that has one. The paper names the
#: layers; the rates are those of the network that it adopts (Zagoruyko, 92.45% on CIFAR-10 in Torch, 2015).
VGG_POOLED = (2, 4, 7, 10)
VGG_DROPOUT = {1: 0.3, 3: 0.4, 5: 0.4, 6: 0.4, 8: 0.4, 9: 0.4, 10: 0.5, 11: 0.5}


class BatchStandardize(nn.Module):
    """Subtract the mean of the batch and divide by its standard deviation, channel by channel: nothing else.

    Neither an affine map nor running statistics (App G.3). What is divided by is the root of the variance + ``eps``;
    the paper does not say its ``eps``, and torch's 1e-5 is far above the variances that its weights of standard
    deviation 1e-4 make. A channel that does not vary becomes 0.
    """

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """Standardized ``x``, same shape."""
        axes = [axis for axis in range(x.ndim) if axis != 1]
        centred = x - x.mean(axes, keepdim=True)
        return centred * (centred.square().mean(axes, keepdim=True) + self.eps).rsqrt()


def lenet() -> nn.Sequential:
    """LeNet of Table 3: 28 × 28 images, one output, 1,232,768 parameters.

    The count fixes what the table leaves open: a 6 × 6 × 64 map before the first dense layer and no bias on the
    output. Of the paddings that give such a map, this has none in the first convolution and 2 in the second.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2304, 512), nn.ReLU(), nn.Linear(512, 1, bias=False), nn.Flatten(0),
    )  # fmt: skip


def vgg(*, width: float = 1.0, standardize: bool = True, dropout: bool = True, layers: int = 12) -> nn.Sequential:
    """VGG of App G.3: 32 × 32 × 3 images, one output, 8,684,864 parameters at width 1.

    Parameters
    ----------
    width
        Factor of the numbers of channels, rounded, at least 1 each; the paper has 1.
    standardize
        Whether :class:`BatchStandardize` stands between every layer but the last and its ReLU.
    dropout
        Whether there are the dropout layers.
    layers
        Layers with weights: 12, or fewer, leaving out convolutions that no pooling follows, the last ones first.

    Raises
    ------
    ValueError
        If the width is not positive or the number of layers not one of 6, ..., 12.
    """
    removable = [k for k in range(10, 0, -1) if k not in VGG_POOLED]
    if not width > 0:
        raise ValueError(f"the width must be positive, got {width}")
    if not 12 - len(removable) <= layers <= 12:
        raise ValueError(f"a VGG has {12 - len(removable)} to 12 layers, got {layers}")
    left_out = removable[: 12 - layers]
    modules: list[nn.Module] = []
    channels = 3
    for k, full in enumerate(VGG_WIDTHS[:-1], start=1):
        if k in left_out:
            continue
        out = max(1, round(width * full))
        if k <= 10:
            modules.append(nn.Conv2d(channels, out, 3, padding=1))
        else:
            modules += [nn.Flatten(), nn.Linear(channels * 4, out)]
        modules += [*[BatchStandardize()] * standardize, nn.ReLU()]
        if dropout and k in VGG_DROPOUT:
            modules.append(nn.Dropout(VGG_DROPOUT[k]))
        if k in VGG_POOLED:
            modules.append(nn.MaxPool2d(2))
        channels = out
    return nn.Sequential(*modules, nn.Linear(channels, 1, bias=False), nn.Flatten(0))


def perceptron(widths: Sequence[int], *, standardize: bool = False) -> nn.Sequential:
    """ReLU network without biases and with one output, (3) of the paper; ``widths`` from the input to the last hidden.

    Parameters
    ----------
    standardize
        Whether :class:`BatchStandardize` stands before every ReLU.

    Raises
    ------
    ValueError
        If there is no width, or one is below 1.
    """
    if not len(widths) or min(widths) < 1:
        raise ValueError(f"widths of at least 1 are needed, got {list(widths)}")
    modules: list[nn.Module] = []
    for inputs, out in pairwise(widths):
        modules += [nn.Linear(inputs, out, bias=False), *[BatchStandardize()] * standardize, nn.ReLU()]
    return nn.Sequential(*modules, nn.Linear(widths[-1], 1, bias=False), nn.Flatten(0))


def affine_layers(network: nn.Module) -> list[nn.Module]:
    """The layers with weights, from the input to the output."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


@torch.no_grad()
def initialize(network: nn.Module, kind: str, generator: torch.Generator, *, scale: float = 1.0) -> None:
    """Fill the weights at random and the biases with zeros, in place.

    Parameters
    ----------
    kind
        ``"uniform"``: uniform with standard deviation ``scale`` / √(fan-in). ``"normal"``: N(0, ``scale``²).
        ``"fan-in"``: N(0, ``scale`` / fan-in), so that ``scale`` is the c of Section 5.2.
    generator
        Source of randomness. The weights are a fixed random tensor times a standard deviation: networks initialized
        from equal generators differ by factors only.

    Raises
    ------
    ValueError
        If the kind is unknown, or the scale negative.
    """
    if not scale >= 0:
        raise ValueError(f"the scale must not be negative, got {scale}")
    for layer in affine_layers(network):
        fan_in = layer.weight[0].numel()
        shape, device = layer.weight.shape, layer.weight.device
        if kind == "uniform":
            noise = (2 * torch.rand(shape, generator=generator) - 1) * math.sqrt(3 / fan_in) * scale
        elif kind == "normal":
            noise = scale * torch.randn(shape, generator=generator)
        elif kind == "fan-in":
            noise = math.sqrt(scale / fan_in) * torch.randn(shape, generator=generator)
        else:
            raise ValueError(f"unknown initialization {kind!r}; known are uniform, normal, fan-in")
        layer.weight.copy_(noise.to(device))
        if layer.bias is not None:
            layer.bias.zero_()
