"""The paper's networks: perceptrons without biases, as lists of weight matrices."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor


def lecun_weights(widths: Sequence[int], generator: torch.Generator) -> list[Float[Tensor, "out in"]]:
    """Weights of a perceptron without biases at LeCun initialization, N(0, 1/fan-in): Assumption 2 of Dong et al.

    Parameters
    ----------
    widths
        Numbers of units from the input to the output: ``[d, C]`` is the linear model V, ``[d, m, C]`` the network
        with one hidden layer (W, V).
    generator
        Source of randomness.

    Returns
    -------
    list of Tensor
        One matrix a layer, shape (widths[l + 1], widths[l]), float32.

    Raises
    ------
    ValueError
        If there are fewer than two widths or one is below 1.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"at least two widths of at least 1 are needed, got {list(widths)}")
    return [torch.randn(out, inputs, generator=generator) / math.sqrt(inputs) for inputs, out in pairwise(widths)]
