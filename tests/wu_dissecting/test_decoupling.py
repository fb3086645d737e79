"""The distance from Kronecker's product against a matrix that is formed; moments of inputs against other ways."""

import pytest
import torch

from common import paths
from common.hessian.convergence import ConvergenceError
from common.hessian.layer import LayerHessian, layer_hessians
from common.wu_dissecting.decoupling import distance_from_kronecker
from common.wu_dissecting.eigenspaces import dominance_of_mean
from common.wu_dissecting.factors import dominance_of_inputs, factors_along_training, input_moments
from common.wu_dissecting.trained import dissected


def sampled(scale):
    """A layer's Hessian whose M grows with ‖x‖ by ``scale``."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 12, generator=generator)
    sizes = (1 + scale * X.square().mean(1)).view(-1, 1, 1)
    return LayerHessian(X, torch.randn(200, 7, 3, generator=generator) * sizes)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_the_distance_is_the_norm_of_the_difference(scale):
    H = sampled(scale)
    formed = H @ torch.eye(84)
    difference = torch.kron(H.output_hessian, H.autocorrelation) - formed
    norm, residual = distance_from_kronecker(H, seed=0)
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(difference, 2)), rel=1e-3)
    assert residual <= 1e-3
    assert distance_from_kronecker(H, seed=0) == (norm, residual)


def test_a_tolerance_that_is_not_reached_is_an_error():
    with pytest.raises(ConvergenceError, match="norm"):
        distance_from_kronecker(sampled(3.0), seed=0, tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1, 12, 7), (1, 1, 1), (5, 6, 4), (5, 1, 4)])
def test_equal_inputs_and_zero_factors_are_decoupled(sizes, dtype):
    N, n, m = sizes
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(1, n, generator=generator, dtype=dtype).expand(N, n).contiguous()
    B = torch.randn(N, m, 3, generator=generator, dtype=dtype)
    for factors in (B, 0 * B):
        assert distance_from_kronecker(LayerHessian(X, factors), seed=0) == (0, 0)


def small_network():
    """Two convolutions, one of them with strides, and two dense layers."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(3, 4, (2, 3), stride=2, dilation=(2, 1)),
        torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(36, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3),
    )  # fmt: skip


@pytest.mark.parametrize("at_once", [4, 100])
def test_moments_are_those_of_the_hessians_factors(at_once):
    network, X = small_network(), torch.rand(21, 2, 8, 7)
    layers = ["0", "2", "5", "7"]
    moments = input_moments(network, layers, X, at_once=at_once)
    for layer, H in layer_hessians(network, layers, X).items():
        found = moments[layer]
        torch.testing.assert_close(found.autocorrelation.float(), H.autocorrelation, rtol=1e-4, atol=1e-5)
        assert abs(float(found.mean_input @ H.mean_input.double())) == pytest.approx(1, abs=1e-5)
        assert dominance_of_mean(found) == pytest.approx(dominance_of_mean(H), rel=1e-3)
    inputs = network[:5](X).detach().double()
    w = inputs.square().sum(1)
    assert moments["5"].effective == pytest.approx(float(w.sum() ** 2 / w.square().sum()), rel=1e-5)
    torch.testing.assert_close(moments["5"].mean[:, 0], inputs.mean(0), rtol=1e-5, atol=1e-7)
    covariance = torch.cov(inputs.T, correction=0)
    expected = float(moments["5"].mean.square().sum() / torch.linalg.eigvalsh(covariance)[-1])
    assert moments["5"].mean_over_covariance == pytest.approx(expected, rel=1e-4)


def test_the_ratio_of_eigenvalues_is_bounded_at_one_position_only():
    """(264) without its −1 is a theorem there, and with two positions of orthogonal means it fails."""
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 2)).double()
    for size in (0.0, 0.1, 0.5, 1.0, 5.0):
        X = torch.randn(40, 6, generator=generator, dtype=torch.float64) * torch.arange(1, 7) + size
        (found,) = input_moments(network, ["0"], X).values()
        values, covariance = torch.linalg.eigvalsh(X.T @ X / 40), torch.cov(X.T, correction=0)
        assert dominance_of_mean(found)[1] == pytest.approx(float(values[-1] / values[-2]))
        expected = float(X.mean(0).square().sum() / torch.linalg.matrix_norm(covariance, 2))
        assert found.mean_over_covariance == pytest.approx(expected)
        assert dominance_of_mean(found)[1] >= found.mean_over_covariance
    mean = torch.zeros(6, dtype=torch.float64)
    mean[0] = 3.0  # along an eigenvector of the covariance that is not its first: the bound is nearly attained
    X = torch.diag(torch.tensor([1.0, 2, 1, 1, 1, 1], dtype=torch.float64))
    (found,) = input_moments(network, ["0"], torch.cat([X, -X]) + mean).values()
    assert dominance_of_mean(found)[1] == pytest.approx((9 + 1 / 6) / (4 / 6))
    assert found.mean_over_covariance == pytest.approx(9 / (4 / 6))
    x = torch.zeros(4, 1, 2, 2)
    x[:, 0, 0, 0], x[:, 0, 1, 1] = 1.0, 1.0
    x += 0.01 * torch.randn(4, 1, 2, 2, generator=generator)
    (found,) = input_moments(torch.nn.Sequential(torch.nn.Conv2d(1, 1, (1, 2), stride=(1, 1))), ["0"], x).values()
    assert found.mean.shape == (2, 2) and dominance_of_mean(found)[1] < 0.1 * found.mean_over_covariance


def test_moments_need_layers_that_can_be_unfolded():
    grouped = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1, groups=2))
    for network, layers in ((grouped, ["0"]), (grouped, ["1"]), (small_network(), ["1"]), (small_network(), [])):
        with pytest.raises(ValueError, match="layer"):
            input_moments(network, layers, torch.rand(3, 2, 8, 7))


def test_factors_along_the_training_are_those_of_the_networks(tmp_path, monkeypatch):
    (paths.CACHE / "data").mkdir(parents=True, exist_ok=True)
    (tmp_path / "data").symlink_to(paths.CACHE / "data")  # decoded images
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    case = dissected("F-7^2", "MNIST", members=2, epochs=1, samples=60, seed=0)
    start = dissected("F-7^2", "MNIST", members=2, epochs=0, samples=60, seed=0)
    before, after = dominance_of_inputs(start), dominance_of_inputs(case)
    assert before["dot"].shape == after["ratio"].shape == (2, 2)
    assert (after["ratio"] >= after["of_mean"] * (1 - 1e-6)).all() and not (before["dot"] == after["dot"]).any()
    H = case.hessian(1, "fc2", 40)
    found = factors_along_training(case, "fc2", 40, [1])
    assert found["tau"].shape == (1, 2, 7) and found["gamma"].shape == (1, 2, 7)
    torch.testing.assert_close(torch.from_numpy(found["tau"][0, 1]).float(), H.output_basis[0])
    assert found["effective"][0, 1] == pytest.approx(H.effective_samples)
    every = case.hessian(1, "fc2", 0)
    assert found["gamma"][0, 1, 0] == pytest.approx(float(every.input_basis[0][0]), rel=1e-5)
