"""SGD on LeNets on a CPU, by hand, in a layout that makes large matrix products of all of it.

An activation lies as (height, channels, width, samples). One output of max pooling comes from 2 × 2 outputs of the
convolution, and these from a tile of the input that is one pixel larger than the kernel: they are computed together, as
4 · outputs rows of a product whose other factor holds such tiles. That factor is the activation once for every column
of the tile, shifted, so that blocks of its rows, which overlap, are all the rows of a tile. Pooling, ReLU and their way
back run along the samples, which are contiguous, and bias and ReLU, which commute with pooling, come after it, on a
quarter of the entries. Equal to torch's autograd up to rounding.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_masked = torch.ops.aten.threshold_backward  # (gradient, x, 0): the gradient where x > 0


class _Convolution:
    """Convolution with stride 1, ReLU, batch normalization or none, 2 × 2 max pooling.

    Attributes
    ----------
    shape
        (channels, height, width) of what comes out.
    gradients
        By the names of the parameters, in the layout of :meth:`inward`.
    """

    def __init__(self, name: str, module: nn.Conv2d, shape: tuple[int, int, int], norm: "_Norm | None"):
        self.name, self.norm = name, norm
        self.channels, self.height, self.width = shape
        self.outputs, self.kernel, self.padding = module.out_channels, module.kernel_size[0], module.padding[0]
        rows, columns = ((side + 2 * self.padding - self.kernel + 1) // 2 for side in shape[1:])
        self.shape, self.tile = (self.outputs, rows, columns), self.kernel + 1
        self.gradients: dict[str, Tensor] = {}
        self._unfolded: dict[int, Tensor] = {}

    def inward(self, weight: Float[Tensor, "o channels kernel kernel"]) -> Float[Tensor, "o kernel channels kernel"]:
        """A weight in the layout that it is used in."""
        return weight.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    def outward(self, weight: Float[Tensor, "o kernel channels kernel"]) -> Float[Tensor, "o channels kernel kernel"]:
        """A weight in torch's layout again."""
        return weight.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    def forward(self, A: Float[Tensor, "H C W B"], parameters: Mapping[str, Tensor]) -> Float[Tensor, "H2 o W2 B"]:
        bias = parameters[f"{self.name}.bias"][:, None, None]
        self.blocks = self._blocks(self._unfold(A))
        weight = self._of_tiles(parameters[f"{self.name}.weight"])
        z = torch.bmm(weight.expand(len(self.blocks), *weight.shape), self.blocks)
        self.z = z = z.view(len(z), 2, 2, self.outputs, -1, A.shape[3])
        if self.norm is not None:
            self.norm.measure(z.add_(bias).relu_())
        self.rows = torch.maximum(z[:, :, 0], z[:, :, 1])
        largest = torch.maximum(self.rows[:, 0], self.rows[:, 1])
        self.active = largest.add_(bias).relu_() if self.norm is None else self.norm.apply(largest)
        return self.active

    def backward(
        self, delta: Float[Tensor, "H2 o W2 B"], parameters: Mapping[str, Tensor], first: bool
    ) -> Float[Tensor, "H C W B"] | None:
        if self.norm is None:
            delta = _masked(delta, self.active, 0)
            self.gradients[f"{self.name}.bias"] = delta.sum((0, 2, 3))
            dz = self._unpool(delta)
        else:
            along = self.norm.along(delta, self.active)
            dz = _masked(self.norm.backward(self._unpool(delta), self.z, along), self.z, 0)
            self.gradients[f"{self.name}.bias"] = dz.sum((0, 1, 2, 4, 5))
        dz = dz.view(len(dz), 4 * self.outputs, -1)
        self.gradients[f"{self.name}.weight"] = self._of_kernels(torch.bmm(dz, self.blocks.mT).sum(0))
        if first:
            return None
        samples = delta.shape[3]
        folded = torch.zeros_like(self._unfolded[samples])
        weight = self._of_tiles(parameters[f"{self.name}.weight"]).T.contiguous()
        for block, of_row in zip(self._blocks(folded), dz, strict=True):
            block.addmm_(weight, of_row)
        below = folded.new_zeros(len(folded), self.channels, self.width + 2 * self.padding, samples)
        for column in range(self.tile):
            below[:, :, self._columns(column)] += folded[:, :, column]
        edge = self.padding
        return below[edge : edge + self.height, :, edge : edge + self.width]

    def _columns(self, column: int) -> slice:
        """The columns of the padded input that one column of the tiles sees."""
        return slice(column, column + 2 * self.shape[2] - 1, 2)

    def _unfold(self, A: Float[Tensor, "H C W B"]) -> Float[Tensor, "H2 C tile W2 B"]:
        """The padded input once for every column of the tiles."""
        samples, edge = A.shape[3], self.padding
        if samples not in self._unfolded:
            shape = self.height + 2 * edge, self.channels, self.tile, self.shape[2], samples
            self._unfolded[samples] = A.new_zeros(shape)
        if edge:
            A = nn.functional.pad(A, (0, 0, edge, edge))
        for column in range(self.tile):
            self._unfolded[samples][edge : edge + self.height, :, column] = A[:, :, self._columns(column)]
        return self._unfolded[samples]

    def _blocks(self, unfolded: Tensor) -> Float[Tensor, "H2 n columns"]:
        """The rows that a row of tiles depends on, one block below the other, overlapping."""
        row, columns = unfolded[0].numel(), unfolded[0, 0, 0].numel()
        size = self.shape[1], self.tile * self.channels * self.tile, columns
        return unfolded.as_strided(size, (2 * row, columns, 1))

    def _of_tiles(self, weight: Float[Tensor, "o kernel channels kernel"]) -> Float[Tensor, "p n"]:
        """The kernel at the four places in a tile."""
        tiles = weight.new_zeros(2, 2, self.outputs, self.tile, self.channels, self.tile)
        for y in range(2):
            for x in range(2):
                tiles[y, x, :, y : y + self.kernel, :, x : x + self.kernel] = weight
        return tiles.view(4 * self.outputs, -1)

    def _of_kernels(self, gradient: Float[Tensor, "p n"]) -> Float[Tensor, "o kernel channels kernel"]:
        """From the gradient by :meth:`_of_tiles` to that by the kernel."""
        tiles, k = gradient.view(2, 2, self.outputs, self.tile, self.channels, self.tile), self.kernel
        return sum(tiles[y, x, :, y : y + k, :, x : x + k] for y in range(2) for x in range(2))

    def _unpool(self, delta: Float[Tensor, "H2 o W2 B"]) -> Float[Tensor, "H2 2 2 o W2 B"]:
        """To the first of the largest of four, as torch does it."""
        z, rows, dz = self.z, self.rows, torch.empty_like(self.z)
        lower = _masked(delta, rows[:, 1] - rows[:, 0], 0)
        for y, of_row in enumerate((delta - lower, lower)):
            right = _masked(of_row, z[:, y, 1] - z[:, y, 0], 0)
            dz[:, y, 1] = right
            torch.sub(of_row, right, out=dz[:, y, 0])
        return dz


