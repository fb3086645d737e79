"""What stands in for data that cannot be had: made from what scikit-learn ships, as large, and hardly as good.

Each function takes the split, the number of samples ``n`` and a generator, and returns :class:`~common.data.Arrays`
in the shapes of the real data.
"""

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from common.data import Arrays, covertype


def _digits(
    split: str, n: int, size: int, generator: torch.Generator
) -> tuple[Float[Tensor, "n 1 size size"], Int64[Tensor, " n"]]:
    """``n`` of scikit-learn's 8x8 handwritten digits, each turned, scaled and moved a little.

    Every sixth is kept for the test split. Returns intensities in [0, 1] and labels.
    """
    from sklearn.datasets import load_digits

    pixels, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    keep = (torch.arange(len(labels)) % 6 == 0) == (split == "test")
    small, labels = pixels[keep].reshape(-1, 1, 8, 8).float() / 16, labels[keep]
    pick = torch.randint(len(labels), (n,), generator=generator)
    angle = 0.15 * torch.randn(n, generator=generator)
    scale = 1.3 + 0.1 * torch.randn(n, generator=generator)  # the digit fills about 3/4 of the picture
    shift = 0.1 * torch.randn(n, 2, 1, generator=generator)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(n, 2, 2)
    theta = torch.cat([scale[:, None, None] * turn, shift], 2)
    chunks = [
        functional.grid_sample(
            small[p], functional.affine_grid(t, [len(p), 1, size, size], align_corners=False), align_corners=False
        )
        for p, t in zip(pick.split(4096), theta.split(4096), strict=True)
    ]
    return torch.cat(chunks), labels[pick]


def _patches(n: int, generator: torch.Generator) -> UInt8[Tensor, "n 3 32 32"]:
    """``n`` random patches of scikit-learn's two sample photographs."""
    from sklearn.datasets import load_sample_images

    photographs = torch.from_numpy(np.stack(load_sample_images().images))
    _, height, width, _ = photographs.shape
    which = torch.randint(len(photographs), (n, 1, 1), generator=generator)
    top = torch.randint(height - 31, (n, 1, 1), generator=generator)
    left = torch.randint(width - 31, (n, 1, 1), generator=generator)
    patches = photographs[which, top + torch.arange(32)[:, None], left + torch.arange(32)]
    return patches.permute(0, 3, 1, 2).contiguous()


def like_mnist(split: str, n: int, generator: torch.Generator) -> Arrays:
    """Handwritten digits, enlarged."""
    digits, labels = _digits(split, n, 28, generator)
    x = (255 * digits).round().to(torch.uint8)
    return Arrays(x.numpy(), labels.numpy(), "scikit-learn's 8x8 handwritten digits, enlarged and moved", None)


def like_cifar10(split: str, n: int, generator: torch.Generator) -> Arrays:
    """Handwritten digits in a random colour, light on dark or dark on light, over patches of photographs."""
    digits, labels = _digits(split, n, 32, generator)
    x = _patches(n, generator)
    for rows in torch.arange(n).split(4096):
        patch, weight = x[rows].float(), 0.8 * digits[rows]
        dark = patch.mean((2, 3), keepdim=True) < 127.5
        colour = 127.5 * (dark + torch.rand(len(rows), 3, 1, 1, generator=generator))
        x[rows] = torch.lerp(patch, colour, weight).round().to(torch.uint8)
    origin = "scikit-learn's handwritten digits blended over 32x32 patches of its two sample photographs"
    return Arrays(x.numpy(), labels.numpy(), origin, None)


def like_cifar100(split: str, n: int, generator: torch.Generator) -> Arrays:
    """Patches of photographs with random labels, in either split."""
    x = _patches(n, generator).numpy()
    y = torch.randint(100, (n,), generator=generator).numpy()
    origin = "32x32 patches of scikit-learn's two sample photographs with random 100-way labels"
    return Arrays(x, y, origin, None)


def relabelled(cifar10: Arrays, n: int, generator: torch.Generator) -> Arrays:
    """``n`` images of CIFAR-10 with random labels out of 100: the better stand-in for CIFAR-100."""
    rows = torch.randperm(len(cifar10.y), generator=generator)[:n].numpy()
    # an image keeps its label, whichever others are drawn
    y = torch.randint(100, (len(cifar10.y),), generator=torch.Generator().manual_seed(0)).numpy()
    origin = f"CIFAR-10 ({cifar10.origin}) with random 100-way labels"
    return Arrays(cifar10.x[rows], y[rows], origin, cifar10.sha256)


def like_covertype(split: str, n: int, generator: torch.Generator) -> Arrays:
    """Gaussian clusters, split and standardized like the real data; one problem for both splits and all seeds."""
    from sklearn.datasets import make_classification

    x, y = make_classification(
        sum(covertype.SIZES.values()),
        54,
        n_informative=10,
        n_redundant=10,
        n_classes=7,
        weights=list(np.array(covertype.CLASSES) / sum(covertype.CLASSES)),
        random_state=0,
    )
    x, y = covertype.standardized(x, y + 1, split)
    rows = torch.randperm(len(y), generator=generator)[:n].numpy()
    origin = "scikit-learn's make_classification, 54 features, 7 classes as frequent as the real ones"
    return Arrays(x[rows], y[rows], origin, None)
