"""The solver of Theorems 1 to 4 of Liao and Mahoney, against closed forms, exact moments and simulation."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from common import paths
from common.liao_eigenspectra.glm import (
    GLM,
    LOGISTIC,
    PHASE_RETRIEVAL,
    ContinuousResponse,
    Features,
    curvature,
    exponential_loss,
    halves,
    logistic_loss,
    phase_retrieval_loss,
    square_loss,
)
from common.liao_eigenspectra.spectrum import Eigenspectrum, Law, coordinates

LOGISTIC_MODEL = {"response": LOGISTIC, "loss": logistic_loss}
UPPER = np.array([0.3 + 1e-6j, 1.0 + 0.01j, -0.5 + 0.1j, 5.0 + 1.0j])


def general_model(p: int = 60, seed: int = 3) -> GLM:
    """Everything at once: C not diagonal, μ, w and w* in general position."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((p, p)) / math.sqrt(p)
    mean, w, w_star = rng.standard_normal((3, p)) / math.sqrt(p)
    return GLM(p=p, mean=2.5 * mean, w=3 * w, w_star=w_star, covariance=A @ A.T + np.eye(p) / 2, **LOGISTIC_MODEL)


# Theorem 1 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.1, 0.9, 1.0, 3.0])
def test_a_constant_curvature_gives_the_marchenko_pastur_law(c):
    H = Eigenspectrum(Law.discrete([1.0]), Features(p=1), c)
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
    H = Eigenspectrum(Law.discrete([1.0]), Features(p=4, covariance=([1.0, 5.0], [0.25, 0.75])), c)
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
    H = Eigenspectrum(Law.discrete(g), Features(p=1), c)
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
    H = Eigenspectrum(law, Features(p=1), 0.5)
    assert H.mass_at_zero == pytest.approx(0.4)
    rng = np.random.default_rng(0)
    X, g = rng.standard_normal((800, 400)), rng.permutation(np.repeat([0.0, 1.0], [560, 240]))
    assert (np.abs(np.linalg.eigvalsh(X.T * g @ X / 800)) < 1e-10).mean() == pytest.approx(0.4)
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
    H = Eigenspectrum(Law.discrete(g), Features(p=len(t), covariance=np.array(t)), c)
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
    H = Eigenspectrum(Law.discrete(g), Features(p=len(t), covariance=np.array(t)), c)
    assert H.support
    for low, high in H.support:
        assert (H.density(low + (high - low) * np.array([1e-3, 0.1, 0.5, 0.9, 1 - 1e-3])) > 0).all()
    ends = [H.support[0][0] - 1, *np.ravel(H.support), H.support[-1][1] + 1]
    outside = np.array([(a + b) / 2 for a, b in zip(ends[::2], ends[1::2], strict=True)])
    outside = outside[np.abs(outside) > 1e-6]
    assert np.allclose(H.density(outside), 0, atol=1e-7)
    assert H.total_mass == pytest.approx(1, abs=0.01)


# The law of g -------------------------------------------------------------------------------------------------------


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


def test_quadrature_of_a_discrete_response():
    """Logistic response, exponential loss: g = exp(-y h) with y correlated with h through w*."""
    p = 10
    w, w_star, mean = np.eye(p)[:3] * [[0.7], [1.1], [0.4]]
    w_star = w_star + 0.5 * w
    glm = GLM(p=p, w=w, w_star=w_star, mean=mean + 0.3 * w, response=LOGISTIC, loss=exponential_loss)
    law = Law.of(glm)
    assert law.q.sum() == pytest.approx(1)
    assert law.support[0][0] < 1e-3
    assert math.isinf(law.support[-1][1])
    assert not law.bounded
    rng = np.random.default_rng(0)
    t = rng.standard_normal((400_000, 2))
    _, along_w, along_w_star = coordinates(glm)
    h, eta = glm.w @ glm.mean + t @ along_w, glm.w_star @ glm.mean + t @ along_w_star
    y = np.where(rng.random(len(eta)) < 1 / (1 + np.exp(-eta)), 1.0, -1.0)
    f = np.exp(-y * h) / (1 + 0.3 * np.exp(-y * h))
    ratio = law.g / (1 + 0.3 * law.g)
    for exact, samples in [
        (ratio @ law.q, f),
        *[((law.first.T @ ratio)[k], f * t[:, k]) for k in range(2)],
        *[(np.tensordot(ratio, law.second, 1)[k, l], f * t[:, k] * t[:, l]) for k in range(2) for l in range(2)],
    ]:
        assert abs(exact - samples.mean()) < 4 * samples.std() / math.sqrt(len(samples))


