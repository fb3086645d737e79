"""The Hessian of Li: of the mean hinge loss by the parameters of a network, and two matrices to hold beside it."""

from collections.abc import Sequence
from operator import index

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.hessian.modes import check_precision, check_repeatable, evaluating, evaluation_copy, same_in_parts
from common.hessian.operators import SymmetricOperator, ZeroOperator, hessian_products
from common.li_adaptive.networks import BatchStandardize
from common.li_adaptive.training import HingeLoss, outputs


def check_outputs(T: Tensor, y: Tensor) -> None:
    """Whether there is one output, and one label, for each of at least one sample: others would be broadcast.

    Raises
    ------
    ValueError
        If not.
    """
    if T.ndim != 1 or T.shape != y.shape or not len(y):
        shapes = f"the network gives {tuple(T.shape)}, y is {tuple(y.shape)}"
        raise ValueError(f"one output and one label a sample are needed, both (N,); {shapes}")


def margins(network: nn.Module, x: Float[Tensor, "N *shape"], y: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """y T(x), dropout off.

    Raises
    ------
    ValueError
        If there is no sample, labels are not ±1, the network draws at random, or samples, outputs and labels do not
        fit each other or are not finite.
    """
    if not len(y) or not ((y == 1) | (y == -1)).all():
        raise ValueError(f"labels y must be ±1, of at least one sample; got {sorted(set(y.flatten().tolist()))[:5]}")
    for parameter in network.parameters():
        check_precision(x, parameter)
    with evaluating(network):
        check_repeatable(network, x[:2])
    T = outputs(network, x.clone())  # a layer may work in place
    check_outputs(T, y)
    if not T.isfinite().all():
        raise ValueError("the network gives outputs that are not finite")
    return y * T


class HingeHessian(SymmetricOperator):
    """Sum over batches of the Hessians of the hinge loss, divided by a number of samples; reverse over reverse.

    Parameters
    ----------
    network
        In evaluation mode.
    parameters
        Those of the network by which derivatives are taken; flat vectors have their order.
    batches
        Images and labels ±1, (N, ...) and (N,).
    number
        What the sum is divided by; more than there are in the batches if others add nothing.
    """

    def __init__(
        self, network: nn.Module, parameters: Sequence[nn.Parameter], batches: Sequence[tuple[Tensor, Tensor]],
        number: int,
    ):  # fmt: skip
        self._network, self._parameters, self._batches, self._number = network, list(parameters), batches, number
        first = self._parameters[0]
        super().__init__(sum(p.numel() for p in self._parameters), first.dtype, first.device)

    def _product(self, V: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self.products(V, batched=False)

    def products(self, V: Float[Tensor, "P k"], *, batched: bool) -> Float[Tensor, "P k"]:
        """With k vectors, ``batched`` as :func:`~common.hessian.operators.hessian_products` has it."""
        loss, total = HingeLoss("sum"), torch.zeros_like(V)
        for x, y in self._batches:

            def at(x: Tensor = x, y: Tensor = y) -> Tensor:
                return loss(self._network(x.clone()), y)

            total += hessian_products(at, self._parameters, V, batched=batched)
        return total / self._number


def hinge_hessian(
    network: nn.Module, x: Float[Tensor, "N *shape"], y: Float[Tensor, " N"], *, names: Sequence[str] | None = None,
    batch_size: int = 256,
) -> SymmetricOperator:  # fmt: skip
    """Hessian of the mean hinge loss of ``network`` as it is now, dropout off.

    A sample beyond its margin adds zero and is left out, unless the network mixes samples, as one does that
    standardizes batches: then all samples are one batch, as one changes the outputs of all others.

    Parameters
    ----------
    x, y
        Images and labels ±1.
    names
        Of the parameters by which derivatives are taken, in this order; all if not given.
    batch_size
        Samples that pass through the network at once.

    Returns
    -------
    HingeHessian or ZeroOperator
        The latter if the Hessian vanishes: no sample inside its margin, or a network whose units are dead.

    Raises
    ------
    ValueError
        If the network has no parameter of such a name, or as :func:`margins`.
    """
    network = evaluation_copy(network).requires_grad_(False)
    known = dict(network.named_parameters())
    if missing := [name for name in names or () if name not in known]:
        raise ValueError(f"there is no parameter {missing[0]!r}; there are {list(known)}")
    parameters = [known[name].requires_grad_() for name in (known if names is None else names)]
    if not parameters or batch_size < 1:
        given = f"{len(parameters)} parameters and batches of {batch_size}"
        raise ValueError(f"a Hessian needs at least one parameter, and batches of at least one sample; got {given}")
    found = margins(network, x, y)
    active = found < 1
    zero = ZeroOperator(sum(p.numel() for p in parameters), parameters[0].dtype, parameters[0].device)
    if not active.any():
        return zero
    standardized = any(isinstance(module, BatchStandardize) for module in network.modules())
    batches = list(zip(x[active].split(index(batch_size)), y[active].split(index(batch_size)), strict=True))
    if standardized or not same_in_parts(network, [images for images, _ in batches], (y * found)[active]):
        batches = [(x, y)]
    operator = HingeHessian(network, parameters, batches, len(y))
    probe = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(0))
    return operator if (operator @ probe.to(operator.device, operator.dtype)).any() else zero


def formed_hessian(network: nn.Module, x: Tensor, y: Tensor) -> Float[Tensor, "P P"]:
    """The whole Hessian of the mean hinge loss, dropout off: for some hundred parameters.

    Raises
    ------
    ValueError
        If samples and labels do not fit the network, as :func:`margins` says.
    """
    network = evaluation_copy(network).requires_grad_()
    margins(network, x, y)
    operator = HingeHessian(network, list(network.parameters()), [(x, y)], len(y))
    unit = torch.eye(operator.shape[0], dtype=operator.dtype, device=operator.device)
    try:
        return operator.products(unit, batched=True)
    except RuntimeError:  # torch cannot batch some derivatives that it has
        return operator.products(unit, batched=False)


class BipartitePart(SymmetricOperator):
    """(H − S H S)/2 with S = ±1 alternating from layer to layer: only the blocks between odd and even layers.

    Its spectrum is symmetric exactly, since S maps it to its negative.

    Parameters
    ----------
    operator
        H, by all parameters of the network.

    Raises
    ------
    ValueError
        If the operator has another dimension.
    """

    def __init__(self, operator: SymmetricOperator, network: nn.Module):
        if operator.shape[0] != (count := sum(p.numel() for p in network.parameters())):
            raise ValueError(f"the network has {count} parameters, the operator is by {operator.shape[0]}")
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        signs, layer = [], 0
        for parameter in network.parameters():
            layer += parameter.ndim > 1  # a weight opens a layer, its bias follows
            signs.append(torch.full((parameter.numel(), 1), (-1.0) ** layer))
        self._operator, self._signs = operator, torch.cat(signs).to(self.device, self.dtype)

    def _product(self, V: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return (self._operator @ V - self._signs * (self._operator @ (self._signs * V))) / 2


class TridiagonalGOE(SymmetricOperator):
    """A tridiagonal matrix whose eigenvalues have the law of those of the Gaussian orthogonal ensemble.

    Dumitriu and Edelman (2002): normal entries of variance 2 on the diagonal, chi variables with N − 1, ..., 1 degrees
    of freedom beside it; here divided by √N. As large as wanted, and symmetric in law.

    Raises
    ------
    ValueError
        If the dimension is below 1.
    """

    def __init__(self, dimension: int, seed: int):
        if dimension < 1:
            raise ValueError(f"the dimension must be at least 1, got {dimension}")
        super().__init__(dimension, torch.float64, torch.device("cpu"))
        rng = np.random.default_rng(seed)
        self._diagonal = torch.from_numpy(rng.standard_normal((dimension, 1)) * np.sqrt(2 / dimension))
        self._beside = torch.from_numpy(np.sqrt(rng.chisquare(np.arange(dimension - 1, 0, -1)) / dimension))[:, None]

    def _product(self, V: Float[Tensor, "N k"]) -> Float[Tensor, "N k"]:
        product = self._diagonal * V
        product[:-1] += self._beside * V[1:]
        product[1:] += self._beside * V[:-1]
        return product
