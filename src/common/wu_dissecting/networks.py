"""The networks of Wu et al. (2022), App E.2, by the paper's names, and their initializations.

Layers are named as in the paper, fc1, fc2, ... and conv1, conv2, from the input on: ``network.get_submodule("fc1")``.
"""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

#: F-200^2, F-200^2-100, F-200^2-BN; LeNet5, LeNet5-(fc1-80), LeNet5-BN; VGG11, VGG11-W32; ResNet18-W48.
_PERCEPTRON = re.compile(r"F((?:-\d+(?:\^\d+)?)+)(-BN)?")
_LENET = re.compile(r"LeNet5(?:-\(fc1-(\d+)\))?(-BN)?")
_VGG = re.compile(r"VGG11(?:-W(\d+))?")
_RESNET = re.compile(r"ResNet18-W(\d+)")
#: Output channels of VGG11's convolutions, and those that a max pooling by 2 follows.
VGG_WIDTHS = (64, 128, 256, 256, 512, 512, 512, 512)
VGG_POOLED = (1, 2, 4, 6, 8)


def classifier(name: str, shape: Sequence[int], classes: int) -> nn.Module:
    """A network of App E.2, with weights as torch draws them.

    Parameters
    ----------
    name
        ``"F-200^2"`` has two hidden layers of 200 units, ``"F-200^2-100"`` a third one of 100; ``"LeNet5"`` and
        ``"LeNet5-(fc1-80)"``, whose first fully connected layer has 80 outputs instead of 120. With ``"-BN"`` a batch
        normalization without affine map follows every ReLU (Table 5). ``"VGG11-W32"`` has 32 output channels in all
        eight convolutions, ``"VGG11"`` the original 64 to 512; ``"ResNet18-W48"`` has 48 everywhere.
    shape
        (channels, height, width) of an image. LeNet5 takes 32 × 32, and 28 × 28 with a border of 2 pixels of zeros;
        VGG11 and ResNet18 take 32 × 32.

    Raises
    ------
    ValueError
        If there is no such network, it does not take such images, or there are no classes.
    """
    if classes < 1:
        raise ValueError(f"at least 1 class is needed, got {classes}")
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
    if found := _VGG.fullmatch(name) or _RESNET.fullmatch(name):
        if tuple(shape[1:]) != (32, 32) or int(found[1] or 1) < 1:
            raise ValueError(f"{name} takes 32 × 32 pixels and needs at least 1 channel, got {tuple(shape)}")
        if name.startswith("ResNet18"):
            return ResNet18(shape[0], int(found[1]), classes)
        return _vgg11(shape[0], [int(found[1])] * 8 if found[1] else VGG_WIDTHS, classes)
    raise ValueError(
        f"unknown network {name!r}; known are F-200^2, LeNet5, LeNet5-(fc1-80), also with -BN, VGG11, VGG11-W32 and "
        "ResNet18-W48"
    )


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


def _vgg11(channels: int, widths: Sequence[int], classes: int) -> nn.Sequential:
    network = nn.Sequential()
    for k, (inputs, outputs) in enumerate(zip([channels, *widths[:-1]], widths, strict=True), start=1):
        network.add_module(f"conv{k}", nn.Conv2d(inputs, outputs, 3, padding=1))
        network.add_module(f"relu_conv{k}", nn.ReLU())
        if k in VGG_POOLED:
            network.add_module(f"pool{k}", nn.MaxPool2d(2))
    network.add_module("flatten", nn.Flatten())
    _add_dense(network, [widths[-1], classes], normalized=False)
    return network


class ResNet18(nn.Module):
    """ResNet18 for 32 × 32 images with one width everywhere and no batch norm, biases instead: App E.2.

    Four stages of two blocks of two convolutions, conv2 to conv17, after conv1; the first convolution of the last three
    stages has stride 2, and the shortcut around it is a 1 × 1 convolution, sc-conv1 to sc-conv3.

    Parameters
    ----------
    channels
        Of the images.
    width
        Output channels of every convolution.
    classes
        c.
    """

    def __init__(self, channels: int, width: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        for k in range(2, 18):
            self.add_module(f"conv{k}", nn.Conv2d(width, width, 3, stride=2 if k in (6, 10, 14) else 1, padding=1))
        for k in range(1, 4):
            self.add_module(f"sc-conv{k}", nn.Conv2d(width, width, 1, stride=2))
        self.fc1 = nn.Linear(width, classes)

    def forward(self, X: Float[Tensor, "N channels 32 32"]) -> Float[Tensor, "N classes"]:
        """Logits."""
        x = self.conv1(X).relu()
        for k in range(2, 18, 2):
            shortcut = self.get_submodule(f"sc-conv{(k - 2) // 4}")(x) if k in (6, 10, 14) else x
            inner = self.get_submodule(f"conv{k}")(x).relu()
            x = (self.get_submodule(f"conv{k + 1}")(inner) + shortcut).relu()
        return self.fc1(x.mean((2, 3)))


def layer_names(network: nn.Module) -> list[str]:
    """Names of the layers with weights, from the input to the output; shortcuts come before the last layer."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


@torch.no_grad()
def xavier(network: nn.Module, generator: torch.Generator) -> None:
    """Weights N(0, 2/(fan-in + fan-out)) and zero biases, in place (App E.3)."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_normal_(module.weight, generator=generator)
            module.bias.zero_()


@torch.no_grad()
def truncated_gaussian(network: nn.Module, generator: torch.Generator) -> None:
    """Weights N(0, 0.04²) cut at two standard deviations, biases 0.1 in the first layer and 0 in the others, in place.

    Dziugaite and Roy (2017), which App H of Wu et al. follows.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for k, layer in enumerate(layers):
        nn.init.trunc_normal_(layer.weight, std=0.04, a=-0.08, b=0.08, generator=generator)
        layer.bias.fill_(0.0 if k else 0.1)