def test_quadrature_of_phase_retrieval():
    """g = 3 h² - η² of two independent Gaussians: exact moments, and no end on either side."""
    glm = GLM(p=4, w=np.eye(4)[0], w_star=2 * np.eye(4)[1], response=PHASE_RETRIEVAL, loss=phase_retrieval_loss)
    law = Law.of(glm)
    assert law.support == ((-math.inf, math.inf),)
    assert law.q @ law.g == pytest.approx(3 - 4)
    assert law.q @ law.g**2 == pytest.approx(27 - 24 + 48)
    assert law.g @ law.second[:, 0, 0] == pytest.approx(9 - 4)
    assert law.g @ law.second[:, 1, 1] == pytest.approx(3 - 12)
    assert Eigenspectrum(law, glm, 0.1).support == ((-math.inf, math.inf),)


def test_quadrature_with_noise_kinks_and_atoms():
    """Squared hinge loss: g is 0 or 1, with P(g = 1) = P(y h < 1) exactly, whatever the kink does to a smooth rule."""
    glm = GLM(p=2, w=[0.8, 0.0], response=LOGISTIC, loss=lambda y, h: torch.relu(1 - y * h) ** 2 / 2, kinks=(-1.0, 1.0))
    law = Law.of(glm)
    assert law.support == ((0.0, 0.0), (1.0, 1.0))
    assert law.q[1] == pytest.approx((1 + math.erf(1 / 0.8 / math.sqrt(2))) / 2, rel=1e-10)
    noisy = GLM(
        p=2, w=[1.0, 0.0], w_star=[0.0, 1.0], loss=lambda y, h: torch.tanh(y) * h**2 / 2,
        response=ContinuousResponse(lambda eta: eta, noise=0.5),
    )  # fmt: skip
    law = Law.of(noisy)
    normal = lambda y: math.exp(-(y**2) / 2.5) / math.sqrt(2.5 * math.pi)  # noqa: E731
    exact = quad(lambda y: math.tanh(y) ** 2 * normal(y), -15, 15)[0]
    assert law.q @ law.g**2 == pytest.approx(exact, rel=1e-6)
    assert law.bounded


def test_sampled_law_meets_the_quadrature():
    glm = general_model()
    _, along_w, _ = coordinates(glm)
    t = np.random.default_rng(0).standard_normal((20_000, 2))
    h = torch.from_numpy(glm.w @ glm.mean + t @ along_w)
    g = curvature(logistic_loss, torch.ones_like(h), h).numpy()
    sampled = Eigenspectrum(Law.sampled(g, t, bounded=True), glm, 0.2)
    exact = Eigenspectrum.of(glm, 0.2)
    assert np.allclose(sampled.support, exact.support, rtol=0.03)
    assert sampled.spikes[-1].eigenvalue == pytest.approx(exact.spikes[-1].eigenvalue, rel=0.03)


