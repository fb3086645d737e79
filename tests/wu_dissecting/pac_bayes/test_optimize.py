"""Bounds of optimized posteriors against known errors; the gradient against autograd; interruptions."""

import math

import pytest
import torch

from common.cache import PartialFile
from common.wu_dissecting.pac_bayes.bound import Confidence, complexity, pac_bayes_bound
from common.wu_dissecting.pac_bayes.optimize import METHODS, Descent, Method, Schedule, tighten
from common.wu_dissecting.pac_bayes.posterior import Posteriors, bounds, gaussian_kl, with_one


def test_the_bound_holds_for_posteriors_fitted_to_their_samples(random_layers, samples):
    """A finite population of noisy labels and a linear network: e(Q) is known, and ê(Q) without KL is too low."""
    X, y = samples(400, n=2, classes=2)
    flipped = torch.rand(400, generator=torch.Generator().manual_seed(5)) < 0.3
    y = torch.where(flipped, 1 - y, y)
    confidence = Confidence(delta=0.1, delta_sampling=0.1)
    schedule = Schedule(epochs=3, lr=0.05, lr_spread=0.1, decay_every=3, batch_size=40)
    options = {"schedule": schedule, "confidence": confidence}
    broken, too_low, informative = 0, 0, 0
    for seed in range(100):
        rows = torch.randint(400, (40,), generator=torch.Generator().manual_seed(1000 + seed))
        prior = random_layers(seed, [2, 2])
        fitted = [w.clone() for w in prior]
        design = with_one(X[rows])
        fitted[0][1] = fitted[0][0] + torch.linalg.lstsq(design, 2 * y[rows, None].to(X) - 1).solution[:, 0]
        q = tighten(fitted, prior, X[rows], y[rows], [METHODS["ITER"]], seed=seed, **options)
        (found,) = bounds(q, X[rows], y[rows], draws=300, seed=2000 + seed, confidence=confidence)
        x, s = q.rotated(X)[0], q.variances()[0][0]
        U, M = q.outputs[0][0], q.mean[0][0]
        along = U[1] - U[0]  # logits are U z, z independent
        spread = (x.square() @ s.T @ along.square()).sqrt()
        margin = (x @ M.T @ along) * (2 * y - 1) / spread
        truth = float(torch.special.ndtr(-margin).mean())
        broken += truth > found.bound
        too_low += truth > found.error
        informative += found.bound < 1
    assert broken <= 100 * 0.2
    assert too_low > 35 and informative > 85


def test_the_bound_holds_where_noise_is_learned_by_heart():
    """Random labels of as many dimensions as samples: e = ½ and ê near 0, which only KL can tell."""
    N, n, confidence = 400, 400, Confidence()
    schedule = Schedule(epochs=20, lr=0.01, lr_spread=0.1, decay_every=10, batch_size=100)
    for seed in range(3):
        generator = torch.Generator().manual_seed(100 + seed)
        X, y = torch.randn(N, n, generator=generator), torch.randint(2, (N,), generator=generator)
        prior = [0.01 * torch.randn(2, n + 1, generator=torch.Generator().manual_seed(seed))]
        fitted = [prior[0].clone()]
        fitted[0][1] += torch.linalg.lstsq(with_one(X), 20 * y[:, None] - 10.0).solution[:, 0]
        q = tighten(fitted, prior, X, y, [METHODS["APPR"]], schedule=schedule, confidence=confidence, seed=seed)
        (found,) = bounds(q, X, y, draws=2000, seed=50 + seed, confidence=confidence)
        assert found.error < 0.2
        assert found.bound > 0.5
        rho = found.half_log_prior
        assert pac_bayes_bound(round(found.error * 2000), 2000, lambda _: 0.0, rho, N, confidence).bound < 0.5


