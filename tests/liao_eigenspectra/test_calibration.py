"""What a single spectrum differs from its limit by, without a theory."""

import math

import numpy as np
import pytest
import torch

from common.hessian.gram import weighted_gram
from common.liao_eigenspectra.calibration import Comparison, compared_spectra, independent_features, own_distances
from common.liao_eigenspectra.glm import GLM, LOGISTIC, halves, logistic_loss
from common.liao_eigenspectra.law import Law
from common.liao_eigenspectra.marchenko_pastur import MarchenkoPastur
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
    assert H.without_spikes(np.array([spike.eigenvalue + 1e-3, 0.1, 0.2])).tolist() == [0.1, 0.2]


def test_both_kinds_of_spectra_are_drawn_from_the_same_weights():
    """The features of the second are new: of trace E[g] p, and apart from the first by one coordinate."""
    glm = GLM(p=60, w=3 * halves(60), response=LOGISTIC, loss=logistic_loss)
    hessians, values, reference = compared_spectra(glm, 420, 20, torch.Generator().manual_seed(0))
    assert np.allclose(np.linalg.eigvalsh(hessians[3].numpy()), values[3])
    law = Law.of(glm)
    trace = law.q @ law.g
    assert reference.mean() == pytest.approx(trace, rel=0.02)
    apart = values.sum(1) - reference.sum(1)  # E[g (t² - 1)]
    error = apart.std(ddof=1) / math.sqrt(20)
    assert apart.mean() == pytest.approx(law.g @ (law.second[:, 0, 0] - law.q), abs=5 * error)
    assert abs(apart.mean()) > 5 * error


def test_the_distance_from_the_law_is_that_of_a_single_matrix():
    """The law is as near to a sample as a matrix of independent weights is to its own mean, up to five errors.

    A law that is off, the nearest Marčenko-Pastur law, is told from it by the bound.
    """
    glm, draws = GLM(p=100, w=3 * halves(100), response=LOGISTIC, loss=logistic_loss), 30
    H = Eigenspectrum.of(glm, 100 / 700)
    found = Comparison.of(glm, H, 700, draws, torch.Generator().manual_seed(0))
    excess = found.distances - found.chance
    assert abs(excess.mean()) < 5 * excess.std(ddof=1) / math.sqrt(draws)
    assert excess.mean() < found.bound < (found.nearest - found.chance).mean()
    least = MarchenkoPastur.fitted(H).distance_from_limit(H)
    assert found.bound == pytest.approx(min(2 / 100, least / 2))
    assert found.eigenvalues.shape == (draws, 100)
