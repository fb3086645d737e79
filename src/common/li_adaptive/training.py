"""Mini-batch training of a network with one output under the hinge loss, as Li, App G, trains."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.cache import Checkpoint
from common.devices import default_device
from common.hessian.modes import evaluating
from common.li_adaptive.data import shift_and_flip
from common.li_adaptive.networks import initialize, lenet, vgg

#: Images (n, channels, height, width) and labels ±1 (n,).
Images = tuple[Tensor, Tensor]
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
    with evaluating(network):
        return torch.cat([network(part) for part in x.split(EVALUATED_AT_ONCE)])


def _evaluate(network: nn.Module, images: Images) -> tuple[float, float]:
    margin = images[1] * outputs(network, images[0])
    return float(torch.relu(1 - margin).mean()), float((margin > 0).float().mean())


def train_sgd(
    network: nn.Module,
    train: Images,
    test: Images,
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
        Where to start, on the device to which the data belong as well; left as it is.
    train, test
        Images and labels.
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
    network = copy.deepcopy(network)
    loss, parameters = HingeLoss(), list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    theta = parameters_to_vector(parameters).detach()
    state = {
        "epoch": torch.tensor(0), "theta": theta, "kept": theta.new_zeros(len(kept_at), len(theta)),
        "risk": torch.zeros(epochs + 1, 2), "accuracy": torch.zeros(epochs + 1, 2),
    }  # fmt: skip
    if checkpoint is not None and (found := checkpoint.load()) is not None:
        state = {name: found[name].to(tensor.device) for name, tensor in state.items()}
        buffers = {k: {"momentum_buffer": v} for k, v in _velocity(found)}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": buffers})
    x, y = train
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
        optimizer.param_groups[0]["lr"] = [lr, *(rate for start, rate in sorted(decay.items()) if epoch >= start)][-1]
        network.train()
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            # One seed an epoch: an interrupted training goes on with the same random numbers.
            generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
            torch.manual_seed(seed * 100_003 + epoch)  # dropout draws from torch's own generator
            for rows in torch.randperm(len(y), generator=generator).to(x.device).split(batch_size):
                batch = x[rows] if augment is None else augment(x[rows], generator)
                optimizer.zero_grad(set_to_none=True)
                loss(network(batch), y[rows]).backward()
                optimizer.step()
        state["theta"] = parameters_to_vector(parameters).detach()
        state["epoch"].fill_(epoch + 1)
        if checkpoint is not None:
            checkpoint.offer(lambda: state | _velocities(optimizer))
    return SGDResult(torch.tensor(kept_at), state["kept"], state["risk"], state["accuracy"])


def _velocities(optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    kept = optimizer.state_dict()["state"].items()
    return {f"velocity:{k}": v["momentum_buffer"] for k, v in kept if v.get("momentum_buffer") is not None}


def _velocity(state: Mapping[str, Tensor]) -> list[tuple[int, Tensor]]:
    return [(int(name.partition(":")[2]), v) for name, v in state.items() if name.startswith("velocity:")]


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
}  # fmt: skip
BATCH_SIZE, MOMENTUM = 64, 0.9


def train_recipe(
    name: str, width: float, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, epochs: int, keep: Sequence[int],
    seed: int, *, progress: str = "", checkpoint: Checkpoint | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """:func:`train_sgd` of the LeNet of G.2 or the VGG of G.3, on the GPU if there is one.

    Parameters
    ----------
    name
        ``"LeNet"`` or ``"VGG"``.
    width
        Factor of the VGG's numbers of channels.
    x, y, test_x, test_y
        Images and labels ±1.

    Returns
    -------
    dict
        The fields of :class:`SGDResult`, and ``on_gpu`` ().

    Raises
    ------
    ValueError, FloatingPointError
        As :func:`train_sgd`.
    """
    recipe, device = RECIPES[name], default_device()
    network = recipe.build(width)
    kind, scale = recipe.initialization
    initialize(network, kind, torch.Generator().manual_seed(seed), scale=scale)
    found = train_sgd(
        network.to(device), (x.to(device), y.to(device)), (test_x.to(device), test_y.to(device)), epochs=epochs,
        batch_size=BATCH_SIZE, lr=recipe.lr, momentum=MOMENTUM, keep=keep, seed=seed, augment=recipe.augment,
        decay={math.ceil(share * epochs): rate for share, rate in recipe.decay.items()}, progress=progress,
        checkpoint=checkpoint,
    )  # fmt: skip
    return {**vars(found), "on_gpu": torch.tensor(device.type == "cuda")}