class _Dense:
    """Linear layer, ReLU unless it is the last, batch normalization or none, on inputs (n, samples)."""

    def __init__(self, name: str, image: tuple[int, int, int] | None, norm: "_Norm | None", last: bool):
        self.name, self.image, self.norm, self.last = name, image, norm, last
        self.gradients: dict[str, Tensor] = {}

    def inward(self, weight: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """A weight on the layout of the activations, if its inputs are an image."""
        if self.image is None:
            return weight.clone()
        return weight.view(len(weight), *self.image).transpose(1, 2).reshape(len(weight), -1)

    def outward(self, weight: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """A weight in torch's layout again."""
        if self.image is None:
            return weight.clone()
        channels, height, width = self.image
        return weight.view(-1, height, channels, width).transpose(1, 2).reshape(len(weight), -1)

    def forward(self, A: Float[Tensor, "*n B"], parameters: Mapping[str, Tensor]) -> Float[Tensor, "m B"]:
        self.inputs = A.reshape(-1, A.shape[-1])
        self.active = torch.addmm(
            parameters[f"{self.name}.bias"][:, None], parameters[f"{self.name}.weight"], self.inputs
        )
        if self.last:
            return self.active
        self.active.relu_()
        if self.norm is None:
            return self.active
        self.norm.measure(self.active)
        return self.norm.apply(self.active)

    def backward(
        self, delta: Float[Tensor, "m B"], parameters: Mapping[str, Tensor], first: bool
    ) -> Float[Tensor, "n B"] | None:
        if self.norm is not None:
            delta = self.norm.backward(delta, self.active, self.norm.along(delta, self.norm.apply(self.active)))
        if not self.last:
            delta = _masked(delta, self.active, 0)
        self.gradients[f"{self.name}.bias"] = delta.sum(1)
        self.gradients[f"{self.name}.weight"] = delta @ self.inputs.T
        return None if first else parameters[f"{self.name}.weight"].T @ delta


class _Norm:
    """Batch normalization without affine map, of one channel for each place along ``axis``."""

    def __init__(self, name: str, module: nn.BatchNorm1d | nn.BatchNorm2d):
        self.name, self.eps, self.rate = name, module.eps, module.momentum
        self.running = {key: tensor.clone() for key, tensor in module.state_dict().items()}

    def measure(self, A: Tensor) -> None:
        """Take mean and variance, and let the running ones follow."""
        channels = len(self.running["running_mean"])
        self.count = A.numel() // channels
        mean = _over_all_but_channels(A) / self.count
        variance = _over_all_but_channels((A - _like(mean, A)).square_()) / self.count
        self.mean, self.scale = mean, (variance + self.eps).rsqrt()
        self.running["running_mean"].lerp_(mean, self.rate)
        self.running["running_var"].lerp_(variance * (self.count / max(1, self.count - 1)), self.rate)
        self.running["num_batches_tracked"] += 1

    def apply(self, A: Tensor) -> Tensor:
        """A normalized by what was measured."""
        return (A - _like(self.mean, A)).mul_(_like(self.scale, A))

    def along(self, delta: Tensor, normalized: Tensor) -> tuple[Tensor, Tensor]:
        """Means of delta and of delta times what was normalized, from those entries where delta is not zero."""
        return tuple(_over_all_but_channels(x) / self.count for x in (delta, delta * normalized))

    def backward(self, delta: Tensor, A: Tensor, along: tuple[Tensor, Tensor]) -> Tensor:
        """From the gradient by what was normalized to that by A."""
        slope = self.scale * along[1]
        level = along[0] - self.mean * slope
        return torch.addcmul(delta - _like(level, A), A, _like(slope, A), value=-1).mul_(_like(self.scale, A))


def _like(of_channels: Float[Tensor, " channels"], A: Tensor) -> Tensor:
    """With the dimensions behind the channels: (..., channels, width, samples), or (channels, samples)."""
    return of_channels[:, None] if A.ndim == 2 else of_channels[:, None, None]


def _over_all_but_channels(A: Tensor) -> Float[Tensor, " channels"]:
    return A.sum(1) if A.ndim == 2 else A.sum((*range(A.ndim - 3), A.ndim - 2, A.ndim - 1))


class Convolutional:
    """The steps of networks that :meth:`takes`, one network after the other, as a
    :class:`~common.wu_dissecting.sgd.Trainer`.

    Parameters
    ----------
    networks
        Equal ones; they are not changed.
    X, y
        (N, channels, height, width) and (N,).
    lr, momentum, weight_decay
        As in torch.optim.SGD.
    """

    def __init__(
        self, networks: Sequence[nn.Sequential], X: Float[Tensor, "N C H W"], y: Int[Tensor, " N"], *, lr: float,
        momentum: float, weight_decay: float,
    ):  # fmt: skip
        self.shape, self.y = tuple(X.shape[1:]), y
        self.X = X.transpose(1, 2).flatten(1)  # (N, height · channels · width)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.stages = [_stages(network, self.shape) for network in networks]
        self.parameters = [self._inward(i, dict(network.named_parameters())) for i, network in enumerate(networks)]
        self.velocities: list[dict[str, Tensor]] = [{} for _ in networks]

    @staticmethod
    def takes(network: nn.Module, shape: Sequence[int]) -> bool:
        """Whether the network, on such samples, is what the steps are written for.

        A sequence of convolutions with stride 1, ReLU and 2 × 2 max pooling, then of linear layers with ReLU but after
        the last, as the LeNets are; batch normalization without affine map may follow a ReLU.
        """
        return len(shape) == 3 and bool(_stages(network, tuple(shape)))

    def pass_through(self, order: Int[Tensor, "E N"], batch_size: int) -> None:
        """One epoch; every network sees its samples in an order of its own."""
        for rows in order.split(batch_size, 1):
            for member, batch in enumerate(rows):
                self._step(member, batch)

    @torch.no_grad()
    def _step(self, member: int, batch: Int[Tensor, " B"]) -> None:
        stages, parameters, count = self.stages[member], self.parameters[member], len(batch)
        channels, height, width = self.shape
        A = self.X[batch].T.contiguous().view(height, channels, width, count)
        for stage in stages:
            A = stage.forward(A, parameters)
        delta = A.softmax(0)
        delta[self.y[batch], torch.arange(count)] -= 1
        delta /= count
        for stage, below in zip(stages[::-1], [*stages[-2::-1], None], strict=True):
            delta = stage.backward(delta, parameters, first=below is None)
            if isinstance(below, _Convolution) and isinstance(stage, _Dense):
                delta = delta.view(below.active.shape)
        for stage in stages:
            for name, gradient in stage.gradients.items():
                self._move(member, name, gradient)

    def _move(self, member: int, name: str, gradient: Tensor) -> None:
        parameter, velocities = self.parameters[member][name], self.velocities[member]
        if self.weight_decay:
            gradient.add_(parameter, alpha=self.weight_decay)
        if self.momentum:
            kept = velocities.get(name)
            velocities[name] = gradient = gradient if kept is None else kept.mul_(self.momentum).add_(gradient)
        parameter.add_(gradient, alpha=-self.lr)

    def _inward(self, member: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        by_name = {stage.name: stage for stage in self.stages[member]}
        found = {}
        for name, tensor in tensors.items():
            layer, _, part = name.partition(".")
            tensor = tensor.detach()
            found[name] = by_name[layer].inward(tensor) if part == "weight" else tensor.clone()
        return found

    def _outward(self, tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of all members by name, stacked, in torch's layout."""
        by_name = {stage.name: stage for stage in self.stages[0]}
        found = {}
        for name in tensors[0]:
            layer, _, part = name.partition(".")
            outward = by_name[layer].outward if part == "weight" else Tensor.clone
            found[name] = torch.stack([outward(one[name]) for one in tensors])
        return found

    def _running(self, member: int) -> dict[str, Tensor]:
        norms = [stage.norm for stage in self.stages[member] if stage.norm is not None]
        return {f"{norm.name}.{key}": tensor for norm in norms for key, tensor in norm.running.items()}

    def now(self) -> dict[str, Tensor]:
        """Parameters and running statistics by their names, one row for each network."""
        running = [self._running(member) for member in range(len(self.stages))]
        stacked = {name: torch.stack([one[name] for one in running]) for name in running[0]}
        return self._outward(self.parameters) | stacked

    def velocity(self) -> dict[str, Tensor]:
        """Momentum buffers by the names of the parameters; empty without momentum and before any step."""
        return self._outward(self.velocities)

    def restore(self, state: Mapping[str, Tensor], velocity: Mapping[str, Tensor]) -> None:
        """What :meth:`now` and :meth:`velocity` gave."""
        for member, own in enumerate(self.parameters):
            for name, tensor in self._inward(member, {name: state[name][member] for name in own}).items():
                own[name].copy_(tensor)
            for name, tensor in self._running(member).items():
                tensor.copy_(state[name][member])
            self.velocities[member] = self._inward(member, {name: t[member] for name, t in velocity.items()})


def _stages(network: nn.Module, shape: tuple[int, int, int]) -> list[_Convolution | _Dense]:
    """What the network is made of; nothing if it is something else than :meth:`Convolutional.takes` says."""
    stages: list[_Convolution | _Dense] = []
    modules = list(network.named_children()) if isinstance(network, nn.Sequential) else []

    def took(kind: type[nn.Module]) -> tuple[str, nn.Module] | None:
        return modules.pop(0) if modules and isinstance(modules[0][1], kind) else None

    def norm(kind: type[nn.Module]) -> _Norm | None:
        usual = modules and modules[0][1].__dict__.get("affine") is False and modules[0][1].momentum is not None
        return _Norm(*found) if usual and (found := took(kind)) else None

    while (found := took(nn.Conv2d)) and took(nn.ReLU):
        stages.append(_Convolution(*found, shape, norm(nn.BatchNorm2d)))
        if not _simple(found[1], shape) or not (pool := took(nn.MaxPool2d)) or not _halves(pool[1]):
            return []
        shape = stages[-1].shape
    flattened, image = took(nn.Flatten), shape
    while stages and flattened and (found := took(nn.Linear)):
        last = not took(nn.ReLU)
        stages.append(_Dense(found[0], image, norm(nn.BatchNorm1d), last))
        if last:
            return [] if modules else stages
        image = None
    return []


def _simple(convolution: nn.Conv2d, shape: tuple[int, int, int]) -> bool:
    """Whether it is square, with stride 1, and gives even numbers of rows and columns."""
    if isinstance(convolution.padding, str):
        return False
    (size, width), (padding, other) = convolution.kernel_size, convolution.padding
    even = all(side + 2 * padding - size >= 1 and (side + 2 * padding - size) % 2 == 1 for side in shape[1:])
    strides = convolution.stride == convolution.dilation == (1, 1) and convolution.groups == 1
    return even and strides and size == width and padding == other


def _halves(pool: nn.MaxPool2d) -> bool:
    return (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode) == (2, 2, 0, 1, False)
