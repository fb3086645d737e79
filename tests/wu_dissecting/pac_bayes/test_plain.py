"""Plain descent against its own algorithm by autograd, and against the law of a direction that does not matter."""

import math

import pytest
import torch

from common.wu_dissecting.pac_bayes.bound import Confidence, complexity
from common.wu_dissecting.pac_bayes.plain import flattest, kl_of_start, plain_descent
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


def test_a_step_is_one_of_autograd(random_layers, samples):
    """KL alone: with one batch, the rise of the dead weights is τ ∂R/∂ς at the start."""
    weights, prior, X, y = with_a_dead_input(random_layers, samples)
    found = plain_descent(weights, prior, X, y, **(OPTIONS | {"epochs": 1, "batch_size": 60}))
    q = Posteriors.start(weights, prior, 1)
    log_std = [part.clone().requires_grad_() for part in q.log_std]
    parts = zip(q.mean, log_std, q.prior_mean, strict=True)
    kl = sum(gaussian_kl(*three, q.half_log_prior) for three in parts)
    root = (complexity(kl, q.half_log_prior, 60, Confidence()) / 2).sqrt()
    step = -0.01 * torch.autograd.grad(root.sum(), log_std)[0][0, :, 0]
    places = flattest(weights, X, share=1 / weights[0][:, :-1].shape[1])
    assert sorted(places.tolist()) == list(range(0, weights[0][:, :-1].numel(), weights[0].shape[1] - 1))
    longer = plain_descent(weights, prior, X, y, **(OPTIONS | {"epochs": 1, "batch_size": 60, "lr": 0.02}))
    assert float(longer["at_most"]) == pytest.approx(2 * float(found["at_most"]))
    assert float(found["at_most"]) == pytest.approx(0.01 / (4 * float(root.detach()) * 59))
    assert float(step.max()) <= float(found["at_most"])


def test_the_kl_of_the_start_is_the_smallest_over_the_prior(random_layers):
    weights, prior = random_layers(0), random_layers(1)
    q = Posteriors.start(weights, prior, 1)
    values = [float(q.kl(rho)) for rho in torch.linspace(-3, 1, 2001).tolist()]
    assert kl_of_start(weights, prior) == pytest.approx(min(values), rel=1e-5)
    assert math.isfinite(kl_of_start(weights, weights))


def test_plain_descent_refuses_what_does_not_fit(random_layers, samples):
    weights, prior, X, y = with_a_dead_input(random_layers, samples)
    with pytest.raises(ValueError, match="batch"):
        plain_descent(weights, prior, X, y, **(OPTIONS | {"batch_size": 61}))
    with pytest.raises(ValueError, match="labels"):
        plain_descent(weights, prior, X, y + 1, **OPTIONS)
