"""The networks of Wu et al. (2022), App E.2, by the paper's names, and Xavier's initialization.

Layers are named as in the paper, fc1, fc2, ... and conv1, conv2, from the input on: ``network.get_submodule("fc1")``.
"""

import re
from collections.abc import Sequence

import torch
from torch import nn

#: F-200^2, F-200^2-100, F-200^2-BN; LeNet5, LeNet5-(fc1-80), LeNet5-BN.
_PERCEPTRON = re.compile(r"F((?:-\d+(?:\^\d+)?)+)(-BN)?")
_LENET = re.compile(r"LeNet5(?:-\(fc1-(\d+)\))?(-BN)?")


def classifier(name: str, shape: Sequence[int], classes: int) -> nn.Sequential:
    """A network of App E.2, with weights as torch draws them.

    Parameters
    ----------
    name
        ``"F-200^2"`` has two hidden layers of 200 units, ``"F-200^2-100"`` a third one of 100; ``"LeNet5"`` and
        ``"LeNet5-(fc1-80)"``, whose first fully connected layer has 80 outputs instead of 120. With ``"-BN"`` a batch
        normalization without affine map follows every ReLU (Table 5).
    shape
        (channels, height, width) of an image. LeNet5 takes 32 × 32, and 28 × 28 with a border of 2 pixels of zeros.

    Raises
    ------
    ValueError
        If there is no such network, or it does not take such images.
    """
    if found := _PERCEPTRON.fullmatch(name):
        hidden: list[int] = []
        for group in found[1][1:].split("-"):
            width, _, times = group.partition("^")
            hidden += [int(width)] * int(times or 1)
        if not hidden or min(hidden) < 1:
            raise ValueError(f"a hidden layer needs at least 1 unit, got {name!r}")
        network = nn.Sequential()
        network.add_module("flatten", nn.Flatten())
        _add_dense(network, [torch.Size(shape).numel(), *hidden, classes], normalized=bool(found[2]))
        return network
    if found := _LENET.fullmatch(name):
        return _lenet5(shape, int(found[1] or 120), classes, normalized=bool(found[2]))
    raise ValueError(f"unknown network {name!r}; known are F-200^2, LeNet5, LeNet5-(fc1-80), also with -BN")


def _add_dense(network: nn.Sequential, widths: Sequence[int], *, normalized: bool) -> None:
    for k in range(1, len(widths)):
        network.add_module(f"fc{k}", nn.Linear(widths[k - 1], widths[k]))
        if k < len(widths) - 1:
            network.add_module(f"relu_fc{k}", nn.ReLU())
            if normalized:
                network.add_module(f"bn_fc{k}", nn.BatchNorm1d(widths[k], affine=False))


def _lenet5(shape: Sequence[int], fc1: int, classes: int, *, normalized: bool) -> nn.Sequential:
    channels, side, _ = shape
    if tuple(shape[1:]) not in {(28, 28), (32, 32)} or fc1 < 1:
        raise ValueError(f"LeNet5 takes 28 × 28 or 32 × 32 pixels and at least 1 unit, got {tuple(shape)}, fc1 {fc1}")
    network = nn.Sequential()
    for k, (inputs, outputs, padding) in enumerate([(channels, 6, (32 - side) // 2), (6, 16, 0)], start=1):
        network.add_module(f"conv{k}", nn.Conv2d(inputs, outputs, 5, padding=padding))
        network.add_module(f"relu_conv{k}", nn.ReLU())
        if normalized:
            network.add_module(f"bn_conv{k}", nn.BatchNorm2d(outputs, affine=False))
        network.add_module(f"pool{k}", nn.MaxPool2d(2))
    network.add_module("flatten", nn.Flatten())
    _add_dense(network, [400, fc1, 84, classes], normalized=normalized)
    return network


def layer_names(network: nn.Sequential) -> list[str]:
    """Names of the layers with weights, from the input to the output."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


@torch.no_grad()
def xavier(network: nn.Module, generator: torch.Generator) -> None:
    """Weights N(0, 2/(fan-in + fan-out)) and zero biases, in place (App E.3)."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_normal_(module.weight, generator=generator)
            module.bias.zero_()
