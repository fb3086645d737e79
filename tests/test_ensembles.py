"""Ensembles of perceptrons against torch's own training of each alone."""

import pytest
import torch

from common.ensembles import train_ensemble, xavier
from common.zoo import PartialFile

ARGUMENTS = {"seeds": [3, 8], "epochs": 3, "lr": 0.1, "batch_size": 16}
WIDTHS = [6, 9, 7, 4]


def data():
    X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    return X, (X[:, :4].argmax(1))


def test_every_member_is_trained_as_torch_trains_it_alone():
    X, y = data()
    found = train_ensemble(X, y, WIDTHS, **ARGUMENTS)
    for member, seed in enumerate(ARGUMENTS["seeds"]):
        weights, biases = ([p[0].requires_grad_() for p in part] for part in xavier(WIDTHS, [seed]))
        optimizer = torch.optim.SGD([*weights, *biases], lr=0.1)

        def logits(x, weights=weights, biases=biases):
            for k, (W, b) in enumerate(zip(weights, biases, strict=True)):
                x = torch.nn.functional.linear(x if k == 0 else x.relu(), W, b)
            return x

        for epoch in range(3):
            order = torch.randperm(50, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
            for rows in order.split(16):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(logits(X[rows]), y[rows]).backward()
                optimizer.step()
        for W, expected in zip(found.network(member)[0], weights, strict=True):
            torch.testing.assert_close(W, expected.detach(), atol=1e-5, rtol=1e-4)
        loss = torch.nn.functional.cross_entropy(logits(X), y)
        torch.testing.assert_close(found.loss[-1, member], loss.detach(), atol=1e-5, rtol=1e-4)
    assert (found.loss[-1] < found.loss[0]).all()


def test_an_interrupted_ensemble_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("common.zoo.CHECKPOINT_SECONDS", 0.0)
    X, y = data()
    whole = train_ensemble(X, y, WIDTHS, **ARGUMENTS)
    checkpoint = PartialFile(tmp_path / "ensemble.pt", "an ensemble")
    randperm, calls = torch.randperm, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) > 4:  # in the third epoch
            raise KeyboardInterrupt
        return randperm(*arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "randperm", interrupted)
        train_ensemble(X, y, WIDTHS, **ARGUMENTS, checkpoint=checkpoint)
    assert int(checkpoint.load()["epoch"]) == 2
    resumed = train_ensemble(X, y, WIDTHS, **ARGUMENTS, checkpoint=checkpoint)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


@pytest.mark.parametrize(("change", "message"), [({"epochs": -1}, "positive"), ({"seeds": []}, "positive")])
def test_what_cannot_be_trained(change, message):
    X, y = data()
    with pytest.raises(ValueError, match=message):
        train_ensemble(X, y, WIDTHS, **ARGUMENTS | change)
    with pytest.raises(ValueError, match="do not fit"):
        train_ensemble(X, y, [5, 4], **ARGUMENTS)
    with pytest.raises(FloatingPointError, match="not finite"):
        train_ensemble(X, y, WIDTHS, **ARGUMENTS | {"lr": 1e30})
