"""The networks of Wu et al. (2022), App E, trained once and kept, and the eigenpairs of their layers.

Notebooks call the functions. The trainings of 1000 epochs can be made beforehand on a machine with a GPU and without
Jupyter, piece by piece,

    python -m common.wu_dissecting.trained fig04_overlap --scale paper --minutes 9

and again until it says that all is made (:mod:`common.pipeline.pieces`).
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.cache import cached
from common.data import DataSource, images
from common.hessian import block_lanczos as eigenpairs
from common.hessian import layer as kronecker
from common.hessian import operators
from common.hessian.block_lanczos import Eigenpairs, top_eigenpairs
from common.hessian.layer import ConvolutionHessian, LayerHessian, layer_hessian, layer_hessians
from common.hessian.operators import FullHessian
from common.pipeline.pieces import Piece, default_device, make_pieces
from common.wu_dissecting import eigenspaces as subspace
from common.wu_dissecting import networks as classifiers
from common.wu_dissecting import output_hessian as full
from common.wu_dissecting import training as ensembles
from common.wu_dissecting.eigenspaces import nested_overlaps, pairwise_overlaps
from common.wu_dissecting.networks import classifier, layer_names
from common.wu_dissecting.output_hessian import gauss_newton_forms, output_approximation
from common.wu_dissecting.training import Ensemble, Scheme, side_by_side, train_ensemble

#: The training schemes of App E.3 and F.2.1.
SCHEMES = {"default": Scheme(), "slow": Scheme(lr=0.001), "momentum": Scheme(momentum=0.9, weight_decay=5e-4)}
#: How the names of data sets with random labels end.
RANDOM = "-R"
#: Epochs after which a LeNet is kept, besides the last.
TRAJECTORY = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
CLASSES = {"MNIST": 10, "CIFAR-10": 10, "CIFAR-100": 100}


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

    def network(self, member: int, epoch: int | None = None) -> nn.Module:
        """One network after ``epoch`` epochs, the last ones by default, to be evaluated."""
        network = classifier(self.name, self.X.shape[1:], self.classes)
        self.ensemble.load(network, member, epoch)
        return network.eval()

    def hessian(
        self, member: int, layer: str, samples: int, epoch: int | None = None
    ) -> LayerHessian | ConvolutionHessian:
        """Hessian of one layer of one network on the first ``samples`` training samples."""
        return self.hessians(member, [layer], samples, epoch)[layer]

    def hessians(
        self, member: int, layers: Sequence[str], samples: int, epoch: int | None = None
    ) -> dict[str, LayerHessian | ConvolutionHessian]:
        """:meth:`hessian` of several layers, from the same backward passes."""
        network, device = self.network(member, epoch), default_device()
        found = layer_hessians(network.to(device), layers, self.X[:samples].to(device))
        return {layer: H.to("cpu") for layer, H in found.items()}

    def eigenpairs(self, member: int, layer: str, samples: int, k: int, tolerance: float = 1e-4) -> Eigenpairs:
        """The k largest of :meth:`hessian`, at most all of them, from a file if they were computed before."""
        device = default_device()
        network, X = self.network(member).to(device), self.X[:samples].to(device)
        state = {f"state:{name}": tensor for name, tensor in network.state_dict().items()}
        k = min(k, network.get_submodule(layer).weight.numel())
        kept = cached(
            "wu_eigenpairs",
            state | {"name": self.name, "X": X, "layer": layer, "k": k, "tolerance": tolerance},
            make=lambda _: vars(layer_hessian(network, layer, X).top_eigenpairs(k, tolerance=tolerance)),
            code=[classifiers, operators, kronecker, eigenpairs],
        )
        return Eigenpairs(**kept)

    def full_eigenpairs(self, member: int, samples: int, k: int, tolerance: float = 1e-3) -> dict[str, Tensor]:
        """Eigenpairs of the full Hessian beside those of App C, for a fully connected network, kept in a file.

        Returns
        -------
        dict
            ``true`` and ``approximated`` eigenvalues, ``overlap`` of the first 1, ..., k vectors of both, and the
            ``first_term`` of (251) along the true ones, (k,) each; k is at most the number of all outputs.
        """
        device = default_device()
        network, X, y = (a.to(device) for a in (self.network(member), self.X[:samples], self.y[:samples]))
        outputs = sum(len(network.get_submodule(layer).weight) for layer in self.layers)
        k = min(k, outputs)

        def make(_: object) -> dict[str, Tensor]:
            layers = [layer_hessian(network, layer, X) for layer in self.layers]
            approximation = output_approximation(layers, k)
            start = approximation.basis[:, : kronecker.BLOCK].contiguous()
            found = top_eigenpairs(FullHessian(network, X, y), k, start=start, tolerance=tolerance)
            return {
                "true": found.values, "approximated": approximation.values,
                "overlap": nested_overlaps(found.vectors, approximation.basis),
                "first_term": gauss_newton_forms(layers, found.vectors),
            }  # fmt: skip

        state = {f"state:{name}": tensor for name, tensor in network.state_dict().items()}
        key = state | {"name": self.name, "X": X, "y": y, "k": k, "tolerance": tolerance}
        code = [classifiers, operators, full, kronecker, eigenpairs, subspace]
        return cached("wu_full_eigenpairs", key, make=make, code=code)

    def overlaps(self, samples: int, shown: float, tolerance: float = 1e-4) -> dict[str, dict[str, Tensor]]:
        """Overlaps of all pairs of networks in every layer, and the eigenvalues of its factors, kept in a file.

        Bases of large layers take much more room than what is wanted of them, and are not kept.

        Parameters
        ----------
        shown
            Largest k in units of m.

        Returns
        -------
        dict
            Of every layer ``pairs`` (E, E, k), :func:`~common.wu_dissecting.eigenspaces.pairwise_overlaps`; ``tau``
            (E, m) and ``gamma`` (E, n), eigenvalues of E[M] and E[xxᵀ], descending.
        """
        device, layers = default_device(), self.layers
        networks, X = [self.network(member) for member in range(self.members)], self.X[:samples]
        states = {f"{e}:{name}": t for e, network in enumerate(networks) for name, t in network.state_dict().items()}

        def measure(network: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
            found, hessians = {}, layer_hessians(network.to(device), layers, X.to(device))
            for layer in layers:
                H = hessians.pop(layer)
                k = min(round(shown * len(H.output_hessian)), H.shape[0])
                found[layer] = H.top_eigenpairs(k, tolerance=tolerance).vectors, H.output_basis[0], H.input_basis[0]
            return found

        def make(_: object) -> dict[str, Tensor]:
            measured, result = side_by_side(measure, networks, device), {}
            for layer in layers:
                bases, tau, gamma = zip(*(one[layer] for one in measured), strict=True)
                result[f"{layer}:pairs"] = torch.from_numpy(pairwise_overlaps(bases))
                result |= {f"{layer}:tau": torch.stack(tau), f"{layer}:gamma": torch.stack(gamma)}
            return result

        key = states | {"name": self.name, "X": X, "shown": shown, "tolerance": tolerance}
        kept = cached("wu_overlaps", key, make=make, code=[classifiers, operators, kronecker, eigenpairs, subspace])
        return {layer: {part: kept[f"{layer}:{part}"] for part in ("pairs", "tau", "gamma")} for layer in layers}


def dissected(
    name: str, data: str, *, members: int, epochs: int, samples: int, seed: int, scheme: str = "default", first: int = 0
) -> Dissected:
    """Equal networks, trained on the same samples, or taken from the files of the zoo.

    Fully connected networks of an ensemble are trained and kept together; convolutional ones one by one, two at once on
    a CPU, so that those who ask for three and for five share three.

    Parameters
    ----------
    name
        As in :func:`common.wu_dissecting.networks.classifier`.
    data
        ``"MNIST"``, ``"CIFAR-10"`` or ``"CIFAR-100"``; with ``"-R"`` behind it the labels are drawn at random, the same
        for all networks.
    samples
        Training samples, drawn at random; 0 for all.
    seed
        Of the draw of samples and labels.
    scheme
        One of :data:`SCHEMES`.
    first
        The networks have the seeds ``seed + first``, ``seed + first + 1``, ...

    Raises
    ------
    ValueError
        If the data set, the network or the scheme is unknown, or there are fewer samples.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known are {list(SCHEMES)}")
    origin = data.removesuffix(RANDOM)
    if origin not in CLASSES:
        raise ValueError(f"unknown data set {data!r}; known are {list(CLASSES)}, and these with {RANDOM}")
    classes = CLASSES[origin]
    found = images.load(origin, samples=samples or images.SIZES[origin]["train"], seed=seed)  # in random order
    X = found.x - found.x.mean((0, 2, 3), keepdim=True)
    X /= X.std((0, 2, 3), keepdim=True)
    y = found.y
    if data.endswith(RANDOM):
        y = torch.randint(classes, (len(y),), generator=torch.Generator().manual_seed(seed))
    device = default_device()
    seeds = [seed + first + k for k in range(members)]
    alone = not name.startswith("F-")
    keep = [epoch for epoch in TRAJECTORY if epoch < epochs] if name.startswith("LeNet5") else []

    def train(group: list[int]) -> Ensemble:
        key = {
            "name": name, "X": X, "y": y, "seeds": group, "epochs": epochs, "scheme": vars(SCHEMES[scheme]),
            "keep": keep,
        }  # fmt: skip
        kept = cached(
            "wu_networks", key, code=[classifiers, ensembles],
            make=lambda checkpoint: train_ensemble(
                lambda: classifier(name, X.shape[1:], classes), X.to(device), y.to(device), seeds=group, epochs=epochs,
                scheme=SCHEMES[scheme], keep=keep, progress=f"{name} on {data}", checkpoint=checkpoint,
            ).tensors(),
        )  # fmt: skip
        return Ensemble.of_tensors(kept)

    parts = side_by_side(train, [[s] for s in seeds] if alone else [seeds], device)
    return Dissected(name, X, y, classes, found.source, Ensemble.joined(parts))


