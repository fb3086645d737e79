"""The density of a limiting spectrum beside the plain fixed-point iteration and beside one sample of it, in one run.

Run with ``python benchmarks/bench_eigenspectra.py``; half a minute. Figure 1a of Liao & Mahoney (2021): logistic
response and loss, p = 800, n = 6000. The peer iterates (7) over n sampled curvatures a thousandth above the real axis,
all points at once, until nothing changes by more than 1e-6.
"""

import argparse
from timeit import timeit

import numpy as np
import torch

from common.liao_eigenspectra.glm import GLM, LOGISTIC, logistic_loss
from common.liao_eigenspectra.spikes import Eigenspectrum

P, N = 800, 6000


def fixed_point(g: np.ndarray, x: np.ndarray, c: float) -> np.ndarray:
    """Density by iterating (7) for C = I over samples of g, shape (n,), at x, shape (Z,)."""
    z = x + 1e-3j
    delta = -c / z
    for _ in range(2000):
        new = c / (np.array([np.mean(g / (1 + g * d)) for d in delta]) - z)
        change, delta = np.abs(new - delta).max(), new
        if change < 1e-6:
            break
    return delta.imag / c / np.pi


def main() -> None:
    """Print the times and how many times ours they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=1000, help="points of the density")
    points = parser.parse_args().points
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(P, generator=generator, dtype=torch.float64).numpy() / P**0.5
    model = GLM(p=P, mean=w, w=w, w_star=w, response=LOGISTIC, loss=logistic_loss)
    X = model.sample_features(N, generator)
    g, H = model.weights(X, generator).numpy(), Eigenspectrum.of(model, P / N)
    x = np.linspace(*H.support[0], points)
    ours = min(timeit(lambda: H.density(x), number=1) for _ in range(3))
    print(f"density at {points} points             {ours:7.2f} s")
    for name, run in {
        "law of g, support, spikes": lambda: Eigenspectrum.of(model, P / N).spikes,
        "plain fixed-point iteration": lambda: fixed_point(g, x, P / N),
        "one Hessian and its eigenvalues": lambda: np.linalg.eigvalsh(model.hessian(X, generator).numpy()),
    }.items():
        taken = timeit(run, number=1)
        print(f"{name:32s}{taken:10.2f} s   {taken / ours:6.1f} times ours")


if __name__ == "__main__":
    main()
