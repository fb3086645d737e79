"""CIFAR: the image folder and its decoded pixels, damaged files, torchvision's batches and their archive."""

import hashlib
import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import paths
from common.data import cifar, files, images


def check(found, blue=0, tolerance=0.0):
    """Labels and pixels are those of ``Place.cifar10``."""
    n = len(found.y) // 10
    assert found.y.tolist() == list(itertools.chain.from_iterable([i] * n for i in range(10)))
    expected = torch.tensor([[20 * i, 30 * j, blue] for i in range(10) for j in range(n)]) / 255
    assert torch.allclose(found.x, expected[:, :, None, None].expand(-1, -1, 32, 32), atol=tolerance)


def folder(pictures):
    return {f"cifar10/{name}": content for name, content in pictures.items()}


def file_sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", ["folder", "archive", "archive with a folder cifar10"])
def test_image_folder_is_decoded_once(place, form, capsys):
    archive = place.data / "cifar10_images.tar.gz"
    if form == "folder":
        place.put(folder(place.cifar10()))
    else:
        place.pack(archive, place.cifar10(), "./cifar10/" if form != "archive" else "")
    for split, n in (("train", 60), ("test", 20)):
        first, again = (images.load("CIFAR-10", split=split) for _ in range(2))
        check(first)
        assert torch.equal(again.x, first.x) and torch.equal(again.y, first.y)
        assert again.source == first.source
        assert (first.source.origin, first.source.samples, first.source.stand_in) == ("image folder, PNG", n, False)
        assert capsys.readouterr().out == f"CIFAR-10: decoding {n} images ({split}), once\n"
    if form != "folder":
        assert first.source.sha256 == file_sha256(archive)


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_what_was_decoded_serves_where_its_source_is_not(place, form, tmp_path, monkeypatch, capsys):
    if form == "folder":
        place.put(folder(place.cifar10()))
    else:
        place.pack(place.data / "cifar10.tar.gz", place.cifar10())
    before = {split: images.load("CIFAR-10", split=split) for split in ("train", "test")}
    capsys.readouterr()
    monkeypatch.setattr(paths, "DATA", tmp_path / "elsewhere")
    assert images.available("CIFAR-10")
    for split, found in before.items():
        after = images.load("CIFAR-10", split=split)
        assert torch.equal(after.x, found.x) and after.source == found.source
    assert capsys.readouterr() == ("", "")
    for decoded in place.store.glob("*.npz"):
        place.damage(decoded)
    assert not images.available("CIFAR-10")


def test_recompressed_images_say_so(place, monkeypatch):
    archive = place.pack(place.data / "cifar10.tar.gz", place.cifar10("jpg"))
    found = images.load("CIFAR-10")
    check(found, tolerance=3 / 255)
    assert found.source.origin == "image folder, recompressed as JPEG"
    monkeypatch.setattr(cifar, "ARCHIVES", {file_sha256(archive): "a known archive"})
    assert images.load("CIFAR-10").source.origin == "a known archive"


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_different_data_never_share_a_cache_entry(place, form):
    """The same names, sizes and times with other contents are other data."""
    for blue in (0, 200, 0):
        if form == "folder":
            place.put(folder(place.cifar10(blue=blue)))
            written = list((place.data / "cifar10").glob("*/*/*"))
        else:
            written = [place.pack(place.data / "cifar10.tar.gz", place.cifar10(blue=blue))]
        for path in written:
            os.utime(path, (0, 0))
        check(images.load("CIFAR-10"), blue=blue)
    assert len(list(place.store.glob("*.npz"))) == 2


def test_damaged_cache_entry_is_made_again(place, capsys):
    place.pack(place.data / "cifar10.tar.gz", place.cifar10())
    images.load("CIFAR-10")
    (decoded,) = place.store.glob("*.npz")
    place.damage(decoded)
    capsys.readouterr()
    check(images.load("CIFAR-10"))
    out = capsys.readouterr().out
    assert f"{decoded.name} is damaged" in out and "decoding" in out


