"""Symmetric matrices that are known by their products with vectors: one class for all Hessians.

It stands on the base of curvlinops, whose algebra (``A + B``, ``2 * A``, ``A @ B``), whose way to SciPy
(``A.to_scipy()``) and whose algorithms (:func:`curvlinops.hutchinson_trace`, ...) take any of them, as do
:func:`~common.hessian.block_lanczos.top_eigenpairs` and :func:`~common.hessian.spectral_measure.lanczos_measures`.
"""

import torch
from curvlinops._torch_base import PyTorchLinearOperator  # its only address
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from common.hessian.modes import evaluation_copy

#: Samples that pass through a network at once, for a block of vectors together.
SAMPLES_AT_ONCE = 2000


class SymmetricOperator(PyTorchLinearOperator):
    """A real symmetric matrix that multiplies flat vectors (d,) and blocks of them (d, k).

    A subclass says in :meth:`_product` how it multiplies a block, and nothing else.

    Parameters
    ----------
    dimension
        d.
    dtype, device
        Of the vectors that it multiplies.

    Examples
    --------
    >>> class Twice(SymmetricOperator):
    ...     def _product(self, V):
    ...         return 2 * V
    >>> H = Twice(3, torch.float32, torch.device("cpu"))
    >>> (H + 3 * H) @ torch.ones(3)
    tensor([8., 8., 8.])
    """

    SELF_ADJOINT = True

    def __init__(self, dimension: int, dtype: torch.dtype, device: torch.device):
        super().__init__([(dimension,)], [(dimension,)])
        self._dtype, self._device = dtype, device

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the vectors lie."""
        return self._device

    def _product(self, V: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """The product with k vectors, which are left as they are."""
        raise NotImplementedError

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self._product(*X)]


class ZeroOperator(SymmetricOperator):
    """The zero matrix."""

    def _product(self, V: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        return torch.zeros_like(V)


class KroneckerProduct(SymmetricOperator):
    """A ⊗ B of two symmetric matrices; a vector is an m × n matrix, row by row.

    Parameters
    ----------
    A, B
        (m, m) and (n, n).
    """

    def __init__(self, A: Float[Tensor, "m m"], B: Float[Tensor, "n n"]):
        super().__init__(len(A) * len(B), A.dtype, A.device)
        self._A, self._B = A, B

    def _product(self, V: Float[Tensor, "mn k"]) -> Float[Tensor, "mn k"]:
        m, n, k = len(self._A), len(self._B), V.shape[1]
        left = (self._A @ V.reshape(m, n * k)).view(m, n, k)
        return (self._B @ left).view(m * n, k)


class FullHessian(SymmetricOperator):
    """Hessian of the mean cross-entropy loss by all parameters of a network.

    Vectors have the parameters in the order of ``network.parameters()``. A product is the derivative of the gradient
    along each vector, forward over reverse, for all of a block in the same matrix products.

    Parameters
    ----------
    network
        Batch norm is taken with its running statistics. The Hessian is that of the network as it is now.
    X, y
        Samples (N, ...) and labels (N,).
    """

    def __init__(self, network: nn.Module, X: Float[Tensor, "N *shape"], y: Int[Tensor, " N"]):
        self._network, self._X, self._y = evaluation_copy(network), X, y
        self._parameters = {name: p.detach() for name, p in self._network.named_parameters()}
        self._sizes = [p.numel() for p in self._parameters.values()]
        first = next(iter(self._parameters.values()))
        super().__init__(sum(self._sizes), first.dtype, first.device)

    def _product(self, V: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        batches = zip(self._X.split(SAMPLES_AT_ONCE), self._y.split(SAMPLES_AT_ONCE), strict=True)
        return sum(self._summed(V, X, y) for X, y in batches) / len(self._y)

    def _summed(self, V: Tensor, X: Tensor, y: Tensor) -> Tensor:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(functional_call(self._network, parameters, (X,)), y, reduction="sum")

        def along(v: Tensor) -> Tensor:
            parts = zip(self._parameters.items(), v.split(self._sizes), strict=True)
            tangent = {name: part.view_as(p) for (name, p), part in parts}
            return torch.cat([g.flatten() for g in jvp(grad(loss), (self._parameters,), (tangent,))[1].values()])

        return vmap(along, in_dims=1, out_dims=1)(V)
