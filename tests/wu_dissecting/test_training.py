"""Ensembles against torch's own training of each network alone; the networks by their names."""

import pytest
import torch

from common import cache, paths
from common.cache import PartialFile
from common.wu_dissecting.convolutional_sgd import Convolutional
from common.wu_dissecting.networks import classifier, layer_names, truncated_gaussian, xavier
from common.wu_dissecting.sgd import InTurn, OnGpu, Scheme, Together, on_cpu
from common.wu_dissecting.training import initial_states, train, train_stage, train_stage_on_gpu, trained_ensemble

SCHEME = Scheme(lr=0.1, batch_size=16)
HEAVY = Scheme(0.1, 0.9, 1e-2, 16)
SHAPES = {
    "F-9-7": (6, 1, 1), "F-9-7-BN": (6, 1, 1), "LeNet5-(fc1-9)": (1, 28, 28), "LeNet5-BN": (3, 32, 32),
    "VGG11-W3": (3, 32, 32),
}  # fmt: skip


def data(name, samples=52):
    X = torch.randn(samples, *SHAPES[name], generator=torch.Generator().manual_seed(0))
    return X, X.flatten(1)[:, :4].argmax(1)


def trained(name, scheme=SCHEME, trainer=on_cpu, dtype=torch.float64, device="cpu", **options):
    X, y = data(name)

    def build():
        return classifier(name, SHAPES[name], 4).to(dtype)

    state = {key: tensor.to(device) for key, tensor in initial_states(build, [3, 8], xavier).items()}
    options = {"seeds": [3, 8], "scheme": scheme, "start": 0, "stop": 3, "state": state, "velocity": {}} | options
    return train(trainer, build, X.to(dtype).to(device), y.to(device), **options)


@pytest.mark.parametrize(("name", "scheme", "trainer"), [
    ("F-9-7", SCHEME, Together), ("F-9-7-BN", SCHEME, Together), ("F-9-7", HEAVY, InTurn),
    ("LeNet5-(fc1-9)", SCHEME, Convolutional), ("LeNet5-BN", Scheme(0.01, 0.5, 1e-2, 26), Convolutional),
    ("VGG11-W3", HEAVY, InTurn),
])  # fmt: skip
def test_every_member_is_trained_as_torch_trains_it_alone(name, scheme, trainer):
    X, y = data(name)
    X, build = X.double(), lambda: classifier(name, SHAPES[name], 4).double()
    assert type(on_cpu([build()], X, y, scheme)) is trainer
    found = trained(name, scheme)
    for member, seed in enumerate([3, 8]):
        network = build()
        xavier(network, torch.Generator().manual_seed(seed))
        optimizer = torch.optim.SGD(
            network.parameters(), lr=scheme.lr, momentum=scheme.momentum, weight_decay=scheme.weight_decay
        )
        for epoch in range(3):
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
            for rows in order.split(scheme.batch_size):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(network(X[rows]), y[rows]).backward()
                optimizer.step()
        for key, expected in network.state_dict().items():
            torch.testing.assert_close(found[f"state:{key}"][member], expected, atol=1e-8, rtol=1e-8)
        loss = torch.nn.functional.cross_entropy(network.eval()(X), y)
        torch.testing.assert_close(found["loss"][member].double(), loss.detach(), atol=1e-6, rtol=1e-6)


def test_of_equal_outputs_of_a_pooling_the_first_gets_the_gradient_as_in_torch():
    network = classifier("LeNet5", (1, 28, 28), 4).double()
    xavier(network, torch.Generator().manual_seed(0))
    state = {name: tensor[None] for name, tensor in network.state_dict().items()}
    X = torch.randint(0, 2, (16, 1, 7, 7), generator=torch.Generator().manual_seed(0)).double()
    X, y = X.repeat_interleave(4, 2).repeat_interleave(4, 3), torch.arange(16) % 4  # squares of equal pixels
    order, found = torch.arange(16)[None], []
    for trainer in (InTurn, on_cpu):
        steps = trainer([classifier("LeNet5", (1, 28, 28), 4).double()], X, y, SCHEME)
        steps.restore(state, {})
        steps.pass_through(order, 16)
        found.append(steps.now())
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected, atol=1e-12, rtol=1e-10)


def test_convolutions_that_the_steps_by_hand_are_not_made_for_are_left_to_torch():
    nn = torch.nn

    def network(convolution, *behind, side=14):
        return nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2), *behind, nn.Flatten(), nn.Linear(side, 2))

    assert Convolutional.takes(network(nn.Conv2d(1, 2, 5)), (1, 28, 28))
    assert Convolutional.takes(network(nn.Conv2d(1, 2, 3, padding=1)), (1, 28, 28))
    for other in (
        network(nn.Conv2d(1, 2, 5, stride=2)), network(nn.Conv2d(1, 2, (3, 5))), network(nn.Conv2d(1, 2, 4)),
        network(nn.Conv2d(1, 2, 5), nn.Dropout()), nn.Sequential(nn.Flatten(), nn.Linear(784, 2)), nn.Linear(2, 2),
    ):  # fmt: skip
        assert not Convolutional.takes(other, (1, 28, 28))


