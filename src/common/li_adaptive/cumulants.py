"""Entries of Hessians as random variables, and how many of their joint cumulants are not zero: Li, App E.

The random matrix is the Hessian of the risk of a batch. A sub-matrix of it is drawn at N_b random rows and N_b random
columns; its N_b² entries, over n batches, are n samples of as many random variables, whose correlations, third and
fourth cumulants are counted that exceed a threshold.

Most entries at random places are zero. For a network of affine layers, ReLU, pooling and one output, and with the hinge
loss, the output is linear in the parameters of any one layer where no unit switches: entries within a layer vanish, and
for layers p < q (5) says that

    ∂²R/∂θ_i ∂θ_j = Σ_positions δ^q ȧ^{q−1},     ȧ^{q−1} = ∂a^{q−1}/∂θ_i,

δ^q the gradient of the risk at the output of layer q, a^{q−1} its input. A single parameter moves one channel, so that
all entries of a sub-matrix cost little more than one pass forward and back (:func:`hessian_samples`). Standardizing
batches undoes this structure; then products with unit vectors give the columns.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import special
from torch import Tensor, nn
from torch.nn import functional

from common.li_adaptive.networks import BatchStandardize, affine_layers
from common.li_adaptive.training import HingeLoss, outputs

#: Thresholds of Table 2 by the order of the cumulants, and N_b, the rows and columns of a random sub-matrix.
THRESHOLDS = {2: 0.4, 3: 0.4, 4: 1.0}
SUBMATRIX = {2: 100, 3: 10, 4: 10}
#: How moments are normalized. "pearson": about the mean, divided by sample standard deviations. "uncentred": about
#: zero, divided by root mean squares. "unit": about zero, not divided, for variables known to have variance 1.
CONVENTIONS = ("pearson", "uncentred", "unit")
#: Samples whose activations are held at once.
SAMPLES_AT_ONCE = 512


# ---------------------------------------------------------------------------------------------------------
# Entries of the Hessian


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
    for index in indices.tolist():
        block = int(np.searchsorted(ends, index, side="right"))
        layer, parameter = blocks[block]
        within = np.unravel_index(index - (ends[block] - parameter.numel()), parameter.shape)
        out, *source = (int(x) for x in within)
        places.append(_Place(layer, out, tuple(source) if parameter.ndim > 1 else None))
    return places


class _Linearized:
    """A network at a batch of samples: inputs a and gradients δ of its affine layers, and the maps in between."""

    def __init__(self, network: nn.Sequential, x: Tensor, y: Tensor, weight: Tensor):
        self.layers: list[nn.Module] = []
        self.inputs: list[Tensor] = []
        self.between: list[list[tuple[str, Tensor | tuple]]] = []
        pre_activations: list[Tensor] = []
        a = x
        for module in network:
            if isinstance(module, nn.Conv2d | nn.Linear):
                self.layers.append(module)
                self.inputs.append(a.detach())
                self.between.append([])
                a = module(a)
                pre_activations.append(a)
            elif isinstance(module, nn.ReLU):
                self.between[-1].append(("mask", (a > 0).to(a.dtype)))
                a = module(a)
            elif isinstance(module, nn.MaxPool2d):
                a, where = functional.max_pool2d(a, module.kernel_size, module.stride, return_indices=True)
                self.between[-1].append(("gather", where.flatten(2)))
                self.between[-1].append(("shape", tuple(a.shape[-2:])))
            elif isinstance(module, nn.Flatten):
                if module.start_dim == 1 and a.ndim > 2:
                    self.between[-1].append(("flatten", tuple(a.shape[2:])))
                a = module(a)
            elif not isinstance(module, nn.Dropout):
                raise TypeError(f"{type(module).__name__} is not linear between its switches")
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
        moved = [
            k for k, p in enumerate(places) if p.source is not None and first <= p.source[0] < first + t.shape[1]
        ]
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


def _window(layer: nn.Conv2d, channel: Float[Tensor, "S height width"], offset: tuple[int, ...]) -> Tensor:
    """What one weight of a convolution of stride 1 multiplies at every position of its output."""
    vertical, horizontal = layer.padding
    padded = functional.pad(channel, (horizontal, horizontal, vertical, vertical))
    height, width = (size - kernel + 1 for size, kernel in zip(padded.shape[1:], layer.kernel_size, strict=True))
    row, column = offset
    return padded[:, row : row + height, column : column + width]


def _structured_samples(
    network: nn.Sequential, x: Tensor, y: Tensor, rows: Tensor, columns: Tensor, batch_size: int
) -> Tensor:
    batch = torch.arange(len(y), device=x.device) // batch_size
    weight = torch.bincount(batch)[batch].to(x.dtype).reciprocal()
    H = x.new_zeros(int(batch[-1]) + 1, len(rows), len(columns))
    row_places, column_places = _places(network, rows), _places(network, columns)
    sides = ((row_places, column_places, H), (column_places, row_places, H.mT))
    active = torch.nonzero(1 - y * outputs(network, x) > 0).flatten()
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
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    shapes = [p.shape for p in parameters.values()]
    sizes = [p.numel() for p in parameters.values()]
    loss = HingeLoss()

    def gradient(p: dict) -> dict:
        return torch.func.grad(lambda q: loss(torch.func.functional_call(network, q, (x,)), y))(p)

    def column(unit: Tensor) -> Tensor:
        parts = unit.split(sizes)
        tangent = {n: t.view(s) for n, t, s in zip(parameters, parts, shapes, strict=True)}
        product = torch.func.jvp(gradient, (parameters,), (tangent,))[1]
        return torch.cat([t.flatten() for t in product.values()])[rows]

    parts = []
    for some in columns.split(at_once):
        units = functional.one_hot(some, sum(sizes)).to(x.dtype)
        parts.append(torch.func.vmap(column)(units))
    return torch.cat(parts).T


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
        If the batch size is not positive or an index is not one of a parameter.
    """
    count = sum(p.numel() for p in network.parameters())
    if batch_size < 1 or len(y) < 1:
        raise ValueError(f"batches of at least one sample are needed, got {batch_size} of {len(y)}")
    if any(len(i) and not 0 <= int(i.min()) <= int(i.max()) < count for i in (rows, columns)):
        raise ValueError(f"indices of parameters must lie in 0..{count - 1}")
    network.eval()
    if not any(isinstance(module, BatchStandardize) for module in network.modules()):
        return _structured_samples(network, x, y, rows, columns, batch_size)
    pairs = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return torch.stack([_columns_by_products(network, *pair, rows, columns, at_once) for pair in pairs])


