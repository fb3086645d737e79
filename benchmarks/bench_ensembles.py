"""Time per SGD step of equal networks as the notebooks take it beside torch's own ways, one thread.

Run with ``python benchmarks/bench_ensembles.py``. The ways take turns, so that what else the machine does falls on all;
the smallest time of each counts. Of fully connected networks torch's way to train an ensemble, vmap over stacked
parameters, is one; of convolutional ones the layout that suits a CPU best, and torch.compile where there is a compiler.
"""

import argparse
import functools
import shutil
from collections.abc import Callable
from timeit import timeit

import torch
from torch import Tensor, nn

from common.wu_dissecting.networks import classifier, xavier
from common.wu_dissecting.sgd import Scheme, on_cpu

BATCH, STEPS = 128, 20
#: What passes through some samples in the order of (E, N) indices.
Pass = Callable[[Tensor], None]


def together(found: list[nn.Module], X: Tensor, y: Tensor) -> Pass:
    """As the notebooks do."""
    steps = on_cpu(found, X, y, Scheme())
    return lambda order: steps.pass_through(order, BATCH)


def in_turn(
    found: list[nn.Module], X: Tensor, y: Tensor, *, channels_last: bool = False, compiled: bool = False
) -> Pass:
    """As one writes it with torch."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    X = X.contiguous(memory_format=layout)
    optimizers = [torch.optim.SGD(n.to(memory_format=layout).parameters(), lr=Scheme().lr) for n in found]
    calls = [torch.compile(n) for n in found] if compiled else found

    def train(order: Tensor) -> None:
        for network, optimizer, rows in zip(calls, optimizers, order, strict=True):
            for batch in rows.split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(X[batch]), y[batch]).backward()
                optimizer.step()

    return train


def vmapped(found: list[nn.Module], X: Tensor, y: Tensor) -> Pass:
    """With torch.func."""
    parameters, buffers = torch.func.stack_module_state(found)

    def loss(parameters: dict, buffers: dict, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(found[0], (parameters, buffers), (x,)), y)

    gradient = torch.func.vmap(torch.func.grad(loss))

    @torch.no_grad()
    def train(order: Tensor) -> None:
        for rows in order.split(BATCH, 1):
            gradients = gradient(parameters, buffers, X[rows], y[rows])
            for key, parameter in parameters.items():
                parameter -= Scheme().lr * gradients[key]

    return train


DENSE = {"this package": together, "torch, one after the other": in_turn, "torch.func.vmap": vmapped}
CONVOLUTIONAL = {
    "this package": together,
    "torch": in_turn,
    "channels last": functools.partial(in_turn, channels_last=True),
}
if shutil.which("g++"):
    CONVOLUTIONAL["torch.compile"] = functools.partial(in_turn, compiled=True)
CASES = (
    ("F-20^2", (1, 28, 28), 5, DENSE), ("F-200^2", (1, 28, 28), 5, DENSE), ("F-600^4", (1, 28, 28), 5, DENSE),
    ("LeNet5", (3, 32, 32), 1, CONVOLUTIONAL), ("LeNet5-BN", (3, 32, 32), 1, CONVOLUTIONAL),
    ("VGG11-W32", (3, 32, 32), 1, CONVOLUTIONAL),
)  # fmt: skip


def networks(name: str, shape: tuple[int, ...], members: int) -> list[nn.Module]:
    """Equal networks with initializations of their own."""
    found = [classifier(name, shape, 10) for _ in range(members)]
    for seed, network in enumerate(found):
        xavier(network, torch.Generator().manual_seed(seed))
    return found


def main() -> None:
    """Print milliseconds a step of a network of each way, and how many of ours they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each of them is measured")
    parser.add_argument("--only", default="", help="networks whose name begins so")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, shape, members, ways in CASES:
        if not name.startswith(options.only):
            continue
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(BATCH * STEPS, *shape, generator=generator)
        y = torch.randint(10, (len(X),), generator=generator)
        order = torch.stack([torch.randperm(len(y), generator=generator) for _ in range(members)])
        passes = {way: begin(networks(name, shape, members), X, y) for way, begin in ways.items()}
        for train in passes.values():
            train(order[:, : 2 * BATCH])
        times = dict.fromkeys(ways, float("inf"))
        for _ in range(options.rounds):
            for way, train in passes.items():
                times[way] = min(times[way], timeit(functools.partial(train, order), number=1) / STEPS / members)
        ours = times["this package"]
        ratios = [f"{way} {1e3 * t:6.2f} ms ({t / ours:4.1f})" for way, t in times.items()]
        print(f"{name:10}", "   ".join(ratios), flush=True)


if __name__ == "__main__":
    main()