# Theorems 2 and 3 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.1, 0.499, 0.501, 0.8, 3.0])
def test_corollary_1(rho):
    """The transition of Baik, Ben Arous and Péché at ρ = √c."""
    c, p = 0.25, 16
    H = Eigenspectrum.of(GLM(p=p, mean=math.sqrt(rho) * halves(p), **LOGISTIC_MODEL), c)
    low, high = H.support[0]
    assert np.allclose([low, high], [0.25 * 0.25, 0.25 * 2.25])
    assert len(H.spikes) == (rho > math.sqrt(c))
    for spike in H.spikes:
        assert spike.side == "right"
        assert spike.multiplicity == 1
        assert spike.eigenvalue == pytest.approx((1 + rho + c * (rho + 1) / rho) / 4, rel=1e-10)
        assert spike.gap == pytest.approx(spike.eigenvalue - high, rel=1e-6)
        assert spike.cosines == {"mean": pytest.approx((rho**2 - c) / (rho**2 + c * rho), rel=1e-8)}


def test_corollary_2():
    p, c, size = 16, 0.1, 2.0
    H = Eigenspectrum.of(GLM(p=p, w=size * halves(p), **LOGISTIC_MODEL), c)
    (spike,) = H.spikes
    assert spike.side == "left"

    def expected(m: complex, weight) -> float:
        f = lambda r: weight(r) / (c * m + 2 + math.exp(-r) + math.exp(r))  # noqa: E731
        return quad(lambda r: f(r) * math.exp(-((r / size) ** 2) / 2) / size / math.sqrt(2 * math.pi), -60, 60)[0]

    m = H.stieltjes_transform(spike.eigenvalue).real
    assert m == pytest.approx(1 / (expected(m, lambda r: 1) - spike.eigenvalue), rel=1e-7)
    assert 1 + m * expected(m, lambda r: r**2 - size**2) / size**2 == pytest.approx(0, abs=1e-7)


def paper_G(H: Eigenspectrum, glm: GLM, z: float) -> tuple[np.ndarray, np.ndarray]:
    """G(z) of (8), with Λ of (9) by pseudo-inverses, and Vᵀ Q̄_b V; in the coordinates of C's eigenvectors."""
    t = glm.eigenvalues
    mean, w, w_star = (glm.to_eigenbasis(v) for v in (glm.mean, glm.w, glm.w_star))
    V, U = np.column_stack([mean, t * w_star, t * w]), np.sqrt(t)[:, None] * np.column_stack([w_star, w])
    basis = coordinates(glm)[0]
    plus = np.linalg.pinv(U) @ basis  # U⁺ z, from the coordinates of z along the basis
    delta = H.delta(z).real
    f = H.law.g / (1 + H.law.g * delta)
    zero, one, two = f @ H.law.q, plus @ (f @ H.law.first), plus @ np.tensordot(f, H.law.second, 1) @ plus.T
    Lambda = np.block([[np.array([[zero]]), one[None]], [one[:, None], two - zero * np.linalg.pinv(U.T @ U)]])
    form = V.T @ (V / (zero * t - z)[:, None])
    return np.eye(3) + Lambda @ form, form


def test_spikes_are_the_roots_of_the_papers_determinant():
    """And Theorem 3 as printed gives the same alignments."""
    glm = general_model()
    H = Eigenspectrum.of(glm, 0.15)
    assert {spike.side for spike in H.spikes} == {"left", "right"}
    for spike in H.spikes:
        G, form = paper_G(H, glm, spike.eigenvalue)
        left, values, right = np.linalg.svd(G)
        assert values[-1] < 1e-6 * values[0]
        v_l, v_r, step = left[:, -1], right[-1], 1e-5 * spike.eigenvalue
        slope = (paper_G(H, glm, spike.eigenvalue + step)[0] - paper_G(H, glm, spike.eigenvalue - step)[0]) / (2 * step)
        printed = -form @ np.outer(v_r, v_l) / (v_l @ slope @ v_r)
        assert np.allclose(spike.alignment, printed, rtol=1e-4, atol=1e-6 * np.abs(printed).max())
        named = {"mean": glm.mean}
        assert spike.cosines["mean"] == pytest.approx(spike.alignment[0, 0] / (glm.mean @ glm.mean), rel=1e-8)
        assert set(spike.cosines) == set(named) | {"w", "w_star"}


