"""What one layer does in the forward pass of a network, and whether the logits are piecewise linear in its weights.

Read from the graph that autograd records, so that functions called in a ``forward`` count as modules do. Only
operations that are known to be linear, piecewise linear or linear in each argument pass.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from common.hessian.modes import check_logits, passing

#: Backward nodes of operations that are linear, or piecewise linear, in all arguments that carry a gradient.
PIECEWISE_LINEAR = frozenset(
    """
    Abs AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Add Alias Amax Amin AsStrided AvgPool2D
    AvgPool3D Cat ChannelShuffle Clamp ClampMax ClampMin Clone ConstantPadNd Cumsum Diagonal Expand Flip Gather
    Hardshrink Hardtanh Im2Col Index IndexSelect LeakyRelu MaskedFill Max MaxPool2DWithIndices
    MaxPool3DWithIndices Maximum Mean Min Minimum Neg Permute PixelShuffle PixelUnshuffle ReflectionPad1D
    ReflectionPad2D ReflectionPad3D Relu Repeat ReplicationPad1D ReplicationPad2D ReplicationPad3D ReshapeAlias Roll
    RreluWithNoise Rsub Select Slice Softshrink Sort Split SplitWithSizes Squeeze Stack Sub Sum T Threshold ToCopy Topk
    Transpose Tril Triu Unbind Unfold UnsafeView Unsqueeze UpsampleBilinear2D UpsampleNearest1D UpsampleNearest2D View
    Where
    """.split()
)
#: Those that are linear in each of their arguments: exact where one of them alone depends on the weights.
MULTILINEAR = frozenset("Addmm Addmv Baddbmm Bmm Convolution Dot Mm Mul Mv PreluKernel".split())
#: Those that are linear in their first argument.
LINEAR_IN_FIRST = frozenset("Div NativeBatchNorm CudnnBatchNorm MiopenBatchNorm".split())


@dataclass(frozen=True)
class Call:
    """One application of a layer: what it was given, where that comes from, and what it gave."""

    inputs: Tensor
    source: Node | None
    output: Tensor


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass, as it was recorded.

    Attributes
    ----------
    logits
        What the network gave.
    calls
        Of each layer by its name, in their order.
    spans
        Name of a module and the numbers of the first operation in it and of the first one after it, inner ones first.
    """

    logits: Tensor
    calls: dict[str, list[Call]]
    spans: list[tuple[str, int, int]]

    def where(self, node: Node) -> str:
        """The innermost module whose operation this is, with its type, as far as there is one."""
        number = node._sequence_nr()
        name = next((name for name, first, end in self.spans if first <= number < end), "")
        return name or "the network's own forward"

    def obstacle(self, layer: str, weight: nn.Parameter) -> str:
        """What keeps the logits from being piecewise linear in the weights of a layer; empty if they are."""
        for node, places in _dependent(self.logits, weight):
            builtin = re.fullmatch(r"(\w+)Backward\d+", node.name())  # functions of somebody's own have no number
            kind = builtin[1] if builtin else node.name()
            modulus = kind == "Abs" and node._saved_self.is_complex()
            linear = (
                (kind in PIECEWISE_LINEAR and not modulus)
                or (kind in MULTILINEAR and len(places) == 1)
                or (kind in LINEAR_IN_FIRST and places == [0] and not getattr(node, "_saved_training", False))
            )
            if not linear:
                if kind in MULTILINEAR and len(self.calls[layer]) > 1:
                    return f"{layer} is applied to what it gave itself"
                return f"{kind} in {self.where(node)} is not known to be"
        return ""

    def used_elsewhere(self, layer: str, weight: nn.Parameter) -> bool:
        """Whether the logits depend on the weights of a layer in another way than through its calls."""
        calls = self.calls[layer]
        above = [self.logits.grad_fn, *(call.source for call in calls)]
        nodes = _above(above, {call.output.grad_fn for call in calls})
        return any(getattr(node, "variable", None) is weight for node in nodes)


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Node]:
    """All backward nodes that tensors come from."""
    return _above([t.grad_fn for t in tensors], set())


def _above(waiting: list[Node | None], ends: set[Node]) -> Iterator[Node]:
    seen = set(ends)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [below for below, _ in node.next_functions]


def _dependent(logits: Tensor, leaf: nn.Parameter) -> Iterator[tuple[Node, list[int]]]:
    """Nodes that depend on a leaf, and which of their arguments do."""
    depends: dict[Node | None, bool] = {None: False}
    waiting = [logits.grad_fn]
    while waiting:
        node = waiting[-1]
        if node in depends:
            waiting.pop()
            continue
        below = [one for one, _ in node.next_functions]
        if missing := [one for one in below if one not in depends]:
            waiting += missing
            continue
        places = [place for place, one in enumerate(below) if depends[one]]
        depends[node] = bool(places) or getattr(node, "variable", None) is leaf
        if places:
            yield node, places


def forward_pass(network: nn.Module, layers: Mapping[str, nn.Module], x: Tensor) -> ForwardPass:
    """Pass samples through a network and record what the layers do, between hooks that are before and after them.

    Raises
    ------
    ValueError
        If the network does not take the samples, or does not give finite logits, (N, c).
    """
    calls: dict[str, list[Call]] = {name: [] for name in layers}
    spans: list[tuple[str, int, int]] = []
    handles = _record_spans(network, spans)
    for name, module in layers.items():
        module.forward = _recorded(module.forward, calls[name])
    try:
        with torch.enable_grad(), passing(x):
            logits = network(x.clone())
    finally:
        for module in layers.values():
            del module.forward
        for handle in handles:
            handle.remove()
    check_logits(logits, len(x))
    return ForwardPass(logits, calls, spans)


def _recorded(forward: Callable[[Tensor], Tensor], calls: list[Call]) -> Callable[[Tensor], Tensor]:
    def recording(input: Tensor) -> Tensor:
        call = Call(input.detach().clone(), input.grad_fn, forward(input).clone())
        calls.append(call)
        return call.output.clone()  # what follows may work in place

    return recording


def _record_spans(network: nn.Module, spans: list[tuple[str, int, int]]) -> list[RemovableHandle]:
    """Note the numbers of the operations between the beginning and the end of each module."""
    one, begun = torch.ones((), requires_grad=True), []

    def number() -> int:
        with torch.inference_mode(False), torch.enable_grad():
            return one.clone().grad_fn._sequence_nr()

    handles: list[RemovableHandle] = []
    for name, module in network.named_modules():
        title = f"{name} ({type(module).__name__})" if name else ""
        handles += [
            module.register_forward_pre_hook(lambda *_: begun.append(number())),
            module.register_forward_hook(lambda *_, title=title: spans.append((title, begun.pop(), number()))),
        ]
    return handles
