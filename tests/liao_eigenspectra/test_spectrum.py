"""The limiting spectrum, Theorem 1 of Liao and Mahoney, against closed forms, exact moments and simulation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.liao_eigenspectra.glm import GLM, PHASE_RETRIEVAL, Features, halves, phase_retrieval_loss
from common.liao_eigenspectra.law import Law
from common.liao_eigenspectra.spectrum import LimitingSpectrum
from common.liao_eigenspectra.spikes import Eigenspectrum

UPPER = np.array([0.3 + 1e-6j, 1.0 + 0.01j, -0.5 + 0.1j, 5.0 + 1.0j])


@pytest.mark.parametrize("c", [0.1, 0.9, 1.0, 3.0])
def test_a_constant_curvature_gives_the_marchenko_pastur_law(c):
    H = LimitingSpectrum(Law.discrete([1.0]), Features(p=1), c)
    low, high = (1 - math.sqrt(c)) ** 2, (1 + math.sqrt(c)) ** 2
    assert np.allclose(H.support, [(low, high)], atol=1e-12)
    assert H.mass_at_zero == pytest.approx(max(0, 1 - 1 / c))
    assert H.total_mass == pytest.approx(1, abs=1e-5)
    x = np.linspace(low, high, 41)[1:-1]
    exact = np.sqrt((high - x) * (x - low)) / (2 * math.pi * c * x)
    assert np.allclose(H.density(x), exact, rtol=1e-8)
    m = H.stieltjes_transform(UPPER)
    assert np.allclose(UPPER * c * m**2 - (1 - c - UPPER) * m + 1, 0, atol=1e-10)
    assert np.allclose(H.stieltjes_transform(UPPER.conj()), m.conj())


@pytest.mark.parametrize(("c", "bulks"), [(0.05, 2), (0.6, 1)])
def test_two_eigenvalues_of_c_give_the_generalized_marchenko_pastur_law(c, bulks):
    """With g = 1, Silverstein's equation z = -1/m + c ∫ t/(1 + t m) for the companion transform is a cubic."""
    H = LimitingSpectrum(Law.discrete([1.0]), Features(p=4, covariance=([1.0, 5.0], [0.25, 0.75])), c)
    assert len(H.support) == bulks

    def m_of(z: complex) -> complex:
        one, five = np.poly1d([1.0, 1.0]), np.poly1d([5.0, 1.0])  # 1 + m, 1 + 5 m
        m = np.poly1d([1.0, 0.0])
        equation = m * z * one * five + one * five - c * m * (0.25 * five + 3.75 * one)
        (companion,) = (root for root in equation.roots if root.imag > 1e-13)
        return (companion + (1 - c) / z) / c

    z = UPPER + 0.01j
    assert np.allclose(H.stieltjes_transform(z), [m_of(complex(x)) for x in z], rtol=1e-9)
    for edge in np.ravel(H.support):  # at an edge the cubic has a double root: its discriminant changes sign
        inside, outside = (H.density(np.array([edge * f for f in (1 - 1e-6, 1 + 1e-6)])) > 0).tolist()
        assert inside != outside
    assert H.total_mass == pytest.approx(1, abs=1e-6)


def free_moments(cumulants: list[float]) -> list[float]:
    """The first four moments from free cumulants."""
    a, b, c, d = cumulants
    return [a, b + a**2, c + 3 * a * b + a**3, d + 4 * a * c + 2 * b**2 + 6 * a**2 * b + a**4]


@pytest.mark.parametrize("g", [[1.0], [0.5, 3.0], [-1.0, 0.0, 2.0]])
@pytest.mark.parametrize("c", [0.3, 2.0])
def test_first_four_moments(g, c):
    """For C = I the law is a free compound Poisson law: its free cumulants are c^(n-1) E[g^n]."""
    H = LimitingSpectrum(Law.discrete(g), Features(p=1), c)
    angle = (np.arange(400) + 0.5) * 2 * math.pi / 400
    z = 40 * np.exp(1j * angle)
    m = H.stieltjes_transform(z)
    measured = [-np.mean(z ** (n + 1) * m).real for n in range(1, 5)]
    cumulants = [c ** (n - 1) * np.mean(np.power(g, n)) for n in range(1, 5)]
    assert np.allclose(measured, free_moments(cumulants), rtol=1e-8, atol=1e-8)
    assert H.total_mass == pytest.approx(1, abs=2e-3)