def test_spikes_and_alignments_meet_simulation():
    """Left, right and between bulks; the error of one Hessian is of order p^(-1/2), that of the mean smaller."""
    p, n, runs = 200, 2000, 16
    mean, w = np.random.default_rng(5).standard_normal((2, p)) / math.sqrt(p)
    mean -= w * (w @ mean) / (w @ w)
    glm = GLM(p=p, mean=1.5 * mean, w=2.5 * w, **LOGISTIC_MODEL)
    H, generator = Eigenspectrum.of(glm, p / n), torch.Generator().manual_seed(0)
    low, high = H.spikes
    assert (low.side, high.side) == ("left", "right")
    measured = []
    for _ in range(runs):
        values, vectors = np.linalg.eigh(glm.hessian(glm.sample_features(n, generator), generator).numpy())
        cosines = [(vectors[:, 0] @ w) ** 2 / (w @ w), (vectors[:, -1] @ mean) ** 2 / (mean @ mean)]
        measured.append([values[0], values[-1], *cosines])
    expected = [low.eigenvalue, high.eigenvalue, low.cosines["w"], high.cosines["mean"]]
    error = np.std(measured, axis=0, ddof=1) / math.sqrt(runs)
    assert (np.abs(np.mean(measured, axis=0) - expected) < 4 * error + 3 / p * np.abs(expected)).all()


def test_a_spike_between_two_bulks():
    p = 800
    w = np.random.default_rng(0).standard_normal(p) / math.sqrt(p)
    glm = GLM(p=p, w=w, mean=2 * w, covariance=([1.0, 4.0], [0.5, 0.5]), **LOGISTIC_MODEL)
    H, generator = Eigenspectrum.of(glm, 800 / 6000), torch.Generator().manual_seed(0)
    (spike,) = H.spikes
    assert spike.side == "between"
    values = np.linalg.eigvalsh(glm.hessian(glm.sample_features(6000, generator), generator).numpy())
    assert spike.gap > 0.01
    nearest = np.abs(values - spike.eigenvalue).argmin()
    assert values[nearest] == pytest.approx(spike.eigenvalue, abs=0.006)
    rest = np.delete(values, nearest)
    (_, low), (high, _) = H.support
    assert not ((rest > low + 0.005) & (rest < high - 0.005)).any()


def test_multiplicity():
    """w and w* that play the same part make an eigenvalue of multiplicity two."""
    p = 20
    w, w_star = 3 * np.eye(p)[:2]
    glm = GLM(p=p, w=w, w_star=w_star, response=LOGISTIC, loss=square_loss)
    t = np.random.default_rng(0).standard_normal((1000, 2))
    t = np.concatenate([order * sign for order in (t, t[:, ::-1]) for sign in ([1, 1], [1, -1], [-1, 1], [-1, -1])])
    law = Law.sampled(np.exp(-(t**2).sum(1) / 2), t, bounded=True)
    (spike,) = Eigenspectrum(law, glm, 0.02).spikes
    assert spike.multiplicity == 2
    assert spike.cosines["w"] == pytest.approx(spike.cosines["w_star"])


@pytest.mark.parametrize("factor", [0.0, 0.5, -2.0])
def test_parallel_and_missing_directions(factor):
    """w* along w, or zero, changes nothing for a loss whose curvature does not see y."""
    p = 30
    w = 2.5 * halves(p)
    reference = Eigenspectrum.of(GLM(p=p, w=w, **LOGISTIC_MODEL), 0.1)
    H = Eigenspectrum.of(GLM(p=p, w=w, w_star=factor * w, **LOGISTIC_MODEL), 0.1)
    assert np.allclose(H.support, reference.support)
    assert H.spikes[0].eigenvalue == pytest.approx(reference.spikes[0].eigenvalue)
    assert H.spikes[0].cosines["w"] == pytest.approx(reference.spikes[0].cosines["w"])


