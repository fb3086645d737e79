"""Several equal networks trained at once, each with its own initialization and order of the samples.

SGD on the mean cross-entropy of mini-batches, by default from Xavier's initialization: Wu et al. (2022), App E.3. Fully
connected networks take their steps together, as batched matrix products. Convolutional ones take turns: as one grouped
convolution sixteen LeNets cost 2.7 times as much on a CPU. On a GPU an epoch is one CUDA graph: its kernels, too small
to fill it, follow each other without being launched one by one, and beside those of other trainings.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.cache import Checkpoint, cached, file_of
from common.wu_dissecting.networks import classifier, truncated_gaussian, xavier

torch.backends.cudnn.allow_tf32 = False  # on a GPU too, float32 is float32

#: Samples that pass through a network at once where no gradient is needed.
EVALUATED_AT_ONCE = 2000


@dataclass(frozen=True)
class Scheme:
    """Plain SGD as App E.3 has it, or with momentum and weight decay as in App F.2.1."""

    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 128


@dataclass(frozen=True)
class Ensemble:
    """E trained networks after K kept numbers of epochs.

    Attributes
    ----------
    epochs
        (K,) ascending.
    states
        Parameters and running statistics by their names in ``state_dict()``, (K, E, ...) each.
    loss, accuracy
        (K, E) mean cross-entropy and share of right answers on the training samples, batch norm with its running
        statistics.
    """

    epochs: Int[Tensor, " K"]
    states: dict[str, Tensor]
    loss: Float[Tensor, "K E"]
    accuracy: Float[Tensor, "K E"]

    def tensors(self) -> dict[str, Tensor]:
        """What is kept in a file."""
        fields = {name: getattr(self, name) for name in ("epochs", "loss", "accuracy")}
        return fields | {f"state:{name}": tensor for name, tensor in self.states.items()}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "Ensemble":
        """From what :meth:`tensors` gave."""
        states = {name.removeprefix("state:"): t for name, t in tensors.items() if name.startswith("state:")}
        return cls(states=states, **{name: t for name, t in tensors.items() if ":" not in name})

    @classmethod
    def joined(cls, parts: Sequence["Ensemble"]) -> "Ensemble":
        """The members of several ensembles with the same kept epochs."""
        states = {name: torch.cat([part.states[name] for part in parts], 1) for name in parts[0].states}
        loss, accuracy = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("loss", "accuracy"))
        return cls(parts[0].epochs, states, loss, accuracy)

    def state(self, member: int, epoch: int | None = None) -> dict[str, Tensor]:
        """Parameters and running statistics of a member after ``epoch`` epochs, the last kept ones by default.

        Raises
        ------
        ValueError
            If that epoch was not kept.
        """
        kept = self.epochs.tolist()
        if epoch is not None and epoch not in kept:
            raise ValueError(f"epoch {epoch} was not kept; there are {kept}")
        place = -1 if epoch is None else kept.index(epoch)
        return {name: tensor[place, member] for name, tensor in self.states.items()}


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


class _Together:
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
        return self.state

    def velocity(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor], velocity: Mapping[str, Tensor]) -> None:
        for name, tensor in state.items():
            self.state[name].copy_(tensor)


class _InTurn:
    """Any network and any scheme: torch's autograd and SGD, one network after the other."""

    def __init__(self, networks: Sequence[nn.Module], X: Tensor, y: Tensor, scheme: Scheme):
        self.networks, self.y = networks, y
        layout = torch.contiguous_format if X.is_cuda or X.ndim < 4 else torch.channels_last
        self.X = X.to(memory_format=layout)
        for network in networks:
            network.to(memory_format=layout).train()
        self.optimizers = [
            torch.optim.SGD(n.parameters(), lr=scheme.lr, momentum=scheme.momentum, weight_decay=scheme.weight_decay)
            for n in networks
        ]

    def pass_through(self, order: Int[Tensor, "E N"], batch_size: int) -> None:
        for rows in order.split(batch_size, 1):
            for network, optimizer, batch in zip(self.networks, self.optimizers, rows, strict=True):
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(network(self.X[batch]), self.y[batch]).backward()
                optimizer.step()

    def now(self) -> dict[str, Tensor]:
        dicts = [network.state_dict() for network in self.networks]
        return {name: torch.stack([d[name] for d in dicts]).contiguous() for name in dicts[0]}

    def velocity(self) -> dict[str, Tensor]:
        """Momentum buffers of the optimizers by member and parameter; empty without momentum and before any step."""
        states = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        return {
            f"{member}:{key}": kept["momentum_buffer"]
            for member, state in enumerate(states)
            for key, kept in state.items()
            if kept.get("momentum_buffer") is not None
        }

    def restore(self, state: Mapping[str, Tensor], velocity: Mapping[str, Tensor]) -> None:
        for member, (network, optimizer) in enumerate(zip(self.networks, self.optimizers, strict=True)):
            network.load_state_dict({name: tensor[member] for name, tensor in state.items()})
            buffers = {
                int(name.partition(":")[2]): {"momentum_buffer": buffer}
                for name, buffer in velocity.items()
                if name.startswith(f"{member}:")
            }
            optimizer.load_state_dict({**optimizer.state_dict(), "state": buffers})


