"""Spikes, eigenvectors and the resolvent, Theorems 2 to 4 of Liao and Mahoney, against the paper and simulation."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq

from common import paths
from common.liao_eigenspectra.glm import (
    GLM,
    LOGISTIC,
    DiscreteResponse,
    Features,
    halves,
    logistic_loss,
    square_loss,
)
from common.liao_eigenspectra.law import Directions, Law
from common.liao_eigenspectra.spectrum import LimitingSpectrum
from common.liao_eigenspectra.spikes import Eigenspectrum

LOGISTIC_MODEL = {"response": LOGISTIC, "loss": logistic_loss}


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


@pytest.mark.parametrize(
    ("c", "size", "mean"),
    [
        *[(0.1, size, 0) for size in (20, 187, 195, 1000)],
        *[(0.3, size, 0) for size in (40.6, 41, 61)],
        *[(0.1, size, 1) for size in (30, 300, 1000)],
        (0.02, 700, 0),
        (0.7, 100, 0),
    ],
)
def test_curvatures_of_many_orders_of_magnitude(c, size, mean):
    """Corollary 2 at large ‖w‖ and a mean along w, with sums over t that know log δ alone: edge, left spike, cosine."""
    t = mean + np.linspace(-10, 10, 200_001)
    weight, r = np.exp(-((t - mean) ** 2) / 2), size * np.abs(t)
    weight /= weight.sum()

    def sums(log_delta):
        h = 1 / (1 + np.exp(np.clip(r + 2 * np.log1p(np.exp(-r)) - log_delta, -700, 700)))  # δg / (1 + δg)
        A, slope = weight @ h, weight @ (h * (1 - h))
        D, D_slope = weight @ (h * t**2), weight @ (h * (1 - h) * t**2)
        return A, slope, D, D_slope

    edge = brentq(lambda Y: np.subtract(*sums(Y)[:2]) - c, -5, 600, xtol=1e-13)
    _, slope, D, _ = sums(edge)
    H = Eigenspectrum.of(GLM(p=16, mean=mean * halves(16), w=size * halves(16), **LOGISTIC_MODEL), c)
    assert math.log(H.support[0][0]) == pytest.approx(math.log(slope) - edge, abs=1e-4)
    assert H.mass_at_zero == 0
    assert len(H.spikes) == (slope > D)
    for spike in H.spikes:
        Y = brentq(lambda Y: sums(Y)[0] - sums(Y)[2] - c, -5, edge, xtol=1e-13)
        _, slope, D, D_slope = sums(Y)
        assert spike.side == "left"
        assert math.log(spike.eigenvalue) == pytest.approx(math.log(D) - Y, abs=1e-4)
        assert spike.cosines["w"] == pytest.approx((slope - D) / (slope - D_slope), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("beside", [0.0, 1.0])
def test_nothing_lies_below_a_positive_curvature(beside):
    """However much smaller than one the resolvent's inverse is."""
    U, V = np.eye(16)[:2]
    H = Eigenspectrum.of(GLM(p=16, mean=U + beside * V, w=1000 * U, **LOGISTIC_MODEL), 0.1)
    assert 0 < H.support[0][0] < 1e-90
    assert H.spikes == ()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    power=st.floats(-1, 3),
    mean=st.floats(0, 2),
    star=st.sampled_from([0.0, 0.5]),
    c=st.sampled_from([0.02, 0.1, 0.3, 0.6]),
)
def test_the_axes_are_of_no_importance(seed, power, mean, star, c):
    """Along axes most entries are exact zeros; in all other directions they are of the size of rounding."""
    plane = np.random.default_rng(seed).standard_normal((6, 3))
    plane *= np.array([10**power, mean, star]) / np.linalg.norm(plane, axis=0)
    along_axes = np.triu(np.linalg.qr(plane, mode="complete")[1])
    found = []
    for w, mu, w_star in (plane.T, along_axes.T):
        try:
            H = Eigenspectrum.of(GLM(p=6, w=w, mean=mu, w_star=w_star, **LOGISTIC_MODEL), c)
        except ValueError as refusal:
            assert power > 2
            assert str(refusal).endswith("choose a smaller w")
            found.append([])
            continue
        found.append([[spike.eigenvalue, *spike.cosines.values()] for spike in H.spikes])
        assert all(spike.eigenvalue > 0 for spike in H.spikes)
    assert len(found[0]) == len(found[1])
    for some, same in zip(*found, strict=True):
        assert some[0] == pytest.approx(same[0], rel=1e-6)
        assert some[1:] == pytest.approx(same[1:], abs=1e-6)


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e-20])
def test_what_is_too_small_to_be_squared_is_no_zero(size):
    """The limit of no w, in which its cosine is known still: here the part along w of a mean of squared length 3."""
    w, w_star, beside = np.eye(16)[:3]
    tiny = GLM(p=16, mean=w + w_star + beside, w=size * w, w_star=size * w_star, **LOGISTIC_MODEL)
    (spike,) = Eigenspectrum.of(tiny, 0.1).spikes
    assert spike.eigenvalue == pytest.approx(0.25 * (1 + 3) * (1 + 0.1 / 3))
    cosine = (1 - 0.1 / 3**2) / (1 + 0.1 / 3)
    assert spike.cosines == pytest.approx({"mean": cosine, "w": cosine / 3, "w_star": cosine / 3}, rel=1e-6)


