"""CIFAR-10 and CIFAR-100 in torchvision's batches or as a folder of images.

The image folder is ``cifar10/{train,test}/<class>/*`` or ``cifar100/{train,test}/<fine class>/*``, or the same packed
as ``cifar10*.tar.gz`` or ``cifar100*.tar.gz``. It is decoded once: the pixels are kept in the store, under the SHA-256
of what they came from, and serve even without it.
"""

import contextlib
import gzip
import hashlib
import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch

from common import paths
from common.data import Arrays, files
from common.data.files import Unavailable
from common.paths import replacing

#: Number of samples of each split, of either.
SIZES = {"train": 50_000, "test": 10_000}
#: Folder of the original batches in torchvision's layout, and the archive that they come in.
BATCHES = {
    "CIFAR-10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "CIFAR-100": ("cifar-100-python", "cifar-100-python.tar.gz"),
}
#: Classes by data set, in its own order, which is the alphabetical one.
CLASSES = {
    "CIFAR-10": tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    "CIFAR-100": tuple(
        """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
        castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
        elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
        man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
        pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
        tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
        """.split()
    ),
}
#: Image-folder archives that are known; others are taken too, identified by their SHA-256.
ARCHIVES = {
    "76d5adebe5e66fda4a50ca75e7a0a2e23726849e4663c8b722304653bf6d0190": (
        "image folder, all 60,000 images recompressed as JPEG"
    ),
    "a936a908eea09828e79a7365f31ff77a264a5f3ee8172b803064664156d0d93e": "image folder, all 60,000 images as PNG",
}

# ---------------------------------------------------------------------------------------------------------
# The original batches


def _torchvision(name: str) -> type:
    """Class of the data set in torchvision, which may be missing."""
    datasets = files.torchvision_datasets()
    return {"CIFAR-10": datasets.CIFAR10, "CIFAR-100": datasets.CIFAR100}[name]


def read_batches(name: str, split: str) -> Arrays:
    """One split of ``"CIFAR-10"`` or ``"CIFAR-100"`` in torchvision's layout, or from its archive, by their MD5.

    Raises
    ------
    Unavailable
        If it is not there, or damaged, or if torchvision is not installed.
    """
    inner, packed = BATCHES[name]
    with contextlib.suppress(Unavailable):
        return _read_unpacked(name, split)
    for root in files.folders():
        archive = root / packed
        if not archive.is_file():
            continue
        if pooch.file_hash(str(archive), "md5") != _torchvision(name).tgz_md5:
            files.set_aside(archive, "its MD5 is wrong")
            continue
        with files.scratch(name) as folder:
            _install(archive, name, folder)
        return _read_unpacked(name, split)
    raise Unavailable(f"no intact {inner} in the data folder")


def _read_unpacked(name: str, split: str) -> Arrays:
    """One split from the unpacked batches; what is damaged is set aside."""
    inner, _ = BATCHES[name]
    for root in files.folders():
        if not (root / inner).is_dir():
            continue
        dataset = _torchvision(name)
        known = [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], dataset.meta["md5"])]
        there = [root / inner / file for file, _ in known if (root / inner / file).is_file()]
        md5 = {root / inner / file: md5 for file, md5 in known}
        bad = [path for path in there if pooch.file_hash(str(path), "md5") != md5[path]]
        for path in bad:
            files.set_aside(path, "its MD5 is wrong")
        if bad or len(there) < len(known):
            continue
        batches = dataset(root, train=split == "train")
        x = np.ascontiguousarray(batches.data.transpose(0, 3, 1, 2))
        return Arrays(x, np.asarray(batches.targets, np.int64), "torchvision", files.sha256(x))
    raise Unavailable(f"no intact {inner} in the data folder")


def fetch(name: str) -> None:
    """Fetch the original batches from where torchvision has them.

    Raises
    ------
    Unavailable
        If that is not possible.
    """
    dataset = _torchvision(name)
    with files.fetching(name) as folder:
        _install(files.retrieve([dataset.url], dataset.tgz_md5, folder), name, folder)


def _install(archive: Path, name: str, folder: Path) -> None:
    """Put the batches of a whole archive into the data folder, by way of ``folder``."""
    inner, _ = BATCHES[name]
    pooch.Untar(extract_dir=str(folder))(str(archive), "download", None)
    files.install({f"{inner}/{file.name}": file for file in (folder / inner).iterdir()})


# ---------------------------------------------------------------------------------------------------------
# Folders of images


class _Picture(NamedTuple):
    """A file of an image folder: the names of its class and file, and how to read it."""

    label: str
    file: str
    read: Callable[[], bytes]


class _DamagedPicture(Exception):
    """A picture does not decode; the message is ``<class>/<file>``."""


def _stem(name: str) -> str:
    """Of its image folder, archives and decoded files: ``"cifar10"`` or ``"cifar100"``."""
    return name.lower().replace("-", "")


