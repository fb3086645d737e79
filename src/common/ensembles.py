"""Several equal fully connected networks trained at once, as one batch: F-n^m of Wu et al. (2022), App E.

SGD on the mean cross-entropy of mini-batches, Xavier's normal weights, zero biases. Every network of the ensemble
has its own initialization and its own order of the samples; all take a step in the same batched matrix products.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.training import Checkpoint


@dataclass(frozen=True)
class Ensemble:
    """E trained networks; every field is a tensor or a list of tensors.

    Attributes
    ----------
    weights, biases
        One a layer, (E, out, in) and (E, out).
    loss, accuracy
        (T + 1, E) mean cross-entropy and share of right answers on the training samples after 0, ..., T epochs.
    """

    weights: list[Float[Tensor, "E out inputs"]]
    biases: list[Float[Tensor, "E out"]]
    loss: Float[Tensor, "T1 E"]
    accuracy: Float[Tensor, "T1 E"]

    def network(self, member: int) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of one network."""
        return [W[member] for W in self.weights], [b[member] for b in self.biases]

    def tensors(self) -> dict[str, Tensor]:
        """What is kept in a file."""
        layers = {f"W{k}": W for k, W in enumerate(self.weights)} | {f"b{k}": b for k, b in enumerate(self.biases)}
        return layers | {"loss": self.loss, "accuracy": self.accuracy}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> "Ensemble":
        """From what :meth:`tensors` gave."""
        depth = sum(name.startswith("W") for name in tensors)
        layers = ([tensors[f"{kind}{k}"] for k in range(depth)] for kind in "Wb")
        return cls(*layers, tensors["loss"], tensors["accuracy"])


def xavier(widths: Sequence[int], seeds: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights N(0, 2/(fan-in + fan-out)) and zero biases, one network for each seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    weights = [
        torch.stack([(2 / (a + b)) ** 0.5 * torch.randn(b, a, generator=g) for g in generators])
        for a, b in pairwise(widths)
    ]
    return weights, [torch.zeros(len(seeds), width) for width in widths[1:]]


def forward(weights: Sequence[Tensor], biases: Sequence[Tensor], x: Float[Tensor, "E N d"]) -> list[Tensor]:
    """Inputs of all layers and, last, the logits; (E, N, ...) each."""
    passed = [x]
    for k, (W, b) in enumerate(zip(weights, biases, strict=True)):
        z = torch.baddbmm(b[:, None], passed[-1], W.mT)
        passed.append(z if k == len(weights) - 1 else z.relu_())
    return passed


@torch.no_grad()
def train_ensemble(
    X: Float[Tensor, "N d"], y: Int[Tensor, " N"], widths: Sequence[int], *, seeds: Sequence[int], epochs: int,
    lr: float = 0.01, batch_size: int = 128, progress: str = "", checkpoint: Checkpoint | None = None,
) -> Ensemble:  # fmt: skip
    """Train one network for each seed on the same samples.

    Parameters
    ----------
    widths
        From the input to the output: F-200² on MNIST is ``[784, 200, 200, 10]``.
    seeds
        Of initialization and of the orders of the samples.
    epochs, lr, batch_size
        App E.3 has lr 0.01 and batches of 128; the last batch of an epoch has what is left.
    progress
        If not empty, this word and the loss are printed ten times.
    checkpoint
        Where to leave the state, and to take it up.

    Raises
    ------
    ValueError
        If the widths do not fit the samples, or sizes are not positive.
    FloatingPointError
        If a loss stops being finite.
    """
    if widths[0] != X.shape[1] or int(y.max()) >= widths[-1]:
        raise ValueError(f"widths {list(widths)} do not fit {X.shape[1]} inputs and labels up to {int(y.max())}")
    if batch_size < 1 or epochs < 0 or not lr > 0 or not seeds:
        raise ValueError(f"positive sizes are needed: {len(seeds)} seeds, {epochs} epochs, batch {batch_size}, lr {lr}")
    N, E = len(y), len(seeds)
    weights, biases = ([p.to(X.device) for p in part] for part in xavier(widths, seeds))
    history = torch.zeros(2, epochs + 1, E)
    start = 0
    if checkpoint is not None and (found := checkpoint.load()) is not None:
        kept = Ensemble.of_tensors(found)
        weights, biases = ([p.to(X.device) for p in part] for part in (kept.weights, kept.biases))
        history, start = torch.stack([kept.loss, kept.accuracy]), int(found["epoch"])
    member = torch.arange(E, device=X.device)[:, None]
    for epoch in range(start, epochs + 1):
        history[:, epoch] = torch.stack(_evaluate(weights, biases, X, y)).cpu()
        if not history[0, epoch].isfinite().all():
            raise FloatingPointError(f"a loss is not finite after epoch {epoch}")
        if progress and epoch % max(1, epochs // 10) == 0:
            loss, accuracy = history[:, epoch].mean(1)
            print(f"{progress}: epoch {epoch} of {epochs}, loss {loss:.4f}, accuracy {accuracy:.4f}", flush=True)
        if epoch == epochs:
            break
        generators = [torch.Generator().manual_seed(seed * 100_003 + epoch) for seed in seeds]
        order = torch.stack([torch.randperm(N, generator=g) for g in generators]).to(X.device)
        for rows in order.split(batch_size, 1):
            passed = forward(weights, biases, X[rows])
            delta = passed[-1].softmax(2)
            delta[member, torch.arange(rows.shape[1], device=X.device), y[rows]] -= 1
            delta *= lr / rows.shape[1]
            for k in reversed(range(len(weights))):
                below = delta @ weights[k] if k else None
                weights[k].baddbmm_(delta.mT, passed[k], alpha=-1)
                biases[k] -= delta.sum(1)
                if k:
                    delta = below.mul_(passed[k] > 0)
        if checkpoint is not None:
            state = Ensemble(weights, biases, *history).tensors() | {"epoch": torch.tensor(epoch + 1)}
            checkpoint.offer(lambda state=state: state)
    return Ensemble(weights, biases, *history)


def _evaluate(weights: list[Tensor], biases: list[Tensor], X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    loss = accuracy = 0
    for x, labels in zip(X.split(4096), y.split(4096), strict=True):
        logits = forward(weights, biases, x.expand(len(weights[0]), -1, -1))[-1]
        loss = loss - logits.log_softmax(2)[:, torch.arange(len(x)), labels].sum(1)
        accuracy = accuracy + (logits.argmax(2) == labels).sum(1)
    return loss / len(y), accuracy / len(y)
