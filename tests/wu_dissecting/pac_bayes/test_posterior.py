"""Posteriors against full covariances, and drawn outputs against networks drawn as matrices."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from common.wu_dissecting.pac_bayes.bases import eigenvectors, kronecker_factors, rotate, turn_back
from common.wu_dissecting.pac_bayes.posterior import (
    Posteriors,
    binned_by_rank,
    count_errors,
    spread_along_curvature,
    with_one,
)


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


@pytest.mark.parametrize("mixed", [False, True])
def test_kl_in_any_basis_is_that_of_the_full_covariance(random_layers, random_posteriors, mixed):
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


def test_the_change_of_basis_leaves_no_trace(random_layers, random_posteriors, orthogonal):
    generator = torch.Generator().manual_seed(0)
    q = random_posteriors(2, mixed=False)
    for layer, W in enumerate(random_layers(0)):
        for e in range(2):
            torch.testing.assert_close(q.mean_weights(e)[layer], W, atol=1e-13, rtol=0)
    assert not torch.allclose(q.mean[0][0], q.mean[0][1])
    before, log_std = q.kl(), [tensor.clone() for tensor in q.log_std]
    q.change_basis(1, 0, orthogonal(5, generator), orthogonal(7, generator))
    torch.testing.assert_close(q.kl(), before)  # a rotation of an isotropic prior
    assert all(torch.equal(*pair) for pair in zip(q.log_std, log_std, strict=True))


@pytest.mark.parametrize("mixed", [False, True])
def test_outputs_drawn_layer_by_layer_are_those_of_drawn_networks(random_posteriors, samples, mixed):
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


def test_variances_in_a_learned_basis_are_marginal(random_posteriors, samples):
    q, (X, _) = random_posteriors(1, mixed=True), samples(40)
    generator = torch.Generator().manual_seed(0)
    U, V = q.outputs[1][0], q.inputs[1][0]
    draws = torch.stack([rotate(drawn_weights(q, 0, generator)[1], U, V) for _ in range(4000)])
    expected = draws.var(0)[:, :-1].flatten().sort().values
    _, variance = spread_along_curvature(q, 0, X)[1]
    torch.testing.assert_close(variance.sort().values, expected, rtol=0.15, atol=0.01)


def test_curvatures_are_the_eigenvalues_of_the_kronecker_product_in_its_own_basis(random_layers, samples):
    X, _ = samples(40)
    q = Posteriors.start(random_layers(0), random_layers(1), 1)
    for layer, factors in enumerate(kronecker_factors(q.mean_weights(0), X)):
        q.change_basis(0, layer, *(eigenvectors(factor) for factor in factors))
    for (curvature, variance), (M, C), log_std in zip(
        spread_along_curvature(q, 0, X), kronecker_factors(q.mean_weights(0), X), q.log_std, strict=True
    ):
        expected = torch.outer(*(torch.linalg.eigvalsh(factor) for factor in (M, C))).flatten().sort(descending=True)
        torch.testing.assert_close(curvature, expected.values, atol=1e-12, rtol=1e-8)
        assert variance.sort().values.tolist() == pytest.approx(
            (2 * log_std[0][:, :-1]).exp().flatten().sort().values.tolist()
        )


def test_bins_of_ranks_against_a_loop():
    k, points = 1000, 25
    curvature = torch.rand(k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variance = curvature.square() + 1
    found = binned_by_rank(curvature, variance, points)
    edges = (10 ** (math.log10(k + 1) / points * np.arange(points + 1)) + 1e-9).astype(int)
    for bin, (low, high) in enumerate(itertools.pairwise(edges)):
        ranks = range(low, high)  # counted from 1
        if not ranks:
            assert all(math.isnan(values[bin]) for values in found.values())
            continue
        assert float(found["rank"][bin]) == pytest.approx(np.mean(ranks))
        for key, values in (("curvature", curvature), ("variance", variance)):
            assert float(found[key][bin]) == pytest.approx(stats.gmean(values[low - 1 : high - 1]))
    assert edges[-1] == k + 1 and found["rank"].isnan().any()
