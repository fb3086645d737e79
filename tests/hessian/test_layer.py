"""Hessians of layers and of all parameters, and their eigenpairs, against autograd and dense linear algebra."""

import re

import pytest
import torch
from torch import nn

from common import paths
from common.hessian.block_lanczos import top_eigenpairs
from common.hessian.convergence import ConvergenceError
from common.hessian.layer import (
    LayerHessian,
    WeightSharingHessian,
    effective_number,
    layer_hessian,
    layer_hessians,
)
from common.hessian.operators import FullHessian
from common.wu_dissecting.eigenspaces import overlap
from common.wu_dissecting.networks import classifier, layer_names, xavier

SAMPLES = 30


def perceptron(widths=(7, 6, 5, 4), suffix=""):
    hidden = "-".join(map(str, widths[1:-1]))
    network = classifier(f"F-{hidden}{suffix}", (widths[0], 1, 1), widths[-1]).double()
    X = torch.randn(SAMPLES, widths[0], 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).abs()
    return prepared(network, X), X


def small_convnet():
    """Overlapping strides, a border, batch norm and pooling, at a size whose Hessians can be formed."""
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(3, affine=False), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 4),
    ).double()  # fmt: skip
    X = torch.randn(SAMPLES, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return prepared(network, X), X


def prepared(network, X):
    xavier(network, torch.Generator().manual_seed(0))
    for p in network.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype)
    network.train()(X)  # running statistics
    return network.eval()


def hessian_by_autograd(network, layer, X):
    name = f"{layer}.weight"
    weight = dict(network.named_parameters())[name].detach()

    def loss(w):
        logits = torch.func.functional_call(network, {name: w.view_as(weight)}, (X,))
        return nn.functional.cross_entropy(logits, torch.zeros(len(X), dtype=torch.int64))

    return torch.func.hessian(loss)(weight.flatten())


