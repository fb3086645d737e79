"""Steps of stochastic gradient descent of several equal networks, each with its own order of the samples.

SGD on the mean cross-entropy of mini-batches: Wu et al. (2022), App E.3. Fully connected networks take their steps
together, as batched matrix products. Convolutional ones take turns, LeNets by hand, others by torch's autograd: as one
grouped convolution sixteen LeNets cost 2.7 times as much on a CPU. On a GPU an epoch is one CUDA graph: its kernels,
too small to fill it, follow each other without being launched one by one, and beside those of other trainings.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from common.wu_dissecting.convolutional_sgd import Convolutional

torch.backends.cudnn.allow_tf32 = False  # on a GPU too, float32 is float32


@dataclass(frozen=True)
class Scheme:
    """Plain SGD as App E.3 has it, or with momentum and weight decay as in App F.2.1."""

    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 128


@runtime_checkable
class Trainer(Protocol):
    """Networks and what changes them."""

    def pass_through(self, order: Int[Tensor, "E N"], batch_size: int) -> None:
        """One epoch; every network sees its samples in an order of its own."""

    def now(self) -> dict[str, Tensor]:
        """Parameters and running statistics by their names, one row for each network."""

    def velocity(self) -> dict[str, Tensor]:
        """Momentum buffers."""

    def restore(self, state: Mapping[str, Tensor], velocity: Mapping[str, Tensor]) -> None:
        """What :meth:`now` and :meth:`velocity` gave."""


class Together:
    """Plain SGD on fully connected ReLU networks: a step of all of them in batched products."""

    def __init__(self, networks: Sequence[nn.Sequential], X: Tensor, y: Tensor, scheme: Scheme):
        self.X, self.y, self.scheme = X.flatten(1), y, scheme
        modules = dict(networks[0].named_children())
        self.layers = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        self.normalized = {name: f"bn_{name}" for name in self.layers if f"bn_{name}" in modules}
        self.momenta = {norm: (modules[norm].momentum, modules[norm].eps) for norm in self.normalized.values()}
        dicts = [network.state_dict() for network in networks]
        self.state = {name: torch.stack([d[name] for d in dicts]) for name in dicts[0]}
        self.member = torch.arange(len(networks), device=X.device)[:, None]

    def pass_through(self, order: Int[Tensor, "E N"], batch_size: int) -> None:
        """As :meth:`Trainer.pass_through`."""
        for rows in order.split(batch_size, 1):
            self._step(rows)

    @torch.no_grad()
    def _step(self, rows: Int[Tensor, "E B"]) -> None:
        inputs, active, normalizers = [self.X[rows]], [], []
        for name in self.layers:
            z = torch.baddbmm(self.state[f"{name}.bias"][:, None], inputs[-1], self.state[f"{name}.weight"].mT)
            if name == self.layers[-1]:
                break
            z.relu_()
            active.append(z)
            inputs.append(self._normalize(name, z, normalizers) if name in self.normalized else z)
        delta = z.softmax(2)
        delta[self.member, torch.arange(rows.shape[1], device=rows.device), self.y[rows]] -= 1
        delta *= self.scheme.lr / rows.shape[1]
        for k in reversed(range(len(self.layers))):
            W = self.state[f"{self.layers[k]}.weight"]
            below = delta @ W if k else None
            W.baddbmm_(delta.mT, inputs[k], alpha=-1)
            self.state[f"{self.layers[k]}.bias"] -= delta.sum(1)
            if k:
                if self.layers[k - 1] in self.normalized:
                    scale = normalizers.pop()
                    along = (below * inputs[k]).mean(1, keepdim=True)
                    below = scale * (below - below.mean(1, keepdim=True) - inputs[k] * along)
                delta = below.mul_(active[k - 1] > 0)

    def _normalize(self, name: str, z: Tensor, normalizers: list[Tensor]) -> Tensor:
        """(z − mean)/std over the batch; the scale is kept for the way back, running statistics as torch's."""
        norm = self.normalized[name]
        rate, eps = self.momenta[norm]
        variance, mean = torch.var_mean(z, 1, correction=0)
        unbiased = variance * (z.shape[1] / max(1, z.shape[1] - 1))
        self.state[f"{norm}.running_mean"].lerp_(mean, rate)
        self.state[f"{norm}.running_var"].lerp_(unbiased, rate)
        self.state[f"{norm}.num_batches_tracked"] += 1
        normalizers.append((variance + eps).rsqrt()[:, None])
        return (z - mean[:, None]) * normalizers[-1]

    def now(self) -> dict[str, Tensor]:
        """As :meth:`Trainer.now`."""
        return self.state

    def velocity(self) -> dict[str, Tensor]:
        """As :meth:`Trainer.velocity`."""
        return {}

    def restore(self, state: Mapping[str, Tensor], velocity: Mapping[str, Tensor]) -> None:
        """As :meth:`Trainer.restore`."""
        for name, tensor in state.items():
            self.state[name].copy_(tensor)


