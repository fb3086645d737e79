"""Networks as they are evaluated: dropout off, batch norm with its running statistics."""

import contextlib
import copy
from collections.abc import Iterator

from torch import nn


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
    """A copy of a network in evaluation mode; neither sees what becomes of the other."""
    return copy.deepcopy(network).eval()
