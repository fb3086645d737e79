"""The first epoch of a training of Li, App G, step by step: the Hessian over all images while many of them are active.

The hinge loss soon leaves few images inside their margin, and a Hessian over some of the images then comes from one or
none. The steps are those that :func:`~common.li_adaptive.training.train_recipe` takes, made again from their seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common.cache import cached
from common.devices import default_device
from common.hessian.spectral_measure import edge_eigenvalues
from common.li_adaptive.data import zero_against_rest
from common.li_adaptive.hinge_hessian import hinge_hessian, margins
from common.li_adaptive.networks import initialize
from common.li_adaptive.training import BATCH_SIZE, MOMENTUM, RECIPES, HingeLoss


def first_steps(name: str, width: float, x: Tensor, y: Tensor, steps: Sequence[int], seed: int) -> Float[Tensor, "K P"]:
    """Parameters after some numbers of steps of the first epoch, those of ``train_recipe`` with the same arguments.

    Parameters
    ----------
    name, width, x, y, seed
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
    recipe, device = RECIPES[name], default_device()
    network = recipe.build(width)
    kind, scale = recipe.initialization
    initialize(network, kind, torch.Generator().manual_seed(seed), scale=scale)
    network, x, y = network.to(device).train(), x.to(device), y.to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=recipe.lr, momentum=MOMENTUM)
    loss, found = HingeLoss(), {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        generator = torch.Generator().manual_seed(seed * 100_003)
        torch.manual_seed(seed * 100_003)
        order = torch.randperm(len(y), generator=generator).to(device).split(BATCH_SIZE)
        for k in range(max(steps, default=0) + 1):
            if k in steps:
                found[k] = parameters_to_vector(network.parameters()).detach().clone()
            if k == max(steps):
                break
            rows = order[k]
            batch = x[rows] if recipe.augment is None else recipe.augment(x[rows], generator)
            optimizer.zero_grad(set_to_none=True)
            loss(network(batch), y[rows]).backward()
            optimizer.step()
    return torch.stack([found[k] for k in steps])


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
        """Σ|λ_i + λ_{−i}| / Σ(|λ_i| + |λ_{−i}|) over the outermost eigenvalues; 0 for a zero matrix."""
        total = (self.lowest.abs() + self.highest.abs()).sum(1)
        return ((self.lowest + self.highest).abs().sum(1) / total.clamp(min=1e-300)).numpy()

    def negative_share(self) -> Float[np.ndarray, " K"]:
        """Share of negative ones among the k eigenvalues of largest modulus."""
        both = torch.cat([self.lowest, self.highest], 1)
        order = both.abs().argsort(1, descending=True)[:, : self.lowest.shape[1]]
        return (both.gather(1, order) < 0).double().mean(1).numpy()


def early_hessians(
    name: str, width: float, x: Tensor, y: Tensor, steps: Sequence[int], active: int, edges: int, seed: int
) -> dict[str, Tensor]:
    """The fields of :class:`EarlyHessians`.

    Parameters
    ----------
    active
        The eigenvalues are those of the Hessian of the first images among which so many are inside their margin; of
        all images where there are fewer.
    edges
        Eigenvalues of either end.
    """
    device = default_device()
    network, x, y = RECIPES[name].build(width).to(device).eval(), x.to(device), y.to(device)
    rows = []
    for theta in first_steps(name, width, x, y, steps, seed):
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
    name: str, *, steps: Sequence[int], active: int, edges: int, seed: int, samples: int | None = None
) -> EarlyHessians:
    """:func:`early_hessians` of the training of App G at its width, on all training images or ``samples`` of them."""
    train = zero_against_rest(RECIPES[name].data, split="train", seed=seed, samples=samples)
    last = -(-len(train.y) // BATCH_SIZE)
    arguments = {
        "name": name, "width": 1.0, "x": train.x, "y": train.y, "steps": sorted({min(k, last) for k in steps}),
        "active": active, "edges": edges, "seed": seed,
    }  # fmt: skip
    return EarlyHessians(**cached(early_hessians, arguments))
