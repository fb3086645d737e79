"""Exact Hessians in closed form beside torch.func, curvlinops and a loop of Hessian-vector products, in one run.

Run with ``python benchmarks/bench_blocks.py``; about three minutes on two idle cores. Every measurement takes turns
with a product of two float32 matrices (sgemm), so that what else the machine does falls on both, and the smallest
time of each counts. The last column is the time that the same work would take where sgemm does 350 GFLOP/s. On a
machine that is busy all the time, ``--threads 1 --cpu-time`` counts the processor's time instead of the wall's.

At the full size the peers compute some columns of the matrix, and their time is scaled to all of them: each column
costs them the same. ``--full`` computes all columns. torch.func.hessian has no columns to leave out and would need
several times 80 GB there, so that it takes part at the reduced size only.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from curvlinops import HessianLinearOperator
from torch import Tensor
from torch.nn.functional import cross_entropy

from common.hessian.hidden_layer import HiddenLayerHessian
from common.hessian.linear import LinearHessian

FULL = {"N": 5000, "d": 500, "m": 8, "C": 500}
REDUCED = {"N": 1000, "d": 100, "m": 8, "C": 100}
IMAGE = {"N": 1000, "d": 64, "C": 1000}
CHUNK = 16  # columns at a time where a peer takes several
SGEMM = 3000


def hidden_model(N: int, d: int, m: int, C: int, loss: str) -> HiddenLayerHessian:
    """Gaussian data and weights at initialization, float32."""
    rng = torch.Generator().manual_seed(0)
    X = torch.randn(N, d, generator=rng)
    W, V = torch.randn(m, d, generator=rng) / d**0.5, torch.randn(C, m, generator=rng) / m**0.5
    return HiddenLayerHessian(X, W, V, torch.arange(N) % C, loss)


def linear_model(N: int, d: int, C: int) -> LinearHessian:
    """Gaussian data and weights at initialization, float32."""
    rng = torch.Generator().manual_seed(0)
    return LinearHessian(torch.randn(N, d, generator=rng), torch.randn(C, d, generator=rng) / d**0.5, "CE")


def fresh_matrix(H: HiddenLayerHessian) -> Tensor:
    """Return the matrix with nothing computed before."""
    return HiddenLayerHessian(H.X, H.W, H.V, H.y, H.loss).matrix()


def fresh_image(H: LinearHessian) -> Tensor:
    """Return an image of 800 pixels, which cut through the blocks, with nothing computed before."""
    return LinearHessian(H.X, H.V, H.loss).image(800)


# What the work takes, in operations --------------------------------------------------------------------------------


def matrix_operations(H: HiddenLayerHessian) -> float:
    """Operations of one product per pair of neurons and part of the matrix, over the samples where both are active."""
    active = H.active.double()
    both = active.T @ active
    pairs, own, every = both.triu().sum().item(), both.trace().item(), both.sum().item()
    if H.loss == "CE":
        return 2 * (pairs * (H.d**2 + H.C**2) + every * H.d * H.C)
    return 2 * (pairs * H.d**2 + own * H.d * H.C)


def image_operations(H: LinearHessian) -> float:
    """Operations of the product of unique feature products and pairs of classes."""
    return 2 * H.N * H.d * (H.d + 1) / 2 * H.C * (H.C + 1) / 2


# The peers ---------------------------------------------------------------------------------------------------------


def objective(H: HiddenLayerHessian, parameters: Tensor) -> Tensor:
    """Cross-entropy as a function of all parameters in one vector."""
    W, V = parameters.split([H.W.numel(), H.V.numel()])
    return cross_entropy(torch.relu(H.X @ W.view_as(H.W).T) @ V.view_as(H.V).T, H.y)


def flat(H: HiddenLayerHessian) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([H.W.flatten(), H.V.flatten()])


def by_torch_func(H: HiddenLayerHessian, columns: int) -> Tensor:
    """torch.func.hessian; all columns whatever is asked."""
    return torch.func.hessian(partial(objective, H))(flat(H))


def by_vmap(H: HiddenLayerHessian, columns: int) -> Tensor:
    """vmap(jvp(grad)), some columns at a time."""
    gradient, at = torch.func.grad(partial(objective, H)), flat(H)
    product = torch.func.vmap(lambda v: torch.func.jvp(gradient, (at,), (v,))[1])
    return torch.cat([product(basis) for basis in torch.eye(H.order)[:columns].split(CHUNK)])


def by_hvp_loop(H: HiddenLayerHessian, columns: int) -> Tensor:
    """One Hessian-vector product after another by double backward, as published codes do it."""
    at = flat(H).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(H, at), at, create_graph=True)
    matrix = torch.empty(columns, H.order)
    for k in range(columns):
        (matrix[k],) = torch.autograd.grad(gradient[k], at, retain_graph=True)
    return matrix


def by_curvlinops(H: HiddenLayerHessian, columns: int) -> Tensor:
    """HessianLinearOperator applied to columns of the identity."""
    model = torch.nn.Sequential(
        torch.nn.Linear(H.d, H.m, bias=False), torch.nn.ReLU(), torch.nn.Linear(H.m, H.C, bias=False)
    )
    model[0].weight.data, model[2].weight.data = H.W, H.V
    operator = HessianLinearOperator(
        model, torch.nn.CrossEntropyLoss(), list(model.parameters()), [(H.X, H.y)], check_deterministic=False
    )
    return torch.cat([operator @ basis.T.contiguous() for basis in torch.eye(H.order)[:columns].split(CHUNK)], dim=1).T


PEERS = {
    "torch.func.hessian": by_torch_func,
    "vmap(jvp(grad))": by_vmap,
    "loop of Hessian-vector products": by_hvp_loop,
    "curvlinops HessianLinearOperator": by_curvlinops,
}


# Measurement -------------------------------------------------------------------------------------------------------


clock = time.perf_counter


def seconds(run: Callable[[], object]) -> float:
    """Time of one call."""
    start = clock()
    run()
    return clock() - start


def beside_sgemm(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Smallest time of a call, and the best rate of sgemm in FLOP/s before and after each of the calls."""
    A, product = torch.randn(SGEMM, SGEMM), torch.empty(SGEMM, SGEMM)
    sgemm, ours = [], []
    for _ in range(rounds):
        sgemm.append(seconds(lambda: torch.mm(A, A, out=product)))
        ours.append(seconds(run))
        sgemm.append(seconds(lambda: torch.mm(A, A, out=product)))
    return min(ours), 2 * SGEMM**3 / min(sgemm)


