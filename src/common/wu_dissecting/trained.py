"""The networks of Wu et al. (2022), App E, trained once and kept, and the eigenpairs of their layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.cache import cached
from common.data import DataSource, images
from common.devices import default_device, side_by_side
from common.hessian.block_lanczos import Eigenpairs, top_eigenpairs
from common.hessian.convergence import ConvergenceError
from common.hessian.layer import (
    BLOCK,
    LayerHessian,
    WeightSharingHessian,
    effective_number,
    layer_hessian,
    layer_hessians,
)
from common.hessian.operators import FullHessian
from common.wu_dissecting.decoupling import distance_from_kronecker
from common.wu_dissecting.eigenspaces import correspondence, nested_overlaps, pairwise_overlaps
from common.wu_dissecting.networks import classifier, layer_names
from common.wu_dissecting.output_hessian import gauss_newton_forms, output_approximation
from common.wu_dissecting.schedule import PAPER_EPOCHS, Snapshot, snapshots_to_measure
from common.wu_dissecting.sgd import Scheme
from common.wu_dissecting.training import Ensemble, trained_ensemble

#: The training schemes of App E.3 and F.2.1.
SCHEMES = {"default": Scheme(), "slow": Scheme(lr=0.001), "momentum": Scheme(momentum=0.9, weight_decay=5e-4)}
#: How the names of data sets with random labels end.
RANDOM = "-R"
#: Numbers of eigenpairs that are made at once; beyond the last its multiples.
PAIRS_MADE = (10, 25, 50, 100)
#: Operations a second of two cores in trainings, as they were measured, to a factor of two.
RATE_ON_CPU = 7e10
#: Of a GPU, not measured: operations a second where they count, and seconds that a step takes however small it is.
RATE_ON_GPU, STEP_ON_GPU = 1e13, 1e-4
#: Entries of all factors of Hessians that are held at once for one network, 1 GiB in single precision.
TOGETHER = 2**28
CLASSES = {"MNIST": 10, "CIFAR-10": 10, "CIFAR-100": 100}
#: Parameters and running statistics of a network by their names in ``state_dict()``.
State = Mapping[str, Tensor]


def operations_of_training(network: nn.Module, x: Float[Tensor, "1 *shape"]) -> int:
    """Floating-point operations of the products in one pass of a sample forward and back."""
    with FlopCounterMode(display=False) as counter:
        network(x).sum().backward()
    return counter.get_total_flops()


def network_of(name: str, classes: int, shape: Sequence[int], state: State) -> nn.Module:
    """A network with these parameters, to be evaluated, on the GPU if there is one."""
    network = classifier(name, shape, classes)
    network.load_state_dict(dict(state))
    return network.to(default_device()).eval()


@dataclass(frozen=True)
class LayerEigenpairs(Eigenpairs):
    """Eigenpairs of a layer's Hessian, over how many samples it is, and what Kronecker's product has of it.

    Attributes
    ----------
    effective
        (1,) n_eff of the Hessian, :attr:`~common.hessian.layer.LayerHessian.effective_samples`.
    tau, gamma
        (m,) and (n,) eigenvalues of E[M] and E[xxᵀ], descending.
    output_vectors
        (m, m) eigenvectors of E[M], in this order.
    first
        (n,) the t₁ of Theorem G.1: first eigenvector of E[xxᵀ].
    on_first
        (k,) how much of every eigenvector lies on v₁ = t₁, (265).
    kronecker
        (min(k, m),) overlaps of the first 1, 2, ... eigenvectors with those of E[M] ⊗ E[xxᵀ].
    decoupling
        (1,) ‖E[M] ⊗ E[xxᵀ] − H‖/‖H‖, how far (3) is from an identity; NaN where the iteration did not converge.
    """

    effective: Float[Tensor, "1"]
    tau: Float[Tensor, " m"]
    gamma: Float[Tensor, " n"]
    output_vectors: Float[Tensor, "m m"]
    first: Float[Tensor, " n"]
    on_first: Float[Tensor, " k"]
    kronecker: Float[Tensor, " l"]
    decoupling: Float[Tensor, "1"]

    def beside_kronecker(self, k: int) -> Float[Tensor, "3 k"]:
        """The k largest eigenvalues, those of E[M] ⊗ E[xxᵀ], and the overlaps of their eigenvectors; k ≤ m."""
        products = (self.tau[:, None] * self.gamma).flatten().topk(k).values
        return torch.stack([part[:k].double() for part in (self.values, products, self.kronecker)])

    def largest(self, k: int) -> "LayerEigenpairs":
        """The k largest of them."""
        of_pairs = {part: getattr(self, part)[:k] for part in ("values", "residuals", "on_first", "kronecker")}
        return replace(self, vectors=self.vectors[:, :k], **of_pairs)


def layer_eigenpairs(
    name: str, classes: int, state: State, X: Tensor, layer: str, k: int, tolerance: float
) -> LayerEigenpairs:
    """The k largest eigenpairs of a layer's Hessian over the samples X."""
    network = network_of(name, classes, X.shape[1:], state)
    H = layer_hessian(network, layer, X.to(default_device()))
    found = H.top_eigenpairs(k, tolerance=tolerance)
    few, first = min(k, len(H.output_hessian)), H.input_basis[1][:, :1]
    try:
        distance, _ = distance_from_kronecker(H.to("cpu"), seed=0)
    except ConvergenceError:
        distance = float("nan")
    return LayerEigenpairs(
        **vars(found), effective=torch.tensor([H.effective_samples]), tau=H.output_basis[0],
        gamma=H.input_basis[0], output_vectors=H.output_basis[1], first=first[:, 0].contiguous(),
        on_first=correspondence(found.vectors, H.output_basis[1], first)[0][0],
        kronecker=nested_overlaps(found.vectors[:, :few], H.kronecker_eigenpairs(few)[1]),
        decoupling=torch.tensor([distance / (float(found.values[0]) or 1.0)]),
    )  # fmt: skip


