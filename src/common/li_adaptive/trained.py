"""The two trainings of Li, App G, their spectra and their cumulant counts, each made once and kept.

Notebooks call the functions. What takes long at the paper's scale can be made beforehand on a machine with a GPU and
without Jupyter, piece by piece,

    python -m common.li_adaptive.trained fig01_landscape --scale paper --minutes 9

and again until it says that all is made (:mod:`common.pipeline.pieces`).
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from common.cache import cached
from common.hessian import spectral_measure as spectrum
from common.hessian.spectral_measure import (
    BipartitePart,
    LanczosMeasures,
    ZeroOperator,
    edge_eigenvalues,
    hinge_hessian,
    lanczos_measures,
)  # fmt: skip
from common.li_adaptive import cumulants
from common.li_adaptive import data as binary
from common.li_adaptive import networks as convnets
from common.li_adaptive import training as sgd
from common.li_adaptive.cumulants import hessian_samples
from common.li_adaptive.data import BinaryData, shift_and_flip, zero_against_rest
from common.li_adaptive.networks import BatchStandardize, affine_layers, initialize, lenet, vgg
from common.li_adaptive.training import train_sgd
from common.pipeline.pieces import Piece, default_device, make_pieces

#: Thresholds of Table 2, and N_b of each order.
THRESHOLDS = {2: 0.4, 3: 0.4, 4: 1.0}
SUBMATRIX = {2: 100, 3: 10, 4: 10}


@dataclass(frozen=True)
class Recipe:
    """What App G says of one training; epochs as shares of all of them, so that a shorter one has the same shape."""

    data: str
    build: Callable[[float], nn.Sequential]
    initialization: tuple[str, float]
    lr: float
    decay: dict[float, float]
    augment: Callable[[Tensor, torch.Generator], Tensor] | None


RECIPES = {
    "LeNet": Recipe("MNIST", lambda width: lenet(), ("uniform", 1.0), 0.01, {0.6: 0.001}, None),
    "VGG": Recipe(
        "CIFAR-10", lambda width: vgg(width=width), ("normal", 1e-4), 0.05, {2 / 3: 0.005, 5 / 6: 0.0005},
        shift_and_flip,
    ),
}
BATCH_SIZE, MOMENTUM = 64, 0.9


@dataclass(frozen=True)
class Trained:
    """A network, its data and what its training passed through; :meth:`at` puts the network where it was.

    The parameters, which are large, are read (or trained) only where they are needed: history, spectra and entries are
    small files of their own, found without them.

    Attributes
    ----------
    key
        Everything that defines the training.
    history
        ``epochs`` (K,) at which parameters are kept, ``risk`` and ``accuracy`` (T + 1, 2) as
        :class:`~common.li_adaptive.training.SGDResult` has them, ``on_gpu`` () where it was trained.
    """

    name: str
    key: dict[str, object]
    network: nn.Sequential
    train: BinaryData
    test: BinaryData
    history: dict[str, Tensor]
    parameters: Callable[[], Float[Tensor, "K P"]]

    @property
    def epochs(self) -> list[int]:
        """Epochs at which parameters are kept."""
        return self.history["epochs"].tolist()

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.network.parameters())

    def at(self, epoch: int) -> nn.Sequential:
        """The network with the parameters kept after an epoch, dropout off."""
        theta = self.parameters()[self.epochs.index(epoch)].to(self.train.x.device)
        vector_to_parameters(theta.clone(), self.network.parameters())
        return self.network.eval()


def trained(
    name: str, *, epochs: int, keep: Sequence[int], seed: int, samples: int | None = None, width: float = 1.0,
    progress: bool = True,
) -> Trained:  # fmt: skip
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
    recipe, device = RECIPES[name], default_device()
    train, test = (
        zero_against_rest(recipe.data, split=split, seed=seed, samples=samples if split == "train" else None).to(device)
        for split in ("train", "test")
    )
    network = recipe.build(width).to(device)
    settings = {
        "epochs": epochs, "batch_size": BATCH_SIZE, "lr": recipe.lr, "momentum": MOMENTUM, "keep": sorted(keep),
        "decay": {math.ceil(share * epochs): rate for share, rate in recipe.decay.items()}, "seed": seed,
    }  # fmt: skip
    key = {
        "network": name, "width": width, "initialization": list(recipe.initialization),
        "augment": getattr(recipe.augment, "__name__", ""), "x": train.x, "y": train.y, "test x": test.x,
        "test y": test.y, **settings, "decay": sorted(settings["decay"].items()),
    }  # fmt: skip
    code = [sgd, convnets, binary]

    def train_now(checkpoint: object) -> dict[str, Tensor]:
        kind, scale = recipe.initialization
        initialize(network, kind, torch.Generator().manual_seed(seed), scale=scale)
        found = train_sgd(
            network, train, test, **settings, augment=recipe.augment, progress=name * progress, checkpoint=checkpoint
        )
        return {**vars(found), "on_gpu": torch.tensor(device.type == "cuda")}

    @lru_cache(maxsize=1)
    def everything() -> dict[str, Tensor]:
        return cached("li_training", key, train_now, code=code)

    small = ("epochs", "risk", "accuracy", "on_gpu")
    history = cached("li_history", key, lambda checkpoint: {k: everything()[k] for k in small}, code=code)
    return Trained(name, key, network, train, test, history, lambda: everything()["parameters"])


def _kept(kind: str, at: Trained, epoch: int, settings: dict, code: list[ModuleType], make: Callable) -> dict:
    key = {"training": at.key, "epoch": epoch, **settings}
    return cached(kind, key, make, code=[convnets, sgd, binary, *code])


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
        """Σ|λ_i + λ_{−i}| / Σ(|λ_i| + |λ_{−i}|) over the outermost eigenvalues of either end."""
        total = float((self.lowest.abs() + self.highest.abs()).sum())
        return float((self.lowest + self.highest).abs().sum()) / total if total else 0.0


def spectra(at: Trained, epoch: int, *, samples: int, iterations: int, starts: int, edges: int, seed: int) -> Spectra:
    """Measures and outermost eigenvalues of the Hessian on the first training images."""
    x, y = at.train.x[:samples], at.train.y[:samples]
    standardized = any(isinstance(m, BatchStandardize) for m in at.network.modules())

    def make(checkpoint: object) -> dict[str, Tensor]:
        network = at.at(epoch)
        whole = hinge_hessian(network, x, y)
        parts = {"whole": whole}
        if not standardized:
            parts["bipartite"] = whole if isinstance(whole, ZeroOperator) else BipartitePart(whole, network)
        found = {k: lanczos_measures(v, iterations=iterations, starts=starts, seed=seed) for k, v in parts.items()}
        kept = {f"{k}_{f}": getattr(v, f) for k, v in found.items() for f in ("nodes", "weights")}
        active = (1 - y * sgd.outputs(network, x) > 0).float().mean()  # E|ℓ'| of the hinge loss
        ends = edge_eigenvalues(whole, edges, seed=seed)
        kept["active"] = active
        return kept | {k: torch.from_numpy(e.copy()) for k, e in zip(("lowest", "highest"), ends, strict=True)}

    settings = {"samples": samples, "iterations": iterations, "starts": starts, "edges": edges, "seed": seed}
    kept = _kept("li_spectra", at, epoch, settings, [spectrum], make)
    whole, bipartite = (
        LanczosMeasures(kept[f"{k}_nodes"], kept[f"{k}_weights"]) if f"{k}_nodes" in kept else None
        for k in ("whole", "bipartite")
    )
    return Spectra(whole, bipartite, kept["lowest"], kept["highest"], float(kept["active"]))


def submatrix_samples(at: Trained, epoch: int, *, size: int, seed: int) -> Float[Tensor, "n entries"]:
    """size² entries of a random sub-matrix of the Hessians of all n training batches (Algorithm 1, step 1)."""
    generator = torch.Generator().manual_seed(seed)
    return _entries(at, epoch, *(torch.randint(at.size, (size,), generator=generator) for _ in range(2)))


def coupled_samples(at: Trained, epoch: int, *, rows: int, columns: int, seed: int) -> Float[Tensor, "n entries"]:
    """Entries that (5) allows to be non-zero: rows into, columns out of one random channel of a convolution.

    It is the second of the LeNet, whose channels lead to a dense layer, or the last but one of the VGG.
    """
    layers = affine_layers(at.network)
    into = 1 if at.name == "LeNet" else 8
    first, second = layers[into].weight, layers[into + 1].weight
    starts = {id(p): int(k) for p, k in zip(at.network.parameters(), _starts(at.network), strict=True)}
    generator = torch.Generator().manual_seed(seed)
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


def _entries(at: Trained, epoch: int, rows: Tensor, columns: Tensor) -> Tensor:
    rows, columns = rows.to(at.train.x.device), columns.to(at.train.x.device)

    def make(checkpoint: object) -> dict[str, Tensor]:
        H = hessian_samples(at.at(epoch), at.train.x, at.train.y, rows, columns, batch_size=BATCH_SIZE)
        return {"samples": H.flatten(1)}

    settings = {"rows": rows, "columns": columns, "batch_size": BATCH_SIZE}
    return _kept("li_entries", at, epoch, settings, [cumulants], make)["samples"]


def initialized_vgg(
    c: float, *, width: float, seed: int, standardize: bool = False, layers: int = 12
) -> nn.Sequential:
    """The VGG of Section 5.2 with weights N(0, c/n), n the fan-in, and no dropout; equal seeds mean equal noise."""
    network = vgg(width=width, standardize=standardize, dropout=False, layers=layers).to(default_device())
    initialize(network, "fan-in", torch.Generator().manual_seed(seed), scale=c)
    return network


def initial_spectrum(
    c: float, train: BinaryData, *, width: float, samples: int, iterations: int, starts: int, seed: int
) -> LanczosMeasures:
    """Lanczos measures of the Hessian of :func:`initialized_vgg` on the first training images."""
    x, y = train.x[:samples], train.y[:samples]

    def make(checkpoint: object) -> dict[str, Tensor]:
        operator = hinge_hessian(initialized_vgg(c, width=width, seed=seed), x, y)
        return vars(lanczos_measures(operator, iterations=iterations, starts=starts, seed=seed))

    key = {"c": c, "x": x, "y": y, "width": width, "iterations": iterations, "starts": starts, "seed": seed}
    return LanczosMeasures(**cached("li_initial_spectra", key, make, code=[convnets, sgd, spectrum]))


# ---------------------------------------------------------------------------------------------------------
# Piece by piece, without Jupyter


def landscape(p: dict, network: str) -> tuple[Trained, dict[int, Spectra]]:
    """The training and the spectra of Figure 1 b and c, by the parameters of fig01_landscape."""
    short = network.lower()
    at = trained(
        network, epochs=p[f"{short}_epochs"], keep=p[f"{short}_keep"], seed=p["seed"],
        samples=p[f"{short}_samples"] or None, width=p["vgg_width"] if network == "VGG" else 1.0,
    )  # fmt: skip
    chosen = {
        epoch: spectra(
            at, epoch, samples=p[f"{short}_hessian_samples"], iterations=p["iterations"], starts=p["starts"],
            edges=p["edges"], seed=p["seed"],
        )
        for epoch in at.epochs
    }
    return at, chosen


def coupling(p: dict) -> tuple[Trained, dict[int, list[list[Tensor]]], dict[int, list[Tensor]]]:
    """The training and the entries of Figures 1 d to f and 6, by the parameters of fig01_06_coupling.

    The random entries by epoch, for each order 2, 3, 4 a list of B arrays (n, N_b²); and the coupled ones by epoch, B
    arrays.
    """
    at = trained(
        p["network"], epochs=p["epochs"], keep=p["keep"], seed=p["seed"], samples=p["samples"] or None, width=p["width"]
    )
    entries = {
        epoch: [
            [
                submatrix_samples(at, epoch, size=SUBMATRIX[order], seed=p["seed"] + 1000 * order + k)
                for k in range(p["repeats"])
            ]
            for order in (2, 3, 4)
        ]
        for epoch in at.epochs
    }
    size = SUBMATRIX[2]
    coupled = {
        epoch: [coupled_samples(at, epoch, rows=size, columns=size, seed=p["seed"] + k) for k in range(p["repeats"])]
        for epoch in at.epochs
    }
    return at, entries, coupled


def initial_spectra(p: dict, train: BinaryData) -> dict[float, LanczosMeasures]:
    """The spectra of Figure 3 a at c = 1/2, 1, 2, by the parameters of fig03_normalization."""
    sizes = {"samples": p["hessian_samples"], "iterations": p["iterations"], "starts": p["starts"], "seed": p["seed"]}
    return {c: initial_spectrum(c, train, width=p["width"], **sizes) for c in (0.5, 1.0, 2.0)}


def normalization_data(p: dict) -> tuple[BinaryData, BinaryData]:
    """Training images of Figure 3, and at most as many or 2000 test images."""
    samples = p["samples"] or None
    train = zero_against_rest("CIFAR-10", split="train", seed=p["seed"], samples=samples)
    test = zero_against_rest("CIFAR-10", split="test", seed=p["seed"], samples=min(samples or 2000, 2000))
    return train.to(default_device()), test.to(default_device())


PIECES: dict[str, Sequence[Piece]] = {
    "fig01_landscape": (lambda p: landscape(p, "LeNet"), lambda p: landscape(p, "VGG")),
    "fig01_06_coupling": (coupling,),
    "fig03_normalization": (lambda p: initial_spectra(p, normalization_data(p)[0]),),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what a notebook needs; 0 when all is made, 3 when time ran out before."""
    return make_pieces("li_adaptive", PIECES, arguments, program="common.li_adaptive.trained", doc=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
