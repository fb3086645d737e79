"""CoverType in scikit-learn's layout: its split, its standardization, its positive class, its damaged files."""

import gzip
import hashlib
import shutil
import socket

import numpy as np
import pytest
import torch

from common.data import covertype, images


@pytest.fixture
def small(place, monkeypatch):
    """A small CoverType; the first feature names the class, the last one is constant."""
    import joblib

    counts = (100, 300, 80, 80, 80, 80, 80)
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(1, 8, dtype=np.int32), counts)
    x = np.concatenate([y[:, None], rng.normal(5, 3, (800, 52)), np.ones((800, 1))], axis=1)
    folder = place.data / "covertype"
    folder.mkdir(parents=True)
    joblib.dump(x, folder / "samples_py3")
    joblib.dump(y, folder / "targets_py3")
    monkeypatch.setattr(covertype, "CLASSES", counts)
    return folder


def test_covertype_in_scikit_learns_layout(small):
    train, test = images.load("CoverType"), images.load("CoverType", split="test")
    assert (train.source.origin, train.source.stand_in, len(train.y), len(test.y)) == ("scikit-learn", False, 600, 200)
    assert train.y.sum() + test.y.sum() == 300
    assert train.x.mean(0).abs().max() < 1e-5
    assert torch.allclose(train.x[:, :-1].std(0, correction=0), torch.ones(53), atol=1e-4)
    assert not train.x[:, -1].any()  # a constant feature stays finite
    for part in (train, test):  # labels belong to their rows, class 2 is positive
        assert len(part.x[part.y == 1, 0].unique()) == 1
        assert not torch.isin(part.x[part.y == 0, 0], part.x[part.y == 1, 0]).any()


def test_damaged_files_are_set_aside(small, capsys):
    (small / "targets_py3").write_bytes((small / "targets_py3").read_bytes()[:200])
    assert images.load("CoverType").source.stand_in
    assert "covertype/targets_py3 is damaged" in capsys.readouterr().out
    assert sorted(file.name for file in small.iterdir()) == ["samples_py3.damaged", "targets_py3.damaged"]


def test_other_rows_are_not_the_known_ones(small, monkeypatch, capsys):
    monkeypatch.setattr(covertype, "CLASSES", (101, 299, 80, 80, 80, 80, 80))
    assert images.load("CoverType").source.stand_in
    assert "samples_py3 is damaged (not the known number of samples in each class)" in capsys.readouterr().out


def test_download(small, place, monkeypatch, capsys):
    """scikit-learn fetches into a folder of its own; what it wrote is installed, and that it could not is said."""
    import sklearn.datasets

    read = sklearn.datasets.fetch_covtype
    source = small.rename(small.with_name("far away"))
    online = False

    def fetch_covtype(*, data_home, download_if_missing=True, **arguments):
        if not download_if_missing:
            return read(data_home=data_home, download_if_missing=False, **arguments)
        if not online:
            raise TimeoutError("timed out")
        shutil.copytree(source, data_home / "covertype")

    monkeypatch.setattr(sklearn.datasets, "fetch_covtype", fetch_covtype)
    monkeypatch.delenv("HESSIAN_OFFLINE")
    assert images.load("CoverType").source.stand_in
    assert (
        "no known table covertype*.csv in the data folder; the download failed: timed out)" in capsys.readouterr().out
    )
    online = True
    assert not images.load("CoverType").source.stand_in
    assert {file.name for file in small.iterdir()} == {"samples_py3", "targets_py3"}
    assert socket.getdefaulttimeout() is None and not list((place.store / "download").iterdir())


def table(x, y):
    """Rows as a table, the class last, under a header."""
    header = ",".join([*(f"feature {j}" for j in range(x.shape[1])), "Cover_Type"])
    lines = [",".join(f"{value:g}" for value in (*row, label)) for row, label in zip(x, y, strict=True)]
    return "\n".join([header, *lines, ""]).encode()


@pytest.fixture
def rows():
    """Some rows, fewer than CoverType has, whose first feature names the class."""
    y = np.repeat(np.arange(1, 8), (20, 30, 10, 10, 10, 10, 10))
    rng = np.random.default_rng(1)
    return np.concatenate([y[:, None] / 7, rng.random((100, 53))], axis=1), y


@pytest.mark.parametrize("packed", [True, False])
def test_a_known_table_of_real_rows_is_real_data_in_the_words_of_the_record(place, rows, packed, monkeypatch):
    content = gzip.compress(table(*rows)) if packed else table(*rows)
    monkeypatch.setattr(covertype, "TABLES", {hashlib.sha256(content).hexdigest(): "stratified subset, 100 rows"})
    place.put({"covertype_part.csv.gz" if packed else "covertype_part.csv": content})
    train, test = images.load("CoverType"), images.load("CoverType", split="test")
    assert (len(train.y), len(test.y)) == (75, 25)  # the shares of the splits of all rows
    assert (train.source.origin, train.source.stand_in) == ("stratified subset, 100 rows", False)
    assert train.y.sum() + test.y.sum() == 30
    assert train.x.mean(0).abs().max() < 1e-5
    for part in (train, test):
        assert len(part.x[part.y == 1, 0].unique()) == 1
    assert len(images.load("CoverType", samples=75).y) == 75
    with pytest.raises(ValueError, match="76 samples of CoverType asked for; its train split has 1 to 75"):
        images.load("CoverType", samples=76)


@pytest.mark.parametrize("cut", [False, True])
def test_an_unknown_table_is_not_taken_for_real_rows_and_is_left(place, rows, cut, capsys):
    content = gzip.compress(table(*rows))
    place.put({"covertype.csv.gz": content[:200] if cut else content})
    assert images.load("CoverType").source.stand_in
    assert "covertype.csv.gz is not used: no known table of CoverType, SHA-256 " in capsys.readouterr().out
    assert (place.data / "covertype.csv.gz").exists()
