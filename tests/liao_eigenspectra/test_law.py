"""The law of g with the two directions, against exact moments and sampling."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from common.liao_eigenspectra import law as law_module
from common.liao_eigenspectra.glm import (
    GLM,
    LOGISTIC,
    PHASE_RETRIEVAL,
    ContinuousResponse,
    curvature,
    exponential_loss,
    logistic_loss,
    phase_retrieval_loss,
)
from common.liao_eigenspectra.law import Directions, Law
from common.liao_eigenspectra.spectrum import LimitingSpectrum
from common.liao_eigenspectra.spikes import Eigenspectrum


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
    x = Directions.of(glm)
    h, eta = glm.w @ glm.mean + t @ x.along_w, glm.w_star @ glm.mean + t @ x.along_w_star
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
    assert LimitingSpectrum(law, glm, 0.1).support == ((-math.inf, math.inf),)


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


def test_sampled_law_meets_the_quadrature(general_model):
    glm = general_model
    along_w = Directions.of(glm).along_w
    t = np.random.default_rng(0).standard_normal((20_000, 2))
    h = torch.from_numpy(glm.w @ glm.mean + t @ along_w)
    g = curvature(logistic_loss, torch.ones_like(h), h).numpy()
    sampled = Eigenspectrum(Law.sampled(g, t, bounded=True), glm, 0.2)
    exact = Eigenspectrum.of(glm, 0.2)
    assert np.allclose(sampled.support, exact.support, rtol=0.03)
    assert sampled.spikes[-1].eigenvalue == pytest.approx(exact.spikes[-1].eigenvalue, rel=0.03)


@pytest.mark.parametrize(("direction", "factor"), [("w", 3), ("w_star", -1)])
def test_one_direction_alone_with_a_continuous_response(direction, factor):
    """Phase retrieval without the other direction: g is 3 h² or -η²."""
    glm = GLM(p=3, **{direction: [2.0, 0.0, 0.0]}, response=PHASE_RETRIEVAL, loss=phase_retrieval_loss)
    law = Law.of(glm)
    ends = sorted(abs(x) for x in law.support[0])
    assert ends == [pytest.approx(0, abs=1e-3), math.inf]
    assert law.q @ law.g == pytest.approx(factor * 4)
    assert law.q @ law.g**2 == pytest.approx(factor**2 * 3 * 16)
    assert law.g @ law.second[:, 0, 0] == pytest.approx(factor * 3 * 4)


@pytest.mark.parametrize(("a", "b"), [(0.0, 2.0), (0.6, 1.5)])
def test_expectations_over_both_directions_of_a_continuous_response(a, b):
    """g = η² h² with h = t₁, η = a t₁ + b t₂: its products with 1, t₁², t₂² and t₁ t₂ have exact means."""
    loss = lambda y, h: y * h**4 / 12  # noqa: E731
    law = Law.of(GLM(p=2, w=[1.0, 0.0], w_star=[a, b], response=PHASE_RETRIEVAL, loss=loss))
    assert law.q @ law.g == pytest.approx(3 * a**2 + b**2)
    moments = np.tensordot(law.g, law.second, 1)
    assert np.allclose(np.diag(moments), [15 * a**2 + 3 * b**2, 3 * a**2 + 3 * b**2])
    assert moments[0, 1] == pytest.approx(6 * a * b, abs=1e-9)
    assert np.allclose(law.g @ law.first, 0, atol=1e-9)


def test_kappa_lambda_and_their_derivatives(general_model):
    """Each derivative meets a difference; κ is the corner of Λ; B(ζ) = -κ/ζ at ζ = -1/δ."""
    law, delta, step = Law.of(general_model), np.array([0.7 + 0.3j, -2.0 + 0.1j]), 1e-5
    kappa, slope = law.kappa(delta)
    value, derivative = law.Lambda(delta)
    assert np.allclose(value[:, 0, 0], kappa)
    assert np.allclose(derivative[:, 0, 0], slope)
    assert np.allclose(derivative, (law.Lambda(delta + step)[0] - law.Lambda(delta - step)[0]) / (2 * step), atol=1e-8)
    smeared, smeared_slope = law.smeared_kappa(delta)  # far from the real axis the width of the nodes does not count
    assert np.allclose(smeared, kappa, rtol=1e-5)
    assert np.allclose(smeared_slope, slope, rtol=1e-4)
    zeta = np.array([-0.5, 1.3])
    B, squares = law.B(zeta)
    kappa, slope = law.kappa(-1 / zeta + 0j)
    assert np.allclose(B, -kappa / zeta)
    assert np.allclose(squares, -slope / zeta**2)


def test_fewer_nodes_keep_the_moments():
    law = Law.of(GLM(p=2, w=[1.5, 0.0], w_star=[0.5, 1.0], response=LOGISTIC, loss=exponential_loss))
    few = law.compressed(300)
    assert len(few.g) == 300 < len(law.g)
    for power in range(4):
        for moment in ("q", "first", "second"):
            exact, kept = (np.tensordot(x.g**power, getattr(x, moment), 1) for x in (law, few))
            assert np.allclose(kept, exact, rtol=1e-7, atol=1e-7 * np.abs(exact).max())


def squared_hinge(y, h):
    return torch.relu(1 - y * h) ** 2 / 2


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Law.discrete([1.0, 2.0], [0.5, 0.6]), "add up to 1"),
        (lambda: Law.discrete([1.0, 2.0], [1.5, -0.5]), "must not be negative"),
        (lambda: Law.discrete([1.0, 2.0], [1.0]), r"q must be 2 finite numbers, .* got shape \(1,\)"),
        (lambda: Law.discrete([1.0, math.inf]), "g must be finite numbers, .*got inf"),
        (lambda: Law.discrete([]), r"g must be finite numbers, .* got shape \(0,\)"),
        (lambda: Law.discrete([[1.0, 2.0]]), r"g must be finite numbers, .* got shape \(1, 2\)"),
        (lambda: Law.sampled(np.array([1.0, math.nan]), np.zeros((2, 1)), bounded=True), "g must be .*got nan"),
        (lambda: Law.sampled(np.ones(2), np.zeros((3, 1)), bounded=True), r"t must be .* got shape \(3, 1\)"),
        (
            lambda: Law.of(GLM(p=2, response=LOGISTIC, loss=logistic_loss), nodes=3),
            "nodes must be a whole number from 128",
        ),
        (
            lambda: Law.of(GLM(p=2, w=[1.0, 0.0], response=LOGISTIC, loss=lambda y, h: (h + 4).sqrt())),
            "curvature of the loss is not finite at h = -",
        ),
        (
            lambda: Law.of(GLM(p=2, w=[1.0, 0.0], response=LOGISTIC, loss=squared_hinge)),
            "the curvature of the loss jumps from 0 to 1 at h = -1 for y = -1: name each such place in kinks",
        ),
        (
            lambda: Law.of(GLM(p=2, w=[1.0, 0.0], response=LOGISTIC, loss=squared_hinge, kinks=(-1.0,))),
            "the curvature of the loss jumps from 1 to 0 at h = 1 for y = 1",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    place=st.floats(-2.5, 2.5),
    jump=st.floats(0.01, 10),
    smooth=st.floats(0, 5),
    mean=st.floats(-1, 1),
    size=st.floats(0.3, 3),
)
def test_a_jump_of_the_curvature_is_found_wherever_it_is_and_only_there(place, jump, smooth, mean, size):
    """A jump at h = place, 2.5 standard deviations of h from its mean at most, beside a smooth part."""
    at = mean + place * size

    def loss(y, h):
        return smooth * torch.nn.functional.softplus(h) + jump * torch.relu(h - at) ** 2 / 2

    models = {"p": 2, "w": [size, 0.0], "mean": [mean / size, 0.0], "response": LOGISTIC, "loss": loss}
    law = Law.of(GLM(**models, kinks=(at,)))
    exact = (
        smooth
        * quad(lambda t: np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi) / (2 + 2 * np.cosh(mean + size * t)), -10, 10)[0]
    )
    assert law.q @ law.g == pytest.approx(exact + jump * math.erfc(place / math.sqrt(2)) / 2, rel=1e-8)
    with pytest.raises(ValueError, match="the curvature of the loss jumps from"):
        Law.of(GLM(**models))


LARGE = st.floats(-1, 3).map(lambda power: 10**power)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=LARGE, star=LARGE, along=st.floats(-1, 1), mean=st.floats(0, 1.5), c=st.sampled_from([0.03, 0.2, 0.6, 1.4]))
def test_a_w_star_that_g_does_not_depend_on_changes_no_spectrum(size, star, along, mean, c):
    """g of the logistic loss is the same for both y: edges and the alignment with w are those without w*."""

    def spectrum(w_star):
        model = {"w": [size, 0.0, 0.0], "mean": [mean, 0.0, 0.0], "response": LOGISTIC, "loss": logistic_loss}
        return Eigenspectrum.of(GLM(p=3, w_star=w_star, **model), c)

    try:
        plain = spectrum([0.0, 0.0, 0.0])
    except ValueError as refusal:
        with pytest.raises(ValueError, match=re.escape(str(refusal)[-20:])):
            spectrum([star * along, star, 0.0])
        return
    beside = spectrum([star * along, star, 0.0])
    tail = 1e-10 if c > 1 else 0.0  # where the least of g that the quadrature has is the edge
    assert np.allclose(beside.support, plain.support, rtol=1e-6, atol=tail)
    assert len(beside.spikes) == len(plain.spikes)
    for spike, same in zip(beside.spikes, plain.spikes, strict=True):
        assert spike.eigenvalue == pytest.approx(same.eigenvalue, rel=1e-6)
        assert spike.cosines["w"] == pytest.approx(same.cosines["w"], rel=1e-5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(size=LARGE, along=st.sampled_from([0.0, 0.5]), beside=st.sampled_from([0.0, 1.0]), noise=st.floats(0, 2))
def test_a_curvature_narrow_beside_the_predictions_is_resolved_or_refused(size, along, beside, noise):
    """log cosh(h - y) with y = η + noise: a hill of width one, of which h - y passes thousands."""

    def loss(y, h):
        return h - y + torch.nn.functional.softplus(-2 * (h - y))

    spread = math.sqrt((size - along) ** 2 + beside**2 + noise**2)
    at = 0.4 * (size - along)
    exact = quad(
        lambda r: math.exp(-(((r - at) / spread) ** 2) / 2) / math.sqrt(2 * math.pi) / spread / math.cosh(r) ** 2,
        -30, 30, points=[0, at] if abs(at) < 30 else [0], limit=200,
    )[0]  # fmt: skip
    response = ContinuousResponse(lambda eta: eta, noise=noise)
    try:
        law = Law.of(
            GLM(p=2, w=[size, 0.0], w_star=[along, beside], mean=[0.4, 0.0], response=response, loss=loss), nodes=512
        )
    except ValueError as refusal:
        assert str(refusal).startswith("the curvature of the loss changes so fast with w'x, w*'x or the noise")
        assert size > 20
    else:
        assert law.q @ law.g == pytest.approx(exact, rel=2e-3)


def test_a_quadrature_finer_than_what_is_affordable_is_no_reason_to_refuse(monkeypatch):
    """One that was asked for is compared with a finer one all the same."""
    monkeypatch.setattr(law_module, "_MOST_POINTS", 1)
    response = ContinuousResponse(lambda eta: eta, noise=0.5)
    model = {"p": 2, "w": [1.0, 0.0], "w_star": [0.0, 1.0], "response": response, "loss": phase_retrieval_loss}
    law = Law.of(GLM(**model), nodes=128)
    assert law.q @ law.g == pytest.approx(3)


def test_a_chance_steep_beside_w_is_resolved():
    """P(y | η) as steep as a step, of which E[exp(-y h)] is known."""
    model = {"p": 2, "w": [1.0, 0.0], "response": LOGISTIC, "loss": exponential_loss}
    for along in (0.0, 0.3):
        law = Law.of(GLM(w_star=[1e3 * along, 1e3], **model))
        cosine = along / math.sqrt(1 + along**2)
        assert law.q @ law.g == pytest.approx(math.exp(0.5) * math.erfc(cosine / math.sqrt(2)), rel=1e-3)


def test_an_even_smear_of_the_nodes_has_the_phase_of_its_own_transform():
    """Of κ and E[arg(1 + g δ)] of the smeared law, each is the other's derivative: d E[log(1 + g δ)] / dδ = κ."""
    law = Law.of(GLM(p=2, w=[1.0, 0.0], response=LOGISTIC, loss=exponential_loss))
    delta, step = np.array([-0.05 + 0.01j, 0.3 + 0.2j, -2.0 + 1e-3j]), 1e-4
    slope = (law.smeared_phase(delta + step) - law.smeared_phase(delta - step)) / (2 * step)
    assert np.allclose(slope, law.smeared_kappa(delta)[0].imag, rtol=1e-4, atol=1e-6)
