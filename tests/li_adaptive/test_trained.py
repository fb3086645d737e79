"""The trainings, spectra and entries of Li at a tiny size: what is kept, and what is enough to be kept."""

import pytest
import torch

from common import paths
from common.li_adaptive import trained as li
from common.li_adaptive.trained import coupled_samples, spectra, submatrix_samples

TINY = {"epochs": 2, "keep": [0, 2], "samples": 32, "width": 1 / 32, "seed": 0}
SETTINGS = {"samples": 8, "iterations": 6, "starts": 2, "edges": 2, "seed": 0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    (paths.CACHE / "data").mkdir(parents=True, exist_ok=True)
    (tmp_path / "data").symlink_to(paths.CACHE / "data")  # decoded images
    monkeypatch.setattr(paths, "CACHE", tmp_path)


def test_spectra_of_the_standardized_network_are_made_once(monkeypatch):
    at = li.trained("VGG", **TINY)
    found = {epoch: spectra(at, epoch, **SETTINGS) for epoch in at.epochs}
    assert list(found) == [0, 2]
    for one in found.values():
        assert one.whole.nodes.shape == (2, 6) and one.bipartite is None
        assert one.lowest[0] <= one.lowest[1] <= one.highest[1] <= one.highest[0]
        assert 0 <= one.active <= 1
    # what is small is enough: history and spectra, brought from another machine without the parameters
    monkeypatch.setattr(li, "hinge_hessian", None)
    monkeypatch.setattr("common.li_adaptive.training.train_sgd", None)
    for file in (paths.CACHE / "li_adaptive.training.train_recipe").iterdir():
        file.unlink()
    again = spectra(li.trained("VGG", **TINY), 2, **SETTINGS)
    assert torch.equal(again.whole.nodes, found[2].whole.nodes)


def test_a_network_at_one_epoch_is_nobody_elses():
    at = li.trained("VGG", **TINY)
    start, end = at.at(0), at.at(2)
    first = [p.clone() for p in start.parameters()]
    assert not all(torch.equal(p, q) for p, q in zip(start.parameters(), end.parameters(), strict=True))
    with torch.no_grad():
        next(end.parameters()).zero_()
    assert all(torch.equal(p, q) for p, q in zip(at.at(0).parameters(), first, strict=True))
    assert not next(at.at(2).parameters()).eq(0).all()
    assert at.size == sum(p.numel() for p in first)
    with pytest.raises(ValueError, match=r"epoch 1 was not kept; there are \[0, 2\]"):
        at.at(1)


def test_entries_of_the_standardized_network():
    at = li.trained("VGG", **TINY)
    assert submatrix_samples(at, 0, size=3, seed=0).shape == (1, 9)
    coupled = coupled_samples(at, 0, rows=3, columns=2, seed=0)
    assert coupled.shape == (1, 6) and (coupled != 0).any()
    with pytest.raises(ValueError, match="unknown network"):
        li.trained("ResNet", **TINY)
