"""The files that keep what took long: found by all that defines them, whole whatever interrupts their making."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common import cache, paths
from common.cache import MissingError, cached, code_of, describe, making_only, spared_seconds
from common.dong_quantifying import full_batch
from common.dong_quantifying.full_batch import LOSSES, TrainingResult, train_full_batch
from common.fingerprint import FingerprintError, reached_by
from common.wu_dissecting.pac_bayes.optimize import Schedule

NAME = "dong_quantifying.full_batch.train_full_batch"
each_loss = pytest.mark.parametrize("loss", LOSSES)


def arguments_of(loss="MSE", d=6, **other):
    generator = torch.Generator().manual_seed(0)
    X, W, V = (torch.randn(shape, generator=generator) for shape in ((37, d), (4, d), (5, 4)))
    y = torch.randint(5, (37,), generator=generator)
    return {"X": X, "y": y, "W": W, "V": V, "loss": loss, "steps": 50, "lr": 1e-2, "keep": [0, 20, 50]} | other


def assert_same(found, arguments):
    made = vars(train_full_batch(**arguments))
    assert found.keys() == made.keys()
    for name in found:
        assert torch.equal(found[name], made[name]), name


class Interruption(Exception):
    pass


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    return tmp_path / NAME


@contextlib.contextmanager
def nothing_made():
    """Inside, a training that begins is an error; its fingerprint is that of the source, which stays."""

    def begin(*_):
        raise AssertionError("made again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_batch, "_FullBatch", begin)
        yield


def entry(folder):
    (file,) = (file for file in folder.glob("*.pt") if not file.name.endswith(".partial.pt"))
    return file


# Found by all that defines it


def test_a_result_is_made_once_and_read_thereafter(folder):
    arguments = arguments_of()
    first = cached(train_full_batch, arguments)
    assert_same(first, arguments)
    spared = spared_seconds()
    with nothing_made():
        again = cached(train_full_batch, dict(reversed(arguments.items())), progress="words that change nothing")
    assert_same(again, arguments)
    assert spared_seconds() > spared
    assert TrainingResult(**first).steps.tolist() == [0, 20, 50]
    assert [file.suffix for file in folder.iterdir() if file.suffix != ".lock"] == [".pt"]


def test_without_the_file_it_is_made(folder):
    cached(train_full_batch, arguments_of())
    with nothing_made(), pytest.raises(AssertionError, match="made again"):
        cached(train_full_batch, arguments_of("CE"))


def test_whatever_defines_a_result_names_its_file():
    base = arguments_of()
    X = base["X"].clone()
    X[0, 0] += 1e-6
    changes = [
        {}, {"X": X}, {"X": base["X"].double()}, {"X": base["X"].reshape(-1, 1)}, {"loss": "CE"}, {"steps": 51},
        {"lr": 2e-2}, {"keep": [0, 50]}, {"y": base["y"].flip(0)}, {"seed": 0},
    ]  # fmt: skip
    keys = [describe(train_full_batch, base | change) for change in changes]
    keys.append(describe(full_batch.cosine_annealing, base))
    assert len(set(keys)) == len(keys)
    assert describe(train_full_batch, dict(reversed(base.items()))) == keys[0]
    assert json.loads(keys[0])["arguments"]["X"]["shape"] == [37, 6]


def test_dataclasses_enter_by_their_fields_and_their_code():
    keys = {describe(train_full_batch, {"schedule": Schedule(epochs=epochs)}) for epochs in (1, 2, 2)}
    assert len(keys) == 2
    assert reached_by(Schedule) <= code_of(train_full_batch, {"options": [{"schedule": Schedule()}]})
    assert not reached_by(Schedule) <= code_of(train_full_batch, {})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Path("file"), "a key holds numbers, .* and tensors; got PosixPath"),
        ({1, 2}, "got set"),
        (Schedule, "got type"),
        ({"deep": [Path("file")]}, "got PosixPath"),
        (train_full_batch, "got function"),
    ],
)
def test_what_is_no_plain_value_is_refused_in_a_key(value, message):
    with pytest.raises(TypeError, match=message):
        describe(train_full_batch, {"value": value})


def test_what_is_not_finite_is_refused_in_a_key():
    with pytest.raises(ValueError, match="not JSON compliant"):
        describe(train_full_batch, {"lr": float("nan")})


@pytest.mark.parametrize("make", [lambda: {}, arguments_of, TrainingResult.__init__], ids=["lambda", "test", "method"])
def test_what_makes_stands_at_the_top_of_a_module_of_common(folder, make):
    with pytest.raises(FingerprintError, match="is no function at the top of a module of common"):
        cached(make, {})
    assert not folder.parent.joinpath(NAME).exists()


# Made, or not now


def test_where_nothing_may_be_made_the_missing_is_named(folder):
    here, gone = arguments_of(), arguments_of("CE")
    cached(train_full_batch, here)
    with making_only() as missing:
        assert_same(cached(train_full_batch, here), here)
        with pytest.raises(MissingError, match=f"{NAME}/[0-9a-f]{{64}} is not in the cache"):
            cached(train_full_batch, gone)
    assert len(missing) == 1 and missing[0].startswith(f"{NAME}/")
    with making_only(*missing) as still_missing:
        assert_same(cached(train_full_batch, gone), gone)
        with pytest.raises(MissingError):
            cached(train_full_batch, arguments_of(steps=51))
    assert len(still_missing) == 1 and still_missing != missing
    other = arguments_of(steps=51)
    assert_same(cached(train_full_batch, other), other)


# Interrupted


@each_loss
@pytest.mark.parametrize("stop", [1, 20, 21, 50])
def test_an_interrupted_making_goes_on_to_the_same_bits(folder, monkeypatch, loss, stop):
    monkeypatch.setattr(cache, "CHECKPOINT_SECONDS", 0.0)
    arguments, done = arguments_of(loss), []

    class Interrupted(cache.PartialFile):
        def offer(self, state):
            super().offer(state)
            done.append(int(state()["step"]))
            if done[-1] == stop:
                raise Interruption

    monkeypatch.setattr(cache, "PartialFile", Interrupted)
    with pytest.raises(Interruption):
        cached(train_full_batch, arguments)
    assert [file.name.endswith(".partial.pt") for file in folder.glob("*.pt")] == [True]
    stopped, stop = stop, -1
    done.clear()
    assert_same(cached(train_full_batch, arguments), arguments)
    assert done == list(range(stopped, 51))
    assert not list(folder.glob("*.partial.pt"))


# Damaged


def truncated(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [truncated, lambda content: b"", lambda content: b"not a file of torch"])
def test_a_damaged_file_is_named_set_aside_and_made_again(folder, capsys, damage):
    arguments = arguments_of()
    cached(train_full_batch, arguments)
    file = entry(folder)
    file.write_bytes(damage(file.read_bytes()))
    assert_same(cached(train_full_batch, arguments), arguments)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{NAME}/{file.name} is damaged (")
    assert file.with_suffix(".damaged").exists()
    with nothing_made():
        found = cached(train_full_batch, arguments)
    assert_same(found, arguments)


def test_one_wrong_byte_is_damage(folder, capsys):
    arguments = arguments_of(d=5000, steps=1, keep=[0])  # the weights fill the middle of the file
    cached(train_full_batch, arguments)
    file = entry(folder)
    stored = bytearray(file.read_bytes())
    stored[len(stored) // 2] ^= 1
    file.write_bytes(stored)
    assert_same(cached(train_full_batch, arguments), arguments)
    assert "SHA-256" in capsys.readouterr().out


def test_the_file_of_another_result_is_damage(folder, capsys):
    cached(train_full_batch, arguments_of())
    other = entry(folder).read_bytes()
    entry(folder).unlink()
    cached(train_full_batch, arguments_of("CE"))
    entry(folder).write_bytes(other)
    assert_same(cached(train_full_batch, arguments_of("CE")), arguments_of("CE"))
    assert "it describes something else" in capsys.readouterr().out


def test_a_damaged_checkpoint_costs_only_the_time(folder, monkeypatch, capsys):
    class Halved(cache.PartialFile):
        def offer(self, state):
            self.path.write_bytes(b"half")
            raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(cache, "PartialFile", Halved)
        with pytest.raises(Interruption):
            cached(train_full_batch, arguments_of())
    assert_same(cached(train_full_batch, arguments_of()), arguments_of())
    assert ".partial.pt is damaged" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_clear_line_and_loses_nothing(folder, monkeypatch):
    old, other, writes = arguments_of(), arguments_of("CE"), []
    cached(train_full_batch, old)
    monkeypatch.setattr(cache, "CHECKPOINT_SECONDS", 0.0)

    @contextlib.contextmanager
    def soon_full(path):
        writes.append(path)
        if len(writes) < 10:
            with paths.replacing(path) as temporary:
                yield temporary
        else:
            yield Path("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "replacing", soon_full)
        with pytest.raises(OSError, match=rf"No space left on device: cannot keep {NAME}/\w+\.partial\.pt") as caught:
            cached(train_full_batch, other)
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    with nothing_made():
        kept = cached(train_full_batch, old)
    assert_same(kept, old)
    assert len(list(folder.glob("*.partial.pt"))) == 1
    assert_same(cached(train_full_batch, other), other)


# Somebody else's


def test_a_whole_file_in_a_read_only_folder_is_read_and_nothing_else_is_begun(folder, read_only):
    arguments = arguments_of()
    cached(train_full_batch, arguments)
    before = sorted(path.name for path in folder.iterdir())
    read_only(folder)
    with nothing_made():
        found = cached(train_full_batch, arguments)
        with pytest.raises(PermissionError, match=f"{NAME}/[0-9a-f]{{64}} is missing, and its folder cannot be"):
            cached(train_full_batch, arguments_of("CE"))
    assert_same(found, arguments)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_damaged_file_in_a_read_only_folder_is_named(folder, read_only):
    cached(train_full_batch, arguments_of())
    entry(folder).write_bytes(b"half")
    read_only(folder)
    with pytest.raises(OSError, match=rf"{NAME}/\w+\.pt is damaged \(.*\), and stays"):
        cached(train_full_batch, arguments_of())


# Two at once

CHILD = """
    import sys, time, torch
    from pathlib import Path
    from common import cache
    from common.dong_quantifying.full_batch import train_full_batch

    folder, pause = Path(sys.argv[1]), float(sys.argv[2])

    class Slow(cache.PartialFile):
        def load(self):
            found = super().load()
            with (folder / "log").open("a") as log:
                print(-1 if found is None else int(found["step"]), file=log)
            return found

        def offer(self, state):
            super().offer(state)
            time.sleep(pause)

    cache.CHECKPOINT_SECONDS, cache.PartialFile = 0.0, Slow
    cache.cached(train_full_batch, torch.load(folder / "arguments"))
