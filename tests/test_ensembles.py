"""Ensembles against torch's own training of each network alone; the networks by their names."""

import pytest
import torch

from common.classifiers import classifier, layer_names, xavier
from common.ensembles import Scheme, train_ensemble
from common.zoo import PartialFile

SCHEME = Scheme(lr=0.1, batch_size=16)
SHAPES = {"F-9-7": (6, 1, 1), "F-9-7-BN": (6, 1, 1), "LeNet5-(fc1-9)": (1, 28, 28), "LeNet5-BN": (1, 28, 28)}


def data(name, samples=52):
    X = torch.randn(samples, *SHAPES[name], generator=torch.Generator().manual_seed(0))
    return X, X.flatten(1)[:, :4].argmax(1)


def trained(name, scheme=SCHEME, **options):
    X, y = data(name)
    return train_ensemble(
        lambda: classifier(name, SHAPES[name], 4), X, y, **{"seeds": [3, 8], "epochs": 3, "scheme": scheme} | options
    )


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
        found.load(same, member)
        for key, expected in network.state_dict().items():
            torch.testing.assert_close(same.state_dict()[key], expected, atol=2e-5, rtol=1e-3)
        loss = torch.nn.functional.cross_entropy(network.eval()(X), y)
        torch.testing.assert_close(found.loss[-1, member], loss.detach(), atol=1e-5, rtol=1e-3)
    with pytest.raises(ValueError, match="not kept"):
        found.load(same, 0, epoch=2)


@pytest.mark.parametrize(("name", "scheme"), [("F-9-7-BN", SCHEME), ("LeNet5-(fc1-9)", Scheme(0.1, 0.9, 1e-2, 16))])
def test_an_interrupted_ensemble_gives_the_same(name, scheme, tmp_path, monkeypatch):
    monkeypatch.setattr("common.zoo.CHECKPOINT_SECONDS", 0.0)
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
    for wrong in ("F-0^2", "F", "LeNet6", "F-200^2BN", "LeNet5-(fc1-0)"):
        with pytest.raises(ValueError, match=r"unknown network|at least 1"):
            classifier(wrong, (3, 32, 32), 10)
    with pytest.raises(ValueError, match="28 × 28 or 32 × 32"):
        classifier("LeNet5", (3, 30, 30), 10)