@pytest.mark.parametrize("mixed", [False, True])
def test_the_gradient_is_that_of_autograd(random_posteriors, samples, mixed):
    q, (X, y) = random_posteriors(2, mixed), samples(9)
    x = torch.stack(q.rotated(X))
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(2, 9, M.shape[1], generator=generator, dtype=torch.float64) for M in q.mean]
    confidence = Confidence()
    objective = Descent(q, 50, confidence).gradient(x, y, noise)
    by_hand = [parameter.grad for parameter in q.parameters()]
    leaves = [parameter.clone().requires_grad_() for parameter in q.parameters()]
    L = len(q.mean)
    mean, log_std, rho, mixing = leaves[:L], leaves[L : 2 * L], leaves[2 * L], leaves[2 * L + 1 :]
    z, kl = x, 0
    for layer in range(L):
        A, C = mixing[2 * layer : 2 * layer + 2] if mixed else (torch.eye(n).double() for n in mean[layer].shape[1:])
        std = ((z @ C).square() @ (2 * log_std[layer]).exp().mT).sqrt()
        z = (z @ mean[layer].mT + (std * noise[layer]) @ A.mT) @ q.outputs[layer].mT
        if layer < L - 1:
            z = with_one(z.relu() @ q.inputs[layer + 1])
        lengths = [part.square().sum(-2).expand(2, -1) for part in (A, C)]
        kl = kl + gaussian_kl(mean[layer], log_std[layer], q.prior_mean[layer], rho, *lengths)
    loss = torch.stack([torch.nn.functional.cross_entropy(logits, y) for logits in z]) / math.log(2)
    expected = loss + (complexity(kl, rho, 50, confidence) / 2).sqrt()
    torch.testing.assert_close(objective, expected.detach())
    for k, (ours, theirs) in enumerate(zip(by_hand, torch.autograd.grad(expected.sum(), leaves), strict=True)):
        torch.testing.assert_close(ours, theirs if k <= 2 * L else theirs.tril(-1), msg=f"parameter {k}")


def test_the_surrogate_is_never_below_the_share_of_wrong_answers(random_layers, samples):
    """Where all answers are wrong by a hair it is 1 in bits, and would be less in nats."""
    X, _ = samples(9)
    q = Posteriors.start([1e-3 * W for W in random_layers(0, [7, 5, 2])], random_layers(1, [7, 5, 2]), 1)
    x, generator = torch.stack(q.rotated(X)), torch.Generator().manual_seed(1)
    noise = [torch.randn(1, 9, M.shape[1], generator=generator, dtype=torch.float64) for M in q.mean]
    y = q.logits(x, noise, q.variances())[0].argmin(1)
    objective = Descent(q, 50, Confidence()).gradient(x, y, noise)
    root = (complexity(q.kl(), q.half_log_prior, 50, Confidence()) / 2).sqrt()
    assert 1 < float(objective - root) < 1.01


def test_bases_are_found_when_the_schedule_says():
    schedule = Schedule(epochs=30, decay_every=10, hessian_every=2)
    due = {name: [t for t in range(30) if schedule.finds_bases(t, method)] for name, method in METHODS.items()}
    assert due["BASE"] == []
    assert due["APPR"] == due["LEARNED"] == [0]
    assert due["ITER"] == due["ITER.M"] == list(range(0, 30, 2))
    assert due["ITER(D)"] == [0, 2, 4, 6, 8]  # η is 20 from the tenth epoch on, 200 from the twentieth
    with pytest.raises(ValueError, match="positive"):
        Schedule(epochs=0)
    with pytest.raises(ValueError, match="positive"):
        Schedule(lr_spread=0.0)


@pytest.mark.parametrize("methods", [[METHODS["BASE"], METHODS["ITER"]], [Method(mixed=True)]])
def test_an_interrupted_optimization_gives_the_same(random_layers, samples, methods, tmp_path, monkeypatch):
    monkeypatch.setattr("common.cache.CHECKPOINT_SECONDS", 0.0)
    X, y = samples(64)
    weights, prior = random_layers(0), random_layers(1)
    schedule = Schedule(epochs=4, lr=0.01, lr_spread=0.05, decay_every=2, hessian_every=1, batch_size=16)

    def run(checkpoint=None, rows=slice(None)):
        options = {"schedule": schedule, "confidence": Confidence(), "seed": 7, "checkpoint": checkpoint}
        return tighten(weights, prior, X[rows], y[rows], methods, **options)

    whole, checkpoint, calls = run(), PartialFile(tmp_path / "posteriors.pt", "posteriors"), []
    once = Descent.pass_through

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return once(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Descent, "pass_through", interrupted)
        run(checkpoint)
    assert int(checkpoint.load()["epoch"]) == 2
    for ours, theirs in zip(run(checkpoint).tensors(), whole.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    assert (whole.kl() < Posteriors.start(weights, prior, 1).kl()).all()  # it has gone down
    if methods[0].mixed:
        A = whole.mixing[0][0][0]
        assert torch.equal(A.diagonal(), torch.ones(5).double()) and A.triu(1).abs().max() == 0
        assert A.tril(-1).abs().max() > 1e-3
    with pytest.raises(ValueError, match="a batch of 16"):
        run(rows=slice(9))