def read_images(name: str, split: str) -> Arrays:
    """One split of ``"CIFAR-10"`` or ``"CIFAR-100"`` from its image folder, else from an archive of it, else decoded.

    What was decoded once serves where its source is not.

    Raises
    ------
    Unavailable
        If there is none that is whole; why another one is not used is printed.
    """
    stem = _stem(name)
    archives = sorted(p for end in ("tar.gz", "tgz") for p in paths.DATA.glob(f"{stem}*.{end}"))
    for source in (paths.DATA / stem, *(p for p in archives if not p.name.startswith(f"{stem}0"))):  # 10 is not 100
        if not source.exists():
            continue
        try:
            return _read_folder(name, source, split) if source.is_dir() else _read_archive(name, source, split)
        except Unavailable as error:
            if source.exists():  # otherwise it was named as it was set aside
                print(f"{files.brief(source)} is not used: {error}", flush=True)
    for path in sorted(files.store().glob(f"{stem}-{split}-*.npz")):
        if (decoded := _read_decoded(name, split, path.stem.rpartition("-")[2])) is not None:
            return decoded
    raise Unavailable(f"no image folder {stem} in the data folder")


def _read_folder(name: str, folder: Path, split: str) -> Arrays:
    """One split of an image folder, identified by the names and contents of its files."""
    found = sorted(p for p in (folder / split).glob("*/*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    digest = hashlib.sha256()
    for path in found:
        content = path.read_bytes()
        digest.update(f"{path.parent.name}/{path.name}\0{len(content)}\0".encode() + content)
    sha256 = digest.hexdigest()
    if (decoded := _read_decoded(name, split, sha256)) is not None:
        return decoded
    pictures = [_Picture(path.parent.name, path.name, path.read_bytes) for path in found]
    try:
        return _decode(name, split, pictures, sha256)
    except _DamagedPicture as error:
        files.set_aside(folder / split / str(error), "it does not decode")
        raise Unavailable(f"{split}/{error} is damaged") from error


def _read_archive(name: str, archive: Path, split: str) -> Arrays:
    """One split of a packed image folder, identified by the archive."""
    content = archive.read_bytes()
    sha256 = files.sha256(content)
    if (decoded := _read_decoded(name, split, sha256)) is not None:
        return decoded
    try:
        content = gzip.decompress(content)  # the whole of it, so that its checksum is checked
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            found = [(Path(m.name), m.offset_data, m.size) for m in tar if m.isfile()]
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        files.set_aside(archive, f"it does not unpack: {error}")
        raise Unavailable("it is damaged") from error
    pictures = [
        _Picture(path.parts[-2], path.name, lambda start=start, size=size: content[start : start + size])
        for path, start, size in sorted(found)
        if path.suffix.lower() in (".jpg", ".jpeg", ".png")
        and path.parts[-3:-2] == (split,)
        and not path.name.startswith(".")
    ]
    try:
        return _decode(name, split, pictures, sha256)
    except _DamagedPicture as error:
        files.set_aside(archive, f"{split}/{error} does not decode")
        raise Unavailable("it is damaged") from error


def _decoded_path(name: str, split: str, sha256: str) -> Path:
    """File of the decoded images of one split of the source with this SHA-256."""
    return files.store() / f"{_stem(name)}-{split}-{sha256}.npz"


def _read_decoded(name: str, split: str, sha256: str) -> Arrays | None:
    """Decoded images, if they are there; the file's own checksums are checked as it is read."""
    path = _decoded_path(name, split, sha256)
    if not path.is_file():
        return None
    try:
        with np.load(path) as file:
            return Arrays(file["x"], file["y"], ARCHIVES.get(sha256, str(file["kind"])), sha256)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        files.set_aside(path, str(error))
        return None


def _decode(name: str, split: str, pictures: Sequence[_Picture], sha256: str) -> Arrays:
    """Decode the pictures, sorted by class and file, and keep them."""
    labels = sorted({p.label for p in pictures})
    if tuple(labels) != CLASSES[name]:
        raise Unavailable(f"the folders in {split} are not {name}'s {len(CLASSES[name])} classes")
    y = np.array([labels.index(p.label) for p in pictures], np.int64)
    each = SIZES[split] // len(labels)
    if not (np.bincount(y) == each).all():
        raise Unavailable(f"{split} does not have {each} images in each class")
    from PIL import Image, UnidentifiedImageError

    print(f"{name}: decoding {len(pictures)} images ({split}), once", flush=True)
    x = np.empty((len(pictures), 3, 32, 32), np.uint8)
    for i, picture in enumerate(pictures):
        try:
            with Image.open(io.BytesIO(picture.read())) as image:
                x[i] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise _DamagedPicture(f"{picture.label}/{picture.file}") from error
    png = all(Path(picture.file).suffix.lower() == ".png" for picture in pictures)
    kind = "image folder, PNG" if png else "image folder, recompressed as JPEG"  # JPEG changes the pixels
    if files.writable(files.store()):
        with replacing(_decoded_path(name, split, sha256)) as path:
            np.savez(path, x=x, y=y, kind=np.array(kind))
    return Arrays(x, y, ARCHIVES.get(sha256, kind), sha256)