def test_damaged_archive_gives_way_to_the_next(place, capsys):
    bad = place.pack(place.data / "cifar10_a.tar.gz", place.cifar10())
    place.pack(place.data / "cifar10_b.tar.gz", place.cifar10(blue=9))
    place.damage(bad)
    check(images.load("CIFAR-10"), blue=9)
    out = capsys.readouterr().out
    assert out.startswith("cifar10_a.tar.gz is damaged (") and "set aside as cifar10_a.tar.gz.damaged\n" in out
    assert not bad.exists()


def test_damaged_picture_is_named(place, capsys):
    place.put(folder(place.cifar10()) | {"cifar10/train/frog/0002.png": b""})
    assert images.load("CIFAR-10").source.stand_in
    assert "cifar10/train/frog/0002.png is damaged (it does not decode)" in capsys.readouterr().out
    check(images.load("CIFAR-10", split="test"))


@pytest.mark.parametrize("change", ["class", "file"])
def test_what_is_not_cifar10_is_not_used_and_left_alone(place, change, capsys):
    pictures = place.cifar10(classes=(*cifar.CLASSES["CIFAR-10"][:-1], "zebra" if change == "class" else "truck"))
    if change == "file":
        pictures.pop("train/dog/0003.png")
    archive = place.pack(place.data / "cifar10.tar.gz", pictures)
    assert images.load("CIFAR-10").source.stand_in
    why = {
        "class": "the folders in train are not CIFAR-10's 10 classes",
        "file": "train does not have 6 images in each class",
    }[change]
    assert f"cifar10.tar.gz is not used: {why}\n" in capsys.readouterr().out
    assert archive.exists()


def test_an_archive_of_cifar100_is_none_of_cifar10(place, capsys):
    place.put({"cifar100_images.tar.gz": b"whatever"})
    place.pack(place.data / "cifar10_images.tar.gz", place.cifar10())
    check(images.load("CIFAR-10"))
    assert capsys.readouterr().out == "CIFAR-10: decoding 60 images (train), once\n"
    assert (place.data / "cifar100_images.tar.gz").exists()


def test_cifar100_as_an_archive_of_images(place, monkeypatch, capsys):
    """The fine classes in their alphabetical order, which is torchvision's; an archive of CIFAR-10 is not taken."""
    for split, size in (("train", 200), ("test", 100)):
        monkeypatch.setitem(cifar.SIZES, split, size)
    classes = cifar.CLASSES["CIFAR-100"]
    assert len(classes) == len(set(classes)) == 100 and list(classes) == sorted(classes)
    place.pack(place.data / "cifar10_images.tar.gz", place.cifar10(each=(20, 10)))
    archive = place.pack(
        place.data / "cifar100_images.tar.gz", place.cifar10(classes=classes, each=(2, 1)), "cifar100/"
    )
    for split, each in (("train", 2), ("test", 1)):
        found = images.load("CIFAR-100", split=split)
        assert found.y.tolist() == [i for i in range(100) for _ in range(each)]
        expected = torch.tensor([[20 * i % 256, 30 * j, 0] for i in range(100) for j in range(each)]) / 255
        assert torch.equal(found.x, expected[:, :, None, None].expand(-1, -1, 32, 32))
        assert (found.source.origin, found.source.stand_in) == ("image folder, PNG", False)
        assert found.source.sha256 == file_sha256(archive)
        assert capsys.readouterr().out == f"CIFAR-100: decoding {100 * each} images ({split}), once\n"
    assert images.available("CIFAR-100")
    assert images.load("CIFAR-10").y.bincount().tolist() == [20] * 10  # nor the other way round


DECODE = """
from common.data import cifar, images
cifar.SIZES.update(train=60, test=20)
print(images.load("CIFAR-10").source.sha256)
"""


