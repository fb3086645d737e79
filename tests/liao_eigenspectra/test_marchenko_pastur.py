"""Scaled and shifted Marčenko-Pastur laws, against their closed form and a spectrum that is one."""

import math

import numpy as np
import pytest

from common.liao_eigenspectra.glm import GLM, LOGISTIC, Features, exponential_loss, halves, logistic_loss
from common.liao_eigenspectra.law import Law
from common.liao_eigenspectra.marchenko_pastur import MarchenkoPastur
from common.liao_eigenspectra.spectrum import LimitingSpectrum

C = 0.25


def test_density_is_the_closed_form():
    law, x = MarchenkoPastur(C, -1.0, 2.0), np.linspace(-0.45, 3.45, 9)
    t = (x + 1) / 2
    assert np.allclose(law.density(x), np.sqrt((t - 0.25) * (2.25 - t)) / (2 * math.pi * C * t) / 2, rtol=1e-8)


def test_edges_are_matched_to_a_sample():
    values = np.array([7.0, 3.0, 4.0])
    law = MarchenkoPastur.matched(values, C)
    assert (law.shift + 0.25 * law.scale, law.shift + 2.25 * law.scale) == pytest.approx((3.0, 7.0))


def test_fit_finds_the_law_that_a_constant_g_makes():
    H = LimitingSpectrum(Law.discrete([0.3]), Features(p=1), C)
    law = MarchenkoPastur.fitted(H)
    assert (law.shift, law.scale) == (pytest.approx(0.0, abs=1e-3), pytest.approx(0.3, abs=1e-3))
    assert law.distance_from_limit(H) < 1e-3
    assert law.distance(H.quantiles(500)) == pytest.approx(0.001, abs=1e-3)  # half a part of 500


def test_no_other_law_of_the_family_is_nearer_than_the_fitted():
    for loss in (logistic_loss, exponential_loss):
        H = LimitingSpectrum(Law.of(GLM(p=8, w=halves(8), response=LOGISTIC, loss=loss)), Features(p=8), C)
        law = MarchenkoPastur.fitted(H)
        least = law.distance_from_limit(H)
        assert least > 1e-4
        for shift, scale in [(0.02, 1), (-0.02, 1), (0, 1.02), (0, 0.98)]:
            other = MarchenkoPastur(C, law.shift + shift * law.scale, law.scale * scale)
            assert other.distance_from_limit(H) > least


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MarchenkoPastur(0.0, 0.0, 1.0), "c must be positive and finite, got 0.0"),
        (lambda: MarchenkoPastur(C, 0.0, -1.0), "scale must be positive and finite, got -1.0"),
        (lambda: MarchenkoPastur(C, math.nan, 1.0), "shift must be a finite number, got nan"),
        (lambda: MarchenkoPastur.matched(np.ones(3), C), "the eigenvalues are all 1"),
        (
            lambda: MarchenkoPastur.fitted(LimitingSpectrum(Law.discrete([0.0]), Features(p=1), C)),
            "the spectrum is zero",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("g", [[-1.0], [-1.0, 1.0], [-2.0, 0.5]])
def test_a_spectrum_of_mean_zero_or_below_has_a_nearest_law_too(g):
    H = LimitingSpectrum(Law.discrete(g), Features(p=1), C)
    law = MarchenkoPastur.fitted(H)
    least = law.distance_from_limit(H)
    for shift, scale in [(0.05, 1), (-0.05, 1), (0, 1.05), (0, 0.95)]:
        assert MarchenkoPastur(C, law.shift + shift * law.scale, law.scale * scale).distance_from_limit(H) > least


def test_the_distribution_function_is_the_integral_of_the_density():
    law, x = MarchenkoPastur(C, -1.0, 2.0), np.linspace(-0.5, 3.5, 20_001)
    assert np.allclose(law.cdf(x[::1000]), np.r_[0, np.cumsum(law.density(x)[1:] * np.diff(x))][::1000], atol=1e-3)
