"""Forest CoverType, lodgepole pine against the rest: scikit-learn's files, or a table of real rows of it.

scikit-learn's layout is ``covertype/{samples,targets}_py3``. A table is ``covertype*.csv.gz`` or ``covertype*.csv`` in
the data folder: a header, 54 features, the class from 1 to 7 last. It may hold a part of the rows, and features that
were rescaled, which the standardization undoes up to the part's own means. Only tables of known SHA-256 are taken:
nothing in a table itself tells rows of CoverType from others.
"""

import gzip
import io
import socket
import warnings

import numpy as np
from jaxtyping import Float, Float32, Int64, Integer

from common import paths
from common.data import Arrays, files
from common.data.files import Unavailable

#: Number of samples of each split. There is no official one: here a fixed random one.
SIZES = {"train": 531_012, "test": 50_000}
#: Number of samples of each of the seven classes. The second, lodgepole pine, is the positive one here.
CLASSES = (211_840, 283_301, 35_754, 2_747, 9_493, 17_367, 20_510)
POSITIVE = 2
#: Tables that are known, by the SHA-256 of the file, with the words of the record.
TABLES = {
    "d1683af154f7279cfb7221e813d44d904346d4965779c56bfbe7c5c74cebf8fd": "stratified subset, 92,962 rows",
}


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


def read_rows(split: str) -> Arrays:
    """One split of the rows in the first known table ``covertype*.csv.gz`` or ``covertype*.csv`` of the data folder.

    Others are left where they are, and named.

    Raises
    ------
    Unavailable
        If there is none.
    """
    for path in sorted(p for end in ("csv.gz", "csv") for p in paths.DATA.glob(f"covertype*.{end}")):
        content = path.read_bytes()
        sha256 = files.sha256(content)
        if sha256 not in TABLES:
            print(f"{files.brief(path)} is not used: no known table of CoverType, SHA-256 {sha256}", flush=True)
            continue
        text = gzip.decompress(content) if path.suffix == ".gz" else content
        table = np.loadtxt(io.BytesIO(text), delimiter=",", skiprows=1, dtype=np.float64, ndmin=2)
        x, y = table[:, :-1], table[:, -1].astype(np.int64)
        return Arrays(*standardized(x, y, split), TABLES[sha256], sha256)
    raise Unavailable("no known table covertype*.csv in the data folder")


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
