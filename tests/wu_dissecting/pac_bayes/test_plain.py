"""Plain descent against its own algorithm by autograd, and against the law of a direction that does not matter."""

import pytest
import torch

from common.wu_dissecting.pac_bayes.bound import Confidence, complexity
from common.wu_dissecting.pac_bayes.plain import flattest, plain_descent
from common.wu_dissecting.pac_bayes.posterior import Posteriors, gaussian_kl

OPTIONS = {"epochs": 6, "lr": 0.01, "decay_every": 3, "batch_size": 20, "confidence": Confidence(), "seed": 0}


def with_a_dead_input(random_layers, samples):
    """A network and samples whose first input is always 0: nothing depends on its weights."""
    X, y = samples(60)
    X[:, 0] = 0
    weights, prior = ([0.05 * w for w in random_layers(seed)] for seed in (0, 1))
    return weights, prior, X, y


def test_what_does_not_matter_rises_as_derived(random_layers, samples, monkeypatch):
    weights, prior, X, y = with_a_dead_input(random_layers, samples)
    m, n = weights[0].shape[0], weights[0].shape[1] - 1
    monkeypatch.setattr("common.wu_dissecting.pac_bayes.plain.flattest", lambda *_: torch.arange(m) * n)
    found = plain_descent(weights, prior, X, y, **OPTIONS)
    assert float(found["rise"]) == pytest.approx(float(found["derived"]), rel=1e-9)
    assert 0 < float(found["derived"]) < float(found["at_most"])
    assert float(found["rise"]) < 0.1 * float(found["needed"])


def test_a_step_is_one_of_autograd(random_layers, samples, monkeypatch):
    """KL alone: with one batch, the rise of the dead weights is τ ∂R/∂ς at the start, whose scale is τ/4R(N − 1)."""
    weights, prior, X, y = with_a_dead_input(random_layers, samples)
    m, n = weights[0].shape[0], weights[0].shape[1] - 1
    monkeypatch.setattr("common.wu_dissecting.pac_bayes.plain.flattest", lambda *_: torch.arange(m) * n)
    found = plain_descent(weights, prior, X, y, **(OPTIONS | {"epochs": 1, "batch_size": 60}))
    q = Posteriors.start([w.double() for w in weights], [w.double() for w in prior], 1)
    log_std = [part.clone().requires_grad_() for part in q.log_std]
    parts = zip(q.mean, log_std, q.prior_mean, strict=True)
    kl = sum(gaussian_kl(*three, q.half_log_prior) for three in parts)
    root = (complexity(kl, q.half_log_prior, 60, Confidence()) / 2).sqrt()
    step = -0.01 * torch.autograd.grad(root.sum(), log_std)[0][0, :, 0]
    assert float(found["rise"]) == pytest.approx(float(step.mean()), rel=1e-6)
    assert float(found["at_most"]) == pytest.approx(0.01 / (4 * float(root.detach()) * 59))
    assert float(step.max()) <= float(found["at_most"])
    longer = plain_descent(weights, prior, X, y, **(OPTIONS | {"epochs": 1, "batch_size": 60, "lr": 0.02}))
    assert float(longer["rise"]) == pytest.approx(2 * float(found["rise"]), rel=1e-6)


def test_dead_weights_are_the_flattest(random_layers, samples, monkeypatch):
    weights, _, X, _ = with_a_dead_input(random_layers, samples)
    m, n = weights[0].shape[0], weights[0].shape[1] - 1
    monkeypatch.setattr("common.wu_dissecting.pac_bayes.plain.FLAT", 1 / n)
    assert sorted(flattest(weights, X).tolist()) == [row * n for row in range(m)]


def test_plain_descent_refuses_what_does_not_fit(random_layers, samples):
    weights, prior, X, y = with_a_dead_input(random_layers, samples)
    with pytest.raises(ValueError, match="batch"):
        plain_descent(weights, prior, X, y, **(OPTIONS | {"batch_size": 61}))
    with pytest.raises(ValueError, match="labels"):
        plain_descent(weights, prior, X, y + 1, **OPTIONS)
