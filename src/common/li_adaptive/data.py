"""Two classes out of ten, as Li, App G.2 and G.3, makes them: class 0 against as many images of the rest."""

from dataclasses import dataclass, replace
from operator import index

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from common.data import DataSource, images


@dataclass(frozen=True)
class BinaryData:
    """Images of two classes, equally many of each, in random order.

    Attributes
    ----------
    x
        (n, channels, height, width) float32; over the training split each channel has mean 0 and variance 1.
    y
        (n,) float32, +1 for class 0 and −1 for the rest.
    source
        Where the images came from.
    """

    x: Float[Tensor, "n channels height width"]
    y: Float[Tensor, " n"]
    source: DataSource

    def to(self, device: torch.device | str) -> "BinaryData":
        """The same on another device."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def first(self, samples: int) -> dict[str, Tensor]:
        """``x`` and ``y`` of the first images, at most of all.

        Raises
        ------
        ValueError
            If their number is below 1.
        """
        if samples < 1:
            raise ValueError(f"the number of samples must be at least 1, got {samples}")
        return {"x": self.x[:samples], "y": self.y[:samples]}


def zero_against_rest(name: str, *, split: str, seed: int, samples: int | None = None) -> BinaryData:
    """All images of class 0, or ``samples`` / 2 of them, and equally many drawn from the other classes.

    Parameters
    ----------
    name
        ``"MNIST"`` or ``"CIFAR-10"``.
    split
        ``"train"`` or ``"test"``; the mean and variance are those of the whole training split in either case.
    seed
        Of the draw and of the order.
    samples
        An even number of images; None for all that there are.

    Raises
    ------
    ValueError
        If ``samples`` is odd, below 2 or more than twice the images of class 0.
    """
    train = images.load(name, split="train")
    variance, mean = torch.var_mean(train.x, dim=(0, 2, 3), correction=0, keepdim=True)
    data = train if split == "train" else images.load(name, split=split)
    generator = torch.Generator().manual_seed(index(seed))
    positive, negative = (torch.nonzero(mask).flatten() for mask in (data.y == 0, data.y != 0))
    most = 2 * min(len(positive), len(negative))
    n = most if samples is None else index(samples)
    if n % 2 or not 2 <= n <= most:
        raise ValueError(f"{n} images asked for; of {name}'s {split} split an even number from 2 to {most} can be had")
    chosen = [rows[torch.randperm(len(rows), generator=generator)[: n // 2]] for rows in (positive, negative)]
    rows = torch.cat(chosen)[torch.randperm(n, generator=generator)]
    x = (data.x[rows] - mean) / variance.sqrt()
    y = 1.0 - 2.0 * (data.y[rows] != 0)
    return BinaryData(x, y.float(), replace(data.source, name=f"{name}, 0 against the rest", samples=n))


def shift_and_flip(x: Float[Tensor, "n channels size size"], generator: torch.Generator) -> Tensor:
    """Pad every side by 4 zeros, crop at random to the old size, mirror half of the images (App G.3)."""
    n, channels, size, _ = x.shape
    padded = functional.pad(x, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, n), generator=generator).to(x.device)
    span = torch.arange(size, device=x.device)
    mirrored = (torch.rand(n, generator=generator) < 0.5).to(x.device)
    columns = left[:, None] + torch.where(mirrored[:, None], size - 1 - span, span)
    sample, channel = torch.arange(n, device=x.device), torch.arange(channels, device=x.device)
    return padded[
        sample[:, None, None, None], channel[:, None, None],
        (top[:, None] + span)[:, None, :, None], columns[:, None, None, :],
    ]  # fmt: skip
