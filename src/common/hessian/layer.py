r"""A layer's Hessian :math:`E[M\otimes xx^\top]` and its Kronecker factors: Wu et al. (2022), (2), (3), App A.

A network of linear layers, convolutions, ReLU, max pooling and batch norm with frozen statistics is piecewise linear
in the weights of one layer, so that for the cross-entropy loss :math:`M=G^\top AG` exactly, with G the Jacobian of the
logits by the layer's output and :math:`A=\mathrm{diag}(p)-pp^\top=SS^\top`, :math:`S=\mathrm{diag}(\sqrt p)-p\sqrt
p^\top`. So M is :math:`BB^\top` with :math:`B=G^\top S`, one backward pass a class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.hessian.block_lanczos import Eigenpairs, top_eigenpairs
from common.hessian.convergence import ConvergenceError
from common.hessian.modes import evaluating
from common.hessian.operators import SymmetricOperator

#: Entries of what is held at once for a product; more is slower, as it leaves the processor's caches.
CHUNK = 2**22
#: Samples that pass through a network at once.
SAMPLES_AT_ONCE = 500
#: Vectors that are multiplied at once, and the first dimensions of the Krylov space.
BLOCK = 8

Factored = TypeVar("Factored", bound="_Factored")


class _Factored(SymmetricOperator):
    """What the Hessians of both kinds of layers share: Kronecker eigenpairs, and true ones started from them."""

    @cached_property
    def output_basis(self) -> tuple[Float[Tensor, " m"], Float[Tensor, "m m"]]:
        """Eigenvalues τ of E[M], descending, and eigenvectors."""
        values, vectors = torch.linalg.eigh(self.output_hessian)
        return values.flip(0), vectors.flip(1)

    @cached_property
    def input_basis(self) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
        """Eigenvalues γ of E[xxᵀ], descending, and eigenvectors."""
        values, vectors = torch.linalg.eigh(self.autocorrelation)
        return values.flip(0), vectors.flip(1)

    def kronecker_places(self, k: int) -> tuple[Float[Tensor, " k"], Tensor, Tensor]:
        """The k largest eigenvalues τ_i γ_j of E[M] ⊗ E[xxᵀ], (3), and their i and j, from 0."""
        values, places = (self.output_basis[0][:, None] * self.input_basis[0]).flatten().topk(k)
        n = len(self.autocorrelation)
        return values, places // n, places % n

    def kronecker_eigenpairs(self, k: int) -> tuple[Float[Tensor, " k"], Float[Tensor, "mn k"]]:
        """The k largest eigenvalues of E[M] ⊗ E[xxᵀ] and their eigenvectors, products of those of the factors."""
        values, i, j = self.kronecker_places(k)
        return values, (self.output_basis[1][:, None, i] * self.input_basis[1][None, :, j]).reshape(-1, k)

    def to(self: Factored, where: torch.device | torch.dtype | str) -> Factored:
        """The same on another device or in another precision, as :meth:`torch.Tensor.to`."""
        return replace(self, **{field.name: getattr(self, field.name).to(where) for field in fields(self)})

    def top_eigenpairs(self, k: int, *, tolerance: float = 1e-4) -> Eigenpairs:
        """The k largest eigenpairs, by block Lanczos from those of the Kronecker product.

        Where a network knows its labels so well that few samples make the whole Hessian, the smallest of the k drown in
        the rounding of the largest; products are then taken in double precision.

        Raises
        ------
        ValueError
            If k is not between 1 and the dimension.
        ConvergenceError
            If they do not converge.
        """
        _, start = self.kronecker_eigenpairs(min(self.shape[0], BLOCK))
        try:
            return top_eigenpairs(self, k, start=start, tolerance=tolerance)
        except ConvergenceError:
            if start.dtype == torch.float64:
                raise
        found = self.to(torch.float64).top_eigenpairs(k, tolerance=tolerance)
        return Eigenpairs(**{name: part.to(start.dtype) for name, part in vars(found).items()})


@dataclass(eq=False)
class LayerHessian(_Factored):
    """E[BBᵀ ⊗ xxᵀ] of a fully connected layer, the mean over samples; vectors are weight matrices, m × n, row by row.

    Attributes
    ----------
    X
        (N, n) inputs of the layer.
    B
        (N, m, r) factors of M.
    """

    X: Float[Tensor, "N n"]
    B: Float[Tensor, "N m r"]

    def __post_init__(self):
        super().__init__(self.B.shape[1] * self.X.shape[1], self.X.dtype, self.X.device)

    def _product(self, V: Float[Tensor, "mn k"]) -> Float[Tensor, "mn k"]:
        """4 N m n k floating-point operations, and 4 N m r k for M."""
        (N, n), (_, m, _) = self.X.shape, self.B.shape
        k = V.shape[1]
        wide = V.view(m, n, k).transpose(0, 1).reshape(n, m * k)
        out = torch.zeros_like(wide)
        for X, B in zip(*(a.split(max(1, CHUNK // (m * k))) for a in (self.X, self.B)), strict=True):
            images = (X @ wide).view(len(X), m, k)
            out.addmm_(X.T, (B @ (B.mT @ images)).view(len(X), m * k))
        return out.view(n, m, k).transpose(0, 1).reshape(m * n, k) / N

    @cached_property
    def output_hessian(self) -> Float[Tensor, "m m"]:
        """E[M]."""
        N, m, _ = self.B.shape
        flat = self.B.transpose(0, 1).reshape(m, -1)
        return flat @ flat.T / N

    @cached_property
    def autocorrelation(self) -> Float[Tensor, "n n"]:
        """E[xxᵀ]."""
        return self.X.T @ self.X / len(self.X)

    @cached_property
    def mean_input(self) -> Float[Tensor, " n"]:
        """E[x]/‖E[x]‖."""
        return nn.functional.normalize(self.X.mean(0), dim=0)


@dataclass(eq=False)
class ConvolutionHessian(_Factored):
    """The exact Hessian of a convolution's weights, E[JᵀJ], and the K-FAC-like factors beside it: App A.2.

    Attributes
    ----------
    J
        (N, r, mn) Sᵀ times the Jacobian of the logits by the weights.
    output_hessian
        (m, m) E[M̃], (33): M summed over pairs of equal positions, divided by their number P.
    autocorrelation
        (n, n) E[XXᵀ] with X the n × P unfolded input, n = channels × kernel height × width.
    mean_input
        (n,) first left singular vector of E[X].
    """

    J: Float[Tensor, "N r mn"]
    output_hessian: Float[Tensor, "m m"]
    autocorrelation: Float[Tensor, "n n"]
    mean_input: Float[Tensor, " n"]

    def __post_init__(self):
        super().__init__(self.J.shape[2], self.J.dtype, self.J.device)

    def _product(self, V: Float[Tensor, "mn k"]) -> Float[Tensor, "mn k"]:
        """4 N r m n k floating-point operations."""
        flat = self.J.flatten(0, 1)
        return flat.T @ (flat @ V) / len(self.J)


def layer_hessian(
    network: nn.Module, layer: str, X: Float[Tensor, "N *shape"]
) -> LayerHessian | ConvolutionHessian:  # fmt: skip
    """Hessian of the mean cross-entropy loss by the weights of one layer, over the samples X.

    Parameters
    ----------
    network
        Gives logits, (N, c). Batch norm is taken with its running statistics.
    layer
        Name of a :class:`torch.nn.Linear` or :class:`torch.nn.Conv2d` in it.

    Raises
    ------
    ValueError
        If there is no such layer, or a convolution has groups or is padded by something else than zeros.
    """
    return layer_hessians(network, [layer], X)[layer]


def layer_hessians(
    network: nn.Module, layers: Sequence[str], X: Float[Tensor, "N *shape"]
) -> dict[str, LayerHessian | ConvolutionHessian]:
    """:func:`layer_hessian` of several layers from the same backward passes, fewer samples at once the more there are.

    For each convolution J is held, N r m n numbers.

    Raises
    ------
    ValueError
        If there is no such layer, or a convolution has groups or is padded by something else than zeros.
    """
    known = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    if missing := [layer for layer in layers if layer not in known]:
        raise ValueError(f"there is no layer {missing[0]!r} with weights; there are {list(known)}")
    for layer in layers:
        module = known[layer]
        if isinstance(module, nn.Conv2d) and (module.groups > 1 or module.padding_mode != "zeros"):
            found = f"{module.groups} groups, padding by {module.padding_mode}"
            raise ValueError(f"{layer} has {found}: 1, zeros can be done")
    parts: dict[str, list[tuple[Tensor, ...]]] = {layer: [] for layer in layers}
    for x in X.split(-(-SAMPLES_AT_ONCE // len(layers))):
        with evaluating(network):
            passed = _passed(network, {layer: known[layer] for layer in layers}, x)
        for layer in layers:
            module, (inputs, B) = known[layer], passed.pop(layer)
            parts[layer].append((inputs, B) if isinstance(module, nn.Linear) else _unfolded(module, inputs, B))
    found: dict[str, LayerHessian | ConvolutionHessian] = {}
    for layer in layers:
        columns = list(zip(*parts.pop(layer), strict=True))
        if isinstance(known[layer], nn.Linear):
            found[layer] = LayerHessian(*(torch.cat(column) for column in columns))
        else:
            J, M, C, mean = torch.cat(columns[0]), *(sum(column) / len(X) for column in columns[1:])
            first = torch.linalg.svd(mean, full_matrices=False).U[:, 0]
            found[layer] = ConvolutionHessian(J, M, C, first * first.sum().sign())
    return found


def _unfolded(module: nn.Conv2d, x: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """J, and the sums over samples of M̃, XXᵀ and X, from a convolution's inputs and B (N, m, P1, P2, r)."""
    unfolded = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    B = B.flatten(2, 3)
    J = torch.einsum("zmpr,znp->zrmn", B, unfolded).flatten(2)
    M = torch.einsum("zmpr,zlpr->ml", B, B) / B.shape[2]
    return J, M, torch.einsum("znp,zlp->nl", unfolded, unfolded), unfolded.sum(0)


def _passed(network: nn.Module, modules: Mapping[str, nn.Module], x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs of every layer, and B = GᵀS of shape (N, *output, c), for a batch."""
    names = {module: name for name, module in modules.items()}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def catch(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        name = names[module]
        inputs[name] = arguments[0].detach().clone()
        outputs[name] = output if outputs else output.detach().requires_grad_()  # nothing before the first is needed
        return outputs[name].clone()  # what follows may work in place

    handles = [module.register_forward_hook(catch) for module in modules.values()]
    try:
        with torch.enable_grad():
            logits = network(x)
    finally:
        for handle in handles:
            handle.remove()
    p = logits.detach().softmax(1)
    root = p.sqrt()
    S = torch.diag_embed(root) - p[:, :, None] * root[:, None, :]
    last, leaves = S.shape[2] - 1, list(outputs.values())
    columns = [torch.autograd.grad(logits, leaves, S[:, :, r], retain_graph=r < last) for r in range(last + 1)]
    factors = {name: torch.stack(column, -1) for name, column in zip(outputs, zip(*columns, strict=True), strict=True)}
    return {name: (inputs[name], factors[name]) for name in modules}
