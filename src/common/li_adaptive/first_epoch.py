"""The first epoch of a training of Li, App G.2, step by step: the Hessian over all images while many are active.

The hinge loss soon leaves few images inside their margin, and a Hessian over some of the images then comes from one or
none. The steps are those of :func:`~common.li_adaptive.training.train_recipe`, watched from the optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.optimizer import register_optimizer_step_post_hook

from common.cache import cached
from common.devices import default_device
from common.hessian.spectral_measure import edge_eigenvalues
from common.li_adaptive.data import zero_against_rest
from common.li_adaptive.hinge_hessian import hinge_hessian, margins
from common.li_adaptive.trained import edge_asymmetry
from common.li_adaptive.training import BATCH_SIZE, RECIPES, train_recipe

#: The recipe; that of the VGG stands apart, as with batch norm a margin depends on the batch.
NETWORK = "LeNet"


def first_steps(x: Tensor, y: Tensor, steps: Sequence[int], seed: int) -> Float[Tensor, "K P"]:
    """Parameters of the LeNet after some numbers of steps of the first epoch.

    Parameters
    ----------
    x, y, seed
        As :func:`~common.li_adaptive.training.train_recipe` has them.
    steps
        From 0, the initialization, to those of a whole epoch.

    Raises
    ------
    ValueError
        If an epoch has not so many steps, or a number is negative.
    """
    epoch = -(-len(y) // BATCH_SIZE)
    if outside := [k for k in steps if not 0 <= k <= epoch]:
        raise ValueError(f"the first epoch has steps 0..{epoch}, got {outside}")
    after = []

    def watch(optimizer: torch.optim.Optimizer, *_: object) -> None:
        after.append(None)
        if len(after) in steps:
            after[-1] = parameters_to_vector(optimizer.param_groups[0]["params"]).detach().clone()

    handle = register_optimizer_step_post_hook(watch)
    try:
        found = train_recipe(NETWORK, 1.0, x, y, x[:1], y[:1], epochs=1, keep=[0], seed=seed)
    finally:
        handle.remove()
    return torch.stack([[found["parameters"][0], *after][k] for k in steps])


@dataclass(frozen=True)
class EarlyHessians:
    """The Hessian after K numbers of steps.

    Attributes
    ----------
    steps
        (K,)
    active
        (K,) share of all images inside their margin, E|ℓ'|.
    rms
        (K,) root of the mean squared eigenvalue of the Hessian over all images, by one random vector.
    images
        (K,) how many images, the first ones, the eigenvalues come from.
    lowest, highest
        (K, k) eigenvalues at either end, outermost first.
    """

    steps: Int[Tensor, " K"]
    active: Float[Tensor, " K"]
    rms: Float[Tensor, " K"]
    images: Int[Tensor, " K"]
    lowest: Float[Tensor, "K k"]
    highest: Float[Tensor, "K k"]

    def edge_asymmetry(self) -> Float[np.ndarray, " K"]:
        """:func:`~common.li_adaptive.trained.edge_asymmetry` after each number of steps."""
        return np.array([edge_asymmetry(*ends) for ends in zip(self.lowest, self.highest, strict=True)])

    def negative_share(self) -> Float[np.ndarray, " K"]:
        """Share of negative ones among the k eigenvalues of largest modulus.

        Raises
        ------
        ValueError
            If k is odd: of pairs ±λ an odd number is never half negative.
        """
        if self.lowest.shape[1] % 2:
            raise ValueError(
                f"an even number of eigenvalues is needed, as they come in pairs; got {self.lowest.shape[1]}"
            )
        both = torch.cat([self.lowest, self.highest], 1)
        order = both.abs().argsort(1, descending=True)[:, : self.lowest.shape[1]]
        return (both.gather(1, order) < 0).double().mean(1).numpy()


def early_hessians(x: Tensor, y: Tensor, steps: Sequence[int], active: int, edges: int, seed: int) -> dict[str, Tensor]:
    """The fields of :class:`EarlyHessians`, for the LeNet.

    Parameters
    ----------
    x, y, steps, seed
        As :func:`first_steps` has them.
    active
        The eigenvalues are those of the Hessian of the first images among which so many are inside their margin; of
        all images where there are fewer.
    edges
        Eigenvalues of either end.
    """
    device = default_device()
    network, x, y = RECIPES[NETWORK].build(1.0).to(device).eval(), x.to(device), y.to(device)
    rows = []
    for theta in first_steps(x, y, steps, seed):
        vector_to_parameters(theta, network.parameters())
        inside = margins(network, x, y) < 1
        number = min(int((inside.cumsum(0) < active).sum()) + 1, len(y))
        probe = torch.randn(len(theta), 1, generator=torch.Generator().manual_seed(seed)).to(device)
        rms = (hinge_hessian(network, x, y) @ probe).double().square().mean().sqrt()
        ends = edge_eigenvalues(hinge_hessian(network, x[:number], y[:number]), edges, seed=seed, tolerance=1e-3)
        lowest, highest = (torch.from_numpy(end.copy()) for end in ends)
        rows.append((inside.double().mean().cpu(), rms.cpu(), torch.tensor(number), lowest, highest))
    columns = (torch.stack(column) for column in zip(*rows, strict=True))
    return dict(zip(("active", "rms", "images", "lowest", "highest"), columns, strict=True)) | {
        "steps": torch.tensor(list(steps))
    }


def kept_early_hessians(
    *, steps: Sequence[int], active: int, edges: int, seed: int, samples: int | None = None
) -> EarlyHessians:
    """:func:`early_hessians` of the training of App G.2, on all training images or ``samples`` of them, made once.

    Raises
    ------
    ValueError
        As :func:`first_steps`.
    """
    train = zero_against_rest(RECIPES[NETWORK].data, split="train", seed=seed, samples=samples)
    arguments = {
        "x": train.x, "y": train.y, "steps": list(steps), "active": active, "edges": edges, "seed": seed,
    }  # fmt: skip
    return EarlyHessians(**cached(early_hessians, arguments))
