"""The stochastic networks of Wu et al. (2022), App H, their bounds computed once and kept."""

import re
from collections.abc import Mapping, Sequence
from operator import index
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from common.cache import Checkpoint, cached
from common.data import DataSource, images
from common.devices import default_device, side_by_side
from common.wu_dissecting.networks import classifier
from common.wu_dissecting.pac_bayes.bases import Weights
from common.wu_dissecting.pac_bayes.bound import Confidence
from common.wu_dissecting.pac_bayes.optimize import METHODS, Schedule, tighten
from common.wu_dissecting.pac_bayes.plain import plain_descent
from common.wu_dissecting.pac_bayes.posterior import binned_by_rank, bounds, count_errors, spread_along_curvature
from common.wu_dissecting.sgd import Scheme
from common.wu_dissecting.training import trained_ensemble

#: Added to the seed of the samples and labels, on which w₀ may not depend, and of the final draws, with which Q may not
#: have been optimized. A CPU's generator looks at 32 bits of a seed only; those of the optimization are far below.
DATA, FRESH = 2**30, 2**31
#: T-600, R-600 (random labels), T-200^2_10 (ten classes): the names of Table 10.
_NAME = re.compile(r"([TR])-(\d+(?:\^\d+)?)(_10)?")


class Labelled(NamedTuple):
    """Samples of one of the data sets of App E.1, pixels scaled to [−1, 1] as in Dziugaite and Roy.

    A scaling by the mean of the training samples would make the prior's predictions depend on them.
    """

    X: Float[Tensor, "N 784"]
    y: Int[Tensor, " N"]
    X_test: Float[Tensor, "K 784"]
    y_test: Int[Tensor, " K"]
    classes: int
    source: DataSource


def labelled(name: str, samples: int, seed: int) -> Labelled:
    """What a network of Table 10 is trained on: MNIST-2 (0 to 4 against 5 to 9), or MNIST with ten classes.

    Parameters
    ----------
    samples
        Drawn at random; 0 for all.
    seed
        Of that draw, and of random labels.

    Raises
    ------
    ValueError
        If there is no such network.
    """
    parts = _NAME.fullmatch(name)
    if not parts:
        raise ValueError(f"unknown network {name!r}; known are T-600, T-300^2, R-600, T-200^2_10, ...")
    samples, seed = index(samples), index(seed)
    train = images.load("MNIST", samples=samples or None, seed=DATA + seed)
    test = images.load("MNIST", split="test")
    classes = 10 if parts[3] else 2
    generator = torch.Generator().manual_seed(DATA + seed)
    ys = [y if parts[3] else (y >= 5).long() for y in (train.y, test.y)]
    if parts[1] == "R":
        ys = [torch.randint(classes, y.shape, generator=generator) for y in ys]
    X, X_test = (2 * x.flatten(1) - 1 for x in (train.x, test.x))
    return Labelled(X, ys[0], X_test, ys[1], classes, train.source)


