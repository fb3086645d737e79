"""Networks as they are evaluated: dropout off, batch norm with its running statistics."""

import contextlib
import copy
from collections.abc import Iterator

from torch import Tensor, nn


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """Inside, every module of ``network`` is in evaluation mode; outside, each has the mode that it had."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield network
    finally:
        for module, training in modes:
            module.training = training


def evaluation_copy(network: nn.Module) -> nn.Module:
    """A copy of a network in evaluation mode; neither sees what becomes of the other.

    Raises
    ------
    ValueError
        If it cannot be copied.
    """
    # Tensors that were computed from parameters, as weight_norm leaves them, are computed anew in the next pass.
    kept = [t for module in network.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    try:
        return copy.deepcopy(network, {id(t): t.detach().clone() for t in kept if not t.is_leaf}).eval()
    except Exception as error:  # whatever a module may hold
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the network cannot be copied: {reason}") from error


@contextlib.contextmanager
def passing(x: Tensor) -> Iterator[None]:
    """Inside, these samples pass through a network.

    Raises
    ------
    ValueError
        If it does not take them.
    """
    try:
        yield
    except RuntimeError as error:
        given, reason = f"{tuple(x.shape)} {x.dtype}", str(error).partition("\n")[0]
        raise ValueError(f"the network does not take samples {given}: {reason}") from error
