"""Forest CoverType, lodgepole pine against the rest, in scikit-learn's layout ``covertype/{samples,targets}_py3``."""

import socket
import warnings

import numpy as np
from jaxtyping import Float, Float32, Int64, Integer

from common.data import Arrays, files
from common.data.files import Unavailable

#: Number of samples of each split. There is no official one: here a fixed random one.
SIZES = {"train": 531_012, "test": 50_000}
#: Number of samples of each of the seven classes. The second, lodgepole pine, is the positive one here.
CLASSES = (211_840, 283_301, 35_754, 2_747, 9_493, 17_367, 20_510)
POSITIVE = 2


def read(split: str) -> Arrays:
    """One split, ``"train"`` or ``"test"``; scikit-learn keeps no checksum of its files, so the content is checked.

    Raises
    ------
    Unavailable
        If it is not there, or damaged.
    """
    from sklearn.datasets import fetch_covtype

    for root in files.folders():
        found = sorted((root / "covertype").glob("[st]a*_py3"))  # samples and targets
        if len(found) < 2:
            continue
        try:
            x, y = fetch_covtype(data_home=root, download_if_missing=False, return_X_y=True)
            if x.shape != (len(y), 54) or tuple(np.bincount(y, minlength=8)[1:]) != CLASSES:
                raise ValueError("not the known number of samples in each class")
        except Exception as error:  # a damaged pickle can raise anything
            for file in found:
                files.set_aside(file, str(error))
            continue
        sha256 = files.sha256(np.ascontiguousarray(x, np.float32))
        return Arrays(*standardized(x, y, split), "scikit-learn", sha256)
    raise Unavailable("no intact covertype in the data folder")


def fetch() -> None:
    """Fetch it as scikit-learn does: it alone makes the files that it reads, and checks what it downloads.

    Raises
    ------
    Unavailable
        If that is not possible.
    """
    from sklearn.datasets import fetch_covtype

    with files.fetching("CoverType") as folder:
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(files.TIMEOUT)  # scikit-learn itself would wait for ever
        try:
            with warnings.catch_warnings(action="ignore"):
                fetch_covtype(data_home=folder, n_retries=1, delay=0.01)
        finally:
            socket.setdefaulttimeout(timeout)
        files.install({f"covertype/{file.name}": file for file in (folder / "covertype").iterdir() if file.is_file()})


def standardized(
    x: Float[np.ndarray, "n d"], y: Integer[np.ndarray, " n"], split: str
) -> tuple[Float32[np.ndarray, "m d"], Int64[np.ndarray, " m"]]:
    """One split of all samples ``x`` and classes ``y``, which count from 1.

    Returns
    -------
    x
        Features, standardized by the training split's mean and deviation; a constant one is 0.
    y
        1 for class 2, else 0.
    """
    order = np.random.default_rng(0).permutation(len(y))
    test, train = np.split(order, [len(y) * SIZES["test"] // sum(SIZES.values())])
    x = x.astype(np.float32)
    mean, deviation = x[train].mean(axis=0, dtype=np.float64), x[train].std(axis=0, dtype=np.float64)
    rows = train if split == "train" else test
    features = (x[rows] - mean.astype(np.float32)) / np.where(deviation > 0, deviation, 1).astype(np.float32)
    return features, (y[rows] == POSITIVE).astype(np.int64)