class InTurn:
    """Any network and any scheme: torch's autograd and SGD, one network after the other."""

    def __init__(self, networks: Sequence[nn.Module], X: Tensor, y: Tensor, scheme: Scheme):
        self.networks, self.y = networks, y
        plain = X.is_cuda or X.ndim < 4 or _corrupted_with_channels_last(networks[0])
        layout = torch.contiguous_format if plain else torch.channels_last
        self.X = X.to(memory_format=layout)
        for network in networks:
            network.to(memory_format=layout).train()
        self.optimizers = [
            torch.optim.SGD(n.parameters(), lr=scheme.lr, momentum=scheme.momentum, weight_decay=scheme.weight_decay)
            for n in networks
        ]

    def pass_through(self, order: Int[Tensor, "E N"], batch_size: int) -> None:
        """As :meth:`Trainer.pass_through`."""
        for rows in order.split(batch_size, 1):
            for (network, optimizer), batch in zip(self._pairs(), rows, strict=True):
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(network(self.X[batch]), self.y[batch]).backward()
                optimizer.step()

    def now(self) -> dict[str, Tensor]:
        """As :meth:`Trainer.now`."""
        dicts = [network.state_dict() for network in self.networks]
        return {name: torch.stack([d[name] for d in dicts]).contiguous() for name in dicts[0]}

    def velocity(self) -> dict[str, Tensor]:
        """Momentum buffers by the names of the parameters; empty without momentum and before any step."""
        buffers = {
            name: [o.state[n.get_parameter(name)].get("momentum_buffer") for n, o in self._pairs()]
            for name, _ in self.networks[0].named_parameters()
        }
        return {name: torch.stack(all_) for name, all_ in buffers.items() if all_[0] is not None}

    def restore(self, state: Mapping[str, Tensor], velocity: Mapping[str, Tensor]) -> None:
        """As :meth:`Trainer.restore`."""
        for member, (network, optimizer) in enumerate(self._pairs()):
            network.load_state_dict({name: tensor[member] for name, tensor in state.items()})
            for name, buffers in velocity.items():
                optimizer.state[network.get_parameter(name)]["momentum_buffer"] = buffers[member].clone()

    def _pairs(self) -> Iterator[tuple[nn.Module, torch.optim.SGD]]:
        return zip(self.networks, self.optimizers, strict=True)


def _corrupted_with_channels_last(network: nn.Module) -> bool:
    """Whether oneDNN (3.12, on processors without AVX-512) would write beyond what is its own on the way back.

    It does in 1 × 1 convolutions with a stride, of channels that are no multiple of 8.
    """
    strided = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) != m.stride]
    return any(m.in_channels % 8 or m.out_channels % 8 for m in strided)


def _plain_and_dense(networks: Sequence[nn.Module], scheme: Scheme) -> bool:
    dense = all(isinstance(m, nn.Flatten | nn.Linear | nn.ReLU | nn.BatchNorm1d) for m in networks[0].children())
    return dense and scheme.momentum == 0 and scheme.weight_decay == 0


def on_cpu(networks: Sequence[nn.Module], X: Tensor, y: Tensor, scheme: Scheme) -> Trainer:
    """What takes the steps of these networks on a CPU."""
    if Convolutional.takes(networks[0], X.shape[1:]):
        rates = {"lr": scheme.lr, "momentum": scheme.momentum, "weight_decay": scheme.weight_decay}
        return Convolutional(networks, X, y, **rates)
    return (Together if _plain_and_dense(networks, scheme) else InTurn)(networks, X, y, scheme)


class OnGpu:
    """What takes the steps on a GPU: an epoch is a CUDA graph, replayed with another order of the samples.

    Trainings at once want a process each, with CUDA's MPS: eight threads of one process did not come through capturing,
    and it is not understood why. Its choice between the two ways is its own, so that what suits a CPU alone makes
    nothing stale that was trained here.
    """

    #: A graph is captured while no other one is.
    _capturing = threading.Lock()

    def __init__(self, networks: Sequence[nn.Module], X: Tensor, y: Tensor, scheme: Scheme):
        self.steps = (Together if _plain_and_dense(networks, scheme) else InTurn)(networks, X, y, scheme)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.now, self.velocity, self.restore = self.steps.now, self.steps.velocity, self.steps.restore

    def pass_through(self, order: Int[Tensor, "E N"], batch_size: int) -> None:
        """One epoch; the first call captures it."""
        if self.graph is None:
            with self._capturing:
                self._capture(order.clone(), batch_size)
        self.order.copy_(order)
        self.graph.replay()

    def _capture(self, order: Int[Tensor, "E N"], batch_size: int) -> None:
        now, velocity = ({k: t.clone() for k, t in part.items()} for part in (self.now(), self.velocity()))
        # Libraries choose and allocate, with both sizes of batches, before anything can be captured.
        self.steps.pass_through(order[:, : 2 * batch_size + order.shape[1] % batch_size], batch_size)
        zero = {name: torch.zeros_like(buffer) for name, buffer in self.velocity().items()}
        self.restore(now, velocity or zero)
        torch.cuda.current_stream().synchronize()
        self.order, self.graph = order, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.steps.pass_through(self.order, batch_size)