def test_no_direction_at_all():
    H = Eigenspectrum.of(GLM(p=5, **LOGISTIC_MODEL), 0.5)
    assert H.spikes == ()
    assert np.allclose(H.support, [((1 - math.sqrt(0.5)) ** 2 / 4, (1 + math.sqrt(0.5)) ** 2 / 4)])


# Theorem 4, and the rates of convergence ------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "fall_of_trace"), [(square_loss, 4.0), (logistic_loss, 2.0)])
def test_deterministic_equivalent_and_its_rates(loss, fall_of_trace):
    """From p to 4 p: forms aᵀ Q b are off by O(p^(-1/2)); tr Q / p by O(1/p) if g is constant.

    If g is random its own sample of n values is off by O(n^(-1/2)), which the trace inherits; its bias is O(1/p).
    """
    sizes, runs, z = (40, 160), 80, np.array([0.2 + 0.15j])
    generator, errors = torch.Generator().manual_seed(0), []
    for p in sizes:
        mean, w, w_star = np.linalg.qr(np.random.default_rng(1).standard_normal((p, 3)))[0].T
        covariance = ([0.5, 2.0], [0.5, 0.5])
        glm = GLM(p=p, mean=mean, w=2 * w, w_star=w_star, covariance=covariance, response=LOGISTIC, loss=loss)
        H, n = Eigenspectrum.of(glm, 0.25), 4 * p
        m, forms = H.stieltjes_transform(z)[0], [(w, w), (w, mean), (w_star, mean)]
        expected = np.array([m, *(H.resolvent(z, a, b)[0] for a, b in forms)])
        measured = []
        for _ in range(runs):
            Q = np.linalg.inv(glm.hessian(glm.sample_features(n, generator), generator).numpy() - z[0] * np.eye(p))
            measured.append([np.trace(Q) / p, *(a @ Q @ b for a, b in forms)])
        deviation = np.array(measured) - expected
        errors.append(np.sqrt(np.mean(np.abs(deviation) ** 2, axis=0)))
        allowed = 4 * np.std(measured, axis=0) / math.sqrt(runs) + 4 / p * np.abs(m)
        assert (np.abs(deviation.mean(axis=0)) < allowed).all()
    falls = errors[0] / errors[1]
    assert 0.7 * fall_of_trace < falls[0] < 1.4 * fall_of_trace
    assert 1.4 < np.exp(np.log(falls[1:]).mean()) < 2.8


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


def test_the_example_of_the_readme(capsys):
    code, _ = re.findall(r"```python\n(.*?)```", (paths.ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("((")


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Eigenspectrum(Law.discrete([1.0]), Features(p=1), 0.0), "c = p/n must be positive"),
        (lambda: Law.discrete([1.0, 2.0], [0.5, 0.6]), "add up to 1"),
        (lambda: Features(p=0), "p must be a positive whole number"),
        (lambda: Features(p=3, w=[1.0, 2.0]), "w must be 3 finite numbers"),
        (lambda: Features(p=3, mean=[1.0, 2.0, math.nan]), "mean must be 3 finite numbers"),
        (lambda: Features(p=3, covariance=([1.0, 2.0], [0.5, 0.5])), "do not share out 3 places"),
        (lambda: Features(p=2, covariance=[1.0, -1.0]), "2 positive eigenvalues"),
        (lambda: Features(p=2, covariance=[[1.0, 0.5], [0.0, 1.0]]), "symmetric matrix of order 2"),
        (lambda: Eigenspectrum(Law.discrete([1.0]), Features(p=1), 1.0).delta(math.nan), "z must be finite"),
        (
            lambda: Law.of(GLM(p=2, w=[1.0, 0.0], response=LOGISTIC, loss=lambda y, h: h.sqrt())),
            "curvature of the loss is not finite at h = -",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
