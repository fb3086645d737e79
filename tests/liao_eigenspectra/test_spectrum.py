"""The limiting spectrum, Theorem 1 of Liao and Mahoney, against closed forms, exact moments and simulation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.liao_eigenspectra.glm import (
    GLM,
    LOGISTIC,
    PHASE_RETRIEVAL,
    Features,
    exponential_loss,
    halves,
    logistic_loss,
    phase_retrieval_loss,
)
from common.liao_eigenspectra.law import Law
from common.liao_eigenspectra.spectrum import LimitingSpectrum
from common.liao_eigenspectra.spikes import Eigenspectrum

FEW = settings(max_examples=30, deadline=None, derandomize=True)
UPPER = np.array([0.3 + 1e-6j, 1.0 + 0.01j, -0.5 + 0.1j, 5.0 + 1.0j])


@pytest.mark.parametrize("c", [0.1, 0.9, 1.0, 3.0])
def test_a_constant_curvature_gives_the_marchenko_pastur_law(c):
    H = LimitingSpectrum(Law.discrete([1.0]), Features(p=1), c)
    low, high = (1 - math.sqrt(c)) ** 2, (1 + math.sqrt(c)) ** 2
    assert np.allclose(H.support, [(low, high)], atol=1e-12)
    assert H.mass_at_zero == pytest.approx(max(0, 1 - 1 / c))
    assert H.total_mass == pytest.approx(1, abs=1e-9)
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
    assert H.total_mass == pytest.approx(1, abs=1e-9)


def test_mass_at_zero_counts_the_curvatures_that_vanish():
    """Also for c < 1, where the paper has no such mass."""
    law = Law.discrete([0.0, 1.0], [0.7, 0.3])
    H = LimitingSpectrum(law, Features(p=1), 0.5)
    rng = np.random.default_rng(0)
    X, g = rng.standard_normal((800, 400)), rng.permutation(np.repeat([0.0, 1.0], [560, 240]))
    assert H.mass_at_zero == pytest.approx((np.abs(np.linalg.eigvalsh(X.T * g @ X / 800)) < 1e-10).mean())
    assert H.cdf(0.0) - H.cdf(-1e-9) == pytest.approx(0.4, abs=1e-3)


@FEW
@given(
    g=st.lists(st.floats(-3, 3).map(lambda g: g if abs(g) > 1e-90 else 0.0), min_size=1, max_size=5),
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


@settings(max_examples=15, deadline=None, derandomize=True)
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
    assert H.total_mass == pytest.approx(1, abs=1e-9)


def test_distribution_function_meets_simulation_of_an_unbounded_law():
    """Phase retrieval, indefinite and unbounded: one draw of p eigenvalues lies within a few 1/p of the law."""
    p, n = 200, 1500
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    w = rng.standard_normal(p) / math.sqrt(p)
    glm = GLM(p=p, w=w, w_star=2 * halves(p), response=PHASE_RETRIEVAL, loss=phase_retrieval_loss)
    H = Eigenspectrum.of(glm, p / n)
    assert H.total_mass == pytest.approx(1, abs=1e-6)
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


# The distribution function --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.2, 1.0, 3.0])
def test_distribution_function_of_the_marchenko_pastur_law(c):
    """Against its density, integrated by a rule of many points in an angle in which it is smooth, c = 1 too."""
    H = LimitingSpectrum(Law.discrete([1.0]), Features(p=1), c)
    low, high = (1 - math.sqrt(c)) ** 2, (1 + math.sqrt(c)) ** 2
    node, weight = np.polynomial.legendre.leggauss(200)
    for x in low + (high - low) * np.array([1e-9, 1e-5, 0.01, 0.3, 0.9, 1 - 1e-6, 1.0]):
        last = math.asin(math.sqrt(min((x - low) / (high - low), 1)))
        u = last * (1 + node) / 2
        density = ((high - low) * np.sin(u) * np.cos(u)) ** 2 / (math.pi * c * (low + (high - low) * np.sin(u) ** 2))
        assert H.cdf(x) - H.mass_at_zero == pytest.approx(density @ weight * last / 2, abs=1e-8)


def test_a_cube_root_pole_at_zero():
    """g = ±1 and C = I at c = 1: the density grows as |x|^(-1/3) at zero, inside the bulk."""
    H = LimitingSpectrum(Law.discrete([-1.0, 1.0]), Features(p=1), 1.0)
    assert H.total_mass == pytest.approx(1, abs=1e-8)
    assert H.cdf(0.0) == pytest.approx(0.5, abs=1e-12)
    grid = np.geomspace(1e-15, 0.5, 4001)
    by_steps = 0.5 + np.trapezoid(grid * H.density(grid), np.log(grid))
    assert H.cdf(0.5) == pytest.approx(by_steps, abs=1e-5)
    assert H.density(np.array([0.0, 1e-6]))[0] == math.inf


SIGNED = st.sampled_from([-1.0, 0.0, 1.0, 1.0])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    signs=st.lists(SIGNED, min_size=1, max_size=4),
    sizes=st.lists(st.floats(-5, 1), min_size=4, max_size=4),
    weights=st.lists(st.floats(0.02, 1), min_size=4, max_size=4),
    t=st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=3),
    c=st.sampled_from([1.0, "P(g ≠ 0)", 1e-3, 0.05, 0.3, 0.9, 1.1, 4.0, 20.0]),
)
def test_every_law_has_mass_one_and_the_moments_that_are_known(signs, sizes, weights, t, c):
    """E λ = E[g] E[t] and E λ² = E[g]² E[t²] + c E[g²] E[t]²; F rises from 0 to 1."""
    g, t = np.array(signs) * 10 ** np.array(sizes[: len(signs)]), 10 ** np.array(t)
    q = np.array(weights[: len(g)]) / sum(weights[: len(g)])
    if c == "P(g ≠ 0)":
        c = float(q[g != 0].sum()) or 1.0
    H = LimitingSpectrum(Law.discrete(g, q), Features(p=len(t), covariance=t), c)
    assert H.total_mass == pytest.approx(1, abs=1e-6)
    first = (q @ g) * t.mean()
    second = (q @ g) ** 2 * (t**2).mean() + c * (q @ g**2) * t.mean() ** 2
    quantiles = H.quantiles(8000)
    assert quantiles.mean() == pytest.approx(first, abs=2e-3 * math.sqrt(second))
    assert (quantiles**2).mean() == pytest.approx(second, rel=0.02, abs=1e-300)
    edges = [x for bulk in H.support for x in bulk]
    F = H.cdf(np.unique([-math.inf, *edges, *quantiles, *np.linspace(-3, 3, 101) * math.sqrt(second), 0.0, math.inf]))
    assert F[0] == pytest.approx(0, abs=1e-9)
    assert F[-1] == pytest.approx(1, abs=1e-9)
    assert (np.diff(F) >= -1e-12).all()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    g=st.lists(st.sampled_from([-3.0, -1.0, -0.01, 0.0, 0.01, 0.5, 1.0, 4.0]), min_size=1, max_size=3, unique=True),
    t=st.lists(st.sampled_from([0.05, 1.0, 3.0, 30.0]), min_size=1, max_size=2, unique=True),
    c=st.sampled_from([0.05, 0.3, 1.0, 2.0]),
    seed=st.integers(0, 9),
)
def test_every_eigenvalue_of_a_sample_is_near_the_support(g, t, c, seed):
    """Within the fluctuation of an edge, of order p^(-2/3); and the law within a few 1/p of the sample."""
    p = 144
    n = round(p / c)
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p)) * np.sqrt(np.repeat(t, p // len(t)))
    sample = np.resize(np.array(g), n)
    H = LimitingSpectrum(Law.discrete(sample), Features(p=p, covariance=np.repeat(t, p // len(t))), p / n)
    values = np.linalg.eigvalsh(X.T * sample @ X / n)
    places = [*H.support, (0.0, 0.0)] if H.mass_at_zero else [*H.support]
    low, high = np.array(places).T[:, :, None]
    away = np.maximum(np.maximum(low - values, values - high), 0) / np.maximum(np.abs(low), np.abs(high)).clip(1e-9)
    away = away.min(axis=0)
    assert away.max() < 4 * p ** (-2 / 3)
    assert H.distance(values) < 5 / p


@pytest.mark.parametrize(
    ("loss", "response", "c"),
    [
        (logistic_loss, LOGISTIC, 1.0),
        (exponential_loss, LOGISTIC, 1.0),
        (exponential_loss, LOGISTIC, 3.0),
        (phase_retrieval_loss, PHASE_RETRIEVAL, 0.2),
    ],
)
def test_laws_of_models_have_mass_one(loss, response, c):
    w, w_star = np.eye(4)[:2]
    glm = GLM(p=4, w=w, w_star=w_star, response=response, loss=loss)
    assert LimitingSpectrum(Law.of(glm), glm, c).total_mass == pytest.approx(1, abs=1e-6)


# A Hessian that is zero -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [lambda y, h: torch.relu(1 - y * h), lambda y, h: (y - h).abs(), lambda y, h: y * h])
def test_a_loss_without_curvature_has_all_its_mass_at_zero(loss):
    glm = GLM(p=20, w=2 * halves(20), w_star=halves(20), mean=halves(20), response=LOGISTIC, loss=loss)
    H, generator = Eigenspectrum.of(glm, 0.2), torch.Generator().manual_seed(0)
    (sample,) = glm.sample_hessians(100, 1, generator)
    values = np.linalg.eigvalsh(sample.numpy())
    assert not values.any()
    assert H.support == ()
    assert H.spikes == ()
    assert H.mass_at_zero == H.total_mass == 1
    assert H.distance(values) == 0
    assert H.distance(values + 1) == 1
    assert H.cdf([-1.0, -1e-12, 0.0, 1.0]).tolist() == [0, 0, 1, 1]
    assert H.density([-1.0, 0.0, 1.0]).tolist() == [0, 0, 0]
    assert H.quantiles(3).tolist() == [0, 0, 0]
    assert np.allclose(H.stieltjes_transform(UPPER), -1 / UPPER)
    assert np.allclose(H.resolvent(UPPER, glm.w, glm.w), -4 / UPPER)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    signs=st.lists(SIGNED, min_size=1, max_size=3),
    share=st.floats(0.01, 1),
    t=st.lists(st.floats(0.1, 5), min_size=1, max_size=3),
    c=st.floats(0.01, 10),
)
def test_mass_at_zero_is_what_the_curvatures_leave(signs, share, t, c):
    """1 - P(g ≠ 0)/c, below and above c = 1; there alone the distribution function jumps."""
    g, q = np.array([0.0, *signs]), np.array([1 - share, *np.full(len(signs), share / len(signs))])
    H = LimitingSpectrum(Law.discrete(g, q), Features(p=len(t), covariance=np.array(t)), c)
    assert H.mass_at_zero == pytest.approx(max(0, 1 - q[g != 0].sum() / c), abs=1e-11)
    assert H.cdf(0.0) - H.cdf(-1e-300) == pytest.approx(H.mass_at_zero, abs=1e-7)
    assert H.total_mass == pytest.approx(1, abs=1e-6)


ONE = LimitingSpectrum(Law.discrete([1.0]), Features(p=1), 1.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (
                lambda c=c: LimitingSpectrum(Law.discrete([1.0]), Features(p=1), c),
                "c = p/n must be positive and finite, got ",
            )
            for c in (0.0, -0.5, math.nan, math.inf, "0.2", None, [0.1, 0.2])
        ),
        (lambda: LimitingSpectrum(Law.discrete([1e-200]), Features(p=1), 1.0), "go up to 1e-200: choose other units"),
        (lambda: ONE.delta(math.nan), "z must be finite"),
        (lambda: ONE.stieltjes_transform(0.0), "z must not be zero"),
        (lambda: ONE.density([0.5, math.nan]), "x must be .*got nan"),
        (lambda: ONE.cdf(math.nan), "x must not be NaN"),
        (lambda: ONE.quantiles(0), "count must be a positive whole number, not 0"),
        (lambda: ONE.distance([]), r"the eigenvalues must be .* got shape \(0,\)"),
        (lambda: ONE.distance([1.0, math.nan]), "the eigenvalues must be .*got nan"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)
