"""Top eigenpairs of a layer's Hessian beside hessian-eigenthings, and beside curvlinops with SciPy's eigsh, in one run.

Run with ``python benchmarks/bench_eigenpairs.py``; ten minutes. The problem is fc1 of F-200² on MNIST (Wu et al. 2022),
156,800 weights, after a few epochs. All solve it in float32 until every residual ‖Hv − λv‖ is below the tolerance times
its eigenvalue; the residuals printed are those that a product with the Hessian gives. A peer that takes the dimension
of its space as given gets the smallest of several that suffices, and only that run is counted.

hessian-eigenthings is not among the project's packages: ``pip install --no-deps hessian-eigenthings==1.0.0a5``.
"""

import argparse
from collections.abc import Callable
from timeit import timeit
from typing import TypeVar

import numpy as np
import torch
from curvlinops import HessianLinearOperator
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from common.hessian.layer import LayerHessian, layer_hessian
from common.wu_dissecting.trained import dissected

Result = TypeVar("Result")
#: Dimensions of the Krylov space, in units of k, that are tried one after the other.
SPACES = (2.0, 2.5, 3.0, 4.0, 6.0, 8.0)


def timed(run: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds that a call takes, and what it returns."""
    results: list[Result] = []
    return timeit(lambda: results.append(run()), number=1), results[0]


def worst_residual(H: LayerHessian, values: Tensor, vectors: Tensor) -> float:
    """Largest ‖Hv − λv‖/λ."""
    return float((torch.linalg.vector_norm(H @ vectors.contiguous() - vectors * values, dim=0) / values).max())


def by_eigenthings(network: nn.Module, X: Tensor, y: Tensor, k: int, tolerance: float) -> tuple[float, Tensor, Tensor]:
    """Seconds, eigenvalues and eigenvectors of hessian-eigenthings."""
    from hessian_eigenthings.algorithms import lanczos
    from hessian_eigenthings.operators import HessianOperator

    operator = HessianOperator(
        network, [(X, y)], lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        param_filter=lambda name, _: name == "fc1.weight",
    )  # fmt: skip
    for space in SPACES:
        seconds, found = timed(lambda n=int(space * k): lanczos(
            operator, k=k, max_iter=n, tol=tolerance, reorthogonalize=True, which="LA", seed=0
        ))  # fmt: skip
        print(f"  hessian-eigenthings, space of {space:g} k: {seconds:.1f} s, converged {bool(found.converged.all())}")
        if found.converged.all():
            return seconds, found.eigenvalues, found.eigenvectors.T
    raise ArithmeticError("hessian-eigenthings did not converge in any of the spaces")


def by_curvlinops(network: nn.Module, X: Tensor, y: Tensor, k: int, tolerance: float) -> tuple[float, Tensor, Tensor]:
    """Seconds, eigenvalues and eigenvectors of eigsh with curvlinops' operator."""
    weight = [network.get_submodule("fc1").weight]
    operator = HessianLinearOperator(network, nn.CrossEntropyLoss(), weight, [(X, y)], check_deterministic=False)
    seconds, (values, vectors) = timed(lambda: eigsh(operator.to_scipy(), k=k, which="LA", tol=tolerance))
    order = np.argsort(values)[::-1].copy()
    return seconds, torch.tensor(values[order]).float(), torch.tensor(vectors[:, order]).float()


def main() -> None:
    """Print the times, how many times ours they are, and the residuals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="F-200^2", help="by the paper's name")
    parser.add_argument("--samples", type=int, default=10_000, help="images of the Hessian and of the training")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--k", type=int, default=200, help="number of eigenpairs")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of residuals, relative to their eigenvalue")
    options = parser.parse_args()
    case = dissected(options.network, "MNIST", members=1, epochs=options.epochs, samples=options.samples, seed=0)
    network, X, y = case.network(0), case.X, case.y
    H = layer_hessian(network, "fc1", X)
    own, found = timed(lambda: layer_hessian(network, "fc1", X).top_eigenpairs(options.k, tolerance=options.tolerance))
    name = f"ours, {int(found.products)} products"
    print(f"{name:24s}{own:8.1f} s, residual {worst_residual(H, found.values, found.vectors):.1e}")
    for name, solve in {"hessian-eigenthings": by_eigenthings, "curvlinops, eigsh": by_curvlinops}.items():
        try:
            seconds, values, vectors = solve(network, X, y, options.k, options.tolerance)
        except ImportError as error:
            print(f"{name}: {error}")
            continue
        residual = worst_residual(H, values, vectors)
        print(f"{name:24s}{seconds:8.1f} s, residual {residual:.1e}, {seconds / own:5.1f} times ours")
        difference = float((values / found.values - 1).abs().max())
        print(f"  largest relative difference of an eigenvalue from ours: {difference:.1e}")


if __name__ == "__main__":
    main()
