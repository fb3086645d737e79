"""Bases and factors against their definitions."""

import pytest
import torch

from common.wu_dissecting.pac_bayes.bases import eigenvectors, kronecker_factors, rotate, turn_back


def test_a_rotation_is_orthogonal_and_is_turned_back(random_layers, orthogonal):
    generator = torch.Generator().manual_seed(0)
    W, U, V = random_layers(0)[0], orthogonal(5, generator), orthogonal(7, generator)
    turned = rotate(W, U, V)
    torch.testing.assert_close(turned[:, :-1], U.T @ W[:, :-1] @ V)
    torch.testing.assert_close(turned[:, -1], U.T @ W[:, -1])
    torch.testing.assert_close(turn_back(turned, U, V), W, atol=1e-14, rtol=0)
    assert float(turned.norm()) == pytest.approx(float(W.norm()), rel=1e-14)


def test_eigenvectors_come_in_descending_order_and_are_orthogonal_to_the_last_digit():
    root = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    matrix = root @ root.T
    U = eigenvectors(matrix)
    rayleigh = (U.double() * (matrix.double() @ U.double())).sum(0)
    assert (rayleigh.diff() < 0).all()
    assert U.dtype == torch.float32
    torch.testing.assert_close(U.double().T @ U.double(), torch.eye(30).double(), atol=3e-7, rtol=0)


def test_factors_of_the_layers(random_layers, samples):
    weights, (X, _) = random_layers(0), samples(30)
    state = torch.get_rng_state()
    exact, rough = kronecker_factors(weights, X), kronecker_factors(weights, X, approximated=True)
    hidden = [X]
    for W in weights[:2]:
        hidden.append((hidden[-1] @ W[:, :-1].T + W[:, -1]).relu())
    p = (hidden[2] @ weights[2][:, :-1].T + weights[2][:, -1]).softmax(1)
    A = torch.diag(p.mean(0)) - p.T @ p / 30
    torch.testing.assert_close(exact[2][0], A)
    torch.testing.assert_close(exact[0][1], X.T @ X / 30)
    torch.testing.assert_close(exact[1][1], hidden[1].T @ hidden[1] / 30)
    S = weights[2][:, :-1] @ weights[1][:, :-1]
    torch.testing.assert_close(rough[0][0], S.T @ A @ S / 16)  # (272) with L − p = 2
    torch.testing.assert_close(rough[2][0], A)
    assert not torch.allclose(rough[0][0], exact[0][0], rtol=0.1)
    assert torch.equal(torch.get_rng_state(), state)  # the network it makes draws nothing
