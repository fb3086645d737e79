"""The files of a data set: where they lie, whether they are whole, and how they come here.

A file lies in the data folder (``HESSIAN_DATA``) or in the *store*, ``CACHE/data``, which takes decoded images, and
what is downloaded where the data folder is read-only. A damaged file is named in one line and set aside; a new one
appears at one stroke or not at all. ``HESSIAN_OFFLINE=1`` forbids downloads.
"""

import contextlib
import errno
import gzip
import hashlib
import http.client
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pooch
import torch

from common import paths
from common.paths import replacing


class Unavailable(Exception):
    """A source does not have the data; the message says why."""


# ---------------------------------------------------------------------------------------------------------
# Where they lie


def store() -> Path:
    """Folder of decoded images, and of downloads where the data folder is read-only."""
    return paths.CACHE / "data"


def folders() -> tuple[Path, Path]:
    """The folders in which a data set may lie, in the order in which they are searched."""
    return paths.DATA, store()


def writable(folder: Path) -> bool:
    """Whether files may be put into ``folder``, which need not exist yet.

    The mode counts even for the superuser, who could write anyway: read-only is a wish.
    """
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


def brief(path: Path) -> str:
    """``path`` below the data folder or the store, for messages."""
    for root in folders():
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return path.name


def install(found: Mapping[str, Path]) -> None:
    """Copy files, named by their place in the data folder, there or into the store, each at one stroke."""
    for relative, file in found.items():
        root = paths.DATA if writable((paths.DATA / relative).parent) else store()
        with replacing(root / relative) as path:
            shutil.copyfile(file, path)


# ---------------------------------------------------------------------------------------------------------
# Whether they are whole

_named: set[Path] = set()  # damaged files that cannot be set aside, so as to name each only once


def set_aside(path: Path, why: str) -> None:
    """Say in one line that ``path`` is damaged, and rename it out of the way unless its folder is read-only."""
    if writable(path.parent):
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        print(f"{brief(path)} is damaged ({why}): set aside as {aside.name}", flush=True)
    elif path not in _named:
        _named.add(path)
        print(f"{brief(path)} is damaged ({why}): not used; its folder is read-only", flush=True)


def sha256(content: bytes | np.ndarray) -> str:
    """SHA-256 of what is in memory; that of a file is ``pooch.file_hash``."""
    return hashlib.sha256(content).hexdigest()


def verified(relative: str, expected: str) -> bytes:
    """Content of a file with this SHA-256; ``.gz`` is unpacked, what is damaged set aside.

    Raises
    ------
    Unavailable
        If there is no such file, or none that is whole.
    """
    for root in folders():
        for path in (root / relative, root / f"{relative}.gz"):
            if not path.is_file():
                continue
            try:
                content = path.read_bytes()
                content = gzip.decompress(content) if path.suffix == ".gz" else content
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                set_aside(path, f"it does not unpack: {error}")
                continue
            if sha256(content) == expected:
                return content
            set_aside(path, "its SHA-256 is wrong")
    raise Unavailable(f"no intact {relative} in the data folder")


# ---------------------------------------------------------------------------------------------------------
# How they come here

#: Seconds without an answer after which a download is given up.
TIMEOUT = 15
#: What a broken connection or archive, or a wrong checksum (ValueError), raises.
FETCH_ERRORS = (OSError, ValueError, EOFError, zlib.error, tarfile.TarError, http.client.HTTPException)


def _disk_is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def scratch(name: str) -> Iterator[Path]:
    """An empty folder of the store, removed in the end."""
    folder = store() / "download" / name
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def fetching(name: str) -> Iterator[Path]:
    """An empty folder to fetch into, quietly.

    Raises
    ------
    Unavailable
        If ``HESSIAN_OFFLINE`` is set, or if the network does anything wrong in the block.
    OSError
        If the disk is full.
    """
    if os.environ.get("HESSIAN_OFFLINE", "0") not in ("", "0"):
        raise Unavailable("no download, HESSIAN_OFFLINE is set")
    log = pooch.get_logger()
    level = log.level
    log.setLevel("WARNING")
    try:
        with scratch(name) as folder:
            yield folder
    except FETCH_ERRORS as error:
        if _disk_is_full(error):
            raise
        reason: BaseException = error
        while (cause := reason.__cause__ or reason.__context__) is not None:
            reason = cause  # "connection refused" lies at the bottom of four exceptions
        said = (str(reason).strip() or repr(reason)).splitlines()[-1]
        raise Unavailable(f"the download failed: {said}") from error
    finally:
        log.setLevel(level)


def retrieve(urls: Sequence[str], md5: str, folder: Path) -> Path:
    """Download a file, from the first address that has it whole, into ``folder``, under the name in the address.

    Raises
    ------
    OSError
        If the last address cannot be reached, or if the disk is full.
    ValueError
        If the last address has a file with another MD5.
    """
    failure: Exception = ValueError("no address to download from")
    for url in urls:
        name = url.rpartition("/")[2]
        try:
            downloader = pooch.HTTPDownloader(timeout=TIMEOUT)
            return Path(pooch.retrieve(url, f"md5:{md5}", name, folder, downloader=downloader))
        except (OSError, ValueError) as error:
            if _disk_is_full(error):
                raise
            failure = error
    raise failure


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


def torchvision_datasets() -> ModuleType:
    """``torchvision.datasets``, which knows the addresses and the MD5 of MNIST and CIFAR, and reads CIFAR.

    Raises
    ------
    Unavailable
        If torchvision is not installed.
    """
    try:
        return import_torchvision().datasets
    except ImportError as error:
        raise Unavailable("torchvision is not installed") from error
