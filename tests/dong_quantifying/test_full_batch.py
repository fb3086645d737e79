"""Training against torch's own autograd and Adam, and the files that keep trainings, whatever interrupts them."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import cache as zoo
from common import paths
from common.dong_quantifying import full_batch as training
from common.dong_quantifying.full_batch import LOSSES, TrainingResult, gradient_descent, train_full_batch

each_loss = pytest.mark.parametrize("loss", LOSSES)


def problem(N=37, d=6, C=5, m=4, *, seed=0, scale=1.0, dtype=torch.float64):
    """Data and initial weights; the first neuron is dead on every sample, the second's weights are exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(N, d, generator=generator, dtype=torch.float64)
    X[:, 0] = X[:, 0].abs() + 1
    y = torch.randint(C, (N,), generator=generator)
    W = torch.randn(m, d, generator=generator, dtype=torch.float64)
    V = scale * torch.randn(C, m, generator=generator, dtype=torch.float64)
    if m > 2:
        W[0] = 0
        W[0, 0] = -1
        W[1] = 0
    return X.to(dtype), y, W.to(dtype), V.to(dtype)


def loss_of(X, y, W, V, loss):
    f = torch.relu(X @ W.T) @ V.T
    if loss == "CE":
        return torch.nn.functional.cross_entropy(f, y)
    return ((f - torch.nn.functional.one_hot(y, len(V))) ** 2).sum(1).mean()