@pytest.mark.parametrize(
    ("c", "size", "words"), [(0.7, 1400, "so is the edge"), (0.1, 1e4, "resolves"), (0.1, 1e8, "resolves")]
)
def test_curvatures_of_too_many_orders_of_magnitude(c, size, words):
    with pytest.raises(ValueError, match=f"{words}.*smaller w$"):
        Eigenspectrum.of(GLM(p=16, w=size * halves(16), **LOGISTIC_MODEL), c)


def paper_G(H: Eigenspectrum, glm: GLM, z: float) -> tuple[np.ndarray, np.ndarray]:
    """G(z) of (8), with Λ of (9) by pseudo-inverses, and Vᵀ Q̄_b V; in the coordinates of C's eigenvectors."""
    t = glm.eigenvalues
    mean, w, w_star = (glm.to_eigenbasis(v) for v in (glm.mean, glm.w, glm.w_star))
    V, U = np.column_stack([mean, t * w_star, t * w]), np.sqrt(t)[:, None] * np.column_stack([w_star, w])
    basis = Directions.of(glm).basis
    plus = np.linalg.pinv(U) @ basis  # U⁺ z, from the coordinates of z along the basis
    delta = H.delta(z).real
    f = H.law.g / (1 + H.law.g * delta)
    zero, one, two = f @ H.law.q, plus @ (f @ H.law.first), plus @ np.tensordot(f, H.law.second, 1) @ plus.T
    Lambda = np.block([[np.array([[zero]]), one[None]], [one[:, None], two - zero * np.linalg.pinv(U.T @ U)]])
    form = V.T @ (V / (zero * t - z)[:, None])
    return np.eye(3) + Lambda @ form, form


def test_spikes_are_the_roots_of_the_papers_determinant(general_model):
    """And Theorem 3 as printed gives the same alignments."""
    glm = general_model
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
        assert spike.cosines["mean"] == pytest.approx(spike.alignment[0, 0] / (glm.mean @ glm.mean), rel=1e-8)
        assert set(spike.cosines) == {"mean", "w", "w_star"}


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


def test_no_spike_at_a_mass_at_zero(general_model):
    """With p > n the eigenvalue zero is no spike; the one on the right meets simulation."""
    p, c, generator = general_model.p, 1.2, torch.Generator().manual_seed(0)
    H = Eigenspectrum.of(general_model, c)
    assert H.mass_at_zero == pytest.approx(1 - 1 / c)
    (spike,) = H.spikes
    assert spike.side == "right"
    largest = []
    for _ in range(40):
        X = general_model.sample_features(round(p / c), generator)
        largest.append(np.linalg.eigvalsh(general_model.hessian(X, generator).numpy())[-1])
    error = np.std(largest, ddof=1) / math.sqrt(len(largest))
    assert abs(np.mean(largest) - spike.eigenvalue) < 4 * error + 3 / p * spike.eigenvalue


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


# Outlying eigenvalues of C --------------------------------------------------------------------------------------------

P = 400
U, V, W = np.linalg.qr(np.column_stack([halves(P), *np.random.default_rng(0).standard_normal((2, P))]))[0].T
COIN = {"response": DiscreteResponse((-1.0, 1.0), lambda y, eta: 0.5 + 0 * eta), "loss": lambda y, h: y * h**2 / 2}


