"""Data sets, synthetic and real, and the note that says where one came from."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8


@dataclass(frozen=True)
class DataSource:
    """Where a data set came from, as the record keeps it.

    Attributes
    ----------
    name
        Such as ``"MNIST"`` or ``"standard Gaussian features, random labels"``.
    origin
        ``"torchvision"``, ``"image folder (JPEG)"``, ``"generated, seed 0"``; for a stand-in, what replaces it.
    sha256
        Of the file that holds the images or features; None for data that are generated.
    samples
        Number of samples used.
    stand_in
        Whether this replaces the data that the paper used.
    """

    name: str
    origin: str
    sha256: str | None
    samples: int
    stand_in: bool = False


class Arrays(NamedTuple):
    """One split of a data set as its files hold it, or some rows of it.

    Attributes
    ----------
    x
        Pixels from 0 to 255, or features.
    y
        Labels, counted from 0.
    origin, sha256
        As :class:`DataSource` has them.
    """

    x: UInt8[np.ndarray, "n channels height width"] | Float32[np.ndarray, "n d"]
    y: Int64[np.ndarray, " n"]
    origin: str
    sha256: str | None