@pytest.mark.parametrize(
    ("name", "scheme"), [("F-9-7-BN", SCHEME), ("LeNet5-(fc1-9)", HEAVY), ("LeNet5-BN", HEAVY), ("VGG11-W3", HEAVY)]
)
def test_a_training_that_was_interrupted_or_made_in_stages_gives_the_same(name, scheme, tmp_path, monkeypatch):
    monkeypatch.setattr("common.cache.CHECKPOINT_SECONDS", 0.0)
    whole = trained(name, scheme)
    checkpoint = PartialFile(tmp_path / "ensemble.pt", "an ensemble")
    randperm, calls = torch.randperm, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) > 4:  # in the third epoch
            raise KeyboardInterrupt
        return randperm(*arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "randperm", interrupted)
        trained(name, scheme, checkpoint=checkpoint)
    assert int(checkpoint.load()["epoch"]) == 2
    resumed = trained(name, scheme, checkpoint=checkpoint)
    half = trained(name, scheme, stop=1)
    state, velocity = (
        {key.removeprefix(part): tensor for key, tensor in half.items() if key.startswith(part)}
        for part in ("state:", "velocity:")
    )
    assert bool(velocity) == (scheme.momentum > 0)
    staged = trained(name, scheme, start=1, state=state, velocity=velocity)
    for key, tensor in whole.items():
        assert torch.equal(tensor, resumed[key]), key
        assert torch.equal(tensor, staged[key]), key


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "scheme"), [("F-9-7-BN", SCHEME), ("F-9-7", HEAVY), ("LeNet5-(fc1-9)", HEAVY)])
def test_a_gpu_trains_as_a_cpu_does(name, scheme):
    found = trained(name, scheme, OnGpu, device="cuda")
    for key, tensor in trained(name, scheme).items():
        torch.testing.assert_close(found[key].cpu(), tensor, atol=1e-9, rtol=1e-9)


