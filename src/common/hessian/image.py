"""Images of matrices too large to form: the moduli of their entries, pooled to pixels tile by tile."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Pool = Literal["mean", "max"]


class PooledImage:
    """Mean or maximum of |H| over the pixels of an image; entries are added in any order, each exactly once."""

    def __init__(self, rows: int, columns: int, pixels: int, pool: Pool, device: torch.device):
        if not pixels >= 1:
            raise ValueError(f"the number of pixels must be at least 1, got {pixels}")
        if min(rows, columns) < 1:
            raise ValueError(f"an image needs at least one row and column, got {rows} and {columns}")
        if pool not in ("mean", "max"):
            raise ValueError(f"pool must be 'mean' or 'max', got {pool!r}")
        self.pool = pool
        self._pixel, counts = [], []
        for length in (rows, columns):
            size = min(length, max(1, round(pixels * length / max(rows, columns))))
            self._pixel.append(torch.arange(length, device=device) * size // length)
            counts.append(torch.bincount(self._pixel[-1], minlength=size).to(torch.float64))
        self._count = torch.outer(*counts)
        self._total = torch.zeros_like(self._count)

    def add(self, rows: slice, columns: slice, values: Float[Tensor, "R S"]) -> None:
        """Add the entries of these rows and columns."""
        row_pixel, top, height = self._pixels(0, rows)
        strip = values.new_zeros(height, values.shape[1])
        self._reduce(strip, 0, row_pixel, values.abs())
        self._add_strip(top, columns, strip, factor=0.5 if rows == columns else 1.0)

    def add_unique(
        self, rows: slice, columns: slice, a: Int[Tensor, " f"], b: Int[Tensor, " f"], values: Float[Tensor, "f B"]
    ) -> None:
        """Add B symmetric blocks of order d side by side, from their unique entries (a, b), shape (entries, B).

        The rows are d and the columns B d. The d entries with a = b come first.
        """
        (row_pixel, top, height), d = self._pixels(0, rows), int(b[-1]) + 1
        strip, moduli = values.new_zeros(height * d, values.shape[1]), values.abs()
        self._reduce(strip, 0, row_pixel[a] * d + b, moduli)
        self._reduce(strip, 0, row_pixel[b[d:]] * d + a[d:], moduli[d:])
        self._add_strip(top, columns, strip.view(height, d, -1).transpose(1, 2).flatten(1))

    def _pixels(self, axis: int, which: slice) -> tuple[Tensor, int, int]:
        """Pixels of some rows or columns counted from the first one, the first one, and how many they are."""
        pixel = self._pixel[axis][which]
        first = int(pixel[0])
        return pixel - first, first, int(pixel[-1]) - first + 1

    def _add_strip(self, top: int, columns: slice, strip: Tensor, factor: float = 1.0) -> None:
        column_pixel, left, width = self._pixels(1, columns)
        patch = strip.new_zeros(len(strip), width)
        self._reduce(patch, 1, column_pixel, strip)
        region = self._total[top : top + len(strip), left : left + width]
        if self.pool == "mean":
            region.add_(patch, alpha=factor)
        else:
            region.copy_(torch.maximum(region, patch))

    def _reduce(self, target: Tensor, dim: int, pixel: Tensor, values: Tensor) -> None:
        index = (pixel[:, None] if dim == 0 else pixel).expand(values.shape)
        if self.pool == "mean":
            target.scatter_add_(dim, index, values)
        else:
            target.scatter_reduce_(dim, index, values, "amax")

    def finish(self, mirror: bool) -> Float[Tensor, "rows columns"]:
        """Return the image; ``mirror`` adds the transpose of what was added, tiles with rows = columns apart."""
        if self.pool == "max":
            return torch.maximum(self._total, self._total.T) if mirror else self._total
        return (self._total + self._total.T if mirror else self._total) / self._count
