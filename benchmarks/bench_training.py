"""Time per full-batch step at the paper's size beside torch's autograd with torch.optim.Adam, one thread, one run.

Run with ``python benchmarks/bench_training.py``. The two take turns, so that what else the machine does
falls on both; the smallest time of each counts.
"""

import argparse
import functools
from timeit import timeit

import torch

from common.dong_quantifying.full_batch import train_full_batch

N, d, C, m = 5000, 500, 500, 8
STEPS = 100


def autograd_steps(X: torch.Tensor, y: torch.Tensor, W: torch.Tensor, V: torch.Tensor, loss: str, steps: int) -> None:
    """The same steps as one writes them with torch."""
    W, V = W.clone().requires_grad_(), V.clone().requires_grad_()
    onehot = torch.nn.functional.one_hot(y, C).to(X)
    optimizer = torch.optim.Adam([W, V], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        f = torch.relu(X @ W.T) @ V.T
        value = torch.nn.functional.cross_entropy(f, y) if loss == "CE" else ((f - onehot) ** 2).sum(1).mean()
        value.backward()
        optimizer.step()
        scheduler.step()


def our_steps(X: torch.Tensor, y: torch.Tensor, W: torch.Tensor, V: torch.Tensor, loss: str, steps: int) -> None:
    """The steps as this package takes them, after the checks and copies that ``steps`` = 0 costs as well."""
    train_full_batch(X, y, W, V, loss=loss, steps=steps, lr=1e-4, keep=[])


def main() -> None:
    """Print milliseconds a step for both losses, ours, torch's, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each of the two is measured")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(N, d, generator=generator)
    W, V = torch.randn(m, d, generator=generator) / d**0.5, torch.randn(C, m, generator=generator) / m**0.5
    y = torch.arange(N) % C
    print(f"N = {N}, d = {d}, C = {C}, m = {m}, float32, one thread; milliseconds a step")
    for loss in ("MSE", "CE"):
        ours, theirs = [], []
        for _ in range(rounds):
            setup, ours_whole, theirs_whole = (
                timeit(functools.partial(steps, X, y, W, V, loss, number), number=1)
                for steps, number in ((our_steps, 0), (our_steps, STEPS), (autograd_steps, STEPS))
            )
            ours.append(ours_whole - setup)
            theirs.append(theirs_whole)
        a, b = 1e3 * min(ours) / STEPS, 1e3 * min(theirs) / STEPS
        print(f"{loss:3s}  this package {a:6.2f}   torch autograd and Adam {b:6.2f}   ratio {b / a:5.1f}")


if __name__ == "__main__":
    main()
