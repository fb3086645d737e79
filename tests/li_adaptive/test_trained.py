"""The trainings, spectra and entries of Li at a tiny size: the path that the paper's scale takes on a GPU."""

import pytest
import torch

from common import paths
from common.li_adaptive import trained as adaptive
from common.pipeline import pieces

TINY = {
    "vgg_epochs": 2, "vgg_keep": [0, 2], "vgg_samples": 32, "vgg_width": 1 / 32, "vgg_hessian_samples": 8,
    "iterations": 6, "starts": 2, "edges": 2, "seed": 0, "network": "VGG", "epochs": 2, "keep": [0, 2],
    "samples": 32, "width": 1 / 32, "repeats": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(paths.CACHE / "data")  # decoded images
    (paths.CACHE / "data").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    monkeypatch.setattr(adaptive, "SUBMATRIX", {2: 3, 3: 2, 4: 2})


def test_spectra_of_the_standardized_network_are_made_once(monkeypatch):
    _, found = adaptive.landscape(TINY, "VGG")
    assert list(found) == [0, 2]
    for spectra in found.values():
        assert spectra.whole.nodes.shape == (2, 6) and spectra.bipartite is None
        assert spectra.lowest[0] <= spectra.lowest[1] <= spectra.highest[1] <= spectra.highest[0]
        assert 0 <= spectra.active <= 1
    # what is small is enough: history and spectra, brought from another machine without the parameters
    monkeypatch.setattr(adaptive, "hinge_hessian", None)
    monkeypatch.setattr(adaptive, "train_sgd", None)
    for file in (paths.CACHE / "li_training").iterdir():
        file.unlink()
    _, again = adaptive.landscape(TINY, "VGG")
    assert torch.equal(again[2].whole.nodes, found[2].whole.nodes)


def test_entries_of_the_standardized_network():
    at, entries, coupled = adaptive.coupling(TINY)
    assert coupled[0][0].shape == (1, 9)
    assert [z[0].shape for z in entries[0]] == [(1, 9), (1, 4), (1, 4)]
    coupled = adaptive.coupled_samples(at, 0, rows=3, columns=2, seed=0)
    assert coupled.shape == (1, 6) and (coupled != 0).any()
    with pytest.raises(ValueError, match="unknown network"):
        adaptive.trained("ResNet", epochs=1, keep=[0], seed=0)


def test_pieces_are_made_without_jupyter_and_go_on_after_time_ran_out(capsys, monkeypatch):
    monkeypatch.setattr("common.cache.CHECKPOINT_SECONDS", 0.0)
    assert adaptive.main(["fig01_06_coupling", "--scale", "quick", "--minutes", "0.01"]) == 3
    assert "call again to go on" in capsys.readouterr().out
    assert adaptive.main(["fig01_06_coupling", "--scale", "quick"]) == 0
    assert "all is made" in capsys.readouterr().out
    assert adaptive.main(["fig01_06_coupling", "--scale", "quick", "--minutes", "0.1"]) == 0


def test_out_of_time_is_no_fault_of_a_file(monkeypatch, capsys):
    """Even in the middle of writing a checkpoint."""

    def out_of_time(*_):
        raise pieces._OutOfTime

    monkeypatch.setattr("pathlib.Path.write_bytes", out_of_time)
    assert adaptive.main(["fig03_normalization", "--scale", "quick"]) == 3
    assert "call again" in capsys.readouterr().out