def dissected_rows(
    rows: Sequence[str], epochs: Sequence[int], samples: Sequence[int], *, members: int, **same: object
) -> Iterator[tuple[str, Dissected]]:
    """The large networks of a figure or table, each with epochs and samples of its own.

    On a CPU two are trained at once, of different rows too, so that no core is idle at the end of a row. Rows on
    CIFAR-100 are left out where it cannot be had: on the random labels of its stand-in they would mean nothing.

    Parameters
    ----------
    rows
        Network and data set, ``"VGG11-W32 CIFAR-10"``.
    same
        What :func:`dissected` takes besides.

    Yields
    ------
    row, networks
        In the order of ``rows``, after all are trained.

    Raises
    ------
    ValueError
        If a row is written otherwise, or lacks its epochs or samples.
    """
    if any(len(row.split()) != 2 for row in rows):
        raise ValueError(f'networks are written "VGG11-W32 CIFAR-10", not as in {list(rows)}')
    if not len(rows) == len(epochs) == len(samples):
        counts = f"{len(rows)} networks, {len(epochs)} numbers of epochs, {len(samples)} of samples"
        raise ValueError(f"{counts}; give as many of each")
    sizes = {row: {"epochs": e, "samples": n} for row, e, n in zip(rows, epochs, samples, strict=True)}
    had = [row for row in rows if row.split()[1] != "CIFAR-100" or images.available("CIFAR-100")]

    def train(one: tuple[str, int]) -> None:
        row, first = one
        dissected(*row.split(), members=1, first=first, **sizes[row], **same)

    # Rows begin with the small networks, and what takes long is best begun first.
    side_by_side(train, [(row, first) for row in reversed(had) for first in range(members)], default_device())
    for row in had:
        yield row, dissected(*row.split(), members=members, **sizes[row], **same)