def _plain_and_dense(networks: Sequence[nn.Module], scheme: Scheme) -> bool:
    dense = all(isinstance(m, nn.Flatten | nn.Linear | nn.ReLU | nn.BatchNorm1d) for m in networks[0].children())
    return dense and scheme.momentum == 0 and scheme.weight_decay == 0


def on_cpu(networks: Sequence[nn.Module], X: Tensor, y: Tensor, scheme: Scheme) -> Trainer:
    """What takes the steps of these networks on a CPU."""
    return (_Together if _plain_and_dense(networks, scheme) else _InTurn)(networks, X, y, scheme)


class OnGpu:
    """What takes the steps on a GPU: an epoch is a CUDA graph, replayed with another order of the samples.

    Trainings at once want a process each, with CUDA's MPS: eight threads of one process did not come through capturing,
    and it is not understood why. Its choice between the two ways is its own, so that a third one that suits a CPU alone
    can join :func:`on_cpu` without making stale what was trained here.
    """

    #: A graph is captured while no other one is.
    _capturing = threading.Lock()

    def __init__(self, networks: Sequence[nn.Module], X: Tensor, y: Tensor, scheme: Scheme):
        self.steps = (_Together if _plain_and_dense(networks, scheme) else _InTurn)(networks, X, y, scheme)
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


