"""Entries of the Hessian of the risk of every batch, at any places: the random variables of Li, App E.

For a network of affine layers, ReLU, pooling and one output, and with the hinge loss, the output is linear in the
parameters of any one layer where no unit switches: entries within a layer vanish, and for layers p < q (5) says that

    ∂²R/∂θ_i ∂θ_j = Σ_positions δ^q ȧ^{q−1},     ȧ^{q−1} = ∂a^{q−1}/∂θ_i,

δ^q the gradient of the risk at the output of layer q, a^{q−1} its input. A single parameter moves one channel, so that
all entries of a sub-matrix cost little more than one pass forward and back. Standardizing batches undoes this
structure; then products with unit vectors give the columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from common.hessian.modes import evaluation_copy
from common.hessian.operators import hessian_products
from common.li_adaptive.hinge_hessian import margins
from common.li_adaptive.networks import BatchStandardize, affine_layers
from common.li_adaptive.training import HingeLoss

#: Samples whose activations are held at once.
SAMPLES_AT_ONCE = 512


@dataclass(frozen=True)
class _Place:
    """Where a parameter is: its layer, its output channel, and for a weight its input channel and kernel position."""

    layer: int
    out: int
    source: tuple[int, ...] | None  # (c,) or (c, row, column); None for a bias


def _places(network: nn.Module, indices: Int[Tensor, " M"]) -> list[_Place]:
    blocks = []
    for k, layer in enumerate(affine_layers(network)):
        blocks += [(k, parameter) for parameter in (layer.weight, layer.bias) if parameter is not None]
    ends = np.cumsum([parameter.numel() for _, parameter in blocks])
    places = []
    for place in indices.tolist():
        block = int(np.searchsorted(ends, place, side="right"))
        layer, parameter = blocks[block]
        within = np.unravel_index(place - (ends[block] - parameter.numel()), parameter.shape)
        out, *source = (int(x) for x in within)
        places.append(_Place(layer, out, tuple(source) if parameter.ndim > 1 else None))
    return places


class _Linearized:
    """A network at a batch of samples: inputs a and gradients δ of its affine layers, and the maps in between."""

    @torch.enable_grad()
    def __init__(self, network: nn.Sequential, x: Tensor, y: Tensor, weight: Tensor):
        self.layers: list[nn.Module] = []
        self.inputs: list[Tensor] = []
        self.between: list[list[tuple[str, Tensor | tuple]]] = []
        pre_activations: list[Tensor] = []
        after: list[tuple[str, Tensor | tuple]] = []  # what comes before the first layer changes none of this
        a = x
        for name, module in network._modules.items():  # some perhaps at several places
            if isinstance(module, nn.Linear) and a.ndim != 2:
                raise ValueError(f"layer {name!r} needs inputs (N, n), got {tuple(a.shape)}; flatten them before it")
            if isinstance(module, nn.Conv2d | nn.Linear):
                self.layers.append(module)
                self.inputs.append(a.detach())
                self.between.append(after := [])
                a = module(a)
                pre_activations.append(a)
            elif isinstance(module, nn.ReLU):
                after.append(("mask", (a > 0).to(a.dtype)))
                a = a.relu()
            elif isinstance(module, nn.MaxPool2d):
                a, where = functional.max_pool2d(
                    a, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode, True
                )
                after.append(("gather", where.flatten(2)))
                after.append(("shape", tuple(a.shape[-2:])))
            elif isinstance(module, nn.Flatten):
                if module.start_dim == 1 and a.ndim > 2:
                    after.append(("flatten", tuple(a.shape[2:])))
                a = module(a)
        risk = (weight * torch.relu(1 - y * a)).sum()
        self.deltas = torch.autograd.grad(risk, pre_activations)

    def start(self, place: _Place) -> tuple[Tensor, int]:
        """∂(output of the layer)/∂θ in the one channel that moves, (S, 1, ...), and that channel."""
        layer, a = self.layers[place.layer], self.inputs[place.layer]
        if isinstance(layer, nn.Linear):
            t = torch.ones_like(a[:, :1]) if place.source is None else a[:, place.source[0], None]
        elif place.source is None:
            t = torch.ones_like(self.deltas[place.layer][:, :1])
        else:
            t = _window(layer, a[:, place.source[0]], place.source[1:])[:, None]
        return t, place.out

    def to_next_input(self, t: Tensor, first: int, layer: int) -> tuple[Tensor, int]:
        """A change of channels ``first``, ... of the output of a layer, carried to the input of the next."""
        for kind, what in self.between[layer]:
            if kind == "mask":
                t = t * what[:, first : first + t.shape[1]]
            elif kind == "gather":
                t = t.flatten(2).gather(2, what[:, first : first + t.shape[1]])
            elif kind == "shape":
                t = t.unflatten(2, what)
            else:
                t, first = t.flatten(1), first * math.prod(what)
        return t, first

    def through(self, t: Tensor, first: int, layer: int) -> tuple[Tensor, int]:
        """A change of the input of a layer, carried to its output."""
        module = self.layers[layer]
        weight = module.weight.detach()[:, first : first + t.shape[1]]
        if isinstance(module, nn.Linear):
            return t @ weight.T, 0
        return functional.conv2d(t, weight, stride=module.stride, padding=module.padding), 0

    def entries(self, t: Tensor, first: int, layer: int, places: list[_Place]) -> Float[Tensor, "S J"]:
        """Each sample's share of ∂²R/∂θ_i∂θ_j, for a change ``t`` of the input of the layer of all θ_j."""
        module, delta = self.layers[layer], self.deltas[layer]
        shares = delta.new_zeros(len(t), len(places))
        moved = [k for k, p in enumerate(places) if p.source is not None and first <= p.source[0] < first + t.shape[1]]
        if isinstance(module, nn.Linear):
            out = [places[k].out for k in moved]
            source = [places[k].source[0] - first for k in moved]
            shares[:, moved] = delta[:, out] * t[:, source]
        else:
            for k in moved:
                channel, *offset = places[k].source
                window = _window(module, t[:, channel - first], offset)
                shares[:, k] = (delta[:, places[k].out] * window).flatten(1).sum(1)
        return shares


