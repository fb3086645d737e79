"""Hessians, bases, samples and labels of any size: the right number, or one line that names what is wrong."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.hessian.layer import LayerHessian, layer_hessian
from common.hessian.operators import KroneckerProduct
from common.hessian.spectral_measure import edge_eigenvalues
from common.wu_dissecting import table10
from common.wu_dissecting.decoupling import distance_from_kronecker
from common.wu_dissecting.eigenspaces import (
    band_mean,
    dominance_of_mean,
    linear_range,
    matricized,
    nested_overlaps,
    overlap,
    pairwise_overlaps,
)
from common.wu_dissecting.logit_gradients import logit_gradients
from common.wu_dissecting.networks import classifier
from common.wu_dissecting.output_hessian import (
    gauss_newton_forms,
    halved_products,
    later_weights,
    output_approximation,
    row_space_without_sum,
)
from common.wu_dissecting.pac_bayes.bases import eigenvectors
from common.wu_dissecting.pac_bayes.bound import Confidence, complexity, pac_bayes_bound
from common.wu_dissecting.pac_bayes.optimize import METHODS, Schedule, tighten
from common.wu_dissecting.pac_bayes.posterior import Posteriors, count_errors
from common.wu_dissecting.theorem_4 import TwoLayers
from common.wu_dissecting.trained import Trainings, of_all_schemes


def check(draw):
    """The norm of a difference and the ends of a spectrum, of few samples, low rank and any type."""
    N, n, m, r = draw.choice([1, 1, 2, 5]), draw.randint(1, 5), draw.randint(1, 4), draw.randint(1, 3)
    dtype = draw.choice([torch.float32, torch.float64])
    generator = torch.Generator().manual_seed(draw.randint(0, 2**30))
    X, B = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((N, n), (N, m, r)))
    if draw.random() < 0.3:
        X = X[:1].expand(N, n).contiguous()
    if draw.random() < 0.2:
        B = B[:1].expand(N, m, r).contiguous()
    X *= draw.choice([0.0, 1.0, 1.0, 1e-4, 1e4])
    H = LayerHessian(X.to(dtype), B.to(dtype))
    exact = H.to(torch.float64)
    product = torch.kron(exact.output_hessian, exact.autocorrelation)
    difference = product - exact @ torch.eye(n * m, dtype=torch.float64)
    norm, scale = float(torch.linalg.matrix_norm(difference, 2)), float(torch.linalg.matrix_norm(product, 2))
    rounding = 100 * torch.finfo(dtype).eps * scale
    assert distance_from_kronecker(H, seed=0)[0] == pytest.approx(norm, rel=2e-3, abs=rounding)
    operator = KroneckerProduct(H.output_hessian, H.autocorrelation) - H
    count = draw.randint(1, n * m)
    values = torch.linalg.eigvalsh(difference).numpy()
    lowest, highest = edge_eigenvalues(operator, count, seed=0)
    np.testing.assert_allclose(lowest, values[:count], rtol=1e-3, atol=rounding + 1e-3 * norm)
    np.testing.assert_allclose(highest, values[::-1][:count], rtol=1e-3, atol=rounding + 1e-3 * norm)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_the_norm_and_the_edges_of_a_difference_are_those_of_the_dense_one(seed):
    check(random.Random(seed))


def normalized_network():
    """A classifier in training mode, with running statistics and dropout."""
    torch.manual_seed(0)
    made = nn.Sequential()
    parts = {"fc1": nn.Linear(3, 4), "relu": nn.ReLU(), "bn": nn.BatchNorm1d(4, affine=False), "drop": nn.Dropout()}
    for name, part in (parts | {"fc2": nn.Linear(4, 2)}).items():
        made.add_module(name, part)
    return made.train(), torch.randn(8, 3), torch.arange(8) % 2


def refused(cases):
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_gradients_of_logits_leave_a_network_in_training_as_it_is():
    made, X, y = normalized_network()
    H, before = layer_hessian(made, "fc1", X), {name: value.clone() for name, value in made.state_dict().items()}
    generator = torch.get_rng_state()
    first, again = (logit_gradients(made, "fc1", H, X, y) for _ in range(2))
    torch.testing.assert_close(first.gamma_centres, again.gamma_centres)
    torch.testing.assert_close(first.gamma_centres, logit_gradients(made.eval(), "fc1", H, X, y).gamma_centres)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    rectified, seen = nn.Sequential(nn.ReLU(inplace=True), *made), X.clone()
    logit_gradients(rectified, "5", layer_hessian(rectified, "5", X), X, y)
    assert torch.equal(X, seen)
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.usefixtures("unchecked")
def test_labels_and_layers_that_do_not_fit():
    made, X, y = normalized_network()
    H = layer_hessian(made, "fc1", X)
    layers = [layer_hessian(made, name, X) for name in ("fc1", "fc2")]
    V = torch.randn(26, 2)
    refused([
        (lambda: logit_gradients(made, "fc1", H, X, y + 1), r"labels y must lie in 0..1, got \[1, 2\]"),
        (lambda: logit_gradients(made, "fc1", H, X, y[:, None]), "one label a sample of the Hessian"),
        (lambda: logit_gradients(made, "fc1", H, X[:4], y), "one label a sample of the Hessian"),
        (lambda: later_weights(made, "fc9"), r"no layer 'fc9' with weights; there are \['fc1', 'fc2'\]"),
        (lambda: later_weights(classifier("LeNet5", (1, 28, 28), 10), "conv1"), "weights of fully connected layers"),
        (lambda: halved_products([]), "weights of fully connected layers"),
        (lambda: halved_products([torch.ones(2, 3), torch.ones(4, 3)]), "as many columns as rows before"),
        (lambda: output_approximation(layers, 0), "k of eigenpairs must lie in 1..6"),
        (lambda: output_approximation(layers, 12), "k of eigenpairs must lie in 1..6"),
        (lambda: output_approximation([], 1), "layers over the same samples"),
        (lambda: gauss_newton_forms(layers, torch.cat([V, V])), r"V needs a row for each of 26 .* got \(52, 2\)"),
        (lambda: gauss_newton_forms(layers, V[:, 0]), "V needs a row for each of 26"),
        (lambda: row_space_without_sum(torch.randn(5, 3)), "no more than columns"),
    ])  # fmt: skip
    mixed = gauss_newton_forms(layers, V.double())
    torch.testing.assert_close(mixed, gauss_newton_forms(layers, V))


def test_rows_that_add_up_to_zero_have_their_span():
    S = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S[2] = -S[0] - S[1]
    basis = row_space_without_sum(S)
    torch.testing.assert_close(S @ basis @ basis.T, S)


def test_equal_and_single_inputs_have_an_infinite_ratio():
    generator = torch.Generator().manual_seed(0)
    x, B = torch.randn(1, 50, generator=generator), torch.randn(100, 4, 3, generator=generator)
    for H in (LayerHessian(x.expand(100, 50).contiguous(), B), LayerHessian(x[0, :, None].repeat(2, 1), B)):
        dot, ratio = dominance_of_mean(H)
        assert ratio == math.inf
        assert dot == pytest.approx(1, rel=1e-5)
    assert math.isnan(dominance_of_mean(LayerHessian(torch.zeros(100, 3), B))[1])


def test_a_band_of_fewer_eigenvectors_than_outputs():
    shares = np.random.default_rng(0).random((5, 5))
    for k in (1, 3):
        assert band_mean(shares[:, :k]) == pytest.approx(np.diag(shares)[:k].mean())


@pytest.mark.usefixtures("unchecked")
def test_bases_of_any_type_and_those_that_are_none():
    U, V = (torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q for _ in range(2))
    assert overlap(U, V.float()) == pytest.approx(overlap(U, V), rel=1e-5)
    torch.testing.assert_close(nested_overlaps(U.float(), V), nested_overlaps(U, V), rtol=1e-5, atol=1e-6)
    refused([
        (lambda: overlap(U[:, :0], V[:, :0]), r"equal shape \(d, k\)"),
        (lambda: overlap(U[:, 0], V[:, 0]), r"equal shape \(d, k\)"),
        (lambda: matricized(U, 4), "vectors of length 6 have no matrices of 4 rows"),
        (lambda: matricized(U, 0), "no matrices of 0 rows"),
        (lambda: pairwise_overlaps([]), r"bases of one shape are needed, got \[\]"),
        (lambda: linear_range(torch.ones(2, 1), torch.ones(2, 1)), "gamma needs at least two eigenvalues"),
        (lambda: eigenvectors(torch.full((3, 3), torch.nan)), "finite entries"),
    ])  # fmt: skip


@pytest.mark.usefixtures("unchecked")
def test_sizes_that_no_theorem_training_or_table_has():
    generator = torch.Generator().manual_seed(0)
    training = {"name": "F-4", "data": "MNIST", "members": 1, "epochs": 1, "samples": 8, "seed": 0}
    refused([
        (lambda: TwoLayers.draw(8, 5, 1, samples=20, generator=generator), "2 classes, .* c = 1"),
        (lambda: TwoLayers.draw(2, 5, 4, samples=20, generator=generator), "as many hidden units"),
        *((lambda change=change: Trainings(**training | change), "at least one member, and no negative")
          for change in ({"members": 0}, {"epochs": -1}, {"samples": -8})),
        (lambda: of_all_schemes("F-4", "MNIST", members=[1, 2], epochs=1, samples=8, seed=0), "one number for each of"),
        (lambda: table10.bounds_of_networks(["T-600"], ["T-60"], seeds=[0]), r"learned bases of \['T-60'\]"),
        (lambda: table10.bounds_of_networks(["T-600"], [], seeds=[0, 0]), "every seed must be given once"),
    ])  # fmt: skip


@pytest.mark.usefixtures("unchecked")
def test_a_label_that_is_none_of_the_classes_is_no_error_of_the_posterior():
    weights, generator = [torch.randn(4, 4), torch.randn(2, 5)], torch.Generator().manual_seed(0)
    q, X, y = Posteriors.start(weights, weights, 2), torch.randn(20, 3, generator=generator), torch.arange(20) % 2
    schedule = Schedule(epochs=1, batch_size=5, hessian_samples=10)
    for a, b, message in (
        (X, y + 5, "labels y must be whole numbers in 0..1, got 5..6"),
        (X, y - 1, "labels y must be whole numbers in 0..1"),
        (X, y[:10], r"labels y \(N,\) are needed"),
        (X, y[:, None], r"samples X \(N, 3\)"),
        (X * torch.nan, y, r"samples X \(N, 3\), finite"),
        (X.double(), y, r"finite and torch.float32"),
    ):
        refused([
            (lambda a=a, b=b: count_errors(q, a, b, 50, 0), message),
            (lambda a=a, b=b: tighten(weights, weights, a, b, [METHODS["APPR"]], schedule=schedule,
                                      confidence=Confidence(), seed=0), message),
        ])  # fmt: skip
    refused([(lambda: count_errors(q, X, y, 0, 0), "number of draws must be at least 1")])


@pytest.mark.usefixtures("unchecked")
def test_bounds_need_numbers():
    refused([
        (lambda: pac_bayes_bound(0, 10, lambda rho: -5.0, -3.0, 100, Confidence()), "must not be negative, got -5"),
        (lambda: pac_bayes_bound(0, 10, lambda rho: 1.0, math.nan, 100, Confidence()), "half_log_prior must be finite"),
        (lambda: complexity(torch.ones(1), -3 * torch.ones(1), 1, Confidence()), "at least 2 samples, got 1"),
    ])  # fmt: skip