# ---------------------------------------------------------------------------------------------------------
# Counts


@dataclass(frozen=True)
class Count:
    """How many cumulants exceed a threshold.

    Attributes
    ----------
    exceeding
        Ordered tuples whose modulus exceeds it; a pair with itself is no pair (Algorithm 3).
    unordered
        The same with every set of entries, some perhaps repeated, counted once.
    distinct
        Ordered tuples without a repeated entry.
    variables, constant
        Number of entries of the sub-matrix, and of those among them whose variance is zero: their statistics
        are 0/0 and count as zero.
    order
        2, 3 or 4.
    """

    exceeding: int
    unordered: int
    distinct: int
    variables: int
    constant: int
    order: int

    @property
    def per_entry(self) -> float:
        """Step 4 of Algorithm 1: tuples divided by N_b²."""
        return self.exceeding / self.variables

    @property
    def exponent(self) -> float:
        """e in ``per_entry`` = N_b^e; 0 where there are fewer tuples than entries."""
        return math.log(max(self.per_entry, 1.0)) / (0.5 * math.log(self.variables))

    @property
    def fraction(self) -> float:
        """Share of all ordered tuples."""
        return self.exceeding / float(self.variables) ** self.order


def normalized(samples: Float[Tensor, "n M"], convention: str) -> tuple[Float[Tensor, "n K"], int]:
    """Variables that vary, brought to unit size by a convention, and how many do not vary.

    Raises
    ------
    ValueError
        If the convention is unknown or there are fewer than 3 samples.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}; known are {', '.join(CONVENTIONS)}")
    if len(samples) < 3:
        raise ValueError(f"cumulants need at least 3 samples, got {len(samples)}")
    varies = (samples != samples[0]).any(0)
    kept = samples[:, varies]
    constant = samples.shape[1] - kept.shape[1]
    if convention == "unit":
        return kept, constant
    scale = kept.abs().amax(0)  # entries of a Hessian can be too small to be squared
    kept = kept / scale
    if convention == "pearson":
        kept = kept - kept.mean(0)
    return kept / kept.square().mean(0).sqrt(), constant


def correlation_matrix(samples: Float[Tensor, "n M"]) -> Float[Tensor, "M M"]:
    """Pearson's correlations of M variables; 0 where one of the two does not vary."""
    varies = (samples != samples[0]).any(0)
    z, _ = normalized(samples, "pearson")
    matrix = samples.new_zeros(len(varies), len(varies))
    matrix[varies.nonzero(), varies.nonzero().T] = z.T @ z / len(z)
    return matrix


