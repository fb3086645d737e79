"""The Hessian of Li: of the mean hinge loss by the parameters of a network, and two matrices to hold beside it."""

from collections.abc import Sequence

import numpy as np
import torch
from curvlinops import HessianLinearOperator
from jaxtyping import Float
from torch import Tensor, nn

from common.hessian.modes import evaluation_copy
from common.hessian.operators import SymmetricOperator, ZeroOperator
from common.li_adaptive.networks import BatchStandardize
from common.li_adaptive.training import HingeLoss, outputs


class HingeHessian(SymmetricOperator):
    """Sum over batches of the Hessians of the hinge loss, divided by a number of samples.

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
        self._mean = HessianLinearOperator(
            network, HingeLoss(), list(parameters), list(batches), check_deterministic=False
        )
        self._share = sum(len(y) for _, y in batches) / number
        super().__init__(self._mean.shape[0], self._mean.dtype, self._mean.device)

    def _product(self, V: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return (self._mean @ V) * self._share


def hinge_hessian(
    network: nn.Module, x: Float[Tensor, "N *shape"], y: Float[Tensor, " N"], *, names: Sequence[str] | None = None,
    batch_size: int = 256,
) -> SymmetricOperator:  # fmt: skip
    """Hessian of the mean hinge loss of ``network`` as it is now, dropout off.

    A sample beyond its margin adds zero and is left out, unless the network standardizes batches: then all samples are
    one batch, as one changes the outputs of all others.

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
        If the network has no parameter of such a name.
    """
    network = evaluation_copy(network)
    known = dict(network.named_parameters())
    if missing := [name for name in names or () if name not in known]:
        raise ValueError(f"there is no parameter {missing[0]!r}; there are {list(known)}")
    parameters = [known[name] for name in (known if names is None else names)]
    zero = ZeroOperator(sum(p.numel() for p in parameters), parameters[0].dtype, parameters[0].device)
    number = len(y)
    active = 1 - y * outputs(network, x) > 0
    if not active.any():
        return zero
    if any(isinstance(module, BatchStandardize) for module in network.modules()):
        batches = [(x, y)]
    else:
        batches = list(zip(x[active].split(batch_size), y[active].split(batch_size), strict=True))
    operator = HingeHessian(network, parameters, batches, number)
    probe = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(0))
    return operator if (operator @ probe.to(operator.device, operator.dtype)).any() else zero


def formed_hessian(network: nn.Module, x: Tensor, y: Tensor) -> Float[Tensor, "P P"]:
    """The whole Hessian of the mean hinge loss, dropout off, by torch.func.hessian: for some hundred parameters."""
    network = evaluation_copy(network)
    names, shapes, sizes = zip(*((n, p.shape, p.numel()) for n, p in network.named_parameters()), strict=True)
    loss = HingeLoss()

    def risk(theta: Tensor) -> Tensor:
        parts = {n: t.view(s) for n, t, s in zip(names, theta.split(sizes), shapes, strict=True)}
        return loss(torch.func.functional_call(network, parts, (x,)), y)

    return torch.func.hessian(risk)(nn.utils.parameters_to_vector(network.parameters()).detach())


class BipartitePart(SymmetricOperator):
    """(H − S H S)/2 with S = ±1 alternating from layer to layer: only the blocks between odd and even layers.

    Its spectrum is symmetric exactly, since S maps it to its negative.

    Parameters
    ----------
    operator
        H, by all parameters of the network.
    """

    def __init__(self, operator: SymmetricOperator, network: nn.Module):
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
    """

    def __init__(self, dimension: int, seed: int):
        super().__init__(dimension, torch.float64, torch.device("cpu"))
        rng = np.random.default_rng(seed)
        self._diagonal = torch.from_numpy(rng.standard_normal((dimension, 1)) * np.sqrt(2 / dimension))
        self._beside = torch.from_numpy(np.sqrt(rng.chisquare(np.arange(dimension - 1, 0, -1)) / dimension))[:, None]

    def _product(self, V: Float[Tensor, "N k"]) -> Float[Tensor, "N k"]:
        product = self._diagonal * V
        product[:-1] += self._beside * V[1:]
        product[1:] += self._beside * V[:-1]
        return product