def _window(layer: nn.Conv2d, channel: Float[Tensor, "S height width"], offset: Sequence[int]) -> Tensor:
    """What one weight of a convolution of stride 1 multiplies at every position of its output."""
    vertical, horizontal = layer.padding
    padded = functional.pad(channel, (horizontal, horizontal, vertical, vertical))
    height, width = (size - kernel + 1 for size, kernel in zip(padded.shape[1:], layer.kernel_size, strict=True))
    row, column = offset
    return padded[:, row : row + height, column : column + width]


def _check_layers(network: nn.Sequential) -> None:
    """Whether the network is of the kinds of layers that are differentiated by hand."""
    if not isinstance(network, nn.Sequential):
        raise TypeError(f"the network must be an nn.Sequential of layers, got {type(network).__name__}")
    layers = [module for module in network if isinstance(module, nn.Conv2d | nn.Linear)]
    weights = [parameter for layer in layers for parameter in layer.parameters()]
    if len(set(weights)) < len(weights):
        raise ValueError("a layer or its weights are used twice; every layer must have its own")
    for name, module in network.named_children():
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.ReLU | nn.MaxPool2d | nn.Flatten | nn.Dropout):
            raise TypeError(f"layer {name!r}: {type(module).__name__} is not linear between its switches, or not known")
        if isinstance(module, nn.Conv2d):
            plain = (1, 1), (1, 1), 1, "zeros", False
            given = module.stride, module.dilation, module.groups, module.padding_mode, isinstance(module.padding, str)
            if given != plain:
                raise ValueError(
                    f"layer {name!r}: only convolutions of stride, dilation and groups 1, padded by a number of zeros"
                )
        if isinstance(module, nn.MaxPool2d) and module.return_indices:
            raise ValueError(f"layer {name!r}: pooling gives indices too, which no layer takes")