def test_two_processes_decode_once(place):
    archive = place.pack(place.data / "cifar10.tar.gz", place.cifar10())
    archive.chmod(0o444)
    place.data.chmod(0o555)
    environment = {**os.environ, "HESSIAN_DATA": str(paths.DATA), "HESSIAN_CACHE": str(paths.CACHE)}
    try:
        processes = [
            subprocess.Popen([sys.executable, "-c", DECODE], env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        said = [process.communicate()[0] for process in processes]
    finally:
        place.data.chmod(0o755)
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(text.count("decoding") for text in said) == 1
    assert {text.splitlines()[-1] for text in said} == {file_sha256(archive)}
    assert [p.name for p in place.data.iterdir()] == [archive.name]


# ---------------------------------------------------------------------------------------------------------
# The original batches

BOTH = pytest.mark.parametrize(
    ("name", "inner"), [("CIFAR-10", "cifar-10-batches-py"), ("CIFAR-100", "cifar-100-python")]
)


class Batches:
    """A small CIFAR in torchvision's layout, whose MD5 sums torchvision takes for the right ones."""

    def __init__(self, name, inner, archive, place, monkeypatch):
        rng = np.random.default_rng(0)
        classes, key = {"CIFAR-10": (10, "labels"), "CIFAR-100": (100, "fine_labels")}[name]
        pixels = rng.integers(256, size=(80, 3072), dtype=np.uint8)
        self.x, self.y = torch.tensor(pixels).reshape(-1, 3, 32, 32) / 255, rng.integers(classes, size=80).tolist()
        dump = {
            "data_batch_1": {"data": pixels[:60], key: self.y[:60]},
            "test_batch": {"data": pixels[60:], key: self.y[60:]},
            "meta": {"label_names": [str(i) for i in range(classes)]},
        }
        contents = {file: pickle.dumps(content) for file, content in dump.items()}
        md5 = {file: hashlib.md5(content).hexdigest() for file, content in contents.items()}
        self.name = name
        self.archive = place.pack(archive, {f"{inner}/{f}": c for f, c in contents.items()})
        datasets = files.torchvision_datasets()
        self.dataset = {"CIFAR-10": datasets.CIFAR10, "CIFAR-100": datasets.CIFAR100}[name]
        for field, value in {
            "train_list": [["data_batch_1", md5["data_batch_1"]]],
            "test_list": [["test_batch", md5["test_batch"]]],
            "meta": {"filename": "meta", "key": "label_names", "md5": md5["meta"]},
            "tgz_md5": hashlib.md5(self.archive.read_bytes()).hexdigest(),
        }.items():
            monkeypatch.setattr(self.dataset, field, value)

    def check(self):
        """Both splits are found, and right."""
        for split, rows in (("train", slice(60)), ("test", slice(60, 80))):
            found = images.load(self.name, split=split)
            assert torch.equal(found.x, self.x[rows]) and found.y.tolist() == self.y[rows]
            assert (found.source.origin, found.source.stand_in) == ("torchvision", False)


@BOTH
def test_torchvisions_batches_and_their_archive(place, name, inner, monkeypatch, capsys):
    batches = Batches(name, inner, place.data / cifar.BATCHES[name][1], place, monkeypatch)
    assert batches.dataset.base_folder == inner and batches.dataset.filename == batches.archive.name
    batches.check()
    place.damage(place.data / inner / "test_batch", 500)  # made again from the archive
    batches.check()
    said = capsys.readouterr().out
    assert said == f"{inner}/test_batch is damaged (its MD5 is wrong): set aside as test_batch.damaged\n"
    batches.archive.unlink()
    (place.data / inner / "test_batch").unlink()
    assert not images.available(name)


@BOTH
def test_download(place, server, name, inner, monkeypatch, capsys):
    url, served = server
    batches = Batches(name, inner, served / "cifar.tar.gz", place, monkeypatch)
    monkeypatch.setattr(batches.dataset, "url", f"{url}cifar.tar.gz")
    batches.check()
    assert capsys.readouterr() == ("", "")
    assert [p.name for p in place.data.iterdir()] == [inner] and not list((place.store / "download").iterdir())


def test_a_damaged_archive_is_set_aside(place, monkeypatch, capsys):
    batches = Batches("CIFAR-10", "cifar-10-batches-py", place.data / "cifar-10-python.tar.gz", place, monkeypatch)
    place.damage(batches.archive)
    assert images.load("CIFAR-10").source.stand_in
    assert capsys.readouterr().out.startswith("cifar-10-python.tar.gz is damaged (its MD5 is wrong): set aside as")
