"""Small data sets in the real layouts, in an empty data folder, and a server to fetch them from."""

import functools
import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import paths
from common.data import cifar, covertype
from common.data import mnist as original_mnist


class Place:
    """A data folder and what tests put into it."""

    def __init__(self, folder: Path):
        self.data, self.store = folder / "data", folder / "cache" / "data"

    def put(self, contents, folder=None):
        """Write files, named by their place in the data folder."""
        for name, content in contents.items():
            path = (folder or self.data) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def pack(self, path, contents, prefix=""):
        """Write a ``.tar.gz`` of these files."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, content in sorted(contents.items(), reverse=True):  # the order in the archive must not matter
                member = tarfile.TarInfo(prefix + name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        self.put({path.name: gzip.compress(buffer.getvalue(), mtime=0)}, path.parent)
        return path

    def damage(self, path, position=None):
        """Flip a bit, in the middle if no position is given."""
        content = bytearray(path.read_bytes())
        content[len(content) // 2 if position is None else position] ^= 1
        path.write_bytes(content)

    def mnist(self, seed=0):
        """The four files of a small MNIST, by name."""
        rng = np.random.default_rng(seed)
        files = {}
        for stem, n in (("train", 60), ("t10k", 20)):
            pixels = rng.integers(256, size=(n, 28, 28), dtype=np.uint8)
            labels = rng.integers(10, size=n, dtype=np.uint8)
            files[f"{stem}-images-idx3-ubyte"] = struct.pack(">4i", 2051, n, 28, 28) + pixels.tobytes()
            files[f"{stem}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, n) + labels.tobytes()
        return files

    def cifar10(self, suffix="png", blue=0, classes=cifar.CLASSES["CIFAR-10"], each=(6, 2)):
        """Pictures by their path below the image folder; class i has red = 20 i, file j green = 30 j, mod 256."""
        pictures = {}
        for split, number in zip(("train", "test"), each, strict=True):
            for i, name in enumerate(classes):
                for j in range(number):
                    buffer = io.BytesIO()
                    colour = (20 * i % 256, 30 * j, blue)
                    Image.new("RGB", (32, 32), colour).save(buffer, {"jpg": "JPEG", "png": "PNG"}[suffix])
                    pictures[f"{split}/{name}/{j:04d}.{suffix}"] = buffer.getvalue()
        return pictures


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Empty data folder and cache, no network, no npm, and every data set small."""
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("HESSIAN_OFFLINE", "1")
    monkeypatch.setattr(original_mnist.shutil, "which", lambda program: None)
    for sizes, small in ((original_mnist.SIZES, 60), (cifar.SIZES, 60), (covertype.SIZES, 600)):
        monkeypatch.setitem(sizes, "train", small)
        monkeypatch.setitem(sizes, "test", small // 3)
    return Place(tmp_path)


@pytest.fixture
def mnist(place, monkeypatch):
    """A small MNIST whose checksums are the known ones; not yet in the data folder."""
    files = place.mnist()
    known = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(original_mnist, "SHA256", known)
    return files


@pytest.fixture
def server(place, tmp_path, monkeypatch):
    """Address of a server on this machine, and the folder that it serves; downloads are allowed."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.delenv("HESSIAN_OFFLINE")
    monkeypatch.setenv("no_proxy", "*")
    yield f"http://127.0.0.1:{server.server_port}/", folder
    server.shutdown()
    thread.join()
    server.server_close()