def _structured_samples(
    network: nn.Sequential, x: Tensor, y: Tensor, rows: Tensor, columns: Tensor, batch_size: int
) -> Tensor:
    batch = torch.arange(len(y), device=x.device) // batch_size
    weight = torch.bincount(batch)[batch].to(x.dtype).reciprocal()
    H = x.new_zeros(int(batch[-1]) + 1, len(rows), len(columns))
    row_places, column_places = _places(network, rows), _places(network, columns)
    sides = ((row_places, column_places, H), (column_places, row_places, H.mT))
    active = torch.nonzero(margins(network, x, y) < 1).flatten()
    for part in active.split(SAMPLES_AT_ONCE):
        at = _Linearized(network, x[part], y[part], weight[part])
        for lower, upper, target in sides:
            for i, place in enumerate(lower):
                above = {p.layer for p in upper if p.layer > place.layer}
                if not above:
                    continue
                t, first = at.start(place)
                for layer in range(place.layer + 1, max(above) + 1):
                    t, first = at.to_next_input(t, first, layer - 1)
                    if layer in above:
                        chosen = [j for j, p in enumerate(upper) if p.layer == layer]
                        shares = at.entries(t, first, layer, [upper[j] for j in chosen])
                        target[:, i, chosen] = target[:, i, chosen].index_add(0, batch[part], shares)
                    if layer < max(above):
                        t, first = at.through(t, first, layer)
    return H


def _columns_by_products(
    network: nn.Module, x: Tensor, y: Tensor, rows: Tensor, columns: Tensor, at_once: int
) -> Tensor:
    parameters, loss = list(network.parameters()), HingeLoss()
    count = sum(p.numel() for p in parameters)
    margins(network, x, y)

    def products(some: Tensor) -> Tensor:
        units = functional.one_hot(some, count).to(x.dtype).T
        return hessian_products(lambda: loss(network(x.clone()), y), parameters, units, batched=False)[rows]

    return torch.cat([products(some) for some in columns.split(at_once)], 1)


def hessian_samples(
    network: nn.Sequential,
    x: Tensor,
    y: Float[Tensor, " samples"],
    rows: Int[Tensor, " R"],
    columns: Int[Tensor, " C"],
    *,
    batch_size: int,
    at_once: int = 4,
) -> Float[Tensor, "n R C"]:
    """Entries of the Hessian of the mean hinge loss of every batch, dropout off.

    Parameters
    ----------
    network
        Convolutions of stride 1, dense layers, ReLU, max pooling, one output, with or without
        :class:`~common.li_adaptive.networks.BatchStandardize`.
    x, y
        Images and labels ±1, cut into batches in their order; the last may be smaller.
    rows, columns
        Places of parameters in the flat vector of all of them.
    at_once
        Products with unit vectors at once, where the network standardizes batches.

    Returns
    -------
    Tensor
        n = ⌈samples / ``batch_size``⌉ matrices.

    Raises
    ------
    TypeError
        If a layer of the network is of another kind.
    ValueError
        If a batch size is not positive, an index is not one of a parameter, a layer has a setting that is not known
        or is used twice, or samples and labels do not fit the network, as
        :func:`~common.li_adaptive.hinge_hessian.margins` says.
    """
    count = sum(p.numel() for p in network.parameters())
    batch_size, at_once = index(batch_size), index(at_once)
    if batch_size < 1 or at_once < 1 or len(y) < 1:
        given = f"{batch_size} of {len(y)}, {at_once} products at once"
        raise ValueError(f"batches of at least one sample are needed, got {given}")
    for places in (rows, columns):
        whole = places.dtype in (torch.int64, torch.int32)
        if not whole or (len(places) and not 0 <= int(places.min()) <= int(places.max()) < count):
            raise ValueError(f"indices of parameters must be whole numbers in 0..{count - 1}")
    network = evaluation_copy(network).requires_grad_()
    if not any(isinstance(module, BatchStandardize) for module in network.modules()):
        _check_layers(network)
        return _structured_samples(network, x, y, rows, columns, batch_size)
    pairs = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return torch.stack([_columns_by_products(network, *pair, rows, columns, at_once) for pair in pairs])
