"""Ensembles against torch's own training of each network alone; the networks by their names."""

import pytest
import torch

from common import cache
from common.cache import PartialFile
from common.wu_dissecting.networks import classifier, layer_names, truncated_gaussian, xavier
from common.wu_dissecting.training import (
    OnGpu,
    Scheme,
    on_cpu,
    train_classifiers,
    train_classifiers_on_gpu,
    train_ensemble,
    trained_ensemble,
)

SCHEME = Scheme(lr=0.1, batch_size=16)
SHAPES = {"F-9-7": (6, 1, 1), "F-9-7-BN": (6, 1, 1), "LeNet5-(fc1-9)": (1, 28, 28), "LeNet5-BN": (1, 28, 28)}


def data(name, samples=52):
    X = torch.randn(samples, *SHAPES[name], generator=torch.Generator().manual_seed(0))
    return X, X.flatten(1)[:, :4].argmax(1)


def trained(name, scheme=SCHEME, **options):
    X, y = data(name)
    options = {"seeds": [3, 8], "epochs": 3, "scheme": scheme} | options
    return train_ensemble(on_cpu, lambda: classifier(name, SHAPES[name], 4), X, y, **options)


@pytest.mark.parametrize(
    ("name", "scheme"), [
        ("F-9-7", SCHEME), ("F-9-7-BN", SCHEME), ("F-9-7", Scheme(0.1, 0.9, 1e-2, 16)), ("LeNet5-(fc1-9)", SCHEME)
    ],
)  # fmt: skip
def test_every_member_is_trained_as_torch_trains_it_alone(name, scheme):
    X, y = data(name)
    found = trained(name, scheme, keep=[1])
    assert found.epochs.tolist() == [1, 3]
    for member, seed in enumerate([3, 8]):
        network, same = classifier(name, SHAPES[name], 4), classifier(name, SHAPES[name], 4)
        xavier(network, torch.Generator().manual_seed(seed))
        optimizer = torch.optim.SGD(
            network.parameters(), lr=scheme.lr, momentum=scheme.momentum, weight_decay=scheme.weight_decay
        )
        for epoch in range(3):
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
            for rows in order.split(16):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(network(X[rows]), y[rows]).backward()
                optimizer.step()
        same.load_state_dict(found.state(member))
        for key, expected in network.state_dict().items():
            torch.testing.assert_close(same.state_dict()[key], expected, atol=2e-5, rtol=1e-3)
        loss = torch.nn.functional.cross_entropy(network.eval()(X), y)
        torch.testing.assert_close(found.loss[-1, member], loss.detach(), atol=1e-5, rtol=1e-3)
    with pytest.raises(ValueError, match="not kept"):
        found.state(0, epoch=2)


@pytest.mark.parametrize(("name", "scheme"), [("F-9-7-BN", SCHEME), ("LeNet5-(fc1-9)", Scheme(0.1, 0.9, 1e-2, 16))])
def test_an_interrupted_ensemble_gives_the_same(name, scheme, tmp_path, monkeypatch):
    monkeypatch.setattr("common.cache.CHECKPOINT_SECONDS", 0.0)
    whole = trained(name, scheme, keep=[0, 1])
    checkpoint = PartialFile(tmp_path / "ensemble.pt", "an ensemble")
    randperm, calls = torch.randperm, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) > 4:  # in the third epoch
            raise KeyboardInterrupt
        return randperm(*arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "randperm", interrupted)
        trained(name, scheme, keep=[0, 1], checkpoint=checkpoint)
    assert int(checkpoint.load()["epoch"]) == 2
    resumed = trained(name, scheme, keep=[0, 1], checkpoint=checkpoint)
    for key, tensor in whole.tensors().items():
        if key != "seconds":
            assert torch.equal(tensor, resumed.tensors()[key]), key


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("name", "scheme"),
    [("F-9-7-BN", SCHEME), ("F-9-7", Scheme(0.1, 0.9, 1e-2, 16)), ("LeNet5-(fc1-9)", Scheme(0.1, 0.9, 1e-2, 16))],
)
def test_a_gpu_trains_as_a_cpu_does(name, scheme):
    X, y = data(name)

    def on(trainer, device):
        def build():
            return classifier(name, SHAPES[name], 4).double()

        options = {"seeds": [3, 8], "epochs": 3, "scheme": scheme, "keep": [1]}
        return train_ensemble(trainer, build, X.double().to(device), y.to(device), **options).tensors()

    found = on(OnGpu, "cuda")
    for key, tensor in on(on_cpu, "cpu").items():
        torch.testing.assert_close(found[key], tensor, atol=1e-9, rtol=1e-9)


def test_what_was_made_on_a_gpu_is_taken_before_it_is_made_on_a_cpu(tmp_path, monkeypatch):
    X, y = data("F-9-7")
    arguments = {
        "name": "F-9-7", "classes": 4, "X": X, "y": y, "seeds": [3], "epochs": 1, "scheme": SCHEME, "keep": [],
        "initialization": "xavier",
    }  # fmt: skip
    monkeypatch.setattr("common.paths.CACHE", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trained_ensemble(arguments).loss.shape == (1, 1)
    assert [folder.name for folder in tmp_path.iterdir()] == ["wu_dissecting.training.train_classifiers"]
    on_gpu = cache.file_of(train_classifiers_on_gpu, arguments)
    description = cache.describe(train_classifiers_on_gpu, arguments)
    cache._write(on_gpu, description, train_classifiers(**arguments) | {"loss": torch.tensor([[7.0]])}, 1.0)
    assert trained_ensemble(arguments).loss.item() == 7


@pytest.mark.parametrize(("change", "message"), [
    ({"epochs": -1}, "positive"), ({"seeds": []}, "positive"), ({"keep": [9]}, "0..3"),
])  # fmt: skip
def test_what_cannot_be_trained(change, message):
    with pytest.raises(ValueError, match=message):
        trained("F-9-7", **change)
    with pytest.raises(FloatingPointError, match="not finite"):
        trained("F-9-7", Scheme(1e30, batch_size=16))


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
    found = train_ensemble(  # not a sequence of modules
        on_cpu, lambda: classifier("ResNet18-W4", (3, 32, 32), 10), X.float(), torch.tensor([0, 1]), seeds=[0], epochs=1
    )
    assert found.loss.isfinite().all()


def test_the_gaussian_initialization_of_dziugaite_and_roy():
    network = classifier("F-300-20", (400, 1, 1), 10)
    truncated_gaussian(network, torch.Generator().manual_seed(0))
    W = network.get_submodule("fc1").weight.detach()
    assert W.abs().max() <= 0.08
    assert float(W.std()) == pytest.approx(0.04 * 0.8796, rel=0.01)  # a standard normal cut at 2 has this deviation
    assert (network.get_submodule("fc1").bias == 0.1).all() and (network.get_submodule("fc2").bias == 0).all()
