"""A step of Algorithm 1 of Wu et al. (2022), and the final Monte Carlo estimate, beside the text's own way, in one run.

Run with ``python benchmarks/bench_pac_bayes.py``; two minutes, one thread. The peer draws one network a step, as a
matrix in the eigenbasis that is rotated back, and differentiates loss and KL by autograd; its Adam is the same. For the
estimate it draws 50,000 networks and takes each on all 60,000 images, timed on a few of them. Ours keeps the rotated
weights and draws outputs. The time of both steps is set beside the floating-point operations of ours.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.wu_dissecting.pac_bayes.bound import Confidence, complexity
from common.wu_dissecting.pac_bayes.optimize import Descent
from common.wu_dissecting.pac_bayes.posterior import Posteriors, count_errors, gaussian_kl

N, BATCH = 60_000, 128


def per_call(run: Callable[[], object], calls: int) -> float:
    """Seconds of a call, after a first that is not counted."""
    run()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


class Peer:
    """Algorithm 1 as printed, but for Adam: weights in the standard basis, variances in that of U ⊗ V."""

    def __init__(self, weights: list[Tensor], bases: list[tuple[Tensor, Tensor]]):
        self.bases, self.prior = bases, [w.clone() for w in weights]
        self.mean = [w.clone().requires_grad_() for w in weights]
        self.log_std = [w.abs().clamp_min(1e-6).log().requires_grad_() for w in weights]
        self.rho = torch.tensor(-3.0, requires_grad=True)
        self.optimizer = torch.optim.Adam([*self.mean, *self.log_std, self.rho], lr=1e-6, fused=True)

    def drawn(self) -> list[Tensor]:
        """One network."""
        found = []
        for mean, log_std, (U, V) in zip(self.mean, self.log_std, self.bases, strict=True):
            noise = U @ (torch.randn_like(mean) * log_std.exp())
            found.append(mean + torch.cat([noise[:, :-1] @ V.T, noise[:, -1:]], 1))
        return found

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step on a batch."""
        self.optimizer.zero_grad()
        nats = sum(gaussian_kl(*parts, self.rho) for parts in zip(self.mean, self.log_std, self.prior, strict=True))
        bound = (complexity(nats, self.rho, N, Confidence()) / 2).sqrt()
        (nn.functional.cross_entropy(through(self.drawn(), x), y) / math.log(2) + bound).backward()
        self.optimizer.step()


def through(weights: list[Tensor], x: Tensor) -> Tensor:
    """Logits."""
    for k, W in enumerate(weights):
        x = x @ W[:, :-1].T + W[:, -1]
        x = x.relu() if k < len(weights) - 1 else x
    return x


def compare(name: str, widths: list[int], draws: int) -> None:
    """Both steps and both estimates for one network."""
    generator = torch.Generator().manual_seed(0)
    weights = [0.04 * torch.randn(m, n + 1, generator=generator) for n, m in itertools.pairwise(widths)]
    X, y = 2 * torch.rand(N, widths[0], generator=generator) - 1, torch.randint(widths[-1], (N,), generator=generator)
    q = Posteriors.start(weights, weights, 1)
    bases = []
    for layer, w in enumerate(weights):
        m, n = len(w), w.shape[1] - 1
        U, V = (torch.linalg.qr(torch.randn(k, k, generator=generator)).Q for k in (m, n))
        bases.append((U, V))
        q.change_basis(0, layer, U, V)
    descent, peer, rows = Descent(q, N, Confidence()), Peer(weights, bases), slice(100 * BATCH)
    seen = [one[rows] for one in q.rotated(X)]
    ours = per_call(lambda: descent.pass_through(seen, y[rows], BATCH, 0), 2) / 100
    theirs = per_call(lambda: peer.step(X[:BATCH], y[:BATCH]), 50)
    operations = 0  # x M and x² S, their gradients; rotations of outputs and, above the first layer, of inputs
    for layer, w in enumerate(weights):
        m, n = len(w), w.shape[1]
        operations += 2 * BATCH * (4 * m * n + 2 * m * m + (2 * m * n + 2 * n * n if layer else 0))
    square = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / per_call(lambda: square @ square, 20)
    print(
        f"{name}: a step {1e3 * ours:.2f} ms, the peer's {1e3 * theirs:.2f} ms ({theirs / ours:.1f} times); "
        f"{operations / ours / 1e9:.0f} GFLOP/s, sgemm {rate / 1e9:.0f}"
    )
    mine = per_call(lambda: count_errors(q, X, y, draws, 0), 1) * 1e6 / draws
    with torch.no_grad():
        one = per_call(lambda: [through(peer.drawn(), x) for x in X.split(10_000)], 2)
    hours = 50_000 * one / 3600
    print(f"{name}: 10⁶ pairs {mine:.0f} s; 50,000 networks on all images {hours:.1f} h, by extrapolation")


def main() -> None:
    """Compare on two networks of Table 10."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--draws", type=int, default=100_000, help="pairs that the estimate is timed on")
    draws = parser.parse_args().draws
    torch.set_num_threads(1)
    compare("T-600", [784, 600, 2], draws)
    compare("T-200²₁₀", [784, 200, 200, 10], draws)


if __name__ == "__main__":
    main()