def full_eigenpairs(
    name: str, classes: int, state: State, X: Tensor, y: Tensor, k: int, tolerance: float
) -> dict[str, Tensor]:
    """What :meth:`Dissected.full_eigenpairs` says."""
    network, X, y = network_of(name, classes, X.shape[1:], state), X.to(default_device()), y.to(default_device())
    layers = [layer_hessian(network, layer, X) for layer in layer_names(network)]
    approximation = output_approximation(layers, k)
    start = approximation.basis[:, :BLOCK].contiguous()
    found = top_eigenpairs(FullHessian(network, X, y), k, start=start, tolerance=tolerance)
    return {
        "true": found.values, "approximated": approximation.values,
        "overlap": nested_overlaps(found.vectors, approximation.basis),
        "first_term": gauss_newton_forms(layers, found.vectors),
        "effective": torch.tensor([effective_number(sum(_traces_with_bias(H) for H in layers))]),
    }  # fmt: skip


def _traces_with_bias(H: LayerHessian) -> Float[Tensor, " N"]:
    """tr(M) (‖x‖² + 1) of every sample: the trace of its part of the Gauss-Newton matrix by weights and biases."""
    return H.sample_traces() + H.B.square().sum((1, 2)).double()


def overlaps_of_layers(
    name: str, classes: int, states: Sequence[State], X: Tensor, shown: float, tolerance: float
) -> dict[str, Tensor]:
    """What :meth:`Dissected.overlaps` says, with the layer before each name."""
    reference, device = classifier(name, X.shape[1:], classes), default_device()
    layers = layer_names(reference)
    groups = _within_memory(
        {layer: len(X) * classes * reference.get_submodule(layer).weight.numel() for layer in layers}
    )

    def measure(state: State) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
        found, network = {}, network_of(name, classes, X.shape[1:], state)
        for group in groups:
            hessians = layer_hessians(network, group, X.to(device))
            for layer in group:
                H = hessians.pop(layer)
                k = min(round(shown * len(H.output_hessian)), H.shape[0])
                basis = H.top_eigenpairs(k, tolerance=tolerance).vectors
                effective = torch.tensor(H.effective_samples)
                found[layer] = basis, H.output_basis[0], H.input_basis[0], effective
        return found

    measured, result = side_by_side(measure, states), {}
    for layer in layers:
        bases, *rest = zip(*(one[layer] for one in measured), strict=True)
        result[f"{layer}:pairs"] = torch.from_numpy(pairwise_overlaps(bases))
        stacked = zip(("tau", "gamma", "effective"), rest, strict=True)
        result |= {f"{layer}:{part}": torch.stack(values) for part, values in stacked}
    return result


