"""Two layers at initialization: the corrected law against simulation, quadrature and the cases that are known."""

import numpy as np
import pytest
import torch

from common.hessian.layer import layer_hessian
from common.wu_dissecting.eigenspaces import overlap
from common.wu_dissecting.gates import gate_moment, limit_of_overlap, overlap_at_width
from common.wu_dissecting.networks import classifier
from common.wu_dissecting.output_hessian import range_of_contrasts, row_space_without_sum
from common.wu_dissecting.theorem_4 import (
    OutputMeasures,
    TwoLayers,
    curvature_of_logits,
    hessian_measures,
    mean_logit_moments,
    output_measures,
    spread_of_curvature,
)


def drawn(n, d, c, samples, seed, shift=None):
    return TwoLayers.draw(n, d, c, samples=samples, generator=torch.Generator().manual_seed(seed), shift=shift)


def test_output_hessian_is_that_of_the_network():
    layers = drawn(20, 30, 4, 200, 0)
    network = classifier("F-20", (30, 1, 1), 4)
    biases = {"fc1.bias": torch.zeros(20), "fc2.bias": torch.zeros(4)}
    network.load_state_dict({"fc1.weight": layers.first, "fc2.weight": layers.second} | biases)
    H = layer_hessian(network, "fc1", layers.X)
    values, vectors = (part.double() for part in H.output_basis)
    found = output_measures(layers)
    assert found.ratio == pytest.approx(float(values[3] / values[2]), rel=1e-4)
    assert found.printed == pytest.approx(1 - overlap(vectors[:, :3], row_space_without_sum(layers.second)), abs=1e-5)
    W, M = layers.second.double(), H.output_hessian.double()
    assert found.projection == pytest.approx(float((W @ M @ W.T).square().sum() / M.square().sum()), rel=1e-4)
    p = network(layers.X).softmax(1).detach().double()
    A = torch.diag(p.mean(0)) - p.T @ p / 200
    assert found.residual == pytest.approx(float((M - W.T @ A @ W / 4).norm() / M.norm()), rel=1e-4)
    of_A = torch.linalg.eigvalsh(A)
    assert found.curvature == pytest.approx(float(of_A[3] / of_A[1]), rel=1e-4)
    # M* of an independent copy of the gates: a double sum over pairs of samples.
    D = (layers.X @ layers.first.T > 0).double()
    star = torch.stack([torch.outer(gates, gates) * (W.T @ A @ W) for gates in D]).mean(0)
    eight = (W.T @ A @ W + torch.diag((W.T @ A @ W).diagonal())) / 4
    assert found.eight == pytest.approx(float((star - eight).norm() / star.norm()), rel=1e-4)


def test_overlap_at_finite_width_is_that_of_simulated_weights():
    generator = torch.Generator().manual_seed(1)
    for n, c, draws in ((96, 3, 8000), (96, 10, 6000)):
        found = []
        for _ in range(draws):
            W = torch.randn(c, n, generator=generator, dtype=torch.float64) / n**0.5
            g = torch.randn(n, generator=generator, dtype=torch.float64)
            q = torch.special.ndtr(g / (np.pi - 1) ** 0.5)
            found.append(overlap(range_of_contrasts(W * q), row_space_without_sum(W)))
        mean, error = np.mean(found), np.std(found) / draws**0.5
        tolerance = 4 * error + 10 / n**2
        assert abs(mean - float(overlap_at_width(n, c))) < tolerance
        assert abs(mean - limit_of_overlap()) > tolerance


def test_what_appendix_b_says_is_what_a_wide_network_does():
    draws = [output_measures(drawn(128, 430, 3, 4096, seed)) for seed in range(40)]
    mean = OutputMeasures(*np.mean(draws, 0))
    error = OutputMeasures(*(np.std(draws, 0, ddof=1) / len(draws) ** 0.5))
    r, o = gate_moment(2), limit_of_overlap()
    of_mean, variance = mean_logit_moments()
    for name, derived, printed in (
        ("gate", r, 0.25), ("logit_mean", of_mean, 0.0), ("logit_variance", variance, 0.1162), ("row_sum", 1.0, 0.0),
        ("eigenvalues", r, 0.25), ("projection", o**2, 1.0), ("residual", (1 - o**2) ** 0.5, 0.0),
        ("eight", (1 - o**2) ** 0.5, 0.0), ("printed", 1 - float(overlap_at_width(128, 3)), 0.0),
    ):  # fmt: skip
        found, width = getattr(mean, name), 4 * getattr(error, name) + 0.01 * derived
        assert abs(found - derived) < width, name
        assert abs(found - printed) > width, name
    assert mean.derived < 0.002 < 0.1 < mean.printed
    assert mean.same_space < 0.002
    assert mean.eight_corrected < 0.1
    assert abs(mean.printed - mean.between) < 0.01


def test_centred_inputs_are_the_case_where_the_printed_space_is_right():
    layers = drawn(256, 1024, 3, 2048, 2, shift=0.0)
    assert (layers.gates == 0.5).all()
    assert output_measures(layers).printed < 0.02
    shifted = drawn(256, 1024, 3, 2048, 2, shift=1.0)  # cosine 1/2
    assert output_measures(shifted).printed == pytest.approx(0.25, abs=0.06)
    assert limit_of_overlap(0.5) == pytest.approx(0.75)


def test_gates_are_those_of_gaussian_inputs():
    """Given the weights preactivations of Gaussian inputs are Gaussian, so that a unit's share is binomial about q."""
    N, n = 20000, 300
    layers = drawn(n, 40, 3, N, 4, shift=0.7)
    shares = (layers.X @ layers.first.T > 0).double().mean(0)
    chi2 = (shares - layers.gates).square() * N / (layers.gates * (1 - layers.gates))
    assert abs(float(chi2.mean()) - 1) < 4 * (2 / n) ** 0.5 * 2  # units share inputs
    assert float(layers.gates.std()) > 0.2


def test_hessian_follows_its_output_hessian():
    narrow, wide = (
        np.mean([hessian_measures(drawn(n, d, 3, 512, seed)) for seed in range(3)], 0)
        for n, d in ((8, 16), (64, 256))
    )  # fmt: skip
    assert (wide[[0, 2, 3]] < narrow[[0, 2, 3]]).all()
    assert wide[0] < 0.05
    assert wide[2] < 0.05 < 0.1 < wide[1] < 0.3
    layers = drawn(20, 30, 3, 200, 0)
    assert hessian_measures(layers).output == pytest.approx(output_measures(layers).printed, abs=1e-5)


def test_draws_follow_the_generator():
    first, second = (output_measures(drawn(8, 16, 3, 64, 5)) for _ in "ab")
    assert first == second
    assert first != output_measures(drawn(8, 16, 3, 64, 6))


def test_curvature_of_gaussian_logits():
    generator = torch.Generator().manual_seed(3)
    one = curvature_of_logits(torch.zeros(1, 3, dtype=torch.float64), 0.1, samples=20000, generator=generator)[0]
    values = torch.linalg.eigvalsh(one)
    assert float(values[2] / values[1]) == pytest.approx(1, abs=0.02)  # the printed law is exchangeable
    assert float(values[0]) == pytest.approx(0, abs=1e-12)
    z = torch.randn(200000, 3, generator=generator, dtype=torch.float64) * 0.1**0.5
    p = z.softmax(1)
    torch.testing.assert_close(one, torch.diag(p.mean(0)) - p.T @ p / len(p), atol=2e-3, rtol=0)
    spread = spread_of_curvature(3, weights=500, samples=500, generator=generator)
    assert spread == pytest.approx(1.40, abs=0.05)