"""


def child(folder, pause):
    """Another process at the same training, which rests ``pause`` seconds at each step."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), str(pause)],
        env=os.environ | {"HESSIAN_CACHE": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def checkpoint_step(folder):
    """Step of the checkpoint, which can be read at any moment; -1 if there is none."""
    return max((int(torch.load(file)["tensors"]["step"]) for file in folder.glob("[!.]*.partial.pt")), default=-1)


def test_a_killed_process_loses_nothing_and_two_at_once_make_it_once(tmp_path, folder):
    arguments = arguments_of()
    torch.save(arguments, tmp_path / "arguments")
    killed = child(tmp_path, 0.2)
    try:
        end = time.monotonic() + 60
        while (reached := checkpoint_step(folder)) < 5:
            assert killed.poll() is None and time.monotonic() < end
            time.sleep(0.01)
    finally:
        killed.kill()
        killed.communicate()

    both = [child(tmp_path, 0.03) for _ in range(2)]
    printed = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    starts = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert len(starts) == 2 and starts[0] == -1 and starts[1] >= reached
    with nothing_made():
        found = cached(train_full_batch, arguments)
    assert_same(found, arguments)


def test_numbers_of_numpy_are_those_of_python(folder):
    arguments = arguments_of()
    found = cached(train_full_batch, arguments)
    same = arguments | {"steps": np.int64(50), "lr": np.float64(1e-2), "keep": [np.int64(t) for t in (0, 20, 50)]}
    with nothing_made():
        again = cached(train_full_batch, same)
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert cache.file_of(train_full_batch, same) == cache.file_of(train_full_batch, arguments)