def of_all_schemes(
    name: str, data: str, *, members: Sequence[int], epochs: int, samples: int, seed: int
) -> list[Dissected]:
    """Equal networks trained by each of :data:`SCHEMES`, so many of each, on the same samples, all seeds different."""
    same = {"epochs": epochs, "samples": samples, "seed": seed}
    return [
        dissected(name, data, members=number, scheme=scheme, first=sum(members[:k]), **same)
        for k, (scheme, number) in enumerate(zip(SCHEMES, members, strict=True)) if number
    ]  # fmt: skip


def _trained(p: dict, data: str, *, name: str = "network", part: str = "") -> Dissected:
    """The ensemble that a notebook's parameters name."""
    sizes = {key: p[f"{part}{key}"] for key in ("members", "epochs", "samples")}
    return dissected(p[name], data, **sizes, seed=p["seed"], scheme=p.get("scheme", "default"))


def _lenet_of(p: dict, suffix: str) -> dict:
    """The parameters of fig26_28_batch_norm as those of one ensemble of LeNets."""
    return p | {"name": p["lenet"] + suffix, "epochs": p["lenet_epochs"], "scheme": p["lenet_scheme"]}


def _listed(p: dict) -> None:
    """The ensembles of a table, as "network data"."""
    for rows, samples in ((p["networks"], p["samples"]), (p["wide_networks"], p["wide_samples"])):
        for row in rows:
            name, data = row.split()
            dissected(name, data, members=p["members"], epochs=p["epochs"], samples=samples, seed=p["seed"])


