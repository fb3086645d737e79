r"""A layer's Hessian :math:`E[M\otimes xx^\top]` and its Kronecker factors: Wu et al. (2022), (2), (3), App A.

The generalized Gauss-Newton matrix of the cross-entropy loss has :math:`M=G^\top AG`, with G the Jacobian of the logits
by the layer's output and :math:`A=\mathrm{diag}(p)-pp^\top=SS^\top`, :math:`S=\mathrm{diag}(\sqrt p)-p\sqrt p^\top`.
So M is :math:`BB^\top` with :math:`B=G^\top S`, one backward pass a class. It is the Hessian where the logits are
piecewise linear in the weights of the layer, as in a network of linear layers, convolutions, ReLU, pooling and batch
norm with frozen statistics. A layer that is applied at several positions, of an image, of a sequence or in several
calls, has :math:`E[J^\top J]` with :math:`J=\sum_p B_p^\top\otimes x_p^\top`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from operator import index
from typing import SupportsIndex, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.hessian.block_lanczos import Eigenpairs, descending_eigh, top_eigenpairs
from common.hessian.convergence import ConvergenceError
from common.hessian.linearity import Call, ForwardPass, forward_pass
from common.hessian.modes import check_repeatable, evaluation_copy, in_chunks, same_in_parts
from common.hessian.operators import SymmetricOperator

#: Entries of what is held at once for a product; more is slower, as it leaves the processor's caches.
CHUNK = 2**22
#: Samples that pass through a network at once.
SAMPLES_AT_ONCE = 500
#: Vectors that are multiplied at once, and the first dimensions of the Krylov space.
BLOCK = 8

Factored = TypeVar("Factored", bound="_Factored")


def effective_number(weights: Float[Tensor, " N"]) -> float:
    """(Σw)²/Σw² of weights that are not negative: N if all are equal, 1 if one alone is not 0, 0 if all are 0."""
    w = weights.double()
    squares = float(w.square().sum())
    return float(w.sum()) ** 2 / squares if squares else 0.0


class _Factored(SymmetricOperator):
    """What the Hessians of both kinds of layers share: Kronecker eigenpairs, and true ones started from them."""

    @cached_property
    def output_basis(self) -> tuple[Float[Tensor, " m"], Float[Tensor, "m m"]]:
        """Eigenvalues τ of E[M], descending, and eigenvectors."""
        return descending_eigh(self.output_hessian)

    @cached_property
    def input_basis(self) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
        """Eigenvalues γ of E[xxᵀ], descending, and eigenvectors."""
        return descending_eigh(self.autocorrelation)

    @cached_property
    def effective_samples(self) -> float:
        """(Σw)²/Σw² of :meth:`sample_traces`: as many samples of equal weight would make a matrix as little noisy.

        A network that knows its labels has it far below N; 0 for a matrix of zeros.
        """
        return effective_number(self.sample_traces())

    def kronecker_places(self, k: SupportsIndex) -> tuple[Float[Tensor, " k"], Tensor, Tensor]:
        """The k largest eigenvalues τ_i γ_j of E[M] ⊗ E[xxᵀ], (3), and their i and j, from 0."""
        values, places = (self.output_basis[0][:, None] * self.input_basis[0]).flatten().topk(index(k))
        n = len(self.autocorrelation)
        return values, places // n, places % n

    def kronecker_eigenpairs(self, k: SupportsIndex) -> tuple[Float[Tensor, " k"], Float[Tensor, "mn k"]]:
        """The k largest eigenvalues of E[M] ⊗ E[xxᵀ] and their eigenvectors, products of those of the factors."""
        values, i, j = self.kronecker_places(k)
        return values, (self.output_basis[1][:, None, i] * self.input_basis[1][None, :, j]).flatten(0, 1)

    def to(self: Factored, where: torch.device | torch.dtype | str) -> Factored:
        """The same on another device or in another precision, as :meth:`torch.Tensor.to`."""
        return replace(self, **{field.name: getattr(self, field.name).to(where) for field in fields(self)})

    def top_eigenpairs(self, k: SupportsIndex, *, tolerance: float = 1e-4) -> Eigenpairs:
        """The k largest eigenpairs, by block Lanczos from those of the Kronecker product.

        Where a network knows its labels so well that few samples make the whole Hessian, the smallest of the k drown in
        the rounding of the largest, and have less than two right digits. Products are then taken in double precision.

        Raises
        ------
        ValueError
            If k is not between 1 and the dimension, or the factors are not finite.
        ConvergenceError
            If they do not converge.
        """
        _, start = self.kronecker_eigenpairs(min(self.shape[0], BLOCK))
        try:
            found = top_eigenpairs(self, k, start=start, tolerance=tolerance)
            if start.dtype == torch.float64 or (found.residuals < 0.01 * found.values.abs()).all():
                return found
        except ConvergenceError:
            if start.dtype == torch.float64:
                raise
        double = self.to(torch.float64)
        found = double.top_eigenpairs(k, tolerance=tolerance)
        values, vectors = (part.to(start.dtype).double() for part in (found.values, found.vectors))
        residuals = torch.linalg.vector_norm(double @ vectors - vectors * values, dim=0)
        found = Eigenpairs(values, vectors, residuals, found.products + index(k))
        return Eigenpairs(**{name: part.to(start.dtype) for name, part in vars(found).items()})


@dataclass(eq=False)
class LayerGaussNewton(_Factored):
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

    def sample_traces(self) -> Float[Tensor, " N"]:
        """tr(M) ‖x‖² of every sample, the trace of its part."""
        return self.B.square().sum((1, 2)).double() * self.X.square().sum(1).double()

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
class LayerHessian(LayerGaussNewton):
    """The same where it is the Hessian."""


@dataclass(eq=False)
class WeightSharingGaussNewton(_Factored):
    """E[JᵀJ] of a layer that is applied at several positions, and the K-FAC-like factors beside it: App A.2.

    Attributes
    ----------
    J
        (N, r, mn) Sᵀ times the Jacobian of the logits by the weights.
    output_hessian
        (m, m) E[M̃], (33): M summed over pairs of equal positions, divided by their number P.
    autocorrelation
        (n, n) E[XXᵀ] with X the n × P inputs at all positions; those of a convolution are unfolded, n = channels ×
        kernel height × width.
    mean_input
        (n,) first left singular vector of E[X].
    """

    J: Float[Tensor, "N r mn"]
    output_hessian: Float[Tensor, "m m"]
    autocorrelation: Float[Tensor, "n n"]
    mean_input: Float[Tensor, " n"]

    def __post_init__(self):
        super().__init__(self.J.shape[2], self.J.dtype, self.J.device)

    def sample_traces(self) -> Float[Tensor, " N"]:
        """‖J‖²_F of every sample, the trace of its part; tr(M) ‖x‖² if there is one position."""
        return torch.linalg.vector_norm(self.J, dim=(1, 2)).double().square()

    def _product(self, V: Float[Tensor, "mn k"]) -> Float[Tensor, "mn k"]:
        """4 N r m n k floating-point operations; vectors as rows, as products with few columns are six times slower."""
        flat, vectors = self.J.flatten(0, 1), V.T.contiguous()
        out = torch.zeros_like(vectors)
        for some in flat.split(max(1, CHUNK // 8 // flat.shape[1])):  # both products find it in a processor's cache
            out.addmm_(vectors @ some.T, some)
        return out.T / len(self.J)


@dataclass(eq=False)
class WeightSharingHessian(WeightSharingGaussNewton):
    """The same where it is the Hessian."""


def layer_hessian(
    network: nn.Module, layer: str, X: Float[Tensor, "N *shape"]
) -> LayerHessian | WeightSharingHessian:  # fmt: skip
    """Hessian of the mean cross-entropy loss by the weights of one layer, over the samples X.

    Parameters
    ----------
    network
        Gives logits, (N, c). Batch norm is taken with its running statistics, dropout is off.
    layer
        Name of a :class:`torch.nn.Linear` or :class:`torch.nn.Conv2d` in it.

    Raises
    ------
    ValueError
        If there is no such layer, or it is one that cannot be done, or the logits are not piecewise linear in its
        weights: the line says what stands in the way, and what can be had instead.
    """
    return layer_hessians(network, [layer], X)[layer]


def layer_gauss_newton(
    network: nn.Module, layer: str, X: Float[Tensor, "N *shape"]
) -> LayerGaussNewton | WeightSharingGaussNewton:  # fmt: skip
    """The generalized Gauss-Newton matrix by the weights of one layer, E[JᵀAJ] with J the Jacobian of the logits.

    As :func:`layer_hessian`, of any differentiable network; positive semidefinite, and in general not the Hessian.

    Raises
    ------
    ValueError
        If there is no such layer, or it or the network is one that cannot be done.
    """
    return _curvatures(network, [layer], X, exact=False)[layer]


def layer_hessians(
    network: nn.Module, layers: Sequence[str], X: Float[Tensor, "N *shape"]
) -> dict[str, LayerHessian | WeightSharingHessian]:
    """:func:`layer_hessian` of several layers from the same backward passes, fewer samples at once the more there are.

    For each layer with several positions J is held, N r m n numbers.

    Raises
    ------
    ValueError
        As :func:`layer_hessian`.
    """
    return _curvatures(network, layers, X, exact=True)


def _curvatures(
    network: nn.Module, layers: Sequence[str], X: Tensor, *, exact: bool
) -> dict[str, LayerGaussNewton | WeightSharingGaussNewton]:
    network = evaluation_copy(network)
    modules = _modules(network, layers, len(X))
    products = {layer: _products(network, layer) for layer in modules}
    for layer, module in modules.items():
        if reason := _kind_that_cannot_be_done(module):
            raise ValueError(f"{layer!r} {reason}. {products[layer]}")
    weights = {module.weight for module in modules.values()}
    for p in network.parameters():
        p.requires_grad_(p in weights)  # nothing before the first of the layers is needed
    check_repeatable(network, X[:2])
    parts: dict[str, list[tuple[Tensor, ...]]] = {layer: [] for layer in modules}
    batches = in_chunks(X, -(-SAMPLES_AT_ONCE // len(modules)))
    for x in batches:
        passed = forward_pass(network, modules, x)
        for layer, module in modules.items():
            if reason := _use_that_cannot_be_done(passed, layer, module, len(x)):
                raise ValueError(f"{reason}. {products[layer]}")
            if exact and (obstacle := passed.obstacle(layer, module.weight)):
                raise ValueError(
                    f"the logits are not piecewise linear in the weights of {layer!r}: {obstacle}. "
                    f"layer_gauss_newton gives the generalized Gauss-Newton matrix. {products[layer]}"
                )
        apart = len(batches) == 1 or same_in_parts(network, x.tensor_split(2), passed.logits.detach())
        factors = _factors(passed) if apart else None
        if factors is None:
            raise ValueError(f"the network mixes the samples. {next(iter(products.values()))}")
        for layer, module in modules.items():
            parts[layer].append(_part(module, passed.calls[layer], factors[layer]))
            if len(parts[layer][-1]) != len(parts[layer][0]):
                raise ValueError(f"{layer!r} is called at one position in some batches only. {products[layer]}")
    return {layer: _joined(parts.pop(layer), len(X), exact) for layer in modules}


def _modules(network: nn.Module, layers: Sequence[str], samples: int) -> dict[str, nn.Module]:
    """The layers of these names, each once."""
    every = dict(network.named_modules(remove_duplicate=False))
    known = {name: module for name, module in every.items() if isinstance(getattr(module, "weight", None), Tensor)}
    if missing := [layer for layer in layers if layer not in known]:
        raise ValueError(f"there is no layer {missing[0]!r} with weights; there are {list(known)}")
    modules = {layer: known[layer] for layer in layers}
    if not modules or not samples or len(set(modules.values())) < len(modules):
        raise ValueError(f"samples and different layers are needed, got {samples} and {list(layers)}")
    return modules


def _products(network: nn.Module, layer: str) -> str:
    """What can be had instead, for the parameters that make the weights of a layer."""
    weight, every = network.get_submodule(layer).weight, dict(network.named_parameters())
    names = [name for name, p in every.items() if p is weight] or [n for n in every if n.startswith(f"{layer}.")]
    return f"FullHessian(network, X, y, parameters={names}) has exact products"


def _kind_that_cannot_be_done(module: nn.Module) -> str:
    """Why the output of a layer need not be its weights times inputs that can be had; empty if it is."""
    kind = type(module)
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return f"is a {kind.__name__}: only linear layers and 2-d convolutions can be done"
    own = "forward" in vars(module) or kind.forward not in (nn.Linear.forward, nn.Conv2d.forward)
    if own or getattr(kind, "_conv_forward", None) not in (None, nn.Conv2d._conv_forward):
        return f"is a {kind.__name__} with a forward of its own, which need not be linear"
    if "weight" not in module._parameters:
        return "has weights made of other parameters"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"has {module.groups} groups, and one group alone has Kronecker factors"
    return ""


def _use_that_cannot_be_done(passed: ForwardPass, layer: str, module: nn.Module, samples: int) -> str:
    """What a forward pass does with a layer that its Hessian cannot be had of; empty if there is nothing."""
    calls = passed.calls[layer]
    if not calls or not all(call.output.requires_grad for call in calls):
        return f"the forward pass does not call {layer!r} with gradients"
    if passed.used_elsewhere(layer, module.weight):
        return f"the weights of {layer!r} are used elsewhere too, tied or in a function"
    if any(len(call.inputs) != samples or not call.output.numel() for call in calls):
        shapes = [tuple(call.inputs.shape) for call in calls]
        return f"{layer!r} is called with {shapes}, where the first dimension is not that of the {samples} samples"
    kinds = {passed.logits.dtype, *(t.dtype for call in calls for t in (call.inputs, call.output))}
    if kinds != {module.weight.dtype}:
        return f"{layer!r} does not compute in one precision, but in {sorted(map(str, kinds))}"
    return ""


def _factors(passed: ForwardPass) -> dict[str, list[Tensor]] | None:
    """Bᵀ = SᵀG of every call of every layer, (N, c, *output); None where the logits of a sample depend on others."""
    logits = passed.logits
    p = logits.detach().softmax(1)
    root = p.sqrt()
    S = torch.diag_embed(root) - p[:, :, None] * root[:, None, :]
    outputs = [call.output for calls in passed.calls.values() for call in calls]
    if not logits.requires_grad:  # they do not depend on the layers
        logits = logits + sum(0 * output.sum() for output in outputs)
    generator = torch.Generator(logits.device).manual_seed(0)
    signs, scale = (torch.randn(n, generator=generator, device=S.device, dtype=S.dtype) for n in (S.shape[2], len(S)))
    # A row of the last is scaled by a number of its own, and so is its derivative, if it depends on no other row.
    columns = [*S.unbind(2), (S @ signs) * scale[:, None]]
    try:
        found = [
            torch.autograd.grad(logits, outputs, column, retain_graph=column is not columns[-1], materialize_grads=True)
            for column in columns
        ]
    except RuntimeError as error:  # a tensor that is needed was changed in place
        reason = str(error).partition("\n")[0]
        raise ValueError(f"torch cannot differentiate the network: {reason}") from error
    factors = [torch.stack(column[:-1], 1) for column in zip(*found, strict=True)]
    for B, scaled in zip(factors, found[-1], strict=True):
        expected = (signs @ B.flatten(2)) * scale[:, None]
        if _largest(expected - scaled.flatten(1)) > torch.finfo(B.dtype).eps ** 0.5 * _largest(B):
            return None
    each = iter(factors)
    return {layer: [next(each) for _ in calls] for layer, calls in passed.calls.items()}


def _part(module: nn.Module, calls: Sequence[Call], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a batch has for a layer: X and B of a dense layer at one position, and else what :func:`_summed` gives."""
    positions = [_positions(module, call, B) for call, B in zip(calls, factors, strict=True)]
    inputs, B = positions[0] if len(positions) == 1 else (torch.cat(p, -1) for p in zip(*positions, strict=True))
    once = isinstance(module, nn.Linear) and inputs.shape[2] == 1
    return (inputs[:, :, 0], B[:, :, :, 0].mT) if once else _summed(inputs, B)


