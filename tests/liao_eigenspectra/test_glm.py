"""G-GLMs: their samples, curvatures and Hessians, against exact moments and torch's own derivatives."""

import math

import numpy as np
import pytest
import torch

from common.liao_eigenspectra.glm import (
    GLM,
    LOGISTIC,
    PHASE_RETRIEVAL,
    ContinuousResponse,
    Features,
    curvature,
    eigenpair,
    exponential_loss,
    halves,
    logistic_loss,
    phase_retrieval_loss,
    square_loss,
    squared_cosine,
)


@pytest.mark.parametrize(
    ("loss", "exact"),
    [
        (logistic_loss, lambda y, h: 1 / (2 + math.exp(h) + math.exp(-h))),
        (exponential_loss, lambda y, h: math.exp(-y * h)),
        (phase_retrieval_loss, lambda y, h: 3 * h**2 - y),
        (square_loss, lambda y, h: 1.0),
        (lambda y, h: y * h, lambda y, h: 0.0),
    ],
)
def test_curvature(loss, exact):
    y, h = torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64), torch.tensor([0.3, -2.0, 12.0], dtype=torch.float64)
    assert np.allclose(curvature(loss, y, h), [exact(*pair) for pair in zip(y.tolist(), h.tolist(), strict=True)])


@pytest.mark.parametrize("shape", ["matrix", "diagonal", "shares", "identity"])
def test_features_have_their_mean_and_covariance(shape):
    """Within five standard errors of a sample's first and second moments."""
    A = np.random.default_rng(0).standard_normal((3, 3))
    covariance, C = {
        "matrix": (A @ A.T + np.eye(3), A @ A.T + np.eye(3)),
        "diagonal": ([0.5, 1.0, 4.0], np.diag([0.5, 1.0, 4.0])),
        "shares": (([2.0, 9.0], [2 / 3, 1 / 3]), np.diag([2.0, 2.0, 9.0])),
        "identity": (None, np.eye(3)),
    }[shape]
    n, features = 40_000, Features(p=3, mean=[1.0, -2.0, 0.5], covariance=covariance)
    X = features.sample_features(n, torch.Generator().manual_seed(0)).numpy()
    scale = np.sqrt(np.diag(C))
    assert (np.abs(X.mean(0) - features.mean) < 5 * scale / math.sqrt(n)).all()
    assert (np.abs(np.cov(X.T) - C) < 5 * np.outer(scale, scale) * math.sqrt(2 / n)).all()
    basis = features.to_eigenbasis(np.eye(3)).T
    assert np.allclose(basis * features.eigenvalues @ basis.T, C)


def test_responses_are_drawn_from_their_law():
    n, eta, generator = 20_000, torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64), torch.Generator().manual_seed(0)
    y = LOGISTIC.sample(eta.repeat_interleave(n), generator).reshape(3, n)
    assert set(y.unique().tolist()) == {-1.0, 1.0}
    chance = torch.sigmoid(eta)
    assert ((y.eq(1).double().mean(1) - chance).abs() < 5 * (chance * (1 - chance) / n).sqrt()).all()
    assert torch.equal(PHASE_RETRIEVAL.sample(eta, generator), eta**2)
    noisy = ContinuousResponse(torch.square, noise=0.5).sample(eta.repeat_interleave(n), generator).reshape(3, n)
    assert ((noisy.mean(1) - eta**2).abs() < 5 * 0.5 / math.sqrt(n)).all()
    assert ((noisy.std(1) - 0.5).abs() < 5 * 0.5 / math.sqrt(2 * n)).all()


def test_hessian_is_the_second_derivative_of_the_loss():
    """Of the mean loss of a sample in w, by torch's own Hessian, at the responses that the generator gives."""
    glm = GLM(p=4, w=[0.5, -1.0, 0.0, 2.0], w_star=[1.0, 1.0, 0.0, 0.0], response=LOGISTIC, loss=exponential_loss)
    X = glm.sample_features(50, torch.Generator().manual_seed(0))
    y = LOGISTIC.sample(X @ torch.from_numpy(glm.w_star), torch.Generator().manual_seed(1))
    exact = torch.autograd.functional.hessian(lambda w: exponential_loss(y, X @ w).mean(), torch.from_numpy(glm.w))
    assert torch.allclose(glm.hessian(X, torch.Generator().manual_seed(1)), exact, rtol=1e-12)


@pytest.mark.parametrize("rank", [0, 1, -1])
def test_eigenpair(rank):
    A = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values, vectors = np.linalg.eigh((A + A.T).numpy())
    value, vector = eigenpair(A + A.T, rank)
    assert value == pytest.approx(values[rank])
    assert squared_cosine(vector, 3 * vectors[:, rank]) == pytest.approx(1)
    assert squared_cosine(vector, vectors[:, 2]) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("p", [4, 5])
def test_halves(p):
    assert np.linalg.norm(halves(p)) == pytest.approx(1)
    assert (halves(p) < 0).tolist() == [k < p // 2 for k in range(p)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Features(p=0), "p must be a positive whole number"),
        (lambda: Features(p=3, w=[1.0, 2.0]), "w must be 3 finite numbers"),
        (lambda: Features(p=3, mean=[1.0, 2.0, math.nan]), "mean must be 3 finite numbers"),
        (lambda: Features(p=3, covariance=([1.0, 2.0], [0.5, 0.5])), "do not share out 3 places"),
        (lambda: Features(p=2, covariance=[1.0, -1.0]), "2 positive eigenvalues"),
        (lambda: Features(p=2, covariance=[[1.0, 0.5], [0.0, 1.0]]), "symmetric matrix of order 2"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sampled_hessians_are_drawn_one_after_the_other():
    model = GLM(p=4, w=halves(4), response=LOGISTIC, loss=logistic_loss)
    generator = torch.Generator().manual_seed(0)
    hessians = list(model.sample_hessians(9, 3, generator))
    again = torch.Generator().manual_seed(0)
    for H in hessians:
        assert torch.equal(H, model.hessian(model.sample_features(9, again), again))
    assert not torch.equal(hessians[0], hessians[1])
