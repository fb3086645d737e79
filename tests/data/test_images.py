"""Data sets by name: what is drawn, what is refused, the command line, torchvision's import."""

import subprocess
import sys

import pytest
import torch

from common.data import images


def test_samples_are_drawn_by_seed_without_replacement(place, mnist):
    place.put(mnist, place.data / "MNIST" / "raw")
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


def test_command_line(place, mnist, capsys):
    place.put(mnist, place.data / "MNIST" / "raw")
    assert images.main(["MNIST", "CIFAR-10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("MNIST      original files, SHA-256 ") and lines[-1].startswith("CIFAR-10   STAND-IN: ")
    assert images.main(["CIFAR-11"]) == 2
    assert "unknown data set 'CIFAR-11'" in capsys.readouterr().err


def test_torchvision_imports_in_a_fresh_process():
    """Whether or not its compiled operators load, twice, and without a word."""
    code = (
        "from common.data.files import import_torchvision as t; assert t() is t();"
        "import torchvision, torch; torchvision.datasets.MNIST; print(torch.ops.torchvision.nms.default._schema)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def test_data_and_cache_that_are_read_only_are_read(place, mnist, read_only):
    place.put(mnist, place.data / "MNIST" / "raw")
    place.store.mkdir(parents=True)
    read_only(place.store.parent)
    assert not images.load("MNIST").source.stand_in
    assert images.load("CIFAR-10", samples=3).source.stand_in
    assert list(place.store.iterdir()) == []


def test_nothing_heavy_is_imported_before_it_is_needed():
    """No plotting, no notebook, no torchvision, no scikit-learn: a machine that only trains may lack them."""
    code = (
        "import sys, common.data.images;"
        "print(*{'matplotlib', 'IPython', 'papermill', 'torchvision', 'sklearn', 'PIL', 'requests'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "")
