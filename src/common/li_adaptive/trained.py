"""The two trainings of Li, App G, their spectra and the entries of their Hessians, each made once and kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from common.cache import cached
from common.devices import default_device
from common.hessian.operators import ZeroOperator
from common.hessian.spectral_measure import LanczosMeasures, edge_eigenvalues, lanczos_measures
from common.li_adaptive.data import BinaryData, zero_against_rest
from common.li_adaptive.hessian_samples import hessian_samples
from common.li_adaptive.hinge_hessian import BipartitePart, hinge_hessian
from common.li_adaptive.networks import BatchStandardize, affine_layers
from common.li_adaptive.training import BATCH_SIZE, RECIPES, outputs, train_recipe

#: What defines a training: the arguments of :func:`~common.li_adaptive.training.train_recipe`.
Training = dict[str, object]


@dataclass(frozen=True)
class Trained:
    """A network, its data and what its training passed through.

    The parameters, which are large, are read (or trained) only where they are needed: history, spectra and entries are
    small files of their own, found without them.

    Attributes
    ----------
    training
        Everything that defines the training.
    history
        ``epochs`` (K,) at which parameters are kept, ``risk`` and ``accuracy`` (T + 1, 2) as
        :class:`~common.li_adaptive.training.SGDResult` has them, ``on_gpu`` () where it was trained.
    """

    name: str
    training: Training
    train: BinaryData
    test: BinaryData
    history: dict[str, Tensor]

    @property
    def epochs(self) -> list[int]:
        """Epochs at which parameters are kept."""
        return self.history["epochs"].tolist()

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in _built(self.training).parameters())

    def at(self, epoch: int) -> nn.Sequential:
        """A network with the parameters kept after an epoch, dropout off."""
        return network_after(self.training, epoch)


def trained(
    name: str, *, epochs: int, keep: Sequence[int], seed: int, samples: int | None = None, width: float = 1.0
) -> Trained:
    """Train the LeNet of G.2 or the VGG of G.3, or read the training from the cache.

    Parameters
    ----------
    name
        ``"LeNet"`` or ``"VGG"``.
    epochs, keep
        Length, and the epochs after which the parameters are kept.
    samples
        Training images; None for all.
    width
        Factor of the VGG's numbers of channels.

    Raises
    ------
    ValueError
        If the name is unknown, or something does not fit.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown network {name!r}; known are {', '.join(RECIPES)}")
    train = zero_against_rest(RECIPES[name].data, split="train", seed=seed, samples=samples)
    test = zero_against_rest(RECIPES[name].data, split="test", seed=seed)
    training = {
        "name": name, "width": width, "x": train.x, "y": train.y, "test_x": test.x, "test_y": test.y,
        "epochs": epochs, "keep": sorted(keep), "seed": seed,
    }  # fmt: skip
    device = default_device()
    history = cached(training_history, {"training": training})
    return Trained(name, training, train.to(device), test.to(device), history)


def training_history(training: Training) -> dict[str, Tensor]:
    """What is small of a training: epochs, risk, accuracy and where it was made."""
    found = cached(train_recipe, training, progress=training["name"])
    return {key: found[key] for key in ("epochs", "risk", "accuracy", "on_gpu")}


def _built(training: Training) -> nn.Sequential:
    return RECIPES[training["name"]].build(training["width"])


def network_after(training: Training, epoch: int) -> nn.Sequential:
    """The network of a training with the parameters kept after an epoch, dropout off, on the GPU if there is one.

    Raises
    ------
    ValueError
        If they were not kept.
    """
    found = cached(train_recipe, training)
    if epoch not in (epochs := found["epochs"].tolist()):
        raise ValueError(f"epoch {epoch} was not kept; there are {epochs}")
    network = _built(training)
    vector_to_parameters(found["parameters"][epochs.index(epoch)].clone(), network.parameters())
    return network.to(default_device()).eval()


def edge_asymmetry(lowest: Float[Tensor, " k"], highest: Float[Tensor, " k"]) -> float:
    """Σ|λ_i + λ_{−i}| / Σ(|λ_i| + |λ_{−i}|) over the eigenvalues at either end; 0 for a zero matrix."""
    total = float((lowest.abs() + highest.abs()).sum())
    return float((lowest + highest).abs().sum()) / total if total else 0.0


@dataclass(frozen=True)
class Spectra:
    """What is kept of the Hessian at one epoch.

    Attributes
    ----------
    whole
        Lanczos measures.
    bipartite
        Those of the blocks between odd and even layers alone, symmetric exactly, by the same start vectors; None for a
        network with batch norm, whose diagonal blocks do not vanish.
    lowest, highest
        The eigenvalues at either end, outermost first.
    active
        Share of the images whose loss is not zero.
    """

    whole: LanczosMeasures
    bipartite: LanczosMeasures | None
    lowest: Float[Tensor, " k"]
    highest: Float[Tensor, " k"]
    active: float

    @property
    def edge_asymmetry(self) -> float:
        """:func:`edge_asymmetry` of the outermost eigenvalues."""
        return edge_asymmetry(self.lowest, self.highest)


