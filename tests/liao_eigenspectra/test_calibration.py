"""What a single spectrum differs from its limit by, without a theory."""

import math

import numpy as np
import pytest
import torch

from common.hessian.gram import weighted_gram
from common.liao_eigenspectra.calibration import compared_spectra, independent_features, own_distances, without_spikes
from common.liao_eigenspectra.glm import GLM, LOGISTIC, halves, logistic_loss
from common.liao_eigenspectra.spikes import Eigenspectrum


def test_new_features_have_the_covariance_and_know_nothing_of_g(general_model):
    generator = torch.Generator().manual_seed(0)
    X = general_model.sample_features(40_000, generator)
    fresh, g = independent_features(general_model, X, generator), general_model.weights(X, generator)
    error = 5 / math.sqrt(40_000)
    assert torch.allclose(fresh.T @ fresh / 40_000, torch.diag(torch.tensor(general_model.eigenvalues)), atol=8 * error)
    g = (g - g.mean()) / g.std()
    white = fresh / torch.from_numpy(np.sqrt(general_model.eigenvalues))
    assert (white.mean(0).abs() < error).all()
    assert ((g @ white / 40_000).abs() < error).all()
    assert ((g @ white**2 / 40_000).abs() < 2 * error).all()


def test_the_spectrum_moves_by_no_more_than_the_coordinates_allow(general_model):
    """Interlacing of singular values: two coordinates and the mean, (k + 1)/p."""
    generator = torch.Generator().manual_seed(1)
    X = general_model.sample_features(300, generator)
    g = general_model.weights(X, generator).abs() / 300
    a, b = (
        np.linalg.eigvalsh(weighted_gram(x, g).numpy()) for x in (X, independent_features(general_model, X, generator))
    )
    p = len(a)
    assert np.abs(np.searchsorted(a, b, "right") - np.arange(1, p + 1)).max() <= 3


def test_own_distances_of_independent_uniform_draws():
    """Kolmogorov's mean, sqrt(π/2) ln 2 / sqrt(p), for spectra that do not repel."""
    p, R = 400, 60
    found = own_distances(np.random.default_rng(0).uniform(size=(R, p)))
    assert found.mean() == pytest.approx(math.sqrt(math.pi / 2) * math.log(2) / math.sqrt(p), rel=0.15)
    with pytest.raises(ValueError, match="3 are needed"):
        own_distances(np.zeros((2, 5)))


def test_predicted_spikes_are_left_out():
    H = Eigenspectrum.of(GLM(p=16, w=2 * halves(16), response=LOGISTIC, loss=logistic_loss), 0.1)
    (spike,) = H.spikes
    assert without_spikes(H, np.array([spike.eigenvalue + 1e-3, 0.1, 0.2])).tolist() == [0.1, 0.2]


def test_the_distance_from_the_law_is_that_of_a_single_matrix():
    """The law is no further from a sample than a matrix of independent weights is from its own mean, up to 2/p."""
    glm = GLM(p=100, w=halves(100), response=LOGISTIC, loss=logistic_loss)
    generator = torch.Generator().manual_seed(0)
    hessians, values, reference = compared_spectra(glm, 700, 12, generator)
    assert np.allclose(np.linalg.eigvalsh(hessians[3].numpy()), values[3])
    assert np.abs(values - reference).max() > 0
    H = Eigenspectrum.of(glm, 100 / 700)
    assert np.mean([H.distance(v) for v in values]) < own_distances(reference).mean() + 2 / 100