def dense(H):
    return H @ torch.eye(H.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("suffix", ["", "-BN"])
@pytest.mark.parametrize("layer", ["fc1", "fc2", "fc3"])
def test_a_dense_layer_has_the_hessian_of_autograd(layer, suffix, monkeypatch):
    monkeypatch.setattr("common.hessian.layer.CHUNK", 64)
    monkeypatch.setattr("common.hessian.layer.SAMPLES_AT_ONCE", 7)
    network, X = perceptron(suffix=suffix)
    expected = hessian_by_autograd(network, layer, X)
    torch.testing.assert_close(dense(layer_hessian(network, layer, X)), expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("layer", ["0", "4", "7"])
def test_layers_of_a_convolutional_network_have_the_hessian_of_autograd(layer, monkeypatch):
    monkeypatch.setattr("common.hessian.layer.SAMPLES_AT_ONCE", 7)
    network, X = small_convnet()
    expected = hessian_by_autograd(network, layer, X)
    torch.testing.assert_close(dense(layer_hessian(network, layer, X)), expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", ["ResNet18-W2", "VGG11-W2"])
def test_all_layers_of_a_large_network_at_once(name, monkeypatch):
    """Branches that are left and joined again, strides and an average over positions, against autograd."""
    monkeypatch.setattr("common.hessian.layer.SAMPLES_AT_ONCE", 2)
    network = classifier(name, (3, 32, 32), 3).double()
    X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    prepared(network, X)
    layers = layer_names(network)
    found = layer_hessians(network, layers, X)
    assert list(found) == layers
    for layer in ("conv1", "conv2", "conv6", "sc-conv1", "conv15", "fc1"):
        if layer in layers:
            expected = hessian_by_autograd(network, layer, X)
            assert expected.abs().max() > 1e-8
            torch.testing.assert_close(dense(found[layer]), expected, atol=1e-12, rtol=1e-8)
            alone = layer_hessian(network, layer, X)
            torch.testing.assert_close(alone.output_hessian, found[layer].output_hessian)


def test_what_follows_a_layer_may_work_in_place():
    network, X = small_convnet()
    layers = ["0", "4", "7"]
    expected = layer_hessians(network, layers, X)
    for place in (1, 5, 8):
        network[place] = nn.ReLU(inplace=True)
    for layer, H in layer_hessians(network, layers, X).items():
        torch.testing.assert_close(dense(H), dense(expected[layer]))
        torch.testing.assert_close(H.autocorrelation, expected[layer].autocorrelation)


def test_convolutions_that_cannot_be_done_are_refused():
    for wrong, match in ((nn.Conv2d(2, 4, 3, groups=2), "2 groups"), (nn.ConvTranspose2d(2, 4, 3), "ConvTranspose2d")):
        with pytest.raises(ValueError, match=f"'0'.*{match}.*FullHessian"):
            layer_hessian(nn.Sequential(wrong, nn.Flatten()), "0", torch.rand(2, 2, 8, 8))


def test_factors_of_a_convolution_are_those_of_equation_33():
    network, X = small_convnet()
    H = layer_hessian(network, "4", X)
    below, above = network[:4](X).detach(), network[5:]
    unfolded = nn.functional.unfold(below, 2, stride=2)
    P = unfolded.shape[2]
    expected, outputs = 0, network[4](below).detach()
    for z in outputs:
        G = torch.func.jacrev(lambda z: above(z[None])[0])(z).flatten(2)  # c × m × P
        p = above(z[None])[0].detach().softmax(0)
        M = torch.einsum("amp,ab,bnp->mn", G, torch.diag(p) - torch.outer(p, p), G) / P
        expected = expected + M / len(outputs)
    torch.testing.assert_close(H.output_hessian, expected)
    torch.testing.assert_close(H.autocorrelation, (unfolded @ unfolded.mT).mean(0))
    first = torch.linalg.svd(unfolded.mean(0)).U[:, 0]
    assert abs(float(first @ H.mean_input)) == pytest.approx(1)


@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc1", "fc3"])
def test_effective_samples_from_the_trace_of_every_sample(layer):
    torch.manual_seed(0)
    network = classifier("LeNet5-(fc1-7)", (3, 32, 32), 10).double()
    X = torch.randn(6, 3, 32, 32, dtype=torch.float64) * torch.tensor([1, 2, 3, 1, 1, 4.0])[:, None, None, None]
    weight, traces = network.get_submodule(layer).weight, []
    for x in X:
        logits = network(x[None])[0]
        J = torch.stack([torch.autograd.grad(z, weight, retain_graph=True)[0].flatten() for z in logits])
        p = logits.detach().softmax(0)
        traces.append((J * ((torch.diag(p) - torch.outer(p, p)) @ J)).sum())
    w = torch.stack(traces)
    H = layer_hessian(network, layer, X)
    torch.testing.assert_close(H.sample_traces(), w)
    assert H.effective_samples == pytest.approx(float(w.sum() ** 2 / w.square().sum()))
    H = layer_hessian(network, layer, X[:1].expand(5, -1, -1, -1))
    assert H.effective_samples == pytest.approx(5)


def test_effective_number_of_weights():
    assert effective_number(torch.ones(7)) == pytest.approx(7)
    assert effective_number(torch.tensor([0.0, 3.0, 0.0])) == pytest.approx(1)
    assert effective_number(torch.zeros(3)) == 0


def test_where_one_position_is_left_a_convolution_is_a_dense_layer():
    X, B = torch.rand(SAMPLES, 6, dtype=torch.float64), torch.rand(SAMPLES, 3, 4, dtype=torch.float64)
    H = LayerHessian(X, B)
    J = torch.einsum("zmr,zn->zrmn", B, X).flatten(2)
    same = WeightSharingHessian(J, H.output_hessian, H.autocorrelation, H.mean_input)
    torch.testing.assert_close(dense(same), dense(H))


def test_factors_and_their_eigenpairs():
    H = layer_hessian(perceptron()[0], "fc2", perceptron()[1])
    M, C = H.output_hessian, H.autocorrelation
    torch.testing.assert_close(M, (H.B @ H.B.mT).mean(0))
    torch.testing.assert_close(C, torch.einsum("ni,nj->ij", H.X, H.X) / len(H.X))
    product = torch.kron(M, C)
    values, vectors = H.kronecker_eigenpairs(9)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(product).flip(0)[:9])
    torch.testing.assert_close(product @ vectors, vectors * values, atol=1e-10, rtol=1e-8)
    same_input = LayerHessian(H.X[:1].repeat(SAMPLES, 1), H.B)  # one input for all: the conjecture holds exactly
    torch.testing.assert_close(dense(same_input), torch.kron(same_input.output_hessian, same_input.autocorrelation))


@pytest.mark.parametrize("k", [1, 5, 15])
def test_top_eigenpairs_are_those_of_the_dense_matrix(k):
    H = layer_hessian(perceptron()[0], "fc1", perceptron()[1])
    values, vectors = torch.linalg.eigh(dense(H))
    found = H.top_eigenpairs(k, tolerance=1e-9)
    torch.testing.assert_close(found.values, values.flip(0)[:k], rtol=1e-8, atol=1e-14)
    assert overlap(found.vectors, vectors.flip(1)[:, :k]) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(k, dtype=torch.float64))
    true = torch.linalg.vector_norm(dense(H) @ found.vectors - found.vectors * found.values, dim=0) / found.values
    assert true.max() <= 1e-8


@pytest.mark.parametrize("block", [3, 4])
def test_reported_residuals_are_the_true_ones(block):
    """At a tolerance that ends the iteration early, of a space that is no multiple of what was asked for."""
    network, X = perceptron((30, 20, 10))
    H = layer_hessian(network, "fc1", X)
    found = top_eigenpairs(H, 10, start=H.kronecker_eigenpairs(block)[1], tolerance=1e-2, most=97)
    true = torch.linalg.vector_norm(H @ found.vectors - found.vectors * found.values, dim=0)
    assert 1e-8 < (true / found.values).max() < 1e-2
    torch.testing.assert_close(found.residuals, true, rtol=1e-6, atol=1e-14)


def test_eigenpairs_that_cannot_be_had():
    network, X = perceptron((30, 20, 10))
    H = layer_hessian(network, "fc1", X)
    with pytest.raises(ConvergenceError, match="largest relative residual"):
        top_eigenpairs(H, 20, start=H.kronecker_eigenpairs(2)[1], tolerance=1e-12, most=26)
    with pytest.raises(ValueError, match="eigenpairs"):
        H.top_eigenpairs(0)
    with pytest.raises(ValueError, match="no layer 'fc4'"):
        layer_hessian(network, "fc4", X)


def test_the_hessian_of_all_parameters_is_that_of_autograd(monkeypatch):
    monkeypatch.setattr("common.hessian.operators.SAMPLES_AT_ONCE", 13)
    network, X = perceptron((5, 4, 3))
    y = torch.arange(SAMPLES) % 3
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    flat = torch.cat([p.flatten() for p in parameters.values()])

    def loss(theta):
        parts = theta.split([p.numel() for p in parameters.values()])
        named = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(network, named, (X,)), y)

    expected = torch.func.hessian(loss)(flat)
    torch.testing.assert_close(dense(FullHessian(network, X, y)), expected, atol=1e-12, rtol=1e-9)


