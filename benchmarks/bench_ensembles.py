"""Time per SGD step of five equal networks in batched products beside torch's autograd and torch.optim.SGD, one thread.

Run with ``python benchmarks/bench_ensembles.py``. The ways take turns, so that what else the machine does falls on all;
the smallest time of each counts. torch's own way to train an ensemble, vmap over stacked parameters, is one of them.
"""

import argparse
import functools
from timeit import timeit

import torch
from torch import nn

from common.wu_dissecting.networks import classifier, xavier
from common.wu_dissecting.sgd import Scheme, on_cpu

MEMBERS, SHAPE, BATCH, STEPS = 5, (1, 28, 28), 128, 20


def networks(name: str) -> list[nn.Module]:
    """Equal networks with initializations of their own."""
    found = [classifier(name, SHAPE, 10) for _ in range(MEMBERS)]
    for seed, network in enumerate(found):
        xavier(network, torch.Generator().manual_seed(seed))
    return found


def in_turn(found: list[nn.Module], X: torch.Tensor, y: torch.Tensor, order: torch.Tensor) -> None:
    """As one writes it with torch."""
    for network, rows in zip(found, order, strict=True):
        optimizer = torch.optim.SGD(network.parameters(), lr=Scheme().lr)
        for batch in rows.split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(X[batch]), y[batch]).backward()
            optimizer.step()


def vmapped(found: list[nn.Module], X: torch.Tensor, y: torch.Tensor, order: torch.Tensor) -> None:
    """With torch.func."""
    parameters, buffers = torch.func.stack_module_state(found)

    def loss(parameters: dict, buffers: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(found[0], (parameters, buffers), (x,)), y)

    gradient = torch.func.vmap(torch.func.grad(loss))
    with torch.no_grad():
        for rows in order.split(BATCH, 1):
            gradients = gradient(parameters, buffers, X[rows], y[rows])
            for key, parameter in parameters.items():
                parameter -= Scheme().lr * gradients[key]


def together(found: list[nn.Module], X: torch.Tensor, y: torch.Tensor, order: torch.Tensor) -> None:
    """As the notebooks do."""
    on_cpu(found, X, y, Scheme()).pass_through(order, BATCH)


def main() -> None:
    """Print milliseconds a step of each way, and how many of ours they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each of them is measured")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(BATCH * STEPS, *SHAPE, generator=generator)
    y = torch.randint(10, (len(X),), generator=generator)
    order = torch.stack([torch.randperm(len(y), generator=generator) for _ in range(MEMBERS)])
    ways = {"this package": together, "torch, one after the other": in_turn, "torch.func.vmap": vmapped}
    for name in ("F-20^2", "F-200^2", "F-600^4"):
        times = dict.fromkeys(ways, float("inf"))
        for _ in range(rounds):
            for way, train in ways.items():
                seconds = timeit(functools.partial(train, networks(name), X, y, order), number=1)
                times[way] = min(times[way], seconds / STEPS)
        ours = times["this package"]
        ratios = [f"{way} {1e3 * t:6.2f} ms ({t / ours:4.1f})" for way, t in times.items()]
        print(f"{MEMBERS} of {name:8}", "   ".join(ratios), flush=True)


if __name__ == "__main__":
    main()
