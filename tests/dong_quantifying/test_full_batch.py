"""Training against torch's own autograd and Adam."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import paths
from common.dong_quantifying import full_batch
from common.dong_quantifying.full_batch import LOSSES, TrainingResult, gradient_descent, train_full_batch, trained

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


def assert_same(a, b):
    for name, tensor in vars(a).items():
        assert torch.equal(tensor, getattr(b, name)), name


# The steps


@each_loss
@pytest.mark.parametrize("chunk", [2**18, 30])
def test_sixty_steps_equal_those_of_torch(monkeypatch, loss, chunk):
    monkeypatch.setattr(full_batch, "CHUNK_CPU", chunk)
    assert_equals_reference(problem(), loss=loss, steps=60, lr=3e-2)


@each_loss
@settings(max_examples=15, deadline=None)
@given(N=st.integers(1, 12), d=st.integers(1, 5), C=st.integers(1, 6), m=st.integers(1, 5), seed=st.integers(0, 2**20))
def test_loss_and_gradient_equal_those_of_autograd_whatever_the_shape(loss, N, d, C, m, seed):
    X, y, W, V = problem(N, d, C, m, seed=seed)
    network = full_batch._FullBatch(X, y, W, V, loss)
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
    assert_same(*results)


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


def test_several_trainings_are_those_made_one_by_one_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    X, y, W, V = problem(dtype=torch.float32)
    how = {"X": X, "y": y, "W": W, "V": V, "steps": 30, "lr": 1e-2, "keep": [0, 30]}
    trainings = [how | {"loss": loss, "steps": steps} for loss, steps in (("CE", 30), ("MSE", 30), ("CE", 40))]
    first, again = trained(trainings), trained(trainings)
    for arguments, *results in zip(trainings, first, again, strict=True):
        assert isinstance(results[0], TrainingResult)
        for result in results:
            assert_same(result, train_full_batch(**arguments))
    assert len(list(tmp_path.glob("*/*.pt"))) == 3


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