def peak_memory(what: str) -> float:
    """Peak memory beside the data and the result, in MiB, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", what]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def high_water() -> int:
    """Largest resident memory of this process so far, in bytes; Linux."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 2**10


def print_peak_memory(what: str) -> None:
    """Print the high-water mark of this process less what it was before and less the result."""
    if what == "image":
        model, run = linear_model(**IMAGE), fresh_image
    else:
        model, run = hidden_model(**FULL, loss=what), fresh_matrix
    torch.mm(torch.ones(500, 500), torch.ones(500, 500))  # the product's own library
    before = high_water()
    result = run(model)
    print((high_water() - before - result.nbytes) / 2**20)


def measure_ours(rounds: int) -> list[dict]:
    """Time, rate and memory at the sizes of the paper."""
    cases = [
        ("CE", "matrix of order 8000, CE", hidden_model(**FULL, loss="CE"), fresh_matrix, matrix_operations, rounds),
        ("MSE", "matrix of order 8000, MSE", hidden_model(**FULL, loss="MSE"), fresh_matrix, matrix_operations, rounds),
        (
            "image",
            "image of order 64,000, CE",
            linear_model(**IMAGE),
            fresh_image,
            image_operations,
            max(1, rounds // 4),
        ),
    ]
    results = []
    print(
        f"{'':28s} {'GFLOP':>7s} {'seconds':>8s} {'of sgemm':>9s} {'MiB':>5s} {'sgemm GFLOP/s':>14s} {'s at 350':>9s}"
    )
    for key, name, model, run, operations, repeat in cases:
        time_taken, rate = beside_sgemm(partial(run, model), repeat)
        work = operations(model)
        results.append(
            {
                "what": name,
                "operations": work,
                "seconds": time_taken,
                "fraction_of_sgemm": work / time_taken / rate,
                "peak_mib": peak_memory(key),
                "sgemm_flops": rate,
                "seconds_at_350_gflops": time_taken * rate / 350e9,
            }
        )
        r = results[-1]
        print(
            f"{name:28s} {work / 1e9:7.1f} {time_taken:8.3f} {r['fraction_of_sgemm']:9.0%} {r['peak_mib']:5.0f}"
            f" {rate / 1e9:14.0f} {r['seconds_at_350_gflops']:9.3f}"
        )
    return results


def measure_peers(size: dict, rounds: int, columns: int | None) -> list[dict]:
    """Times for the whole matrix under CE, scaled from some columns, and how many times ours."""
    H = hidden_model(**size, loss="CE")
    measured = H.order if columns is None else min(columns, H.order)
    matrix = fresh_matrix(H)
    ours = min(seconds(partial(fresh_matrix, H)) for _ in range(rounds))
    what = "all columns" if measured == H.order else f"{measured} of {H.order} columns, scaled"
    print(f"\n{size}, CE, order {H.order}; {what}\n{'closed form':34s} {ours:9.3f} s")
    results = [{"peer": "closed form", "size": size, "seconds": ours, "columns": H.order}]
    for name, peer in PEERS.items():
        if peer is by_torch_func and size is FULL:
            continue
        peer(H, CHUNK)  # warm up
        start = clock()
        computed = peer(H, measured)
        time_taken = (clock() - start) * H.order / (H.order if peer is by_torch_func else measured)
        ours = min(ours, seconds(partial(fresh_matrix, H)))
        error = ((computed - matrix[: len(computed)]).norm() / computed.norm()).item()
        results.append({"peer": name, "size": size, "seconds": time_taken, "columns": measured, "difference": error})
        print(f"{name:34s} {time_taken:9.3f} s   {time_taken / ours:6.0f} times ours   difference {error:.0e}")
    return results


def main() -> None:
    """Print the tables; write them where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="times that each of ours is measured")
    parser.add_argument("--columns", type=int, default=64, help="columns the peers compute at the full size")
    parser.add_argument("--full", action="store_true", help="the peers compute all columns at the full size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="count the time of the processor; with one thread")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--memory-of", choices=["CE", "MSE", "image"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        global clock
        clock = time.process_time
    if options.memory_of:
        print_peak_memory(options.memory_of)
        return
    kind = "processor's time" if options.cpu_time else "wall time"
    print(f"float32, {options.threads} threads, {kind}, torch {torch.__version__}")
    results = {
        "ours": measure_ours(options.rounds),
        "reduced": measure_peers(REDUCED, options.rounds, None),
        "full": measure_peers(FULL, options.rounds, None if options.full else options.columns),
    }
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