def _overlapping(p: dict) -> None:
    """The ensembles of Figures 4, 6, 22, and the eigenpairs of their layers."""
    sizes = {key: p[f"lenet_{key}"] for key in ("members", "epochs", "samples")}
    perceptrons = _trained(p, "MNIST", name="perceptron", part="perceptron_")
    cases = [(perceptrons, ["fc1", perceptrons.layers[-1]], p["perceptron_hessian_samples"])]
    for case in of_all_schemes(p["lenet"], "CIFAR-10", **sizes, seed=p["seed"]):
        cases.append((case, case.layers, p["lenet_hessian_samples"]))
    for case, layers, samples in cases:
        for layer in layers:
            m = len(case.network(0).get_submodule(layer).weight)
            for member in range(case.members):
                case.eigenpairs(member, layer, samples, round(p["shown"] * m))


def _large(p: dict, part: str = "") -> Iterator[tuple[str, Dissected]]:
    """The networks of Figures 7 and 8."""
    return dissected_rows(
        p[f"{part}networks"], p[f"{part}epochs"], p[f"{part}samples"],
        members=p[f"{part}members"], seed=p["seed"], scheme=p[f"{part}scheme"],
    )  # fmt: skip


def _overlaps_of_large(p: dict) -> None:
    """The networks of Figures 7 and 8, and the overlaps of their layers."""
    used = dict(zip(p["networks"], p["hessian_samples"], strict=True))
    for row, case in _large(p):
        case.overlaps(used[row], p["shown"])


def _listed_large(p: dict) -> None:
    """The large networks of Tables 6 and 7."""
    for _ in _large(p, "large_"):
        pass


PIECES: dict[str, Sequence[Piece]] = {
    "fig01_teaser": (lambda p: _trained(p, "CIFAR-10"),),
    "fig02_kronecker": (
        lambda p: _trained(p, "MNIST"),
        lambda p: [_trained(p | {"name": name}, "MNIST", name="name", part="deeper_") for name in p["deeper"]],
    ),
    "fig03_eigenspectra": (lambda p: _trained(p, "MNIST"), lambda p: _trained(p, "MNIST-R")),
    "fig04_overlap": (_overlapping,),
    "fig07_08_convnets": (_overlaps_of_large,),
    "fig09_10_failures": (
        lambda p: _trained(p, "MNIST"), lambda p: _trained(p, "MNIST", name="deeper", part="deeper_"),
        lambda p: _trained(p | {"scheme": "momentum"}, "CIFAR-10", name="convolutional", part="convolutional_"),
        lambda p: _trained(p | {"scheme": "momentum"}, "CIFAR-10", name="large", part="large_").overlaps(
            p["large_hessian_samples"], 1.5
        ),
    ),
    "fig11_18_correspondence": (
        lambda p: _trained(p, "CIFAR-10"), lambda p: _trained(p, "CIFAR-10", name="large", part="large_")
    ),
    "fig19_20_trajectory": (lambda p: _trained(p, "CIFAR-10"),),
    "fig21_low_rank_eigenvectors": (lambda p: _trained(p, "CIFAR-10"),),
    "fig26_28_batch_norm": (
        lambda p: [_trained(_lenet_of(p, suffix), "CIFAR-10", name="name") for suffix in ("-BN", "")],
        lambda p: [_trained(p | {"name": f"{name}-BN"}, "MNIST", name="name") for name in p["perceptrons"]],
    ),
    "fig29_30_logit_clusters": (lambda p: _trained(p, "MNIST"),),
    "table06_07_autocorrelation": (_listed, _listed_large),
    "table08_output_eigenspace": (_listed,),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what a notebook needs; 0 when all is made, 3 when time ran out before."""
    return make_pieces("wu_dissecting", PIECES, arguments, program="common.wu_dissecting.trained", doc=__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