def train_ensemble(
    trainer: Callable[[Sequence[nn.Module], Tensor, Tensor, Scheme], Trainer], build: Callable[[], nn.Module],
    X: Float[Tensor, "N *shape"], y: Int[Tensor, " N"], *, seeds: Sequence[int], epochs: int,
    scheme: Scheme | None = None, keep: Sequence[int] = (), progress: str = "", checkpoint: Checkpoint | None = None,
    initialize: Callable[[nn.Module, torch.Generator], None] = xavier,
) -> Ensemble:  # fmt: skip
    """Train one network for each seed on the same samples.

    Parameters
    ----------
    trainer
        What takes the steps: :func:`on_cpu`, :class:`OnGpu`.
    build
        Makes a network, which is then initialized.
    seeds
        Of initialization and of the orders of the samples.
    scheme
        Step size and the like; the last batch of an epoch has what is left.
    keep
        Epochs to keep besides the last.
    progress
        If not empty, this word and the epoch are printed ten times.
    checkpoint
        Where to leave the state, and to take it up; the result does not depend on an interruption.
    initialize
        Draws the parameters of a network, in place.

    Raises
    ------
    ValueError
        If sizes or rates are not positive, or epochs to keep are not among those trained.
    FloatingPointError
        If a loss stops being finite.
    """
    scheme = scheme or Scheme()
    kept_at = sorted({*keep, epochs})
    if scheme.batch_size < 1 or epochs < 0 or not scheme.lr > 0 or not seeds:
        raise ValueError(f"positive sizes are needed: {len(seeds)} seeds, {epochs} epochs, {scheme}")
    if kept_at[0] < 0 or kept_at[-1] > epochs:
        raise ValueError(f"epochs to keep must lie in 0..{epochs}, got {list(keep)}")
    networks = [build() for _ in seeds]
    for network, seed in zip(networks, seeds, strict=True):
        initialize(network, torch.Generator().manual_seed(seed))
        network.to(X.device)
    steps = trainer(networks, X, y, scheme)
    states: dict[str, list[Tensor]] = {name: [] for name in steps.now()}
    loss, accuracy, start = torch.zeros(len(kept_at), len(seeds)), torch.zeros(len(kept_at), len(seeds)), 0
    if checkpoint is not None and (found := checkpoint.load()) is not None:
        groups = {part: _group(found, part) for part in ("now", "velocity", "kept")}
        steps.restore(groups["now"], groups["velocity"])
        states = {name: list(tensor) for name, tensor in groups["kept"].items()} or states
        loss, accuracy, start = found["loss"], found["accuracy"], int(found["epoch"])
    evaluated = build().to(X.device).eval()
    for epoch in range(start, epochs + 1):
        if epoch in kept_at:
            place, now = kept_at.index(epoch), steps.now()
            for member in range(len(seeds)):
                evaluated.load_state_dict({name: tensor[member] for name, tensor in now.items()})
                loss[place, member], accuracy[place, member] = _evaluate(evaluated, X, y)
            if not loss[place].isfinite().all():
                raise FloatingPointError(f"a loss is not finite after epoch {epoch}")
            for name, tensor in now.items():
                states[name].append(tensor.detach().cpu().clone())
            if progress:
                means = loss[place].mean(), accuracy[place].mean()
                print(f"{progress}: after {epoch} epochs loss {means[0]:.4f}, accuracy {means[1]:.4f}", flush=True)
        elif progress and epoch % max(1, epochs // 10) == 0:
            print(f"{progress}: {epoch} of {epochs} epochs", flush=True)
        if epoch == epochs:
            break
        # One seed an epoch: an interrupted training goes on with the same orders.
        generators = [torch.Generator().manual_seed(seed * 100_003 + epoch) for seed in seeds]
        order = torch.stack([torch.randperm(len(y), generator=g) for g in generators]).to(X.device)
        steps.pass_through(order, scheme.batch_size)
        if checkpoint is not None:
            checkpoint.offer(lambda epoch=epoch: _state(steps, states, loss, accuracy, epoch + 1))
    stacked = {name: torch.stack(tensors) for name, tensors in states.items()}
    return Ensemble(torch.tensor(kept_at), stacked, loss, accuracy)


def _state(
    steps: Trainer, states: dict[str, list[Tensor]], loss: Tensor, accuracy: Tensor, epoch: int
) -> dict[str, Tensor]:
    parts = {"now": steps.now(), "velocity": steps.velocity()}
    parts["kept"] = {name: torch.stack(tensors) for name, tensors in states.items() if tensors}
    flat = {f"{part}:{name}": tensor for part, group in parts.items() for name, tensor in group.items()}
    return flat | {"loss": loss, "accuracy": accuracy, "epoch": torch.tensor(epoch)}


def _group(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}:"): t for name, t in tensors.items() if name.startswith(f"{part}:")}


@torch.no_grad()
def _evaluate(network: nn.Module, X: Tensor, y: Tensor) -> tuple[float, float]:
    logits = torch.cat([network(x) for x in X.split(EVALUATED_AT_ONCE)])
    return float(nn.functional.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())


def train_classifiers(
    name: str, classes: int, X: Float[Tensor, "N *shape"], y: Int[Tensor, " N"], seeds: Sequence[int], epochs: int,
    scheme: Scheme, keep: Sequence[int], initialization: str, *, progress: str = "",
    checkpoint: Checkpoint | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """:func:`train_ensemble` of networks by name on a CPU; what :meth:`Ensemble.tensors` gives.

    Parameters
    ----------
    name, classes
        As :func:`~common.wu_dissecting.networks.classifier` takes them.
    initialization
        ``"xavier"`` or ``"truncated gaussian"``.

    Raises
    ------
    ValueError
        If there is no such network or initialization, or as :func:`train_ensemble`.
    FloatingPointError
        If a loss stops being finite.
    """
    trained = train_ensemble(
        on_cpu, lambda: classifier(name, X.shape[1:], classes), X, y, seeds=seeds, epochs=epochs, scheme=scheme,
        keep=keep, progress=progress, checkpoint=checkpoint, initialize=_initialization(initialization),
    )  # fmt: skip
    return trained.tensors()


def train_classifiers_on_gpu(
    name: str, classes: int, X: Float[Tensor, "N *shape"], y: Int[Tensor, " N"], seeds: Sequence[int], epochs: int,
    scheme: Scheme, keep: Sequence[int], initialization: str, *, progress: str = "",
    checkpoint: Checkpoint | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """:func:`train_classifiers` on a GPU, in float32 throughout, in a stream of its own.

    A network that was trained there differs from one trained on a CPU by what rounding grows to; another function,
    so that the file of a result says which it is.

    Raises
    ------
    RuntimeError
        If there is no GPU.
    ValueError, FloatingPointError
        As :func:`train_classifiers`.
    """
    device = torch.device("cuda")
    with torch.cuda.stream(torch.cuda.Stream(device)):
        trained = train_ensemble(
            OnGpu, lambda: classifier(name, X.shape[1:], classes), X.to(device), y.to(device), seeds=seeds,
            epochs=epochs, scheme=scheme, keep=keep, progress=progress, checkpoint=checkpoint,
            initialize=_initialization(initialization),
        )  # fmt: skip
        return {name: tensor.cpu() for name, tensor in trained.tensors().items()}


def _initialization(name: str) -> Callable[[nn.Module, torch.Generator], None]:
    kinds = {"xavier": xavier, "truncated gaussian": truncated_gaussian}
    if name not in kinds:
        raise ValueError(f"unknown initialization {name!r}; known are {list(kinds)}")
    return kinds[name]


def trained_ensemble(arguments: Mapping[str, object], *, progress: str = "") -> Ensemble:
    """What :func:`train_classifiers` gives, from its file; on the GPU if there is one, or if it was made on one.

    Parameters
    ----------
    arguments
        Of :func:`train_classifiers`, by name.
    progress
        If not empty, this word and the epoch are printed ten times.

    Raises
    ------
    ValueError, FloatingPointError
        As :func:`train_classifiers`.
    MissingError, OSError
        As :func:`~common.cache.cached`.
    """
    if torch.cuda.is_available() or file_of(train_classifiers_on_gpu, arguments).exists():
        return Ensemble.of_tensors(cached(train_classifiers_on_gpu, arguments, progress=progress))
    return Ensemble.of_tensors(cached(train_classifiers, arguments, progress=progress))
