"""The bound against exact probabilities, high precision and full covariances; its gradient against autograd."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from common.cache import PartialFile
from common.wu_dissecting import pac_bayes
from common.wu_dissecting.pac_bayes import (
    METHODS,
    Confidence,
    Descent,
    Method,
    Posteriors,
    Schedule,
    binary_kl,
    bounds,
    complexity,
    count_errors,
    gaussian_kl,
    kl_inverse,
    kronecker_factors,
    pac_bayes_bound,
    rotate,
    spread_along_curvature,
    tighten,
    turn_back,
    with_one,
)

WIDTHS = [7, 5, 4, 3]


def random_layers(seed, widths=WIDTHS):
    generator = torch.Generator().manual_seed(seed)
    sizes = itertools.pairwise(widths)
    return [0.5 * torch.randn(m, n + 1, generator=generator, dtype=torch.float64) for n, m in sizes]


def orthogonal(size, generator):
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def random_posteriors(E, mixed, seed=0):
    """In random bases, with ϱ that differ."""
    q = Posteriors.start(random_layers(seed), random_layers(seed + 1), E, mixed=mixed)
    generator = torch.Generator().manual_seed(seed)
    for e in range(E):
        for layer, mean in enumerate(q.mean):
            m, n = mean.shape[1], mean.shape[2] - 1
            q.change_basis(e, layer, orthogonal(m, generator), orthogonal(n, generator))
    q.half_log_prior = torch.linspace(-2, -1.3, E, dtype=torch.float64)
    for part in (part for pair in q.mixing for part in pair):
        part += 0.2 * torch.randn(part.shape, generator=generator, dtype=torch.float64).tril(-1)
    return q


def drawn_weights(q, e, generator):
    """Weights of one network, drawn as matrices in the standard basis."""
    found = []
    for layer, M in enumerate(q.mean):
        noise = torch.randn(M[e].shape, generator=generator, dtype=M.dtype) * q.log_std[layer][e].exp()
        if q.mixing:
            A, C = (part[e] for part in q.mixing[layer])
            noise = A @ noise @ C.T
        found.append(turn_back(M[e] + noise, q.outputs[layer][e], q.inputs[layer][e]))
    return found


def passed_through(weights, X):
    for k, W in enumerate(weights):
        X = with_one(X) @ W.T
        X = X.relu() if k < len(weights) - 1 else X
    return X


def samples(N, seed=0, n=7, classes=3):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(N, n, generator=generator, dtype=torch.float64)
    return X, X[:, :classes].argmax(1)


@pytest.mark.parametrize("q", [0.0, 1e-9, 0.02, 0.3, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("bound", [0.0, 1e-12, 1e-6, 0.003, 0.3, 2.0, 30.0])
def test_the_inverse_of_kl_to_fifty_digits(q, bound):
    found = kl_inverse(q, bound)
    with mpmath.workdps(50):
        Q = mpmath.mpf(q)

        def kl(p):
            first = Q * mpmath.log(Q / p) if q > 0 else mpmath.mpf(0)
            return first + ((1 - Q) * mpmath.log((1 - Q) / (1 - p)) if q < 1 else 0)

        assert q <= found <= 1
        if found < 1:
            assert kl(mpmath.mpf(found)) >= bound  # a bound must not be rounded down
            assert abs(float(kl(mpmath.mpf(found))) - binary_kl(q, found)) <= 1e-12 + 1e-9 * bound
        below = mpmath.mpf(found) - mpmath.mpf("2e-12")
        assert below <= q or kl(below) <= bound + 2e-15
    if q == 0:
        assert found == pytest.approx(-math.expm1(-bound), abs=4e-12)


@pytest.mark.parametrize("draws", [1, 7, 200, 5000])
def test_the_bound_from_draws_fails_as_rarely_as_it_says(draws):
    """Exactly, from the binomial distribution of the number of errors."""
    confidence = Confidence(delta_sampling=0.05)
    counts = np.arange(draws + 1)
    raised = np.array([kl_inverse(k / draws, math.log(2 / 0.05) / draws) for k in counts])
    failing = [stats.binom.pmf(counts[raised < e], draws, e).sum() for e in np.linspace(0.001, 0.999, 97)]
    assert max(failing) <= confidence.delta_sampling
    assert draws < 200 or max(failing) > 0.005  # a bound of 1 would pass as well


@pytest.mark.parametrize("N", [8, 50, 1000])
def test_the_bound_of_one_hypothesis_fails_as_rarely_as_it_says(N):
    """With Q = P and one network only, exactly: kl(ê‖e) ≤ ln(N/δ)/(N − 1)."""
    delta, counts = 0.2, np.arange(N + 1)
    raised = np.array([kl_inverse(k / N, math.log(N / delta) / (N - 1)) for k in counts])
    assert max(stats.binom.pmf(counts[raised < e], N, e).sum() for e in np.linspace(0.001, 0.999, 97)) <= delta


def test_the_bound_holds_for_posteriors_fitted_to_their_samples():
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


def test_the_terms_of_the_bound():
    confidence = Confidence()
    rho = (math.log(confidence.c) - 137.3 / confidence.b) / 2
    found = pac_bayes_bound(300, 10_000, lambda rho: 5000 + 100 * rho, rho, 60_000, confidence)
    assert found.j in (137, 138)
    assert found.half_log_prior == pytest.approx((math.log(0.1) - found.j / 100) / 2)
    assert found.kl == pytest.approx(5000 + 100 * found.half_log_prior)
    B = float(complexity(torch.tensor(found.kl), torch.tensor(found.half_log_prior).double(), 60_000, confidence))
    expected = (found.kl + math.log(60_000 * math.pi**2 * found.j**2 / (6 * 0.025))) / 59_999
    assert pytest.approx(expected, rel=1e-6) == B
    assert found.error == 0.03
    assert found.bound == pytest.approx(kl_inverse(kl_inverse(0.03, math.log(200) / 10_000), expected), rel=1e-6)
    assert pac_bayes_bound(3, 10, lambda _: 5.0, -1.0, 60, confidence).j == 1  # λ > c is not on the grid
    assert pac_bayes_bound(10, 10, lambda _: 5.0, -2.0, 60, confidence).bound == 1
    with pytest.raises(ValueError, match="errors"):
        pac_bayes_bound(11, 10, lambda _: 5.0, -2.0, 60, confidence)
    for wrong in ({"delta": 0.0}, {"delta_sampling": 1.0}, {"b": 0}, {"c": -1.0}):
        with pytest.raises(ValueError, match="probabilities"):
            Confidence(**wrong)
    with pytest.raises(ValueError, match="bound of at least 0"):
        kl_inverse(0.5, -1e-9)


@pytest.mark.parametrize("mixed", [False, True])
def test_kl_in_any_basis_is_that_of_the_full_covariance(mixed):
    q = random_posteriors(1, mixed)
    prior, expected = random_layers(1), 0
    lam = float((2 * q.half_log_prior[0]).exp())
    for layer, W in enumerate(q.mean_weights(0)):
        U, V = q.outputs[layer][0], torch.block_diag(q.inputs[layer][0], torch.ones(1, 1, dtype=torch.float64))
        A, C = (part[0] for part in q.mixing[layer]) if mixed else (torch.eye(len(W)), torch.eye(W.shape[1]))
        turn = torch.kron(U @ A.double(), V @ C.double())
        covariance = turn @ torch.diag((2 * q.log_std[layer][0]).exp().flatten()) @ turn.T
        Q = torch.distributions.MultivariateNormal(W.flatten(), covariance)
        P = torch.distributions.MultivariateNormal(prior[layer].flatten(), lam * torch.eye(W.numel()).double())
        expected += float(torch.distributions.kl_divergence(Q, P))
    assert float(q.kl()[0]) == pytest.approx(expected, rel=1e-9)
    assert float(q.kl(-1.0)[0]) != pytest.approx(expected, rel=1e-3)


def test_the_change_of_basis_is_orthogonal_and_leaves_no_trace():
    generator = torch.Generator().manual_seed(0)
    W, U, V = random_layers(0)[0], orthogonal(5, generator), orthogonal(7, generator)
    turned = rotate(W, U, V)
    torch.testing.assert_close(turned[:, :-1], U.T @ W[:, :-1] @ V)
    torch.testing.assert_close(turn_back(turned, U, V), W, atol=1e-14, rtol=0)
    assert float(turned.norm()) == pytest.approx(float(W.norm()), rel=1e-14)
    q = random_posteriors(2, mixed=False)
    for layer, W in enumerate(random_layers(0)):
        for e in range(2):
            torch.testing.assert_close(q.mean_weights(e)[layer], W, atol=1e-13, rtol=0)
    assert not torch.allclose(q.mean[0][0], q.mean[0][1])
    before, log_std = q.kl(), [tensor.clone() for tensor in q.log_std]
    q.change_basis(1, 0, U, V)
    torch.testing.assert_close(q.kl(), before)  # a rotation of an isotropic prior
    assert all(torch.equal(*pair) for pair in zip(q.log_std, log_std, strict=True))


@pytest.mark.parametrize("mixed", [False, True])
def test_outputs_drawn_layer_by_layer_are_those_of_drawn_networks(mixed):
    """The share of errors of independent pairs against networks drawn as weights, each on all samples, as in App H."""
    q, (X, y) = random_posteriors(2, mixed), samples(60)
    q.log_std = [log_std.clamp(-1.5, -0.5) for log_std in q.log_std]
    generator = torch.Generator().manual_seed(3)
    draws = 100_000
    for e, wrong in enumerate(count_errors(q, X, y, draws, seed=1)):
        networks = (drawn_weights(q, e, generator) for _ in range(2500))
        errors = np.array([float((passed_through(W, X).argmax(1) != y).double().mean()) for W in networks])
        share = wrong / draws
        deviation = math.hypot(errors.std() / math.sqrt(2500), math.sqrt(share * (1 - share) / draws))
        assert abs(share - errors.mean()) < 4 * deviation
        assert 0.2 < share < 0.9 and deviation < 0.01


@pytest.mark.parametrize("mixed", [False, True])
def test_the_gradient_is_that_of_autograd(mixed):
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


def test_every_wrong_answer_costs_at_least_a_bit():
    logits = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0))
    wrong = logits.argmax(1) != 0
    bits = torch.nn.functional.cross_entropy(logits, torch.zeros(1000).long(), reduction="none") / math.log(2)
    assert bits[wrong].min() >= 1 and wrong.any()


def test_factors_of_the_layers():
    weights, (X, _) = random_layers(0), samples(30)
    exact, rough = kronecker_factors(weights, X), kronecker_factors(weights, X, approximated=True)
    p = passed_through(weights, X).softmax(1)
    A = torch.diag(p.mean(0)) - p.T @ p / 30
    torch.testing.assert_close(exact[2][0], A)
    torch.testing.assert_close(exact[0][1], X.T @ X / 30)
    hidden = (with_one(X) @ weights[0].T).relu()
    torch.testing.assert_close(exact[1][1], hidden.T @ hidden / 30)
    S = weights[2][:, :-1] @ weights[1][:, :-1]
    torch.testing.assert_close(rough[0][0], S.T @ A @ S / 16)  # (272) with L − p = 2
    torch.testing.assert_close(rough[2][0], A)
    assert not torch.allclose(rough[0][0], exact[0][0], rtol=0.1)


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
def test_an_interrupted_optimization_gives_the_same(methods, tmp_path, monkeypatch):
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


def test_variances_in_a_learned_basis_are_marginal():
    q, (X, _) = random_posteriors(1, mixed=True), samples(40)
    generator = torch.Generator().manual_seed(0)
    U, V = q.outputs[1][0], q.inputs[1][0]
    draws = torch.stack([rotate(drawn_weights(q, 0, generator)[1], U, V) for _ in range(4000)])
    expected = draws.var(0)[:, :-1].flatten().sort().values
    _, variance = spread_along_curvature(q, 0, X)[1]
    torch.testing.assert_close(variance.sort().values, expected, rtol=0.15, atol=0.01)


def test_curvatures_are_the_eigenvalues_of_the_kronecker_product_in_its_own_basis():
    X, _ = samples(40)
    q = Posteriors.start(random_layers(0), random_layers(1), 1)
    for layer, factors in enumerate(kronecker_factors(q.mean_weights(0), X)):
        q.change_basis(0, layer, *(pac_bayes._eigenvectors(factor) for factor in factors))
    for (curvature, variance), (M, C), log_std in zip(
        spread_along_curvature(q, 0, X), kronecker_factors(q.mean_weights(0), X), q.log_std, strict=True
    ):
        expected = torch.outer(*(torch.linalg.eigvalsh(factor) for factor in (M, C))).flatten().sort(descending=True)
        torch.testing.assert_close(curvature, expected.values, atol=1e-12, rtol=1e-8)
        assert variance.sort().values.tolist() == pytest.approx(
            (2 * log_std[0][:, :-1]).exp().flatten().sort().values.tolist()
        )
