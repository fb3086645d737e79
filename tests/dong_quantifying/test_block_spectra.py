"""Spectra of blocks: the equation against the Marčenko–Pastur law, its moments, and simulated Hessians of autograd."""

import math

import numpy as np
import pytest
import torch

from common.dong_quantifying.block_norms import linear_moments
from common.dong_quantifying.block_spectra import (
    block_eigenvalues,
    decoupling_gap,
    hidden_weights,
    linear_weights,
    resolvent_trace,
    simulated_spectra,
    stieltjes_transform,
)

Z = np.array([0.3 + 0.2j, 1 + 0.5j, -1 + 1j, 4 + 0.1j])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("share", "gamma"), [(1, 0.5), (2, 1.0), (4, 1.0)])
def test_masks_give_the_marchenko_pastur_laws_of_proposition_6(share, gamma):
    # Bernoulli(1/k) weights: MP(kγ, 1/k), whose transform solves (97).
    weights = np.array([1.0] + [0.0] * (share - 1))
    s = stieltjes_transform(Z, weights, gamma)
    y, sigma2 = share * gamma, 1 / share
    residual = y * Z * sigma2 * s**2 + (Z - sigma2 * (1 - y)) * s + 1
    assert np.abs(residual).max() < 1e-7
    assert (s.imag > 0).all()


def test_moments_at_infinity_are_those_of_theorem_1():
    p = linear_weights(torch.randn(200_000, 5, generator=generator())).own.numpy()
    z = np.array([200j * p.mean()])
    s = stieltjes_transform(z, p, 0.7, tolerance=1e-15)
    first, second = p.mean(), 0.7 * (p**2).mean() + p.mean() ** 2
    expansion = -1 / z - first / z**2 - second / z**3
    assert abs((s - expansion) / (second / z**3))[0] < 0.05
    assert second == pytest.approx(linear_moments(5).g_ii(0.7), rel=0.02)


def test_weights_and_blocks_are_those_of_autograd():
    N, d, m, C = 7, 4, 3, 5
    X, W, V = (torch.randn(*s, generator=generator(1), dtype=torch.float64) for s in ((N, d), (m, d), (C, m)))
    U, y = torch.randn(C, d, generator=generator(2), dtype=torch.float64), torch.arange(N) % C

    def cross_entropy(logits):
        return torch.nn.functional.cross_entropy(logits, y)

    linear = torch.func.hessian(lambda v: cross_entropy(X @ v.reshape(C, d).T))(U.flatten()).reshape(C, d, C, d)
    hidden = torch.func.hessian(lambda w: cross_entropy(torch.relu(X @ w.reshape(m, d).T) @ V.T))(W.flatten())
    hidden = hidden.reshape(m, d, m, d)
    for H, weights in ((linear, linear_weights(X @ U.T)), (hidden, hidden_weights(X @ W.T, V))):
        for other, w in enumerate(weights):
            expected = torch.linalg.eigvalsh(H[0, :, other])
            torch.testing.assert_close(block_eigenvalues(X, w), expected, rtol=1e-8, atol=1e-12)


def test_simulated_spectra_solve_the_equations():
    V = torch.randn(6, 4, generator=generator(3)) / 2
    drawn = linear_weights(torch.randn(20_000, 6, generator=generator(4)))
    drawn = (*drawn, *hidden_weights(torch.randn(20_000, 4, generator=generator(5)), V))
    spectra = list(simulated_spectra(300, 300, 6, V, 4, generator(6)))
    for weights, eigenvalues in zip(drawn, zip(*spectra, strict=True), strict=True):
        scale = weights.abs().mean().item()
        z = scale * np.array([0.5 + 0.5j, 2 + 1j])
        found = np.mean([resolvent_trace(e, z) for e in eigenvalues], axis=0)
        expected = stieltjes_transform(z, weights.numpy(), 1.0)
        assert np.abs(found / expected - 1).max() < 0.06
        # One weight for all samples, its mean, would not do
        wrong = stieltjes_transform(z, weights.mean(0, keepdim=True).numpy(), 1.0)
        assert np.abs(found / wrong - 1).max() > 0.1


def test_what_decoupling_changes_shrinks_like_the_root_of_n():
    z = np.array([0.1 + 0.1j])
    coarse, fine = (decoupling_gap(n, n, 3, z, 100, generator(n)) for n in (20, 80))
    rms = [math.sqrt((np.abs(gap) ** 2).mean()) for gap in (coarse, fine)]
    assert 1.4 < rms[0] / rms[1] < 2.9  # like the root of N


def test_bad_points_are_refused():
    with pytest.raises(ValueError, match="upper half plane"):
        stieltjes_transform(np.array([1 - 1j]), np.ones(1), 1.0)
    with pytest.raises(ValueError, match="C must be at least 2"):
        decoupling_gap(3, 3, 1, np.array([1j]), 1, generator())