def _joined(
    parts: list[tuple[Tensor, ...]], samples: int, exact: bool
) -> LayerGaussNewton | WeightSharingGaussNewton:  # fmt: skip
    """The matrix of a layer from what all batches have for it; the list is emptied, so that nothing is held twice."""
    once = len(parts[0]) == 2
    gathered = [part.new_empty((samples, *part.shape[1:])) for part in parts[0][: 2 if once else 1]]
    sums: list[Tensor | int] = [0] * (len(parts[0]) - len(gathered))
    start = 0
    while parts:
        part = parts.pop(0)
        for whole, some in zip(gathered, part, strict=False):
            whole[start : start + len(some)] = some
        sums = [total + some for total, some in zip(sums, part[len(gathered) :], strict=True)]
        start += len(part[0])
    if once:
        return (LayerHessian if exact else LayerGaussNewton)(*gathered)
    M, C, mean = (total / samples for total in sums)
    first = torch.linalg.svd(mean, full_matrices=False).U[:, 0]
    kind = WeightSharingHessian if exact else WeightSharingGaussNewton
    return kind(gathered[0], M, C, first * first.sum().sign())


def _positions(module: nn.Module, call: Call, B: Tensor) -> tuple[Float[Tensor, "N n P"], Float[Tensor, "N r m P"]]:
    """Inputs and factors at every position of a call."""
    x = call.inputs
    if isinstance(module, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1]).mT, B.reshape(*B.shape[:2], -1, B.shape[-1]).mT
    kernel, padding = module.weight.shape[2:], module.padding
    if module.padding_mode != "zeros":  # as its forward has it
        x, padding = nn.functional.pad(x, module._reversed_padding_repeated_twice, module.padding_mode), 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, kernel, strict=True)][::-1]
        x, padding = nn.functional.pad(x, [side for t in total for side in (t // 2, t - t // 2)]), 0
    elif padding == "valid":
        padding = 0
    return nn.functional.unfold(x, kernel, module.dilation, padding, module.stride), B.flatten(3)


def _summed(x: Float[Tensor, "N n P"], B: Float[Tensor, "N r m P"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """J, and the sums over samples of M̃, XXᵀ and X."""
    J = (B.flatten(1, 2) @ x.mT).view(*B.shape[:2], -1)
    of_each = B.flatten(0, 1)
    return J, _gram(of_each) / B.shape[3], _gram(x), x.sum(0)


def _gram(A: Float[Tensor, "N n P"]) -> Float[Tensor, "n n"]:
    """The sum of A Aᵀ over the first dimension, few of them held at once."""
    return sum((some @ some.mT).sum(0) for some in A.split(max(1, CHUNK // A.shape[1] ** 2)))


def _largest(values: Tensor) -> float:
    """The largest modulus."""
    low, high = values.aminmax()
    return max(-float(low), float(high))
