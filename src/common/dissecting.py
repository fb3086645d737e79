"""The fully connected networks of Wu et al. (2022), App E, trained once and kept."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common import ensembles
from common.data import DataSource, images
from common.ensembles import Ensemble, train_ensemble
from common.hessian.kronecker import LayerHessian, perceptron_layer
from common.zoo import cached


@dataclass(frozen=True)
class Dissected:
    """An ensemble and the samples that it was trained on.

    Attributes
    ----------
    X, y
        Inputs of mean 0 and variance 1 over all pixels, and labels.
    """

    X: Float[Tensor, "N d"]
    y: Int[Tensor, " N"]
    source: DataSource
    ensemble: Ensemble

    def layer(self, member: int, layer: int, samples: int) -> LayerHessian:
        """Hessian of one layer of one network on the first ``samples`` training samples."""
        return perceptron_layer(*self.ensemble.network(member), self.X[:samples], layer)


def perceptrons(
    data: str, hidden: list[int], *, members: int, epochs: int, seed: int, samples: int | None = None,
    random_labels: bool = False, progress: str = "",
) -> Dissected:  # fmt: skip
    """F-n^m: ``members`` networks with these hidden widths on MNIST or CIFAR-10, SGD with batches of 128 and lr 0.01.

    Parameters
    ----------
    hidden
        ``[200, 200]`` for F-200².
    samples
        Training samples, drawn at random; None for all.
    random_labels
        Whether labels are drawn at random, once for all networks (MNIST-R).

    Raises
    ------
    ValueError
        If the data set is unknown or has fewer samples.
    """
    found = images.load(data, samples=samples, seed=seed)
    X = found.x.flatten(1)
    X = (X - X.mean()) / X.std()
    y = found.y
    classes = int(y.max()) + 1
    if random_labels:
        y = torch.randint(classes, (len(y),), generator=torch.Generator().manual_seed(seed))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    X, y = X.to(device), y.to(device)
    widths, seeds = [X.shape[1], *hidden, classes], [seed + k for k in range(members)]
    key = {"X": X, "y": y, "widths": widths, "seeds": seeds, "epochs": epochs}
    kept = cached(
        "wu_perceptrons", key, code=[ensembles],
        make=lambda checkpoint: train_ensemble(
            X, y, widths, seeds=seeds, epochs=epochs, progress=progress, checkpoint=checkpoint
        ).tensors(),
    )  # fmt: skip
    return Dissected(X, y, found.source, Ensemble.of_tensors(kept))
