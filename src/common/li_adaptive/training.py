"""Mini-batch training of a network with one output under the hinge loss, as Li, App G, trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.dong_quantifying.full_batch import Checkpoint
from common.li_adaptive.data import BinaryData

#: Images that pass through a network at once where no gradient is needed.
EVALUATED_AT_ONCE = 512


class HingeLoss(nn.Module):
    """Mean or sum over samples of max(0, 1 − y T(x)); ``reduction`` as torch's losses have it."""

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, output: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """The loss, a scalar."""
        losses = torch.relu(1 - y * output)
        return losses.mean() if self.reduction == "mean" else losses.sum()


@dataclass(frozen=True)
class SGDResult:
    """A training and what it passed through; every field is a tensor.

    Attributes
    ----------
    epochs
        (K,) the kept epochs, ascending; 0 is the initialization.
    parameters
        (K, P) all parameters after that many epochs, in the order of ``network.parameters()``.
    risk, accuracy
        (T + 1, 2) mean hinge loss, and share of samples on the right side of 0, after 0, ..., T epochs, of the training
        and of the test images, dropout off.
    """

    epochs: Int[Tensor, " K"]
    parameters: Float[Tensor, "K P"]
    risk: Float[Tensor, "T1 2"]
    accuracy: Float[Tensor, "T1 2"]


@torch.no_grad()
def outputs(network: nn.Module, x: Tensor) -> Float[Tensor, " n"]:
    """T(x) for many images, dropout off; batches as large as memory allows, since BN looks at the batch."""
    network.eval()
    return torch.cat([network(part) for part in x.split(EVALUATED_AT_ONCE)])


def _evaluate(network: nn.Module, data: BinaryData) -> tuple[float, float]:
    margin = data.y * outputs(network, data.x)
    return float(torch.relu(1 - margin).mean()), float((margin > 0).float().mean())


def train_sgd(
    network: nn.Module,
    train: BinaryData,
    test: BinaryData,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    decay: Mapping[int, float],
    momentum: float,
    keep: Sequence[int],
    seed: int,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    progress: str = "",
    checkpoint: Checkpoint | None = None,
) -> SGDResult:
    """Stochastic gradient descent with momentum on the mean hinge loss of mini-batches.

    Parameters
    ----------
    network
        Trained in place, on the device where it lies, to which the data belong as well.
    epochs, batch_size
        Passes through the training images, in a new order each time, and images a step; the last step of an epoch has
        what is left.
    lr, decay, momentum
        Step size, the epochs after which another one holds, and the factor of torch's ``SGD``.
    keep
        Epochs in 0, ..., ``epochs`` after which to keep the parameters.
    seed
        Of the order, of the augmentation and of dropout.
    augment
        Changes the images of a step at random.
    progress
        If not empty, this word and the risk are printed after each tenth of the epochs.
    checkpoint
        Where to leave the state, and to take it up; the result does not depend on an interruption.

    Raises
    ------
    ValueError
        If ``keep`` or ``decay`` name epochs that there are not, or sizes or rates are not positive.
    FloatingPointError
        If the parameters or the risk stop being finite; the message names the epoch.
    """
    if outside := [t for t in (*keep, *decay) if not 0 <= t <= epochs]:
        raise ValueError(f"epochs must lie in 0..{epochs}, got {outside}")
    if batch_size < 1 or not lr > 0:
        raise ValueError(f"batch size and learning rate must be positive, got {batch_size} and {lr}")
    kept_at = sorted(set(keep))
    device = train.x.device
    theta = parameters_to_vector(network.parameters()).detach()
    state = {
        "epoch": torch.tensor(0), "theta": theta, "velocity": torch.zeros_like(theta),
        "kept": theta.new_zeros(len(kept_at), len(theta)), "risk": torch.zeros(epochs + 1, 2),
        "accuracy": torch.zeros(epochs + 1, 2),
    }  # fmt: skip
    if checkpoint is not None and (found := checkpoint.load()) is not None:
        state = {name: tensor.to(state[name].device) for name, tensor in found.items()}
    loss = HingeLoss()
    parameters = list(network.parameters())
    for epoch in range(int(state["epoch"]), epochs + 1):
        vector_to_parameters(state["theta"].clone(), parameters)
        (state["risk"][epoch, 0], state["accuracy"][epoch, 0]) = _evaluate(network, train)
        (state["risk"][epoch, 1], state["accuracy"][epoch, 1]) = _evaluate(network, test)
        if not (state["theta"].isfinite().all() and state["risk"][epoch].isfinite().all()):
            raise FloatingPointError(f"parameters or risk are not finite after epoch {epoch}")
        if epoch in kept_at:
            state["kept"][kept_at.index(epoch)] = state["theta"]
        if progress and epoch % max(1, epochs // 10) == 0:
            risk, accuracy = state["risk"][epoch, 0], state["accuracy"][epoch, 1]
            print(f"{progress}: epoch {epoch} of {epochs}, risk {risk:.4g}, test accuracy {accuracy:.4f}", flush=True)
        if epoch == epochs:
            break
        # One seed an epoch: an interrupted training goes on with the same random numbers.
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        torch.manual_seed(seed * 100_003 + epoch)
        rate = lr
        for start, value in sorted(decay.items()):
            rate = value if epoch >= start else rate
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=momentum)
        if momentum > 0 and epoch > 0:
            for p, v in zip(parameters, state["velocity"].split([p.numel() for p in parameters]), strict=True):
                optimizer.state[p]["momentum_buffer"] = v.view_as(p).clone()
        network.train()
        for rows in torch.randperm(len(train.y), generator=generator).to(device).split(batch_size):
            x = train.x[rows] if augment is None else augment(train.x[rows], generator)
            optimizer.zero_grad(set_to_none=True)
            loss(network(x), train.y[rows]).backward()
            optimizer.step()
        state["theta"] = parameters_to_vector(parameters).detach()
        if momentum > 0:
            state["velocity"] = torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in parameters])
        state["epoch"].fill_(epoch + 1)
        if checkpoint is not None:
            checkpoint.offer(lambda: state)
    return SGDResult(torch.tensor(kept_at), state["kept"], state["risk"], state["accuracy"])