def test_eigenvalues_below_the_rounding_of_the_largest_are_found():
    generator = torch.Generator().manual_seed(0)
    x, B = torch.randn(12, 40, generator=generator), torch.randn(12, 30, 3, generator=generator)
    H = LayerHessian(x, B * torch.logspace(0, -8, 12)[:, None, None])  # eigenvalues over 16 decades
    assert (top_eigenpairs(H, 20, start=H.kronecker_eigenpairs(8)[1]).values == 0).any()
    found = H.top_eigenpairs(20)
    G = (x.double() @ x.T.double()).repeat_interleave(3, 0).repeat_interleave(3, 1)
    flat = H.B.double().transpose(1, 2).reshape(36, 30)
    expected = torch.linalg.eigvalsh(G * (flat @ flat.T)).flip(0)[:20] / 12
    torch.testing.assert_close(found.values.double(), expected, rtol=1e-3, atol=0)
    assert found.vectors.dtype == torch.float32
    double = H.to(torch.float64)
    true = torch.linalg.vector_norm(double @ found.vectors.double() - found.vectors.double() * found.values, dim=0)
    torch.testing.assert_close(found.residuals.double(), true, rtol=1e-3, atol=1e-12)


def test_the_example_of_the_readme(capsys):
    _, code = re.findall(r"```python\n(.*?)```", (paths.ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["true"].values.shape == (9,)
    assert "tensor" in capsys.readouterr().out
