"""Symmetric matrices that are known by their products with vectors: one class for all Hessians.

It stands on the base of curvlinops, whose algebra (``A + B``, ``2 * A``, ``A @ B``), whose way to SciPy
(``A.to_scipy()``) and whose algorithms (:func:`curvlinops.hutchinson_trace`, ...) take any of them, as do
:func:`~common.hessian.block_lanczos.top_eigenpairs` and :func:`~common.hessian.spectral_measure.lanczos_measures`.
"""

from collections.abc import Callable, Sequence

import torch
from curvlinops._torch_base import PyTorchLinearOperator  # its only address
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.hessian.linearity import graph_nodes
from common.hessian.modes import (
    check_logits,
    check_precision,
    check_repeatable,
    evaluation_copy,
    in_chunks,
    passing,
    same_in_parts,
)  # fmt: skip

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

    Raises
    ------
    ValueError
        If they are not square, or of different types.
    """

    def __init__(self, A: Float[Tensor, "m m"], B: Float[Tensor, "n n"]):
        if A.shape != A.mT.shape or B.shape != B.mT.shape or A.dtype != B.dtype:
            shapes = f"A {tuple(A.shape)} {A.dtype}, B {tuple(B.shape)} {B.dtype}"
            raise ValueError(f"two square matrices of one type are needed, got {shapes}")
        super().__init__(len(A) * len(B), A.dtype, A.device)
        self._A, self._B = A, B

    def _product(self, V: Float[Tensor, "mn k"]) -> Float[Tensor, "mn k"]:
        m, n, k = len(self._A), len(self._B), V.shape[1]
        left = (self._A @ V.reshape(m, n * k)).view(m, n, k)
        return (self._B @ left).view(m * n, k)


class FullHessian(SymmetricOperator):
    """Hessian of the mean cross-entropy loss by the parameters of a network, of any network that has one.

    Vectors have the parameters in the order of ``network.parameters()``. A product is the derivative of the gradient
    along each vector, reverse over reverse, for all of a block in the same matrix products. Forward over reverse is
    wrong in torch 2.13 where a layer normalization has an affine map.

    Parameters
    ----------
    network
        Batch norm is taken with its running statistics. The Hessian is that of the network as it is now. One that mixes
        samples gets all of them at once.
    X, y
        Samples (N, ...) and labels (N,).
    parameters
        Names of those by which derivatives are taken, in this order; all if left out.

    Raises
    ------
    ValueError
        If there is no such parameter, samples and labels do not fit the network, it draws at random, or torch cannot
        differentiate it twice.
    """

    def __init__(
        self, network: nn.Module, X: Float[Tensor, "N *shape"], y: Int[Tensor, " N"],
        parameters: Sequence[str] | None = None,
    ):  # fmt: skip
        self._network, self._X, self._y = evaluation_copy(network).requires_grad_(False), X, y
        known = dict(self._network.named_parameters(remove_duplicate=parameters is None))
        if missing := [name for name in parameters or () if name not in known]:
            raise ValueError(f"there is no parameter {missing[0]!r}; there are {list(known)}")
        self._parameters = [known[name].requires_grad_() for name in (known if parameters is None else parameters)]
        if not self._parameters or len({id(p) for p in self._parameters}) < len(self._parameters):
            raise ValueError(f"a Hessian needs one parameter or more, each once; got {list(parameters or known)}")
        first = self._parameters[0]
        super().__init__(sum(p.numel() for p in self._parameters), first.dtype, first.device)
        self._at_once = self._samples_at_once()
        self._batched = self._can_be_batched()

    def _samples_at_once(self) -> int:
        """How many samples may pass together, once all have passed: all of them where the network mixes them."""
        X, y = self._X, self._y
        if y.shape != (len(X),) or not len(X):
            raise ValueError(f"one label a sample is needed, ({len(X)},), N ≥ 1; got {tuple(y.shape)}")
        check_precision(X, self._parameters[0])
        check_repeatable(self._network, X[:2])
        parts, mixed = in_chunks(X, SAMPLES_AT_ONCE), False
        for part in parts:
            with torch.no_grad(), passing(part):
                logits = self._network(part.clone())
            check_logits(logits, len(part))
            mixed = mixed or (len(parts) > 1 and not same_in_parts(self._network, part.tensor_split(2), logits))
        if y.dtype != torch.int64 or y.min() < 0 or y.max() >= logits.shape[1]:
            raise ValueError(f"labels must be int64 in 0..{logits.shape[1] - 1}, got {y.dtype} up to {y.max()}")
        return len(X) if mixed else SAMPLES_AT_ONCE

    def _can_be_batched(self) -> bool:
        """Whether torch takes vectors together: it cannot batch some second derivatives that it has.

        Of two samples, to name what cannot be done before it takes long. A wrong second derivative is seldom symmetric.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        V = torch.randn(self.shape[0], 2, generator=generator, dtype=self.dtype, device=self.device)
        V = nn.functional.normalize(V, dim=0)
        for batched in (True, False):
            try:
                images = self._summed(V, self._X[:2], self._y[:2], batched)
                break
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
        else:
            raise ValueError(f"torch cannot differentiate the network twice: {reason}")
        forms, size = V.T @ images, torch.linalg.matrix_norm(images)
        if (forms[0, 1] - forms[1, 0]).abs() > torch.finfo(self.dtype).eps * (1000 * size + 100):
            raise ValueError(
                "the second derivatives that torch has of the network are not symmetric: one of its functions has a "
                "wrong derivative (in torch 2.13 weight_norm does)"
            )
        return batched

    def _product(self, V: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        batches = zip(in_chunks(self._X, self._at_once), in_chunks(self._y, self._at_once), strict=True)
        return sum(self._summed(V, X, y, self._batched) for X, y in batches) / len(self._y)

    def _summed(self, V: Tensor, X: Tensor, y: Tensor, batched: bool) -> Tensor:
        def loss() -> Tensor:
            return nn.functional.cross_entropy(self._network(X.clone()), y, reduction="sum")

        return hessian_products(loss, self._parameters, V, batched=batched)


def hessian_products(
    loss: Callable[[], Float[Tensor, ""]], parameters: Sequence[nn.Parameter], V: Float[Tensor, "P k"], *,
    batched: bool,
) -> Float[Tensor, "P k"]:  # fmt: skip
    """Products of the Hessian of a loss with vectors, reverse over reverse; those of a loss without one are zero.

    Parameters
    ----------
    loss
        Gives the loss as it is with the parameters now.
    batched
        Whether all vectors share the same matrix products. With convolutions it is faster not to, and torch cannot for
        some derivatives that it has.
    """
    sizes, k = [p.numel() for p in parameters], V.shape[1]
    along = [v.reshape(k, *p.shape) for v, p in zip(V.T.split(sizes, 1), parameters, strict=True)]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have one derivative alone
        value = loss()
        if not (value.requires_grad and k):
            return torch.zeros_like(V)
        gradient = grad(value, parameters, create_graph=True, allow_unused=True)
        varying = [pair for pair in zip(gradient, along, strict=True) if pair[0] is not None and pair[0].requires_grad]
        if not varying:
            return torch.zeros_like(V)
        outputs, vectors = zip(*varying, strict=True)
        if any("Error" in node.name() for node in graph_nodes(outputs)):
            raise ValueError("a function that is said to be once_differentiable has no second derivative")
        each = [vectors] if batched else zip(*vectors, strict=True)
        blocks = [
            grad(outputs, parameters, one, retain_graph=not batched, is_grads_batched=batched, allow_unused=True)
            for one in each
        ]
    found = [
        torch.zeros(k, size).to(V) if parts[0] is None else torch.stack(parts).reshape(k, size)
        for size, parts in zip(sizes, zip(*blocks, strict=True), strict=True)
    ]
    return torch.cat(found, 1).T
