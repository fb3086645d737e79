"""Theorems 1 and 2 of Dong et al.: quadrature, sampling, closed forms and simulated networks against each other."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad

from common.dong_quantifying import block_norms as theory
from common.dong_quantifying.block_norms_sampled import hidden_block_norms, linear_block_norms, mask_limits

FIELDS = ("h1", "h1_squared", "h2", "h2_squared")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cross_entropy(logits, y):
    return -torch.log_softmax(logits, 1).gather(1, y[:, None]).mean()


def test_linear_moments_for_two_classes_are_one_dimensional_integrals():
    # C = 2: p = sigmoid(Z1 - Z2), a single Gaussian of variance 2.
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    p = 1 / (1 + np.exp(-math.sqrt(2) * nodes))
    h = p * (1 - p)
    weights = weights / weights.sum()
    moments = theory.linear_moments(2)
    assert moments.h1 == pytest.approx(weights @ h, rel=1e-8)
    assert moments.h1_squared == pytest.approx(weights @ h**2, rel=1e-8)
    # With two classes p_1 p_2 = p_1 (1 - p_1): both kinds of block have the same norm.
    assert moments.h2 == pytest.approx(moments.h1, rel=1e-8)
    assert moments.h2_squared == pytest.approx(moments.h1_squared, rel=1e-7)


@pytest.mark.parametrize("C", [3, 50, 2000])
def test_linear_moments_agree_with_the_papers_monte_carlo(C):
    exact = theory.linear_moments(C)
    value, error = theory.sampled_linear_moments(C, max(2_000_000 // C, 1000), generator(C))
    for field in FIELDS:
        assert abs(getattr(value, field) - getattr(exact, field)) < 4.5 * getattr(error, field)
        # An error bar so wide that nothing could fall outside would make the line above empty.
        assert getattr(error, field) < 0.02 * getattr(exact, field)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_linear_limits_are_approached_like_one_over_c(gamma):
    gaps = []
    for C in (10**5, 10**6):
        moments = theory.linear_moments(C)
        gaps.append((
            C**2 * moments.g_ii(gamma) - theory.g_ii_limit(gamma),
            C**4 * moments.g_ij(gamma) - theory.g_ij_limit(gamma),
        ))  # fmt: skip
    assert np.divide(*gaps) == pytest.approx([10, 10], rel=0.02)


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("rho", [0.0, 0.125, 0.5])
def test_quadrant_moments_against_quadrature(k, rho):
    def integrand(x, y):
        return (x * y) ** k * math.exp(rho * x * y - (x**2 + y**2) / 2) / (2 * math.pi)

    value, _ = dblquad(integrand, 0, 14, 0, 14, epsabs=1e-10)
    assert theory.quadrant_moment(k, rho) == pytest.approx(value, rel=1e-7)


def test_quadrant_moment_diverges_where_the_paper_calls_it_finite():
    with pytest.raises(ValueError, match="diverges"):
        theory.q_ij_limit(2)


@pytest.mark.parametrize("m", [3, 4, 8])
def test_limits_at_infinite_c_against_sampling_and_against_the_printed_ones(m):
    samples = theory.sampled_limits(m, 400_000, generator(m))
    for gamma in (0.5, 1.0):
        assert abs(samples.h_ii(gamma).deviation(theory.h_ii_limit(gamma, m))) < 4.5
        assert abs(samples.h_ij(gamma).deviation(theory.h_ij_limit(gamma, m))) < 4.5
        assert samples.h_ij(gamma).deviation(theory.h_ij_limit_printed(gamma, m)) < -5
    for estimate, derived, printed in (
        (theory.SampledValue.of(samples.q_ii), theory.q_ii_limit(m), theory.q_ii_limit_printed(m)),
        (theory.SampledValue.of(samples.q_ij), theory.q_ij_limit(m), theory.q_ij_limit_printed(m)),
    ):
        assert abs(estimate.deviation(derived)) < 4.5
        assert estimate.deviation(printed) < -5


def test_hidden_moments_against_simulated_networks():
    # N = d = 300: both sides differ by terms of order 1/d, a few per mille, below the standard errors here.
    C, m, gamma = 16, 4, 1.0
    moments = theory.hidden_moments(C, m, 3000, 64, generator(1))
    networks = list(hidden_block_norms(300, 300, m, [C], 600, generator(2), output_classes=32))
    for predicted, name in ((moments.h_ii(gamma), "ce_ii"), (moments.h_ij(gamma), "ce_ij")):
        measured = theory.SampledValue.of(torch.cat([getattr(n, name) for n in networks]) / 300)
        assert abs(predicted.value - measured.value) < 4.5 * math.hypot(predicted.error, measured.error)
        assert measured.error < 0.05 * measured.value
    for exact, name in ((theory.u_ii(gamma, C, m), "mse_ii"), (theory.u_ij(gamma, C, m), "mse_ij")):
        measured = theory.SampledValue.of(torch.cat([getattr(n, name) for n in networks]) / 300)
        assert abs(measured.deviation(exact)) < 4.5
    for predicted, name in ((moments.q_ii_at(300), "vv_ii"), (moments.q_ij_at(300), "vv_ij")):
        measured = theory.SampledValue.of(torch.cat([getattr(n, name) for n in networks]))
        assert abs(predicted.value - measured.value) < 4.5 * math.hypot(predicted.error, measured.error)
        assert measured.error < 0.05 * measured.value
    # What (92) prints loses the covariance that V induces; the networks see it.
    ce_ij = theory.SampledValue.of(torch.cat([n.ce_ij for n in networks]) / 300)
    assert ce_ij.deviation(moments.h_ij_printed(gamma)) < -2.5


@pytest.mark.parametrize(("d", "N", "m"), [(6, 12, 3), (2, 6, 4)])
def test_hidden_moments_at_a_finite_dimension_are_those_of_networks_of_that_size(d, N, m, unchecked):
    # So small that the shared weights of the first layer matter; in the second case W x has fewer dimensions than m.
    C = 8
    moments = theory.hidden_moments(C, m, 12_000, 16, generator(1), d=d)
    limit = theory.hidden_moments(C, m, 6_000 if d == 6 else 2, 16, generator(3))  # compared for d = 6 only
    networks = list(hidden_block_norms(d, N, m, [C], 8_000, generator(2), output_classes=C))
    fields = (("h_ii", "ce_ii", d), ("h_ij", "ce_ij", d), ("q_ii", "vv_ii", 1), ("q_ij", "vv_ij", 1))
    infinite = {"q_ii": limit.q_ii_at(N), "q_ij": limit.q_ij_at(N)}
    infinite |= {"h_ii": limit.h_ii(d / N), "h_ij": limit.h_ij(d / N)}
    for name, field, scale in fields:
        predicted = getattr(moments, f"{name}_at")(N)
        measured = theory.SampledValue.of(torch.cat([getattr(x, field) for x in networks]) / scale)
        error = math.hypot(predicted.error, measured.error)
        assert abs(predicted.value - measured.value) < 4.5 * error
        assert error < 0.06 * measured.value
        if d == 6 and name != "h_ii":  # without W it would be seen to be wrong
            assert measured.value - infinite[name].value > 5 * math.hypot(infinite[name].error, measured.error)
    with pytest.raises(ValueError, match="d is infinite"):
        limit.h_ii_at(N)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_norms_of_the_masks_against_the_constants_of_31(gamma):
    m = 4
    for sampled, name in zip(mask_limits(gamma, m, (40, 80), 600, generator(3)), ("ii", "ij"), strict=True):
        printed = (1 + 2 * gamma) / (4 * m**2) if name == "ii" else (1 + 4 * gamma) / (16 * m**2)
        assert abs(sampled.deviation(printed)) < 4.5
        assert sampled.error < 0.02 * printed


def test_hidden_moments_tend_to_the_derived_limits():
    m, gamma = 8, 1.0
    values = {C: theory.hidden_moments(C, m, 400, 64, generator(C)) for C in (500, 2000)}
    # Two values of C remove the bias of order 1/C.
    for name, power, limit in (("h_ij", 1, theory.h_ij_limit(gamma, m)), ("q_ii", 2, theory.q_ii_limit(m))):
        estimates = []
        for C, moments in values.items():
            sample = moments.h_ij(gamma) if name == "h_ij" else theory.SampledValue.of(moments.q_ii)
            estimates.append((C**power * sample.value, C**power * sample.error))
        (coarse, coarse_error), (fine, fine_error) = estimates
        extrapolated, error = (4 * fine - coarse) / 3, math.hypot(4 * fine_error, coarse_error) / 3
        assert abs(extrapolated - limit) < 4.5 * error
        assert error < 0.05 * limit


def test_linear_simulation_against_autograd():
    d, N, counts = 4, 6, [2, 3, 7]
    norms = next(linear_block_norms(d, N, counts, 1, generator(5)))
    averaged = next(linear_block_norms(d, N, counts, 1, generator(5), averaged=4))
    g = generator(5)
    X = torch.randn(N, d, generator=g).double()
    V = torch.cat([torch.randn(b - a, d, generator=g).double() for a, b in ((0, 2), (2, 3), (3, 7))]) / math.sqrt(d)
    for row, C in zip(norms, counts, strict=True):
        y = torch.zeros(N, dtype=torch.int64)

        def loss(v, C=C, y=y):
            return cross_entropy(X @ v.reshape(C, d).T, y)

        H = torch.func.hessian(loss)(V[:C].flatten()).reshape(C, d, C, d)
        expected = torch.stack([(H[0, :, 0] ** 2).sum(), (H[0, :, 1] ** 2).sum()])
        torch.testing.assert_close(row, expected, rtol=2e-5, atol=0)
        k = min(C, 4)
        blocks = (H[:k, :, :k] ** 2).sum((1, 3))
        expected = torch.stack([blocks.diagonal().mean(), (blocks.sum() - blocks.trace()) / (k * (k - 1))])
        torch.testing.assert_close(averaged[counts.index(C)], expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("C", [2, 5])
def test_hidden_simulation_against_autograd(C):
    d, N, m = 3, 8, 3
    norms = next(hidden_block_norms(d, N, m, [C], 1, generator(7), output_classes=32))
    g = generator(7)
    X = torch.randn(N, d, generator=g).double()
    W = (torch.randn(m, d, generator=g) / math.sqrt(d)).double()
    V = torch.randn(C, m, generator=g, dtype=torch.float64) / math.sqrt(m)
    y = torch.arange(N) % C
    target = torch.nn.functional.one_hot(y, C).double()

    def ce(w):
        return cross_entropy(torch.relu(X @ w.reshape(m, d).T) @ V.T, y)

    def half_mse(w):
        # The paper's (8) lacks the factor 2 of its own loss (7).
        return ((torch.relu(X @ w.reshape(m, d).T) @ V.T - target) ** 2).sum(1).mean() / 2

    def ce_of_output(v):
        return cross_entropy(torch.relu(X @ W.T) @ v.reshape(C, m).T, y)

    blocks = (torch.func.hessian(ce_of_output)(V.flatten()).reshape(C, m, C, m) ** 2).sum((1, 3))
    off = (blocks.sum() - blocks.trace()) / (C * (C - 1))
    assert norms.vv_ii.item() == pytest.approx(blocks.diagonal().mean().item(), rel=1e-5)
    assert norms.vv_ij.item() == pytest.approx(off.item(), rel=1e-5)
    for loss, kind in ((ce, "ce"), (half_mse, "mse")):
        blocks = (torch.func.hessian(loss)(W.flatten()).reshape(m, d, m, d) ** 2).sum((1, 3))
        diagonal = blocks.diagonal().mean()
        off = (blocks.sum() - blocks.diagonal().sum()) / (m * (m - 1))
        assert getattr(norms, f"{kind}_ii").item() == pytest.approx(diagonal.item(), rel=1e-5)
        assert getattr(norms, f"{kind}_ij").item() == pytest.approx(off.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.linear_moments(0), "C must be at least 2, got 0"),
        (lambda: next(linear_block_norms(3, 3, [0], 1, generator())), "at least 2"),
        (lambda: next(linear_block_norms(3, 3, [8, 4], 1, generator())), "must increase"),
        (lambda: next(hidden_block_norms(3, 3, 1, [4], 1, generator())), "m must be at least 2"),
        (lambda: next(hidden_block_norms(3, 3, 2, [4], 1, generator(), output_classes=1)), "0 or at least 2"),
        (lambda: theory.hidden_moments(4, 2, 2, 2, generator(), d=0), "d must be at least 1"),
        (lambda: mask_limits(1.0, 4, (80, 40), 2, generator()), "two increasing sizes"),
        (lambda: theory.sampled_limits(2, 10, generator()), "at least 3"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