def count_cumulants(
    samples: Float[Tensor, "n M"], order: int, threshold: float, convention: str = "pearson"
) -> Count:
    """Number of ordered tuples of variables whose normalized joint cumulant exceeds a threshold.

    Parameters
    ----------
    samples
        n samples of M variables.
    order
        2: correlations; 3: mean of x y z; 4: mean of w x y z less the three products of second moments (App E.1).
    convention
        One of :data:`CONVENTIONS`.

    Raises
    ------
    ValueError
        If the order or the convention is unknown, or there are fewer than 3 samples.
    """
    if order not in (2, 3, 4):
        raise ValueError(f"cumulants of order 2, 3 or 4 are counted, got {order}")
    z, constant = normalized(samples, convention)
    n, K = z.shape
    total = unordered = distinct = 0
    second = z.T @ z / n if order == 4 else None
    products = (z[:, :, None] * z[:, None, :]).flatten(1) if order > 2 else None
    places = torch.arange(K, device=z.device)
    if order == 2:
        for rows in places.split(2048):
            large = (z[:, rows].T @ z / n).abs() > threshold
            large[torch.arange(len(rows), device=z.device), rows] = False
            total += int(large.sum())
        return Count(total, total // 2, total, samples.shape[1], constant, order)
    if order == 4:
        b, c, d = torch.meshgrid(places, places, places, indexing="ij")
        all_apart, all_rising = (b != c) & (b != d) & (c != d), (b <= c) & (c <= d)
    for a in range(K):
        if order == 3:
            large = ((z[:, a] @ products / n).abs() > threshold).view(K, K)
            b2, c2 = places[:, None], places[None, :]
            apart = (b2 != a) & (c2 != a) & (b2 != c2)
            rising = (a <= b2) & (b2 <= c2)
        else:
            fourth = ((z[:, a, None] * z).T @ products / n).view(K, K, K)
            fourth -= second[a, :, None, None] * second
            fourth -= second[a, None, :, None] * second[:, None, :]
            fourth -= second[a, None, None, :] * second[:, :, None]
            large = fourth.abs() > threshold
            apart = (b != a) & (c != a) & (d != a) & all_apart
            rising = (a <= b) & all_rising
        total += int(large.sum())
        unordered += int((large & rising).sum())
        distinct += int((large & apart).sum())
    return Count(total, unordered, distinct, samples.shape[1], constant, order)


# ---------------------------------------------------------------------------------------------------------
# The null law


def _linear_tail(a: np.ndarray, n: int, threshold: float, convention: str) -> np.ndarray:
    """P(|mean of a·w| > threshold) for independent normal w, normalized by the convention; a is (draws, n)."""
    if convention == "unit":
        return special.erfc(threshold * n / np.sqrt(2 * (a**2).sum(1)))
    if convention == "pearson":
        a = a - a.mean(1, keepdims=True)
    # w/√n is uniform on the unit sphere of n (or, centred, n − 1) dimensions: its square along a is a beta variable.
    cosine = np.minimum(threshold * np.sqrt(n / (a**2).sum(1)), 1)
    free = n - 2 if convention == "pearson" else n - 1
    return special.betaincc(0.5, free / 2, cosine**2)


def _standard(w: np.ndarray, convention: str) -> np.ndarray:
    if convention == "pearson":
        w = w - w.mean(1, keepdims=True)
    return w if convention == "unit" else w / np.sqrt((w**2).mean(1, keepdims=True))


def expected_null_count(
    order: int, variables: int, n: int, threshold: float, convention: str, *, draws: int = 20_000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Expected number of ordered tuples above a threshold if all variables are independent and normal.

    Split by how often an index repeats. Of the second order the value is exact: the squared correlation is a beta
    variable (Student's t in disguise). Where some variable appears once, the cumulant is linear in it, and its tail is
    exact given the others, over which the mean is taken; only the patterns without such a variable are counted.

    Parameters
    ----------
    draws
        Draws of the other variables.

    Returns
    -------
    dict
        Pattern ("11" distinct pair, "111", "21", "3", "1111", "211", "31", "22", "4") to the expected count and its
        standard error.
    """
    rng = np.random.default_rng(seed)
    M = variables

    def draw(count: int) -> list[np.ndarray]:
        return [_standard(rng.standard_normal((draws, n)), convention) for _ in range(count)]

    def mean(x: np.ndarray) -> np.ndarray:
        return x.mean(1, keepdims=True)

    def result(number: int, probabilities: np.ndarray) -> tuple[float, float]:
        return number * float(probabilities.mean()), number * float(probabilities.std(ddof=1) / math.sqrt(draws))

    if order == 2:
        if convention == "unit":
            return {"11": result(M * (M - 1), _linear_tail(draw(1)[0], n, threshold, convention))}
        exact = _linear_tail(_standard(np.arange(n)[None] - 0.3, convention), n, threshold, convention)
        return {"11": (M * (M - 1) * float(exact[0]), 0.0)}
    x, y = draw(2)
    if order == 3:
        return {
            "111": result(M * (M - 1) * (M - 2), _linear_tail(x * y, n, threshold, convention)),
            "21": result(3 * M * (M - 1), _linear_tail(x * x, n, threshold, convention)),
            "3": result(M, np.abs((x**3).mean(1)) > threshold),
        }
    if order != 4:
        raise ValueError(f"null counts of order 2, 3 or 4 are known, got {order}")
    (z,) = draw(1)
    one = x * y * z - sum(p * mean(q * r) for p, (q, r) in zip((x, y, z), ((y, z), (x, z), (x, y)), strict=True))
    two = x * x * y - 2 * x * mean(x * y) - y * mean(x * x)
    three = x**3 - 3 * x * mean(x * x)
    pairs = (x * x * y * y).mean(1) - (x * x).mean(1) * (y * y).mean(1) - 2 * (x * y).mean(1) ** 2
    alone = (x**4).mean(1) - 3 * (x * x).mean(1) ** 2
    return {
        "1111": result(M * (M - 1) * (M - 2) * (M - 3), _linear_tail(one, n, threshold, convention)),
        "211": result(6 * M * (M - 1) * (M - 2), _linear_tail(two, n, threshold, convention)),
        "31": result(4 * M * (M - 1), _linear_tail(three, n, threshold, convention)),
        "22": result(3 * M * (M - 1), np.abs(pairs) > threshold),
        "4": result(M, np.abs(alone) > threshold),
    }