def trained(name: str, data: Labelled, *, epochs: int, seed: int) -> tuple[Weights, Weights, float]:
    """Weights after SGD and before, of a network of Table 10, and its test error; kept in a file."""
    network = "F-" + _NAME.fullmatch(name)[2]
    kept = trained_ensemble(
        network, data.classes, data.X[:, :, None, None], data.y, seeds=[seed], epochs=epochs, scheme=Scheme(),
        initialization="truncated gaussian", progress=f"{name}, {seed}",
    )  # fmt: skip
    layers, states = range(1, 1 + len(kept.states) // 2), kept.states
    last, first = (
        [torch.cat([states[f"fc{k}.weight"][at, 0], states[f"fc{k}.bias"][at, 0, :, None]], 1) for k in layers]
        for at in (-1, 0)
    )
    found = classifier(network, (data.X.shape[1], 1, 1), data.classes)
    found.load_state_dict(kept.state(0))
    with torch.no_grad():
        wrong = found(data.X_test).argmax(1) != data.y_test
    return last, first, float(wrong.float().mean())


#: What is kept of a bound: the fields of :class:`Bound`, the errors of network and posterior on the test samples.
COLUMNS = ("bound", "error", "error_bound", "kl", "j", "half_log_prior", "test_error", "stochastic_test_error")


def tightened(
    methods: Sequence[str], weights: Weights, prior_weights: Weights, X: Tensor, y: Tensor, X_test: Tensor,
    y_test: Tensor, test_error: float, seed: int, schedule: Schedule, draws: int, confidence: Confidence, *,
    progress: str = "", checkpoint: Checkpoint | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The bounds of one network by several methods that are optimized together.

    Parameters
    ----------
    weights, prior_weights
        Where the posterior starts, and the centre of the prior.
    draws
        For the estimate of the stochastic error; as many as that, at most 100,000, on the test samples.

    Returns
    -------
    dict
        What :func:`stochastic` says, as ``"method:column"``.
    """
    device, tested = default_device(), min(draws, 100_000)
    start, prior = ([w.to(device) for w in ws] for ws in (weights, prior_weights))
    X, y, X_test, y_test = (tensor.to(device) for tensor in (X, y, X_test, y_test))
    q = tighten(
        start, prior, X, y, [METHODS[method] for method in methods], schedule=schedule, confidence=confidence,
        seed=seed, progress=progress, checkpoint=checkpoint,
    )  # fmt: skip
    rows = bounds(q, X, y, draws=draws, seed=FRESH + seed, confidence=confidence)
    wrong = count_errors(q, X_test, y_test, tested, FRESH + seed)
    result = {}
    for e, method in enumerate(methods):
        values = {**vars(rows[e]), "test_error": test_error, "stochastic_test_error": wrong[e] / tested}
        result |= {f"{method}:{column}": torch.tensor(float(values[column])) for column in COLUMNS}
        curves = spread_along_curvature(q, e, X[: schedule.hessian_samples])
        correlations = [float(stats.spearmanr(*curve).statistic) for curve in curves]
        result[f"{method}:correlation"] = torch.tensor(correlations)
        binned = [binned_by_rank(*curve) for curve in curves]
        result |= {f"{method}:{key}": torch.stack([one[key] for one in binned]) for key in binned[0]}
    return result


def stochastic(
    name: str, methods: Sequence[str], *, seed: int, samples: int, sgd_epochs: int, schedule: Schedule, draws: int,
    confidence: Confidence,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """The bounds of one network by several methods that are optimized together, kept in a file.

    Parameters
    ----------
    name
        Of Table 10: ``"T-600"``, ``"R-600"``, ``"T-200^2_10"``.
    methods
        Of :data:`METHODS`; not both with and without learned bases.
    seed
        Of the draw of samples, initialization, trainings and draws of networks.
    draws
        As :func:`tightened`.

    Returns
    -------
    dict
        Of every method a number for each of :data:`COLUMNS`; ``correlation`` (L,), Spearman's between curvature and
        variance in each layer; ``rank``, ``curvature`` and ``variance`` (L, K) as
        :func:`~common.wu_dissecting.pac_bayes.posterior.binned_by_rank` gives them.

    Raises
    ------
    ValueError
        If the network or a method is unknown.
    """
    if unknown := [method for method in methods if method not in METHODS]:
        raise ValueError(f"unknown methods {unknown}; known are {list(METHODS)}")
    data = labelled(name, samples, seed)
    weights, prior_weights, test_error = trained(name, data, epochs=sgd_epochs, seed=seed)
    key = {
        "methods": list(methods), "weights": weights, "prior_weights": prior_weights, "X": data.X, "y": data.y,
        "X_test": data.X_test, "y_test": data.y_test, "test_error": test_error, "seed": seed, "schedule": schedule,
        "draws": draws, "confidence": confidence,
    }  # fmt: skip
    kept = cached(tightened, key, progress=f"{name}, {seed}, {', '.join(methods)}")
    return {
        method: {k.removeprefix(f"{method}:"): tensor for k, tensor in kept.items() if k.startswith(f"{method}:")}
        for method in methods
    }


def bounds_of_networks(
    networks: Sequence[str], learned: Sequence[str], *, seeds: Sequence[int], **options: object
) -> dict[str, list[Mapping[str, Mapping[str, Tensor]]]]:
    """Of every network what :func:`stochastic` gives for each seed, by all methods; two tasks at once on a CPU.

    All methods of a network that stay in orthogonal bases are one batch.

    Parameters
    ----------
    learned
        The networks that get a learned basis too.
    options
        What :func:`stochastic` takes besides.

    Raises
    ------
    ValueError
        If a learned basis is asked for another network, a seed is given twice, or as :func:`stochastic`.
    """
    seeds = list(seeds)
    if unknown := [name for name in learned if name not in networks]:
        raise ValueError(f"learned bases of {unknown} are asked for, but networks are {list(networks)}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"every seed must be given once, got {seeds}")

    def groups(name: str) -> list[list[str]]:
        mixed = [method for method in METHODS if METHODS[method].mixed and name in learned]
        return [group for group in ([m for m in METHODS if not METHODS[m].mixed], mixed) if group]

    def train(network: tuple[str, int]) -> None:
        name, seed = network
        trained(name, labelled(name, options["samples"], seed), epochs=options["sgd_epochs"], seed=seed)

    def optimize(task: tuple[str, int, list[str]]) -> dict[str, dict[str, Tensor]]:
        name, seed, methods = task
        return stochastic(name, methods, seed=seed, **options)

    pairs = [(name, seed) for name in networks for seed in seeds]
    tasks = [(name, seed, group) for name, seed in pairs for group in groups(name)]
    side_by_side(train, pairs)
    results = side_by_side(optimize, tasks)
    found: dict[str, list[dict]] = {name: [{} for _ in seeds] for name in networks}
    for (name, seed, _), result in zip(tasks, results, strict=True):
        found[name][seeds.index(seed)] |= result
    return found


#: By how much the doubling of the schedule may move the bound, ϱ, and ς (root mean square over ranks of a layer).
SETTLED = {"bound": 0.003, "half_log_prior": 0.05, "log_std": 0.1}


def change_by_doubling(
    once: Sequence[Mapping[str, Tensor]], twice: Sequence[Mapping[str, Tensor]]
) -> dict[str, float]:  # fmt: skip
    """How far a bound is from its optimum, by what a schedule of twice the length changes.

    Parameters
    ----------
    once, twice
        What :func:`stochastic` gives of one method, for each seed, by a schedule and by one of twice its epochs.

    Returns
    -------
    dict
        By the keys of :data:`SETTLED`: the change of the bound and of ϱ, and the root mean square change of ς = ½ ln s
        over the logarithmically spaced ranks of a layer; of the seed and the layer where the modulus is largest.
    """
    found = {
        key: max((float(b[key] - a[key]) for a, b in zip(once, twice, strict=True)), key=abs)
        for key in ("bound", "half_log_prior")
    }
    moved = torch.stack([(b["variance"] / a["variance"]).log() / 2 for a, b in zip(once, twice, strict=True)])
    return found | {"log_std": float(moved.square().nanmean(-1).sqrt().max())}


def unsettled(change: Mapping[str, float]) -> str:
    """Why a method is not at its optimum, from :func:`change_by_doubling`; empty if it is near."""
    names = {"bound": "the bound", "half_log_prior": "ϱ", "log_std": "ς"}
    words = [f"{names[key]} by {abs(change[key]):.2g}" for key, most in SETTLED.items() if not abs(change[key]) < most]
    return f"twice the epochs move {' and '.join(words)}" if words else ""


def rank_correlation_of_sharp(
    curvature: Float[Tensor, " points"], variance: Float[Tensor, " points"], share: float = 0.01
) -> float:
    """Spearman's correlation of curvature and variance over the sharp directions, Figure 31.

    Parameters
    ----------
    curvature, variance
        Of logarithmically spaced ranks, as :func:`~common.wu_dissecting.pac_bayes.posterior.binned_by_rank` gives them.
    share
        Sharp is what has more than this share of the largest curvature.

    Raises
    ------
    ValueError
        If there are fewer than three such ranks.
    """
    there = curvature.isfinite() & variance.isfinite()
    curvature, variance = curvature[there], variance[there]
    sharp = curvature > share * curvature.max()
    if int(sharp.sum()) < 3:
        raise ValueError(f"a correlation of ranks needs at least 3 sharp directions, got {int(sharp.sum())}")
    return float(stats.spearmanr(curvature[sharp], variance[sharp]).statistic)


def plain_descents(
    name: str, *, seeds: Sequence[int], samples: int, sgd_epochs: int, epochs: int, lr: float, decay_every: int,
    batch_size: int, confidence: Confidence,
) -> dict[str, Float[np.ndarray, " R"]]:  # fmt: skip
    """Algorithm 1 as it is printed on a network of Table 10, for each seed, kept in files.

    Parameters
    ----------
    name, samples, sgd_epochs
        As :func:`stochastic`.
    epochs, lr, decay_every, batch_size, confidence
        As :func:`~common.wu_dissecting.pac_bayes.plain.plain_descent`, whose numbers are returned.
    """
    found = []
    for seed in seeds:
        data = labelled(name, samples, seed)
        weights, prior_weights, _ = trained(name, data, epochs=sgd_epochs, seed=seed)
        key = {
            "weights": weights, "prior_weights": prior_weights, "X": data.X, "y": data.y, "epochs": epochs, "lr": lr,
            "decay_every": decay_every, "batch_size": batch_size, "confidence": confidence, "seed": seed,
        }  # fmt: skip
        found.append(cached(plain_descent, key, progress=f"{name}, {seed}"))
    return {part: np.array([float(one[part]) for one in found]) for part in found[0]}
