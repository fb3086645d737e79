"""Several equal networks trained on the same samples, each with its own initialization and order of the samples.

A training is made in stages, from one of :data:`MILESTONES` to the next, and each is kept in a file: a longer training
goes on from where a shorter one ended, and the networks on the way are there for whoever asks how far they were.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.cache import Checkpoint, cached, file_of
from common.wu_dissecting.networks import classifier, truncated_gaussian, xavier
from common.wu_dissecting.sgd import OnGpu, Scheme, Trainer, on_cpu

#: Numbers of epochs after which networks are kept, besides the last; from 5 on each has others at a quarter and a half.
MILESTONES = (0, 1, 2, 5, 10, 25, 50, 100, 250, 500, 1000)
#: Samples that pass through a network at once where no gradient is needed.
EVALUATED_AT_ONCE = 2000


@dataclass(frozen=True)
class Ensemble:
    """E trained networks after K kept numbers of epochs.

    Attributes
    ----------
    epochs
        (K,) ascending, from 0 on.
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


def trained_ensemble(
    name: str, classes: int, X: Float[Tensor, "N *shape"], y: Int[Tensor, " N"], *, seeds: Sequence[int], epochs: int,
    scheme: Scheme, initialization: str = "xavier", progress: str = "",
) -> Ensemble:  # fmt: skip
    """One network for each seed, from files as far as they were trained before.

    A stage is made on the GPU if there is one, and taken from there if it was made on one.

    Parameters
    ----------
    name, classes
        As :func:`~common.wu_dissecting.networks.classifier` takes them.
    seeds
        Of initialization and of the orders of the samples.
    epochs
        The last one; those of :data:`MILESTONES` before it are kept too.
    scheme
        Step size and the like; the last batch of an epoch has what is left.
    initialization
        ``"xavier"`` or ``"truncated gaussian"``.
    progress
        If not empty, this word and what was reached are printed at the end of every stage.

    Raises
    ------
    ValueError
        If there is no such network or initialization, or as :func:`train`.
    FloatingPointError
        If a loss stops being finite.
    MissingError, OSError
        As :func:`~common.cache.cached`.
    """
    initialize = {"xavier": xavier, "truncated gaussian": truncated_gaussian}.get(initialization)
    if initialize is None:
        raise ValueError(f'unknown initialization {initialization!r}; known are "xavier" and "truncated gaussian"')
    state = initial_states(lambda: classifier(name, X.shape[1:], classes), seeds, initialize)
    stops = sorted({0, *(milestone for milestone in MILESTONES if milestone < epochs), epochs})
    velocity: dict[str, Tensor] = {}
    stages = []
    for start, stop in pairwise([0, *stops]):
        arguments = {
            "name": name, "classes": classes, "X": X, "y": y, "seeds": list(seeds), "scheme": scheme, "start": start,
            "stop": stop, "state": state, "velocity": velocity,
        }  # fmt: skip
        if torch.cuda.is_available() or file_of(train_stage_on_gpu, arguments).exists():
            stages.append(cached(train_stage_on_gpu, arguments, progress=progress))
        else:
            stages.append(cached(train_stage, arguments, progress=progress))
        state, velocity = (_group(stages[-1], part) for part in ("state", "velocity"))
    states = {key: torch.stack([stage[f"state:{key}"] for stage in stages]) for key in state}
    loss, accuracy = (torch.stack([stage[part] for stage in stages]) for part in ("loss", "accuracy"))
    return Ensemble(torch.tensor(stops), states, loss, accuracy)


def initial_states(
    build: Callable[[], nn.Module], seeds: Sequence[int], initialize: Callable[[nn.Module, torch.Generator], None]
) -> dict[str, Tensor]:
    """Parameters and running statistics of untrained networks by their names, (E, ...) each.

    Raises
    ------
    ValueError
        If there is no seed.
    """
    if not seeds:
        raise ValueError("at least one seed is needed")
    networks = [build() for _ in seeds]
    for network, seed in zip(networks, seeds, strict=True):
        initialize(network, torch.Generator().manual_seed(seed))
    dicts = [network.state_dict() for network in networks]
    return {name: torch.stack([one[name] for one in dicts]) for name in dicts[0]}