def hessian_spectra(
    training: Training, epoch: int, samples: int, iterations: int, starts: int, edges: int, seed: int
) -> dict[str, Tensor]:
    """What :class:`Spectra` holds, on the first training images; of a measure ``whole_nodes`` and ``whole_weights``."""
    network = network_after(training, epoch)
    x, y = (training[key][:samples].to(default_device()) for key in ("x", "y"))
    whole = hinge_hessian(network, x, y)
    parts = {"whole": whole}
    if not any(isinstance(m, BatchStandardize) for m in network.modules()):
        parts["bipartite"] = whole if isinstance(whole, ZeroOperator) else BipartitePart(whole, network)
    found = {k: lanczos_measures(v, iterations=iterations, starts=starts, seed=seed) for k, v in parts.items()}
    kept = {f"{k}_{f}": getattr(v, f) for k, v in found.items() for f in ("nodes", "weights")}
    kept["active"] = (1 - y * outputs(network, x) > 0).float().mean()  # E|ℓ'| of the hinge loss
    ends = edge_eigenvalues(whole, edges, seed=seed)
    return kept | {k: torch.from_numpy(e.copy()) for k, e in zip(("lowest", "highest"), ends, strict=True)}


def spectra(at: Trained, epoch: int, *, samples: int, iterations: int, starts: int, edges: int, seed: int) -> Spectra:
    """Measures and outermost eigenvalues of the Hessian on the first training images.

    Raises
    ------
    ValueError
        If there are to be no images, or as :func:`~common.hessian.spectral_measure.lanczos_measures` and
        :func:`~common.hessian.spectral_measure.edge_eigenvalues`.
    """
    at.train.first(samples)
    settings = {"samples": samples, "iterations": iterations, "starts": starts, "edges": edges, "seed": seed}
    kept = cached(hessian_spectra, {"training": at.training, "epoch": epoch, **settings})
    whole, bipartite = (
        LanczosMeasures(kept[f"{k}_nodes"], kept[f"{k}_weights"]) if f"{k}_nodes" in kept else None
        for k in ("whole", "bipartite")
    )
    return Spectra(whole, bipartite, kept["lowest"], kept["highest"], float(kept["active"]))


def submatrix_samples(at: Trained, epoch: int, *, size: int, seed: int) -> Float[Tensor, "n entries"]:
    """size² entries of a random sub-matrix of the Hessians of all n training batches (Algorithm 1, step 1)."""
    generator = torch.Generator().manual_seed(index(seed))
    return _entries(at, epoch, *(torch.randint(at.size, (size,), generator=generator) for _ in range(2)))


def coupled_samples(at: Trained, epoch: int, *, rows: int, columns: int, seed: int) -> Float[Tensor, "n entries"]:
    """Entries that (5) allows to be non-zero: rows into, columns out of one random channel of a convolution.

    It is the second of the LeNet, whose channels lead to a dense layer, or the last but one of the VGG.
    """
    network = _built(at.training)
    layers = affine_layers(network)
    into = 1 if at.name == "LeNet" else 8
    first, second = layers[into].weight, layers[into + 1].weight
    starts = {id(p): int(k) for p, k in zip(network.parameters(), _starts(network), strict=True)}
    generator = torch.Generator().manual_seed(index(seed))
    channel = int(torch.randint(len(first), (1,), generator=generator))
    places = [torch.arange(p.numel()).view(p.shape) + starts[id(p)] for p in (first, second)]
    fan = second.shape[1] // len(first)  # positions of a channel, where a dense layer follows
    candidates = places[0][channel].flatten(), places[1][:, channel * fan : (channel + 1) * fan].flatten()
    chosen = [
        some[torch.randperm(len(some), generator=generator)[:size]]
        for some, size in zip(candidates, (rows, columns), strict=True)
    ]
    return _entries(at, epoch, *chosen)


def _starts(network: nn.Module) -> np.ndarray:
    """Places of the first entries of all parameters in the flat vector."""
    return np.cumsum([0] + [p.numel() for p in network.parameters()])[:-1]


def hessian_entries(training: Training, epoch: int, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """``samples`` (n, R C), entries of the Hessians of all n training batches in the given rows and columns."""
    device = default_device()
    network, places = network_after(training, epoch), (rows.to(device), columns.to(device))
    x, y = training["x"].to(device), training["y"].to(device)
    return {"samples": hessian_samples(network, x, y, *places, batch_size=BATCH_SIZE).flatten(1)}


def _entries(at: Trained, epoch: int, rows: Tensor, columns: Tensor) -> Tensor:
    key = {"training": at.training, "epoch": epoch, "rows": rows, "columns": columns}
    return cached(hessian_entries, key)["samples"]
