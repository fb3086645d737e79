"""Data sets, synthetic and real, and the note that says where one came from."""

from dataclasses import dataclass


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