def train_stage(
    name: str, classes: int, X: Float[Tensor, "N *shape"], y: Int[Tensor, " N"], seeds: Sequence[int], scheme: Scheme,
    start: int, stop: int, state: Mapping[str, Tensor], velocity: Mapping[str, Tensor], *, progress: str = "",
    checkpoint: Checkpoint | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """:func:`train` of networks by name, on a CPU."""
    return train(
        on_cpu, lambda: classifier(name, X.shape[1:], classes), X, y, seeds=seeds, scheme=scheme, start=start,
        stop=stop, state=state, velocity=velocity, progress=progress, checkpoint=checkpoint,
    )  # fmt: skip


def train_stage_on_gpu(
    name: str, classes: int, X: Float[Tensor, "N *shape"], y: Int[Tensor, " N"], seeds: Sequence[int], scheme: Scheme,
    start: int, stop: int, state: Mapping[str, Tensor], velocity: Mapping[str, Tensor], *, progress: str = "",
    checkpoint: Checkpoint | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """:func:`train` of networks by name on a GPU, in float32 throughout, in a stream of its own.

    A network that was trained there differs from one trained on a CPU by what rounding grows to; another function,
    so that the file of a result says which it is.

    Raises
    ------
    RuntimeError
        If there is no GPU.
    """
    device = torch.device("cuda")
    with torch.cuda.stream(torch.cuda.Stream(device)):
        state, velocity = ({key: tensor.to(device) for key, tensor in part.items()} for part in (state, velocity))
        found = train(
            OnGpu, lambda: classifier(name, X.shape[1:], classes), X.to(device), y.to(device), seeds=seeds,
            scheme=scheme, start=start, stop=stop, state=state, velocity=velocity, progress=progress,
            checkpoint=checkpoint,
        )  # fmt: skip
        return {key: tensor.cpu() for key, tensor in found.items()}


def train(
    trainer: Callable[[Sequence[nn.Module], Tensor, Tensor, Scheme], Trainer], build: Callable[[], nn.Module],
    X: Float[Tensor, "N *shape"], y: Int[Tensor, " N"], *, seeds: Sequence[int], scheme: Scheme, start: int, stop: int,
    state: Mapping[str, Tensor], velocity: Mapping[str, Tensor], progress: str = "",
    checkpoint: Checkpoint | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Train networks, one for each seed, from epoch ``start`` to epoch ``stop``.

    Parameters
    ----------
    trainer
        What takes the steps: :func:`~common.wu_dissecting.sgd.on_cpu`, :class:`~common.wu_dissecting.sgd.OnGpu`.
    build
        Makes a network; what its parameters are is of no account.
    state, velocity
        Parameters and running statistics, (E, ...) each, and momentum buffers after ``start`` epochs.
    progress
        If not empty, this word, epoch, loss and accuracy are printed at the end.
    checkpoint
        Where to leave the state, and to take it up; the result does not depend on an interruption.

    Returns
    -------
    dict
        ``state:`` and ``velocity:`` before every name, ``loss`` and ``accuracy`` (E,) as in :class:`Ensemble`.

    Raises
    ------
    ValueError
        If sizes or rates are not positive, or epochs do not ascend.
    FloatingPointError
        If a loss stops being finite.
    """
    if scheme.batch_size < 1 or not scheme.lr > 0 or not 0 <= start <= stop or not seeds:
        raise ValueError(f"positive sizes are needed: {len(seeds)} seeds, epochs {start} to {stop}, {scheme}")
    networks = [build().to(X.device) for _ in seeds]
    steps = trainer(networks, X, y, scheme)
    steps.restore(state, velocity)
    if checkpoint is not None and (found := checkpoint.load()) is not None:
        steps.restore(_group(found, "state"), _group(found, "velocity"))
        start = int(found["epoch"])
    for epoch in range(start, stop):
        # One seed an epoch: an interrupted training goes on with the same orders.
        generators = [torch.Generator().manual_seed(seed * 100_003 + epoch) for seed in seeds]
        order = torch.stack([torch.randperm(len(y), generator=g) for g in generators]).to(X.device)
        steps.pass_through(order, scheme.batch_size)
        if checkpoint is not None:
            checkpoint.offer(lambda epoch=epoch: _tensors(steps) | {"epoch": torch.tensor(epoch + 1)})
    evaluated, now = build().to(X.device).eval(), steps.now()
    measured = []
    for member in range(len(seeds)):
        evaluated.load_state_dict({name: tensor[member] for name, tensor in now.items()})
        measured.append(_evaluate(evaluated, X, y))
    loss, accuracy = (torch.tensor(values) for values in zip(*measured, strict=True))
    if not loss.isfinite().all():
        raise FloatingPointError(f"a loss is not finite after epoch {stop}")
    if progress:
        print(f"{progress}: after {stop} epochs loss {loss.mean():.4f}, accuracy {accuracy.mean():.4f}", flush=True)
    return _tensors(steps) | {"loss": loss, "accuracy": accuracy}


def _tensors(steps: Trainer) -> dict[str, Tensor]:
    """State and velocity, as a file keeps them."""
    parts = {"state": steps.now(), "velocity": steps.velocity()}
    return {f"{part}:{name}": tensor.detach() for part, group in parts.items() for name, tensor in group.items()}


def _group(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}:"): t for name, t in tensors.items() if name.startswith(f"{part}:")}


@torch.no_grad()
def _evaluate(network: nn.Module, X: Tensor, y: Tensor) -> tuple[float, float]:
    logits = torch.cat([network(x) for x in X.split(EVALUATED_AT_ONCE)])
    return float(nn.functional.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())