def spiked(*strengths):
    """I + Σ θ u uᵀ along U, V, ..."""
    return np.eye(P) + sum(strength * np.outer(u, u) for strength, u in zip(strengths, (U, V, W), strict=False))


def test_an_eigenvector_of_c_along_w_leaves_no_bulk_behind():
    """C = I + 5 uuᵀ: alone it makes a spike, w along u takes it back into the bulk."""
    p, c = 800, 0.1
    u = halves(p)
    C = np.eye(p) + 5 * np.outer(u, u)
    alone = Eigenspectrum.of(GLM(p=p, covariance=C, **LOGISTIC_MODEL), c)
    (spike,) = alone.spikes
    assert spike.eigenvalue == pytest.approx((1 + 5) * (1 + c / 5) / 4, rel=1e-9)
    assert len(alone.support) == 1
    glm = GLM(p=p, w=2 * u, covariance=C, **LOGISTIC_MODEL)
    H = Eigenspectrum.of(glm, c)
    assert H.spikes == ()
    ((low, high),) = H.support
    (sample,) = glm.sample_hessians(8000, 1, torch.Generator().manual_seed(0))
    values = np.linalg.eigvalsh(sample.numpy())
    assert values[0] > low - 0.01 * (high - low)
    assert values[-1] < high + 0.05 * (high - low)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    strength=st.floats(0.02, 30) | st.floats(-0.95, -0.02),
    c=st.floats(0.02, 0.9),
    multiplicity=st.integers(1, 3),
    size=st.sampled_from([-1.0, 0.25, 3.0]),
)
def test_the_transition_of_an_outlying_eigenvalue(strength, c, multiplicity, size):
    """t = 1 + θ makes a spike at t (1 + c/θ), times g, if θ² > c: Baik and Silverstein."""
    if abs(strength**2 / c - 1) < 0.02:
        return
    t = np.ones(300)
    t[100 : 100 + multiplicity] += strength
    H = Eigenspectrum(Law.discrete([size]), Features(p=300, covariance=t), c)
    if strength**2 > c:
        (spike,) = H.spikes
        assert spike.eigenvalue == pytest.approx(size * (1 + strength) * (1 + c / strength), rel=1e-9)
        assert spike.multiplicity == multiplicity
        assert spike.side == ("right" if size * strength > 0 else "left")
    else:
        assert H.spikes == ()
    edges = sorted(size * (1 + sign * math.sqrt(c)) ** 2 for sign in (-1, 1))
    assert np.allclose(np.ravel(H.support), edges, rtol=0.05 if strength**2 < c else 1e-9)