def test_mass_at_zero_counts_the_curvatures_that_vanish():
    """Also for c < 1, where the paper has no such mass."""
    law = Law.discrete([0.0, 1.0], [0.7, 0.3])
    H = LimitingSpectrum(law, Features(p=1), 0.5)
    rng = np.random.default_rng(0)
    X, g = rng.standard_normal((800, 400)), rng.permutation(np.repeat([0.0, 1.0], [560, 240]))
    assert H.mass_at_zero == pytest.approx((np.abs(np.linalg.eigvalsh(X.T * g @ X / 800)) < 1e-10).mean())
    assert H.cdf(0.0) - H.cdf(-1e-9) == pytest.approx(0.4, abs=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    g=st.lists(st.floats(-3, 3), min_size=1, max_size=5),
    t=st.lists(st.floats(0.1, 5), min_size=1, max_size=4),
    c=st.floats(0.05, 5),
    x=st.floats(-20, 20),
    height=st.floats(1e-6, 5),
)
def test_the_fixed_point_is_found_everywhere_in_the_upper_half_plane(g, t, c, x, height):
    H = LimitingSpectrum(Law.discrete(g), Features(p=len(t), covariance=np.array(t)), c)
    z = np.array([complex(x, height)])
    delta = H.delta(z)[0]
    kappa = np.mean([a / (1 + a * delta) for a in g])
    assert delta.imag > 0
    assert abs(c * np.mean([s / (s * kappa - z[0]) for s in t]) - delta) <= 1e-8 * abs(delta) + 1e-14


@settings(max_examples=25, deadline=None)
@given(
    g=st.lists(st.sampled_from([-2.0, -0.5, 0.3, 1.0, 2.5, 6.0]), min_size=1, max_size=3, unique=True),
    t=st.lists(st.sampled_from([0.2, 1.0, 4.0]), min_size=1, max_size=2, unique=True),
    c=st.sampled_from([0.02, 0.2, 0.7, 1.6]),
)
def test_density_lives_on_the_support_and_nowhere_else(g, t, c):
    H = LimitingSpectrum(Law.discrete(g), Features(p=len(t), covariance=np.array(t)), c)
    assert H.support
    for low, high in H.support:
        assert (H.density(low + (high - low) * np.array([1e-3, 0.1, 0.5, 0.9, 1 - 1e-3])) > 0).all()
    ends = [H.support[0][0] - 1, *np.ravel(H.support), H.support[-1][1] + 1]
    outside = np.array([(a + b) / 2 for a, b in zip(ends[::2], ends[1::2], strict=True)])
    outside = outside[np.abs(outside) > 1e-6]
    assert np.allclose(H.density(outside), 0, atol=1e-7)
    assert H.total_mass == pytest.approx(1, abs=0.01)


def test_distribution_function_meets_simulation_of_an_unbounded_law():
    """Phase retrieval, indefinite and unbounded: one draw of p eigenvalues lies within a few 1/p of the law."""
    p, n = 200, 1500
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    w = rng.standard_normal(p) / math.sqrt(p)
    glm = GLM(p=p, w=w, w_star=2 * halves(p), response=PHASE_RETRIEVAL, loss=phase_retrieval_loss)
    H = Eigenspectrum.of(glm, p / n)
    assert H.total_mass == pytest.approx(1, abs=1e-3)
    assert H.spikes == ()
    distances = []
    for _ in range(4):
        values = np.linalg.eigvalsh(glm.hessian(glm.sample_features(n, generator), generator).numpy())
        distances.append(np.abs(H.cdf(values) - (np.arange(p) + 0.5) / p).max())
    assert np.median(distances) < 0.04


def test_quantiles_and_distance():
    """The p quantiles are within 1/(2 p) of the law; all of them moved are as far as the mass at zero is large."""
    H = LimitingSpectrum(Law.discrete([0.0, 1.0], [0.7, 0.3]), Features(p=1), 0.5)
    x = H.quantiles(1000)
    assert (x == 0).sum() == pytest.approx(400, abs=1)
    assert np.allclose(H.cdf(x[x > 0]), (np.flatnonzero(x > 0) + 0.5) / 1000, atol=2e-4)
    assert H.distance(np.random.default_rng(0).permutation(x)) == pytest.approx(1 / 2000, abs=5e-4)
    assert H.distance(x + 0.01) == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LimitingSpectrum(Law.discrete([1.0]), Features(p=1), 0.0), "c = p/n must be positive"),
        (lambda: LimitingSpectrum(Law.discrete([1.0]), Features(p=1), 1.0).delta(math.nan), "z must be finite"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