def reference(X, y, W, V, *, loss, steps, lr):
    """Weights after 0..steps steps, losses and the last gradient's norm, as torch gives them."""
    W, V = W.clone().requires_grad_(), V.clone().requires_grad_()
    optimizer = torch.optim.Adam([W, V], lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    path, losses = [], []
    for t in range(steps + 1):
        path.append((W.detach().clone(), V.detach().clone()))
        optimizer.zero_grad()
        value = loss_of(X, y, W, V, loss)
        value.backward()
        losses.append(value.item())
        norm = torch.cat([W.grad.flatten(), V.grad.flatten()]).norm().item()
        if t < steps:
            optimizer.step()
            scheduler.step()
    return path, losses, norm


def assert_equals_reference(data, *, loss, steps, lr, tolerance=1e-10):
    result = train_full_batch(*data, loss=loss, steps=steps, lr=lr, keep=range(steps + 1))
    path, losses, norm = reference(*data, loss=loss, steps=steps, lr=lr)
    assert result.steps.tolist() == list(range(steps + 1))
    W_torch, V_torch = (torch.stack(weights) for weights in zip(*path, strict=True))
    torch.testing.assert_close([result.W, result.V], [W_torch, V_torch], rtol=tolerance, atol=tolerance)
    assert result.losses.tolist() == pytest.approx(losses, rel=tolerance, abs=tolerance)
    assert result.gradient_norm.item() == pytest.approx(norm, rel=1e3 * tolerance, abs=tolerance)


# The steps


@each_loss
@pytest.mark.parametrize("chunk", [2**18, 30])
def test_sixty_steps_equal_those_of_torch(monkeypatch, loss, chunk):
    monkeypatch.setattr(training, "CHUNK_CPU", chunk)
    assert_equals_reference(problem(), loss=loss, steps=60, lr=3e-2)


@each_loss
@settings(max_examples=15, deadline=None)
@given(N=st.integers(1, 12), d=st.integers(1, 5), C=st.integers(1, 6), m=st.integers(1, 5), seed=st.integers(0, 2**20))
def test_loss_and_gradient_equal_those_of_autograd_whatever_the_shape(loss, N, d, C, m, seed):
    X, y, W, V = problem(N, d, C, m, seed=seed)
    network = training._FullBatch(X, y, W, V, loss)
    value = network.loss_and_gradient()
    leaves = [W.clone().requires_grad_(), V.clone().requires_grad_()]
    expected = loss_of(X, y, *leaves, loss)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
    dW, dV = torch.autograd.grad(expected, leaves)
    torch.testing.assert_close([network.dW, network.dVt.T], [dW, dV], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_logits_of_any_size_are_safe(scale):
    assert_equals_reference(problem(scale=scale), loss="CE", steps=20, lr=1e-2)


def test_huge_logits_stay_finite_in_single_precision():
    result = train_full_batch(*problem(scale=1e4, dtype=torch.float32), loss="CE", steps=3, lr=1e-2, keep=[3])
    assert all(bool(tensor.isfinite().all()) for tensor in vars(result).values())


@each_loss
def test_dead_neurons_stay_as_they_were(loss):
    X, y, W, V = problem()
    result = train_full_batch(X, y, W, V, loss=loss, steps=30, lr=1e-2, keep=[30])
    torch.testing.assert_close(result.W[0, :2], W[:2], rtol=0, atol=0)
    assert not torch.equal(result.W[0, 2:], W[2:])


@each_loss
def test_single_precision_at_the_papers_width(loss):
    data = problem(600, 500, 500, 8, dtype=torch.float32)
    single = train_full_batch(*data, loss=loss, steps=10, lr=1e-4, keep=[10])
    X, y, W, V = data
    double = train_full_batch(X.double(), y, W.double(), V.double(), loss=loss, steps=10, lr=1e-4, keep=[10])
    torch.testing.assert_close(single.losses.double(), double.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(single.gradient_norm.double(), double.gradient_norm, rtol=1e-4, atol=0)


@each_loss
def test_bits_do_not_depend_on_the_number_of_threads(loss):
    data = problem(2000, 100, 100, 8, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(train_full_batch(*data, loss=loss, steps=5, lr=1e-3, keep=[5]))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_same(*map(vars, results))


@each_loss
def test_training_learns_separable_classes(loss, capsys):
    y = torch.arange(60) % 3
    X = torch.eye(3)[y] + 0.05 * torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    W, V = problem(1, 3, 3, 16, dtype=torch.float32, scale=0.5)[2:]
    result = train_full_batch(X, y, W, V, loss=loss, steps=400, lr=3e-2, keep=[400, 0, 0], progress=loss)
    assert result.steps.tolist() == [0, 400]
    torch.testing.assert_close(result.W[0], W, rtol=0, atol=0)
    torch.testing.assert_close(result.V[0], V, rtol=0, atol=0)
    initial = (torch.relu(X @ W.T) @ V.T).argmax(1)
    assert result.accuracy.tolist() == [pytest.approx((initial == y).double().mean().item()), 1.0]
    assert result.losses[-1] < 0.05 * result.losses[0]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and lines[-1].startswith(f"{loss}: step 400 of 400, loss ")


def test_gradient_descent_is_that_of_torch():
    X, y, W, V = problem()
    W_end, V_end = gradient_descent(lambda W, V: loss_of(X, y, W, V, "CE"), [W, V], steps=10, lr=0.1)
    leaves = [W.clone().requires_grad_(), V.clone().requires_grad_()]
    optimizer = torch.optim.SGD(leaves, lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(X, y, *leaves, "CE").backward()
        optimizer.step()
    torch.testing.assert_close([W_end, V_end], [p.detach() for p in leaves], rtol=1e-12, atol=1e-12)
    assert not W_end.requires_grad and not W.requires_grad


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "hinge"}, "unknown loss 'hinge'; known are CE, MSE"),
        ({"steps": -1, "keep": []}, "steps must not be negative, got -1"),
        ({"lr": 0.0}, "learning rate must be positive"),
        ({"lr": float("nan")}, "learning rate must be positive"),
        ({"keep": [0, 4]}, r"must lie in 0..3, got \[4\]"),
        ({"keep": [-1]}, r"must lie in 0..3, got \[-1\]"),
        ({"V": torch.zeros(0, 4, dtype=torch.float64)}, "C = 0"),
        ({"X": torch.zeros(0, 6, dtype=torch.float64), "y": torch.zeros(0, dtype=torch.int64)}, "N = 0 samples"),
        ({"y": torch.full((37,), 5)}, "labels must lie in 0..4, got 5..5"),
        ({"y": torch.full((37,), -1)}, "labels must lie in 0..4, got -1..-1"),
        ({"X": torch.full((37, 6), torch.nan, dtype=torch.float64)}, "X holds infinities or NaN"),
        ({"W": torch.zeros(4, 6)}, "one floating-point type"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    X, y, W, V = problem()
    arguments = {"X": X, "y": y, "W": W, "V": V, "loss": "CE", "steps": 3, "lr": 1e-3, "keep": [0, 3]}
    with pytest.raises(ValueError, match=message) as caught:
        train_full_batch(**(arguments | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [{"steps": -1, "lr": 0.1}, {"steps": 1, "lr": -0.1}])
def test_bad_gradient_descent_is_refused(bad):
    with pytest.raises(ValueError, match=r"steps must not be|learning rate must be"):
        gradient_descent(lambda x: x, [torch.tensor(1.0)], **bad)


# The files


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Interruption(Exception):
    pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    return tmp_path / "training"


def arguments_of(loss="MSE", **other):
    X, y, W, V = problem(dtype=torch.float32)
    return {"X": X, "y": y, "W": W, "V": V, "loss": loss, "steps": 50, "lr": 1e-2, "keep": [0, 20, 50]} | other


def kept_training(arguments):
    return zoo.cached(
        "training",
        arguments,
        lambda checkpoint: vars(train_full_batch(**arguments, checkpoint=checkpoint)),
        code=[training],
    )


def never(checkpoint):
    raise AssertionError("made again")


def test_a_training_is_made_once_and_read_thereafter(cache):
    arguments = arguments_of()
    first = kept_training(arguments)
    assert_same(first, vars(train_full_batch(**arguments)))
    assert_same(first, zoo.cached("training", arguments, never, code=[training]))
    assert TrainingResult(**first).steps.tolist() == [0, 20, 50]
    assert [file.suffix for file in cache.iterdir() if file.suffix != ".lock"] == [".pt"]


def test_whatever_defines_a_result_names_its_file(tmp_path):
    base = arguments_of()
    X = base["X"].clone()
    X[0, 0] += 1e-6
    changes = [
        {}, {"X": X}, {"X": base["X"].double()}, {"X": base["X"].reshape(-1, 1)}, {"loss": "CE"}, {"steps": 51},
        {"lr": 2e-2}, {"keep": [0, 50]}, {"y": base["y"].flip(0)}, {"seed": 0},
    ]  # fmt: skip
    keys = [zoo.describe(base | change, [training]) for change in changes]
    keys += [zoo.describe(base, [training, zoo]), zoo.describe(base, [])]
    assert len(set(keys)) == len(keys)
    assert zoo.describe(dict(reversed(base.items())), [training]) == keys[0]
    assert json.loads(keys[0])["key"]["X"]["shape"] == [37, 6]
    with pytest.raises(TypeError, match="a key holds numbers, strings, lists, mappings and tensors; got PosixPath"):
        zoo.describe({"file": tmp_path}, [])


@each_loss
@pytest.mark.parametrize("stop", [1, 20, 21, 50])
def test_an_interrupted_training_goes_on_to_the_same_bits(cache, monkeypatch, loss, stop):
    monkeypatch.setattr(zoo, "CHECKPOINT_SECONDS", 0.0)
    arguments = arguments_of(loss)
    done = []

    class Interrupted(zoo.PartialFile):
        def offer(self, state):
            super().offer(state)
            done.append(int(state()["step"]))
            if done[-1] == stop:
                raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(zoo, "PartialFile", Interrupted)
        with pytest.raises(Interruption):
            kept_training(arguments)
        stop = -1
        done.clear()
        resumed = kept_training(arguments)
    assert done[0] > 0 and done[-1] == 50
    assert_same(resumed, vars(train_full_batch(**arguments)))
    assert not list(cache.glob("*.partial.pt"))


def entry(cache):
    (file,) = (file for file in cache.glob("*.pt") if not file.name.endswith(".partial.pt"))
    return file


def truncated(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [truncated, lambda content: b"", lambda content: b"not a file of torch"])
def test_a_damaged_file_is_named_set_aside_and_made_again(cache, capsys, damage):
    arguments = arguments_of()
    first = kept_training(arguments)
    file = entry(cache)
    file.write_bytes(damage(file.read_bytes()))
    assert_same(first, kept_training(arguments))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"training/{file.name} is damaged (")
    assert file.with_suffix(".damaged").exists()
    assert_same(first, zoo.cached("training", arguments, never, code=[training]))


def test_one_wrong_byte_is_damage(cache, capsys):
    content = {"a": torch.zeros(10_000)}
    zoo.cached("training", {}, lambda checkpoint: content, code=[])
    file = entry(cache)
    stored = bytearray(file.read_bytes())
    stored[len(stored) // 2] ^= 1  # 40 kB of zeros fill the middle of the file
    file.write_bytes(stored)
    assert_same(content, zoo.cached("training", {}, lambda checkpoint: content, code=[]))
    assert "SHA-256" in capsys.readouterr().out


def test_a_damaged_checkpoint_costs_only_the_time(cache, monkeypatch, capsys):
    arguments = arguments_of()

    def stopped(checkpoint):
        checkpoint.path.write_bytes(b"half")
        raise Interruption

    with pytest.raises(Interruption):
        zoo.cached("training", arguments, stopped, code=[training])
    assert_same(kept_training(arguments), vars(train_full_batch(**arguments)))
    assert ".partial.pt is damaged" in capsys.readouterr().out


@contextlib.contextmanager
def full_disk(path):
    yield Path("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_clear_line_and_loses_nothing(cache, monkeypatch):
    arguments = arguments_of()
    old = kept_training(arguments)
    other = arguments_of("CE")
    monkeypatch.setattr(zoo, "CHECKPOINT_SECONDS", 0.0)
    calls = []

    @contextlib.contextmanager
    def soon_full(path):
        calls.append(path)
        with paths.replacing(path) if len(calls) < 10 else full_disk(path) as temporary:
            yield temporary

    with monkeypatch.context() as patch:
        patch.setattr(zoo, "replacing", soon_full)
        with pytest.raises(OSError, match=r"No space left on device: cannot keep training/\w+\.partial\.pt") as caught:
            kept_training(other)
        assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert_same(old, zoo.cached("training", arguments, never, code=[training]))
    assert len(list(cache.glob("*.partial.pt"))) == 1
    assert_same(kept_training(other), vars(train_full_batch(**other)))


CHILD = """
    import sys, time, torch
    from pathlib import Path
    from common.dong_quantifying import full_batch as training
    from common import cache as zoo

    folder, pause = Path(sys.argv[1]), float(sys.argv[2])
    arguments = torch.load(folder / "arguments")

    class Slow(zoo.PartialFile):
        def offer(self, state):
            super().offer(state)
            time.sleep(pause)

    def make(checkpoint):
        found = checkpoint.load()
        with (folder / "log").open("a") as log:
            print(-1 if found is None else int(found["step"]), file=log)
        return vars(training.train_full_batch(**arguments, checkpoint=checkpoint))

    zoo.CHECKPOINT_SECONDS, zoo.PartialFile = 0.0, Slow
    zoo.cached("training", arguments, make, code=[training])
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


def checkpoint_step(cache):
    """Step of the checkpoint, which can be read at any moment; -1 if there is none."""
    return max((int(torch.load(file)["tensors"]["step"]) for file in cache.glob("[!.]*.partial.pt")), default=-1)


def test_a_killed_process_loses_nothing_and_two_at_once_train_once(tmp_path, cache):
    arguments = arguments_of()
    torch.save(arguments, tmp_path / "arguments")
    killed = child(tmp_path, 0.2)
    try:
        end = time.monotonic() + 60
        while (reached := checkpoint_step(cache)) < 5:
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
    result = zoo.cached("training", arguments, never, code=[training])
    assert_same(result, vars(train_full_batch(**arguments)))