@pytest.mark.parametrize(
    ("model", "c"),
    [
        ({"covariance": spiked(5.0), "w": 1.5 * U + 1.5 * V, **LOGISTIC_MODEL}, 0.1),
        ({"covariance": spiked(5.0), "mean": 2 * U + V, "w": U - V, **LOGISTIC_MODEL}, 0.3),
        ({"covariance": spiked(-0.95), "w": 2 * U + 2 * V, **LOGISTIC_MODEL}, 0.1),
        ({"covariance": spiked(5.0, 9.0, -0.8), "w": 2 * U, "w_star": V, "mean": W, **LOGISTIC_MODEL}, 0.2),
        ({"covariance": spiked(40.0), **COIN}, 0.3),
        ({"covariance": spiked(9.0), "w": U, "mean": U, **LOGISTIC_MODEL}, 1.5),
    ],
)
def test_outlying_eigenvalues_meet_simulation(model, c):
    """However w, w* and μ lie to their eigenvectors: as many eigenvalues leave the bulk as predicted, and where."""
    glm, n, runs = GLM(p=P, **model), round(P / c), 8
    H, generator = Eigenspectrum.of(glm, P / n), torch.Generator().manual_seed(1)
    assert len(H.support) == 1
    ((low, high),) = H.support
    values = np.array([np.linalg.eigvalsh(sample.numpy()) for sample in glm.sample_hessians(n, runs, generator)])
    slack = 2 * P ** (-2 / 3) * (high - low)
    left, right = ([s for s in H.spikes if s.side == side and s.gap > slack] for side in ("left", "right"))
    if not H.mass_at_zero:
        assert abs(np.median((values < low - slack).sum(axis=1)) - len(left)) == 0
    assert abs(np.median((values > high + slack).sum(axis=1)) - len(right)) == 0
    seen = [*values[:, : len(left)].T, *(values[:, values.shape[1] - len(right) :].T if right else [])]
    for spike, sample in zip([*left, *right], seen, strict=True):
        error = sample.std(ddof=1) / math.sqrt(runs)
        assert abs(sample.mean() - spike.eigenvalue) < 4 * error + 12 / P * (abs(spike.eigenvalue) + high - low)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    strengths=st.lists(st.sampled_from([-0.9, 2.0, 5.0, 5.0, 12.0]), min_size=1, max_size=3),
    w=st.lists(st.floats(-1, 1).map(lambda x: round(x, 6)), min_size=3, max_size=3),
    mean=st.lists(st.sampled_from([-1.0, 0.0, 0.7]), min_size=3, max_size=3),
    c=st.sampled_from([0.05, 0.2, 0.5]),
)
def test_spikes_are_the_roots_of_the_papers_determinant_with_the_whole_of_c(strengths, w, mean, c):
    """Or, where an eigenvector of C has no part in μ and w, of κ t = z; the bulk is that of C without the outliers."""
    basis = np.column_stack([U, V, W])
    glm = GLM(p=P, w=basis @ w, mean=basis @ mean, covariance=spiked(*strengths), **LOGISTIC_MODEL)
    law = Law.of(glm)
    H = Eigenspectrum(law, glm, c)
    assert np.allclose(H.support, LimitingSpectrum(law, Features(p=P), c).support, rtol=1e-9)
    for spike in H.spikes:
        G, _ = paper_G(H, glm, spike.eigenvalue)
        values = np.linalg.svd(G)[1]
        pole = np.abs(
            law.kappa(H.delta(spike.eigenvalue).reshape(1))[0].real * (1 + np.array(strengths)) - spike.eigenvalue
        )
        assert min(values[-1] / values[0], pole.min() / abs(spike.eigenvalue)) < 1e-6


def test_eigenvalues_equal_up_to_rounding_are_one():
    """As those of a matrix are, which ``eigh`` gives apart from each other by a few units in the last place."""
    H = Eigenspectrum.of(GLM(p=P, covariance=spiked(5.0), **LOGISTIC_MODEL), 0.1)
    assert H.t == pytest.approx([1.0])
    assert H.outlying.sum() == 1
    many = Features(p=4, covariance=([1.0, 6.0], [0.75, 0.25]))
    assert Eigenspectrum(Law.discrete([1.0]), many, 0.05).t.tolist() == [1, 6]  # a fourth is a share, not an outlier


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda H: H.resolvent(1j, np.ones(2), np.ones(P)), r"a must be 400 finite numbers, .* got shape \(2,\)"),
        (lambda H: H.separation([1.0, 2.0], 5.0), "the eigenvalues must have some below and some above x = 5"),
        (lambda H: H.separation([], 5.0), r"the eigenvalues must be .* got shape \(0,\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused(make, message):
    H = Eigenspectrum.of(GLM(p=P, w=U, **LOGISTIC_MODEL), 0.1)
    with pytest.raises(ValueError, match=message):
        make(H)


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


def test_the_example_of_the_readme(capsys):
    code, _ = re.findall(r"```python\n(.*?)```", (paths.ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("((")


def test_a_law_of_other_directions_is_refused(general_model):
    law = Law.sampled(np.ones(3), np.zeros((3, 1)), bounded=True)
    with pytest.raises(ValueError, match="the law has 1 coordinates t, the features have 2"):
        Eigenspectrum(law, general_model, 0.5)


def test_separation_of_two_bulks_leaves_out_a_spike_between_them():
    """Two bulks with a spike in the gap: C has eigenvalues 1 and 4, and μ = w, as in Figure 2d."""
    p = 200
    w = np.random.default_rng(0).standard_normal(p) / math.sqrt(p)
    model = GLM(p=p, mean=w, w=w, covariance=([1.0, 4.0], [0.5, 0.5]), **LOGISTIC_MODEL)
    H = Eigenspectrum.of(model, p / 1500)
    (spike,) = H.spikes
    assert spike.side == "between"
    (_, low), (high, _) = H.support
    sample = np.array([low - 0.01, high + 0.02, low - 0.2, spike.eigenvalue + 1e-3, high + 0.5])
    assert H.separation(sample, (low + high) / 2) == pytest.approx(high - low + 0.03)
