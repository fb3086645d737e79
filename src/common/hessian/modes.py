"""Networks as they are evaluated: dropout off, batch norm with its running statistics; and what is asked of them."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode


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


def in_chunks(X: Shaped[Tensor, "N *shape"], size: int) -> Sequence[Tensor]:
    """Parts of at most so many rows, as equal as can be: a single sample alone is squeezed by some networks."""
    return X.tensor_split(-(-len(X) // size))


def check_precision(X: Float[Tensor, "N *shape"], like: Tensor) -> None:
    """Whether samples lie where the parameters of a network do, with as many digits.

    Raises
    ------
    ValueError
        If not.
    """
    if X.device != like.device or (X.is_floating_point() and X.dtype != like.dtype):
        raise ValueError(f"the samples are {X.dtype} on {X.device}, the network is {like.dtype} on {like.device}")


def check_logits(logits: object, samples: int) -> None:
    """Whether a network has given logits of so many samples.

    Raises
    ------
    ValueError
        If they are not finite, or of another shape than (samples, c).
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != samples or not logits.shape[1]:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"logits of shape (N, c) are needed, one row a sample; the network gives {given}")
    if not logits.isfinite().all():
        raise ValueError("the network gives logits that are not finite")


class _RefusingToDraw(TorchDispatchMode):
    """Inside, no operation of this thread draws from a generator."""

    class DrawError(RuntimeError):
        """One was about to."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Called for every operation."""
        evaluated = operation is torch.ops.aten.rrelu_with_noise.default and not args[4]
        if torch.Tag.nondeterministic_seeded in operation.tags and not evaluated:
            raise self.DrawError(str(operation))
        return operation(*args, **(kwargs or {}))


def check_repeatable(network: nn.Module, X: Float[Tensor, "N *shape"]) -> None:
    """Whether a network gives the same outputs again; torch's generators are left as they were.

    Raises
    ------
    ValueError
        If a pass would draw from them, the next pass differs, or the network does not take the samples.
    """
    try:
        with torch.no_grad(), passing(X), sdpa_kernel(SDPBackend.MATH), _RefusingToDraw():
            first, second = network(X.clone()), network(X.clone())
        same = not isinstance(first, Tensor) or _near(first, second)
    except ValueError as error:
        if not isinstance(error.__cause__, _RefusingToDraw.DrawError):
            raise
        same = False
    if not same:
        raise ValueError("the network draws at random: a Hessian needs the same outputs for the same samples")


def same_in_parts(network: nn.Module, parts: Iterable[Tensor], outputs: Float[Tensor, "N *c"]) -> bool:
    """Whether samples that pass in these parts have the outputs that they have together."""
    try:
        with torch.no_grad():
            return _near(torch.cat([network(part.clone()) for part in parts if len(part)]), outputs)
    except Exception:  # a network may do anything with another number of samples
        return False


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    if a.shape != b.shape:
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    return not b.numel() or bool((a - b).abs().max() <= torch.finfo(b.dtype).eps ** 0.5 * b.abs().max())