def _within_memory(sizes: Mapping[str, int], most: int = TOGETHER) -> list[list[str]]:
    """Names in their order, in groups whose sizes add up to no more than ``most``, or of one name."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups


@dataclass(frozen=True)
class Dissected:
    """An ensemble of equal networks and the samples that it was trained on.

    Attributes
    ----------
    name
        As in the paper, ``"F-200^2"``.
    X, y
        On the CPU, as everything that the methods return; what takes long is done on the GPU if there is one.
        Images, every channel of mean 0 and variance 1 over all samples and pixels, and labels.
    classes
        c.
    """

    name: str
    X: Float[Tensor, "N channels height width"]
    y: Int[Tensor, " N"]
    classes: int
    source: DataSource
    ensemble: Ensemble

    @property
    def members(self) -> int:
        """Number of networks."""
        return self.ensemble.loss.shape[1]

    @property
    def layers(self) -> list[str]:
        """Names of the layers with weights."""
        return layer_names(self.network(0))

    def needs(self, members: int = 5, name: str = "") -> str:
        """What trainings as long as the paper's take, on all images of the data set, of these networks or of others."""
        network = classifier(name, self.X.shape[1:], self.classes) if name else self.network(0)
        every = images.SIZES[self.source.name]["train"]
        operations = operations_of_training(network, self.X[:1]) * every * members * PAPER_EPOCHS
        steps = -(every // -Scheme().batch_size) * PAPER_EPOCHS  # of all networks at once
        hours, minutes = operations / RATE_ON_CPU / 3600, max(operations / RATE_ON_GPU, steps * STEP_ON_GPU) / 60
        return (
            f"{members} trainings of {name or self.name} for {PAPER_EPOCHS} epochs on all {every} images are "
            f"{operations:.1g} operations, {hours:.2g} hours on two cores, by estimate {minutes:.2g} minutes of a GPU"
        )

    def summary(self) -> str:
        """What was trained on how much, and how well, in one line."""
        loss, accuracy = self.ensemble.loss[-1], self.ensemble.accuracy[-1]
        trained = f"{self.members} networks, {self.ensemble.epochs[-1]} epochs on {len(self.y)} samples"
        return f"{self.name}: {trained}, mean loss {loss.mean():.4f}, smallest accuracy {accuracy.min():.4f}"

    def network(self, member: int, epoch: int | None = None) -> nn.Module:
        """One network after ``epoch`` epochs, the last ones by default, to be evaluated."""
        network = classifier(self.name, self.X.shape[1:], self.classes)
        network.load_state_dict(self.ensemble.state(member, epoch))
        return network.eval()

    @property
    def checkpoints(self) -> list[int]:
        """The kept epochs s₁ ≤ t/4, s₂ ≤ t/2 and t, the latest that there are; t alone where there are none."""
        *kept, last = self.ensemble.epochs.tolist()
        middle = max((epoch for epoch in kept if 0 < epoch <= last / 2), default=0)
        early = max((epoch for epoch in kept if 0 < epoch <= last / 4 and epoch < middle), default=0)
        return [early, middle, last] if early else [last]

    def snapshots(
        self, images: int = 0, *, differs: bool = False, of_any: bool = False, shortcut: bool = True
    ) -> list[Snapshot]:  # fmt: skip
        """Where a claim that the rule decides is measured, :func:`~common.wu_dissecting.schedule.snapshots_to_measure`.

        Parameters
        ----------
        images
            Of the Hessian, 0 for all.
        differs
            Whether data or scheme are unlike the paper's.
        of_any
            Whether something is claimed of any networks.
        shortcut
            Whether networks on the way may decide; where labels are random they do not.
        """
        kept = self.checkpoints if shortcut else self.checkpoints[-1:]
        return snapshots_to_measure(kept, images, len(self.y), differs=differs, of_any=of_any)

    def hessian(
        self, member: int, layer: str, samples: int, epoch: int | None = None
    ) -> LayerHessian | WeightSharingHessian:
        """Hessian of one layer of one network on the first ``samples`` training samples, on all of them if it is 0.

        Raises
        ------
        ValueError
            If ``samples`` is negative, or as :func:`~common.hessian.layer.layer_hessian`.
        """
        return self.hessians(member, [layer], samples, epoch)[layer]

    def hessians(
        self, member: int, layers: Sequence[str], samples: int, epoch: int | None = None
    ) -> dict[str, LayerHessian | WeightSharingHessian]:
        """:meth:`hessian` of several layers, from the same backward passes."""
        network, device = self.network(member, epoch), default_device()
        found = layer_hessians(network.to(device), layers, self.X[self._first(samples)].to(device))
        return {layer: H.to("cpu") for layer, H in found.items()}

    def _first(self, samples: int) -> slice:
        """The first training samples, at most all of them; all for 0."""
        if samples < 0:
            raise ValueError(f"the number of samples must be at least 1, or 0 for all, got {samples}")
        return slice(samples or None)

    def _key(self, member: int, samples: int, epoch: int | None = None) -> dict[str, object]:
        state = self.ensemble.state(member, epoch)
        return {"name": self.name, "classes": self.classes, "state": state, "X": self.X[self._first(samples)]}

    def eigenpairs(
        self, member: int, layer: str, samples: int, k: int, tolerance: float = 1e-4, epoch: int | None = None
    ) -> LayerEigenpairs:
        """The k largest of :meth:`hessian`, at most all of them, from a file if they were computed before.

        A few more are made, so that figures that ask for nearly as many share them.
        """
        size = self.network(member).get_submodule(layer).weight.numel()
        made = min(next((pairs for pairs in PAIRS_MADE if pairs >= k), -(k // -PAIRS_MADE[-1]) * PAIRS_MADE[-1]), size)
        key = self._key(member, samples, epoch) | {"layer": layer, "k": made, "tolerance": tolerance}
        return LayerEigenpairs(**cached(layer_eigenpairs, key)).largest(k)

    def full_eigenpairs(
        self, member: int, samples: int, k: int, tolerance: float = 1e-3, epoch: int | None = None
    ) -> dict[str, Tensor]:
        """Eigenpairs of the full Hessian beside those of App C, for a fully connected network, kept in a file.

        Returns
        -------
        dict
            ``true`` and ``approximated`` eigenvalues, ``overlap`` of the first 1, ..., k vectors of both, and the
            ``first_term`` of (251) along the true ones, (k,) each; k is at most the number of all outputs.
            ``effective`` (1,), n_eff of the Gauss-Newton matrix by all parameters.
        """
        network = self.network(member)
        outputs = sum(len(network.get_submodule(layer).weight) for layer in self.layers)
        key = self._key(member, samples, epoch) | {
            "y": self.y[self._first(samples)],
            "k": min(k, outputs),
            "tolerance": tolerance,
        }
        return cached(full_eigenpairs, key)

    def overlaps(
        self, samples: int, shown: float, tolerance: float = 1e-4, epoch: int | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Overlaps of all pairs of networks in every layer, and the eigenvalues of its factors, kept in a file.

        Bases of large layers take much more room than what is wanted of them, and are not kept.

        Parameters
        ----------
        samples
            The first so many, 0 for all.
        shown
            Largest k in units of m.
        epoch
            After which; the last by default.

        Returns
        -------
        dict
            Of every layer ``pairs`` (E, E, k), :func:`~common.wu_dissecting.eigenspaces.pairwise_overlaps`; ``tau``
            (E, m) and ``gamma`` (E, n), eigenvalues of E[M] and E[xxᵀ], descending; ``effective`` (E,), n_eff.
        """
        states = [self.ensemble.state(member, epoch) for member in range(self.members)]
        key = {"name": self.name, "classes": self.classes, "states": states, "X": self.X[self._first(samples)]}
        kept = cached(overlaps_of_layers, key | {"shown": shown, "tolerance": tolerance})
        parts = "pairs", "tau", "gamma", "effective"
        return {layer: {part: kept[f"{layer}:{part}"] for part in parts} for layer in self.layers}


def overlaps_in_layer(
    cases: Sequence[Dissected], layer: str, samples: int, shown: float, epoch: int | None = None
) -> dict[str, Tensor]:
    """Overlaps of all pairs of the networks of several ensembles in one layer, and what Kronecker's product has of it.

    Eigenpairs are kept in files, by network.

    Parameters
    ----------
    cases
        Of equal networks.
    samples
        Training samples that the Hessians are over, 0 for all.
    shown
        Largest k in units of m.
    epoch
        After which; the last by default.

    Returns
    -------
    dict
        Of E networks ``pairs``, ``tau`` and ``gamma`` as in :meth:`Dissected.overlaps`; ``first`` (E, n), the t₁ of
        Theorem G.1: first eigenvectors of E[xxᵀ]; ``kronecker`` (E, m), overlaps of the first 1, ..., m eigenvectors
        with those of E[M] ⊗ E[xxᵀ]; ``on_first`` (E, k), how much of every eigenvector lies on t₁, (265);
        ``outputs`` (E, E, m), overlaps of the top eigenspaces of E[M] alone, as ``pairs``;
        ``effective`` (E,), n_eff.
    """
    networks = [(case, member) for case in cases for member in range(case.members)]
    m = len(cases[0].network(0).get_submodule(layer).weight)
    every = [case.eigenpairs(member, layer, samples, round(shown * m), epoch=epoch) for case, member in networks]
    found = {part: [getattr(one, part) for one in every] for part in ("tau", "gamma", "first", "on_first", "kronecker")}
    found["effective"] = [one.effective[0] for one in every]
    pairs = {"pairs": [one.vectors for one in every], "outputs": [one.output_vectors for one in every]}
    overlaps = {name: torch.from_numpy(pairwise_overlaps(bases)) for name, bases in pairs.items()}
    return overlaps | {name: torch.stack(parts) for name, parts in found.items()}


@dataclass(frozen=True)
class Trainings:
    """What defines an ensemble.

    Attributes
    ----------
    name
        As in :func:`common.wu_dissecting.networks.classifier`.
    data
        ``"MNIST"``, ``"CIFAR-10"`` or ``"CIFAR-100"``; with ``"-R"`` behind it the labels are drawn at random, the same
        for all networks.
    members
        Number of networks.
    samples
        Training samples, drawn at random; 0 for all.
    seed
        Of the draw of samples and labels.
    scheme
        One of :data:`SCHEMES`.
    first
        The networks have the seeds ``seed + first``, ``seed + first + 1``, ...
    """

    name: str
    data: str
    members: int
    epochs: int
    samples: int
    seed: int
    scheme: str = "default"
    first: int = 0

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"unknown scheme {self.scheme!r}; known are {list(SCHEMES)}")
        if self.origin not in CLASSES:
            raise ValueError(f"unknown data set {self.data!r}; known are {list(CLASSES)}, and these with {RANDOM}")
        if self.members < 1 or self.epochs < 0 or self.samples < 0:
            given = f"{self.members} members, {self.epochs} epochs, {self.samples} samples"
            raise ValueError(f"at least one member, and no negative epochs or samples are needed, got {given}")

    @property
    def origin(self) -> str:
        """The data set whose images are taken."""
        return self.data.removesuffix(RANDOM)

    @property
    def groups(self) -> list[list[int]]:
        """Seeds of the networks that are trained and kept together: all, if they are fully connected, or one by one."""
        seeds = [self.seed + self.first + k for k in range(self.members)]
        return [seeds] if self.name.startswith("F-") else [[seed] for seed in seeds]

    def load(self) -> tuple[Tensor, Tensor, DataSource]:
        """Images, every channel of mean 0 and variance 1, labels, and where they come from."""
        found = images.load(self.origin, samples=self.samples or images.SIZES[self.origin]["train"], seed=self.seed)
        X = found.x - found.x.mean((0, 2, 3), keepdim=True)
        X /= X.std((0, 2, 3), keepdim=True)
        y = found.y
        if self.data.endswith(RANDOM):
            y = torch.randint(
                CLASSES[self.origin], (len(y),), generator=torch.Generator().manual_seed(index(self.seed))
            )
        return X, y, found.source


def dissected_all(trainings: Sequence[Trainings]) -> list[Dissected]:
    """Ensembles, each trained on the same samples, or taken from the cache.

    Fully connected networks of an ensemble are trained and kept together; others one by one, so that those who ask for
    three and for five share three. On a CPU two are trained at once, of different ensembles too, so that no core is
    idle at the end of one.

    Raises
    ------
    ValueError
        If a network is unknown, or there are fewer samples.
    """
    samples: dict[tuple, tuple[Tensor, Tensor, DataSource]] = {}
    for one in trainings:
        key = one.data, one.samples, one.seed
        samples[key] = samples.get(key) or one.load()

    def train(task: tuple[Trainings, list[int]]) -> Ensemble:
        one, seeds = task
        X, y, _ = samples[one.data, one.samples, one.seed]
        return trained_ensemble(
            one.name, CLASSES[one.origin], X, y, seeds=seeds, epochs=one.epochs, scheme=SCHEMES[one.scheme],
            progress=f"{one.name} on {one.data}, {one.scheme}, seeds {seeds}",
        )  # fmt: skip

    tasks = [(one, group) for one in trainings for group in one.groups]
    # Lists begin with the small networks, and what takes long is best begun first.
    parts = reversed(side_by_side(train, tasks[::-1]))
    found = []
    for one in trainings:
        X, y, source = samples[one.data, one.samples, one.seed]
        ensemble = Ensemble.joined([next(parts) for _ in one.groups])
        found.append(Dissected(one.name, X, y, CLASSES[one.origin], source, ensemble))
    return found


def dissected(name: str, data: str, **defining: object) -> Dissected:
    """One ensemble of :func:`dissected_all`, by the fields of :class:`Trainings`.

    Raises
    ------
    ValueError
        As :func:`dissected_all`.
    """
    return dissected_all([Trainings(name, data, **defining)])[0]


def of_all_schemes(
    name: str, data: str, *, members: Sequence[int], epochs: int, samples: int, seed: int
) -> list[Trainings]:
    """Equal networks trained by each of :data:`SCHEMES`, so many of each, on the same samples, all seeds different.

    Raises
    ------
    ValueError
        If there is not one number of members for each scheme, or one is negative.
    """
    if len(members) != len(SCHEMES):
        raise ValueError(f"members must be one number for each of {list(SCHEMES)}, got {list(members)}")
    return [
        Trainings(name, data, number, epochs, samples, seed, scheme, first=sum(members[:k]))
        for k, (scheme, number) in enumerate(zip(SCHEMES, members, strict=True)) if number
    ]  # fmt: skip


def dissected_rows(
    rows: Sequence[str], members: Sequence[int], epochs: Sequence[int], samples: Sequence[int], *, seed: int,
    scheme: str,
) -> dict[str, Dissected]:  # fmt: skip
    """The networks of a figure or table by row, each with members, epochs and samples of its own.

    Rows on CIFAR-100 are left out where it cannot be had: on the random labels of its stand-in they would mean nothing.

    Parameters
    ----------
    rows
        Network and data set, ``"VGG11-W32 CIFAR-10"``.

    Raises
    ------
    ValueError
        If a row is written otherwise, or lacks its members, epochs or samples; or as :func:`dissected_all`.
    """
    if any(len(row.split()) != 2 for row in rows):
        raise ValueError(f'networks are written "VGG11-W32 CIFAR-10", not as in {list(rows)}')
    if not len(rows) == len(members) == len(epochs) == len(samples):
        counts = f"{len(rows)} networks, {len(members)} of members, {len(epochs)} of epochs, {len(samples)} of samples"
        raise ValueError(f"{counts}; give as many of each")
    had = {
        row: Trainings(*row.split(), m, e, n, seed, scheme)
        for row, m, e, n in zip(rows, members, epochs, samples, strict=True)
        if row.split()[1] != "CIFAR-100" or images.available("CIFAR-100")
    }
    return dict(zip(had, dissected_all(list(had.values())), strict=True))