def test_a_longer_training_goes_on_from_the_files_of_a_shorter_one(tmp_path, monkeypatch, capsys):
    X, y = data("F-9-7")
    monkeypatch.setattr("common.paths.CACHE", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one = {"name": "F-9-7", "classes": 4, "X": X, "y": y, "seeds": [3], "scheme": HEAVY}
    short = trained_ensemble(**one, epochs=2)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert short.epochs.tolist() == [0, 1, 2] and len(files) == 3
    long = trained_ensemble(**one, epochs=7, progress="stages")
    assert capsys.readouterr().out.count("stages: after") == 2
    assert long.epochs.tolist() == [0, 1, 2, 5, 7]
    assert all(path.stat().st_mtime_ns == files[path] for path in files)
    for key, tensor in short.states.items():
        assert torch.equal(tensor, long.states[key][:3])
    network = classifier("F-9-7", SHAPES["F-9-7"], 4)
    xavier(network, torch.Generator().manual_seed(3))
    assert all(torch.equal(tensor, long.state(0, 0)[key]) for key, tensor in network.state_dict().items())
    with pytest.raises(ValueError, match="not kept"):
        long.state(0, epoch=3)


def test_what_was_made_on_a_gpu_is_taken_before_it_is_made_on_a_cpu(tmp_path, monkeypatch):
    X, y = data("F-9-7")
    monkeypatch.setattr("common.paths.CACHE", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one = {"name": "F-9-7", "classes": 4, "X": X, "y": y, "seeds": [3], "scheme": SCHEME}
    assert trained_ensemble(**one, epochs=0).loss.shape == (1, 1)
    assert [folder.name for folder in tmp_path.iterdir()] == ["wu_dissecting.training.train_stage"]
    state = initial_states(lambda: classifier("F-9-7", X.shape[1:], 4), [3], xavier)
    arguments = one | {"start": 0, "stop": 0, "state": state, "velocity": {}}
    on_gpu, description = (f(train_stage_on_gpu, arguments) for f in (cache.file_of, cache.describe))
    cache._write(on_gpu, description, train_stage(**arguments) | {"loss": torch.tensor([7.0])}, 1.0)
    assert paths.CACHE in on_gpu.parents and trained_ensemble(**one, epochs=0).loss.item() == 7


@pytest.mark.parametrize("change", [{"start": -1}, {"start": 4}, {"seeds": []}])
def test_what_cannot_be_trained(change):
    with pytest.raises(ValueError, match="positive"):
        trained("F-9-7", **change)
    with pytest.raises(FloatingPointError, match="not finite"):
        trained("F-9-7", Scheme(1e30, batch_size=16), dtype=torch.float32)
    X, y = data("F-9-7")
    with pytest.raises(ValueError, match="unknown initialization"):
        trained_ensemble("F-9-7", 4, X, y, seeds=[0], epochs=1, scheme=SCHEME, initialization="zero")
    with pytest.raises(ValueError, match="at least one seed"):
        trained_ensemble("F-9-7", 4, X, y, seeds=[], epochs=1, scheme=SCHEME)
    with pytest.raises(ValueError, match="at least 1 class"):
        classifier("F-9-7", (6, 1, 1), 0)


def test_networks_have_the_sizes_of_tables_3_to_5():
    def parameters(name, shape):
        return [tuple(p.shape) for p in classifier(name, shape, 10).parameters() if p.ndim > 1]

    assert parameters("F-200^2", (1, 28, 28)) == [(200, 784), (200, 200), (10, 200)]
    assert parameters("F-200^2-100", (1, 28, 28)) == [(200, 784), (200, 200), (100, 200), (10, 100)]
    lenet = [(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]
    assert parameters("LeNet5", (3, 32, 32)) == parameters("LeNet5-BN", (3, 32, 32)) == lenet
    assert parameters("LeNet5-(fc1-80)", (1, 28, 28))[2:4] == [(80, 400), (84, 80)]
    assert layer_names(classifier("LeNet5-BN", (1, 28, 28), 10)) == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    vgg = [p[:2] for p in parameters("VGG11", (3, 32, 32))]
    assert vgg == [(64, 3), (128, 64), (256, 128), (256, 256), (512, 256), *[(512, 512)] * 3, (10, 512)]
    assert [p[:2] for p in parameters("VGG11-W32", (3, 32, 32))] == [(32, 3), *[(32, 32)] * 7, (10, 32)]
    assert layer_names(classifier("VGG11-W32", (3, 32, 32), 10)) == [*(f"conv{k}" for k in range(1, 9)), "fc1"]
    with pytest.raises(ValueError, match="32 × 32 pixels"):
        classifier("VGG11", (1, 28, 28), 10)
    for wrong in ("F-0^2", "F", "LeNet6", "F-200^2BN", "LeNet5-(fc1-0)", "VGG11-W0", "ResNet18"):
        with pytest.raises(ValueError, match=r"unknown network|at least 1"):
            classifier(wrong, (3, 32, 32), 10)
    with pytest.raises(ValueError, match="28 × 28 or 32 × 32"):
        classifier("LeNet5", (3, 30, 30), 10)


def test_resnet18_is_the_usual_one_without_batch_norm():
    network = classifier("ResNet18-W4", (3, 32, 32), 10).double()
    X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights, shapes = dict(network.named_parameters()), []

    def conv(name, x, stride=1):
        weight = weights[f"{name}.weight"]
        return torch.nn.functional.conv2d(x, weight, weights[f"{name}.bias"], stride, weight.shape[2] // 2)

    x, k = conv("conv1", X).relu(), 1
    for stage, stride in enumerate((1, 2, 2, 2)):
        for block in range(2):
            first = stride if block == 0 else 1
            inner = conv(f"conv{k + 2}", conv(f"conv{k + 1}", x, first).relu())
            x = (inner + (conv(f"sc-conv{stage}", x, 2) if first == 2 else x)).relu()
            k += 2
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 32, 32), (4, 16, 16), (4, 8, 8), (4, 4, 4)]
    expected = x.mean((2, 3)) @ weights["fc1.weight"].T + weights["fc1.bias"]
    torch.testing.assert_close(network(X), expected)
    assert layer_names(network) == [*(f"conv{k}" for k in range(1, 18)), "sc-conv1", "sc-conv2", "sc-conv3", "fc1"]
    assert type(on_cpu([network], X, torch.tensor([0, 1]), SCHEME)) is InTurn  # not a sequence of modules


def test_the_gaussian_initialization_of_dziugaite_and_roy():
    network = classifier("F-300-20", (400, 1, 1), 10)
    truncated_gaussian(network, torch.Generator().manual_seed(0))
    W = network.get_submodule("fc1").weight.detach()
    assert W.abs().max() <= 0.08
    assert float(W.std()) == pytest.approx(0.04 * 0.8796, rel=0.01)  # a standard normal cut at 2 has this deviation
    assert (network.get_submodule("fc1").bias == 0.1).all() and (network.get_submodule("fc2").bias == 0).all()
