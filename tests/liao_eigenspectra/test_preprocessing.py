"""Functions of the curvature, Remark 1: the law by quadrature, and the spikes by simulation."""

import numpy as np
import pytest
import torch
from scipy import stats

from common.liao_eigenspectra.glm import GLM, LOGISTIC, PHASE_RETRIEVAL, exponential_loss, halves, phase_retrieval_loss
from common.liao_eigenspectra.law import Law
from common.liao_eigenspectra.preprocessing import clipped, indicator, preprocessed_hessian, trimmed
from common.liao_eigenspectra.spikes import Eigenspectrum


def model(p: int) -> GLM:
    """Figure 1c's, with w at right angles to w*."""
    w = np.tile([1.0, -1.0], p // 2) / np.sqrt(p)
    return GLM(p=p, w=w, w_star=2 * halves(p), response=PHASE_RETRIEVAL, loss=phase_retrieval_loss)


def test_functions():
    g = np.array([-3.0, -1.0, 0.5, 2.0])
    assert trimmed(2)(g).tolist() == [0, -1, 0.5, 0]
    assert clipped(2)(g).tolist() == [-2, -1, 0.5, 2]
    assert indicator(2)(g).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("function", [trimmed(8), clipped(8), indicator(2)])
def test_the_law_has_the_moments_of_a_fine_grid(function):
    """E[f], E[f²] and E[f t tᵀ] against the product of two midpoint rules."""
    law = Law.of(model(4), 2**14).mapped(function)
    x = (np.arange(3000) + 0.5) / 3000 * 16 - 8
    q = stats.norm.pdf(x) * 16 / 3000
    a, b = np.meshgrid(x, x, indexing="ij")
    f, weight = function(3 * a**2 - 4 * b**2), np.outer(q, q)
    expected = [(weight * f * y).sum() for y in (1, f, a * a, b * b, a * b)]
    second = np.tensordot(law.g, law.second, 1)
    found = [law.g @ law.q, law.g**2 @ law.q, second[0, 0], second[1, 1], second[0, 1]]
    assert found == pytest.approx(expected, abs=5e-3)


def test_trimming_isolates_an_eigenvalue_along_w_star():
    """At ε = 16 Theorems 2 and 3 have one on the left; none at ε = 4."""
    p, n, runs = 150, 1125, 12
    glm, generator = model(p), torch.Generator().manual_seed(0)
    law = Law.of(glm)
    H = Eigenspectrum(law.mapped(trimmed(16)), glm, p / n)
    left = [spike for spike in H.spikes if spike.side == "left"]
    assert (left[0].eigenvalue, left[0].cosines["w_star"]) == pytest.approx((-5.954, 0.535), abs=0.01)
    assert not [s for s in Eigenspectrum(law.mapped(trimmed(4)), glm, p / n).spikes if s.side == "left"]
    measured = []
    for _ in range(runs):
        X = glm.sample_features(n, generator)
        values, vectors = np.linalg.eigh(preprocessed_hessian(X, glm.weights(X, generator), trimmed(16)).numpy())
        measured.append([values[0], (vectors[:, 0] @ halves(p)) ** 2])
    error = np.std(measured, axis=0, ddof=1) / np.sqrt(runs)
    off = np.abs(np.mean(measured, axis=0) - [left[0].eigenvalue, left[0].cosines["w_star"]])
    assert (off < 5 * error).all()


def test_the_indicator_has_a_spike_for_some_bounds_only():
    """As printed in Remark 1, at c = 2/15: one on the left at ε = 2, of the indicator, none at ε = 8."""
    glm, left = model(4), {}
    law = Law.of(glm)
    for bound in (2, 8):
        H = Eigenspectrum(law.mapped(indicator(bound)), glm, 2 / 15)
        left[bound] = [(s.eigenvalue, H.support[0][0]) for s in H.spikes if s.side == "left"]
    assert left[2][0] == pytest.approx((0.0808, 0.0867), abs=3e-4)
    assert not left[8]


def test_a_response_of_chance_is_mapped_too():
    """Exponential loss, g = exp(-y h), with w* at an angle to w; E[f], E[f²] and E[f t] by two midpoint rules."""
    glm = GLM(p=2, w=[1.0, 0.0], w_star=[0.6, 0.8], response=LOGISTIC, loss=exponential_loss)
    law = Law.of(glm).mapped(clipped(1.5))
    x = (np.arange(3000) + 0.5) / 3000 * 16 - 8
    q = stats.norm.pdf(x) * 16 / 3000
    a, b = np.meshgrid(x, x, indexing="ij")
    weight, expected = np.outer(q, q), np.zeros(4)
    for y in (-1, 1):
        chance, f = weight / (1 + np.exp(-y * (0.6 * a + 0.8 * b))), np.minimum(np.exp(-y * a), 1.5)
        expected += [(chance * part).sum() for part in (f, f**2, f * a, f * b)]
    found = [law.g @ law.q, law.g**2 @ law.q, *(law.g @ law.first)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert law.bounded
    with pytest.raises(ValueError, match=r"f\(g\)"):
        law.mapped(lambda g: np.full_like(g, np.inf))
