"""Closed-form Hessians against automatic differentiation, curvlinops, and sums over formed blocks."""

import math

import curvlinops
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, one_hot

from common.hessian.gram import (
    KhatriRao,
    squared_gram,
    weighted_block_norms,
    weighted_gram,
    weighted_gram_norms,
)  # fmt: skip
from common.hessian.hidden_layer import HiddenLayerHessian
from common.hessian.image import PooledImage
from common.hessian.linear import LinearHessian

LOSSES = ("CE", "MSE")
FEW = settings(max_examples=40, deadline=None, derandomize=True)


def linear(N, d, C, loss, seed=0, dtype=torch.float64, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    X = torch.randn(N, d, generator=rng, dtype=torch.float64)
    V = scale * torch.randn(C, d, generator=rng, dtype=torch.float64)
    return LinearHessian(X.to(dtype), V.to(dtype), loss)


def hidden(N, d, m, C, loss, seed=0, dead=False, dtype=torch.float64, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    X = torch.randn(N, d, generator=rng, dtype=torch.float64)
    W = torch.randn(m, d, generator=rng, dtype=torch.float64)
    V = scale * torch.randn(C, m, generator=rng, dtype=torch.float64)
    if dead:
        W[seed % m] = 0  # never active; the kink itself, too
    y = torch.randint(C, (N,), generator=rng)
    return HiddenLayerHessian(X.to(dtype), W.to(dtype), V.to(dtype), y, loss)


def objective(outputs, y, loss):
    """Return the loss as the module states it."""
    if loss == "CE":
        return cross_entropy(outputs, y)
    return (outputs - one_hot(y, outputs.shape[1])).square().sum(dim=1).mean()


def by_autograd(H):
    """Return the same Hessian by torch.func."""
    if isinstance(H, LinearHessian):
        y = torch.zeros(H.N, dtype=torch.long)
        return torch.func.hessian(lambda v: objective(H.X @ v.view_as(H.V).T, y, H.loss))(H.V.flatten())

    def at(parameters):
        W, V = parameters.split([H.W.numel(), H.V.numel()])
        return objective((H.X @ W.view_as(H.W).T).relu() @ V.view_as(H.V).T, H.y, H.loss)

    return torch.func.hessian(at)(torch.cat([H.W.flatten(), H.V.flatten()]))


def pooled(H, pixels, pool):
    """Pool |H| from the formed matrix: parameter r of n belongs to the pixel floor(r · size / n)."""
    image = H.abs().double().numpy()
    for axis, n in enumerate(H.shape):
        size = min(n, max(1, round(pixels * n / max(H.shape))))
        pixel = np.arange(n) * size // n
        first = np.searchsorted(pixel, np.arange(size))
        if pool == "max":
            image = np.maximum.reduceat(image, first, axis)
        else:
            image = np.add.reduceat(image, first, axis) / np.expand_dims(np.bincount(pixel), 1 - axis)
    return torch.from_numpy(image)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products this small gain nothing from a second thread and lose much where the processors are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["one chunk", "tiny chunks", "no Khatri-Rao matrix"])
def memory(request, monkeypatch):
    """Set the bounds on memory so that every way of splitting the work is taken."""
    if request.param == "tiny chunks":
        monkeypatch.setattr("common.hessian.gram.SAMPLES_AT_ONCE", 2)
        monkeypatch.setattr("common.hessian.hidden_layer.SAMPLES_AT_ONCE", 2)
        monkeypatch.setattr("common.hessian.closed_form.ENTRIES_AT_ONCE", 30)
    if request.param == "no Khatri-Rao matrix":
        monkeypatch.setattr("common.hessian.gram.LARGEST_PRODUCTS", 0)


# ---------------------------------------------------------------------------------------------------------------------
# The matrix


@FEW
@given(
    N=st.integers(1, 8),
    d=st.integers(1, 5),
    C=st.integers(1, 18),
    loss=st.sampled_from(LOSSES),
    seed=st.integers(0, 99),
)
@example(N=1, d=1, C=1, loss="CE", seed=0)
@example(N=3, d=2, C=17, loss="CE", seed=0)
def test_linear_matrix_is_that_of_autograd(N, d, C, loss, seed):
    H = linear(N, d, C, loss, seed)
    expected = by_autograd(H)
    close(H.matrix(), expected)
    close(H.tile(slice(None), slice(None)), expected)
    close(H.squared_norms(), expected.view(C, d, C, d).square().sum((1, 3)))


@FEW
@given(
    N=st.integers(1, 8),
    d=st.integers(1, 4),
    m=st.integers(1, 4),
    C=st.integers(1, 10),
    loss=st.sampled_from(LOSSES),
    seed=st.integers(0, 99),
    dead=st.booleans(),
)
@example(N=1, d=1, m=1, C=1, loss="CE", seed=0, dead=False)
@example(N=1, d=1, m=1, C=1, loss="MSE", seed=0, dead=True)
@example(N=5, d=3, m=1, C=2, loss="CE", seed=0, dead=True)
@example(N=5, d=3, m=2, C=17, loss="CE", seed=0, dead=False)
def test_hidden_matrix_is_that_of_autograd(N, d, m, C, loss, seed, dead):
    H = hidden(N, d, m, C, loss, seed, dead)
    expected = by_autograd(H)
    close(H.matrix(), expected)
    close(H.tile(slice(None), slice(None)), expected)
    split = m * d
    close(H.ww(), expected[:split, :split])
    close(H.vv(), expected[split:, split:])
    close(H.wv(), expected[:split, split:])
    close(H.squared_norms("ww"), H.ww().view(m, d, m, d).square().sum((1, 3)))
    close(H.squared_norms("vv"), H.vv().view(C, m, C, m).square().sum((1, 3)))
    sheets = H.wv().view(m, d, C, m).square().sum((1, 2))
    close(torch.tensor(H.stripe_energy()), torch.stack([sheets.trace(), sheets.sum()]).float())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("d, C", [(5, 4), (2, 17)])
def test_linear_matrix_however_the_work_is_split(memory, d, C, loss):
    H = linear(7, d, C, loss)
    expected = by_autograd(H)
    close(H.matrix(), expected)
    close(H.tile(slice(1, 9, 2), torch.tensor([0, 5, 3])), expected[1:9:2, [0, 5, 3]])
    close(H.squared_norms(), expected.view(C, d, C, d).square().sum((1, 3)))
    for pool in ("mean", "max"):
        close(H.image(6, pool), pooled(expected, 6, pool))


@pytest.mark.parametrize("loss", LOSSES)
def test_hidden_matrix_however_the_work_is_split(memory, loss):
    H = hidden(9, 4, 3, 5, loss)
    expected = by_autograd(H)
    close(H.matrix(), expected)
    rows, columns = torch.tensor([26, 0, 13, 7]), slice(3, None, 4)
    close(H.tile(rows, columns), expected[rows][:, columns])
    close(H.tile(H.w(2), H.v(4)), expected[8:12, 24:27])
    close(H.squared_norms("ww"), H.ww().view(3, 4, 3, 4).square().sum((1, 3)))


def test_curvlinops_agrees():
    H = hidden(12, 5, 3, 4, "CE", dead=True)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 3, bias=False), torch.nn.ReLU(), torch.nn.Linear(3, 4, bias=False)
    ).double()
    model[0].weight.data, model[2].weight.data = H.W, H.V
    parameters = list(model.parameters())
    data = [(H.X, H.y)]
    operator = curvlinops.HessianLinearOperator(model, torch.nn.CrossEntropyLoss(), parameters, data)
    close(H.matrix(), operator @ torch.eye(H.order, dtype=torch.float64))

    H = HiddenLayerHessian(H.X, H.W, H.V, H.y, "MSE")
    data = [(H.X, one_hot(H.y, 4).double())]
    operator = curvlinops.HessianLinearOperator(model, torch.nn.MSELoss(), parameters, data)
    close(H.matrix(), 4 * (operator @ torch.eye(H.order, dtype=torch.float64)))  # MSELoss divides by C = 4


@pytest.mark.parametrize("loss", LOSSES)
def test_matrix_is_exactly_symmetric_and_written_where_asked(loss):
    for H in (hidden(600, 130, 3, 270, loss, dtype=torch.float32), linear(300, 20, 9, loss, dtype=torch.float32)):
        out = torch.full((H.order, H.order), math.nan)
        matrix = H.matrix(out=out)
        assert matrix is out and torch.equal(matrix, matrix.T)


def test_mse_couples_no_two_classes():
    d, C = 6, 5
    matrix = linear(30, d, C, "MSE").matrix().view(C, d, C, d)
    for i in range(C):
        for j in range(C):
            assert i == j or not matrix[i, :, j].any()
    assert linear(30, d, C, "MSE").mean_squared_norms().off_diagonal == 0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_float32_agrees_with_float64_even_where_the_model_is_sure(loss, scale):
    # At scale 30 most samples have a probability of almost 1, whose complement a naive 1 - p would lose.
    for arguments in ({"N": 2000, "d": 40, "m": 6, "C": 50}, {"N": 300, "d": 150, "m": 4, "C": 7}):
        exact = hidden(loss=loss, scale=scale, **arguments)
        H = HiddenLayerHessian(exact.X.float(), exact.W.float(), exact.V.float(), exact.y, loss)
        exact = HiddenLayerHessian(H.X.double(), H.W.double(), H.V.double(), H.y, loss)
        for part in ("ww", "vv", "wv"):
            expected = getattr(exact, part)()
            assert (getattr(H, part)() - expected).norm() <= 1e-6 * expected.norm()
        close(H.squared_norms("ww").double(), exact.squared_norms("ww"), 1e-5)
        close(torch.tensor(H.mean_squared_norms("vv")), torch.tensor(exact.mean_squared_norms("vv")), 1e-5)


def test_complement_of_a_probability_near_one():
    H = LinearHessian(torch.ones(1, 1), torch.tensor([[60.0], [0.0], [1.0]]), "CE")
    expected = (math.exp(-60) + math.exp(-59)) / (1 + math.exp(-60) + math.exp(-59))
    assert H.top[2].item() == pytest.approx(expected, rel=1e-14)
    assert H.matrix()[0, 0].item() == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Norms


@pytest.mark.parametrize("d", [1, 7, 300])
def test_weighted_gram_and_its_norms(d):
    rng = torch.Generator().manual_seed(d)
    X = torch.randn(40, d, generator=rng, dtype=torch.float64)
    weights = torch.randn(40, 3, generator=rng, dtype=torch.float64)
    formed = torch.einsum("nb,ni,nj->bij", weights, X, X)
    samples = torch.tensor([3, 8, 30])
    close(weighted_gram(X, weights[:, 0]), formed[0])
    close(weighted_gram(X, weights[:, 0], samples), (X[samples].T * weights[samples, 0]) @ X[samples])
    close(KhatriRao(X).grams(weights), formed)
    norms = (formed / 40).square().sum((1, 2))
    close(weighted_gram_norms(squared_gram(X), weights), norms)
    close(weighted_block_norms(X, weights), norms)
    close(KhatriRao(X).squared_norms(weights) / 40**2, norms)


@pytest.mark.parametrize("N, d, B", [(30, 4, 5), (10, 300, 5), (100, 270, 1), (10, 6, 40)])
def test_block_norms_by_each_of_the_three_ways(N, d, B, monkeypatch):
    X, weights = torch.randn(N, d, dtype=torch.float64), torch.randn(N, B, dtype=torch.float64)
    expected = torch.einsum("nb,ni,nj->bij", weights / N, X, X).square().sum((1, 2))
    close(weighted_block_norms(X, weights), expected)
    monkeypatch.setattr("common.hessian.gram.LARGEST_GRAM", 0)
    close(weighted_block_norms(X, weights), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "N, d, C", [(5, 30, 12), (8, 4, 40), (300, 2, 5), (20, 2, 40), (4, 3, 1), (4, 3, 2), (1, 1, 9)]
)
def test_mean_norms_against_brute_force(N, d, C, loss):
    H = linear(N, d, C, loss)
    norms = H.matrix().view(C, d, C, d).square().sum((1, 3))
    mean = H.mean_squared_norms()
    assert mean.diagonal == pytest.approx(norms.diagonal().mean().item(), rel=1e-10, abs=1e-300)
    off = [norms[i, j].item() for i in range(C) for j in range(C) if i != j]
    if off:
        assert mean.off_diagonal == pytest.approx(sum(off) / len(off), rel=1e-10)
    else:
        assert math.isnan(mean.off_diagonal)


@pytest.mark.parametrize("loss", LOSSES)
def test_mean_norms_of_the_layers(loss):
    H = hidden(60, 5, 4, 6, loss, dead=True)
    for part, formed in (("ww", H.ww().view(4, 5, 4, 5)), ("vv", H.vv().view(6, 4, 6, 4))):
        norms, mean = formed.square().sum((1, 3)), H.mean_squared_norms(part)
        count = len(norms)
        assert mean.diagonal == pytest.approx(norms.trace().item() / count, rel=1e-12)
        off = (norms.sum() - norms.trace()).item() / (count * (count - 1))
        assert mean.off_diagonal == pytest.approx(off, rel=1e-10, abs=1e-14)


def test_the_gradient_of_the_loss_lives_on_the_stripes_alone():
    """Other labels change the cross-layer Hessian only in the columns v_k of the rows w_k, the first term of (18)."""
    H = hidden(50, 4, 3, 5, "CE")
    other = HiddenLayerHessian(H.X, H.W, H.V, (H.y + 1) % 5, "CE")
    change = (H.wv() - other.wv()).view(3, 4, 5, 3)
    stripes = torch.eye(3, dtype=torch.bool)[:, None, None, :].expand(3, 4, 5, 3)
    assert not change[~stripes].any() and change[stripes].any()


# ---------------------------------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("pixels", [1, 7, 24, 31, 10**6])
def test_image_is_the_pooled_matrix(pixels, loss, pool):
    for H in (linear(20, 6, 12, loss), linear(20, 3, 24, loss), linear(4, 300, 2, loss)):
        close(H.image(pixels, pool), pooled(H.matrix(), pixels, pool))
    H = hidden(20, 7, 3, 11, loss, dead=True)
    matrices = {"full": H.matrix(), "ww": H.ww(), "vv": H.vv(), "wv": H.wv()}
    for part, matrix in matrices.items():
        close(H.image(pixels, part, pool), pooled(matrix, pixels, pool))


def test_image_without_khatri_rao_matrix():
    H = linear(4, 300, 2, "CE")
    assert not KhatriRao.fits(H.N, H.d)
    close(H.image(11), pooled(H.matrix(), 11, "mean"))
    close(H.matrix(), by_autograd(H))


def test_image_of_a_matrix_too_large_to_form():
    """Order 40,000: 6.4 GB in float32."""
    H = linear(50, 40, 1000, "CE", dtype=torch.float32)
    image = H.image(8)
    corner = H.tile(slice(0, 5000), slice(35000, 40000)).abs().mean(dtype=torch.float64)
    assert image[0, 7].item() == pytest.approx(corner.item(), rel=1e-5)
    assert image[7, 0] == image[0, 7]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


X, W, V, Y = torch.ones(4, 3), torch.ones(2, 3), torch.ones(5, 2), torch.zeros(4, dtype=torch.long)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((X, W, torch.ones(0, 2), Y, "CE"), "the number of classes C must be at least 1, got 0"),
        ((torch.ones(0, 3), W, V, Y[:0], "CE"), "the number of samples N must be at least 1, got 0"),
        ((X, torch.ones(0, 3), torch.ones(5, 0), Y, "CE"), "the number of hidden neurons m must be at least 1, got 0"),
        ((X, torch.ones(2, 4), V, Y, "CE"), "W has 4 columns but the samples have 3 features"),
        ((X, W, torch.ones(5, 3), Y, "CE"), "V has 3 columns but W has 2 rows"),
        ((X, W, V, Y[:3], "CE"), "y must hold 4 integer labels"),
        ((X, W, V, Y.double(), "CE"), "y must hold 4 integer labels"),
        ((X, W, V, Y + 5, "CE"), "labels must lie in 0, ..., 4, got 5"),
        ((X, W, V, Y - 1, "CE"), "labels must lie in 0, ..., 4, got -1"),
        ((X, W, V, Y, "hinge"), "the loss must be 'CE' or 'MSE', got 'hinge'"),
        ((X * math.nan, W, V, Y, "CE"), "X holds values that are not finite"),
        ((X, W, V / 0, Y, "CE"), "V holds values that are not finite"),
        ((X.half(), W, V, Y, "CE"), "X must be float32 or float64"),
        ((X[0], W, V, Y, "CE"), "X must be a matrix"),
    ],
)
def test_bad_input_is_named_in_one_line(arguments, message):
    with pytest.raises(ValueError, match="^" + message) as error:
        HiddenLayerHessian(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("unchecked")
def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="V has 2 columns but the samples have 3 features"):
        LinearHessian(X, V, "CE")
    H = HiddenLayerHessian(X, W, V, Y, "CE")
    with pytest.raises(ValueError, match=r"class must lie in 0, \.\.\., 4, got 5"):
        H.v(5)
    with pytest.raises(ValueError, match=r"neuron must lie in 0, \.\.\., 1, got -1"):
        H.w(-1)
    with pytest.raises(ValueError, match="the number of pixels must be at least 1, got 0"):
        H.image(0)
    with pytest.raises(ValueError, match="pool must be 'mean' or 'max', got 'median'"):
        H.image(5, pool="median")
    with pytest.raises(ValueError, match="part must be one of full, ww, vv, wv, got 'vw'"):
        H.image(5, part="vw")
    with pytest.raises(ValueError, match="part must be 'ww' or 'vv', got 'wv'"):
        H.squared_norms("wv")


def test_what_is_given_is_left_as_it_is():
    given = [part.clone() for part in (X, W, V, Y)]
    weights = given[2].requires_grad_()
    for loss in LOSSES:
        H = HiddenLayerHessian(*given, loss)
        assert not H.matrix().requires_grad and weights.requires_grad
        H.image(5)
        H.image(5, "wv", "max")
        H.tile(slice(None), slice(None))
        H.squared_norms("ww"), H.squared_norms("vv"), H.stripe_energy()
        assert all(torch.equal(part, original) for part, original in zip(given, (X, W, V, Y), strict=True))
        assert torch.equal(H.matrix(), HiddenLayerHessian(X, W, V, Y, loss).matrix())
    values, image = -torch.ones(2, 2), PooledImage(2, 2, 2, "mean", torch.device("cpu"))
    image.add(slice(0, 2), slice(0, 2), values)
    assert (values == -1).all()


def test_probabilities_are_those_of_activations_before_they_are_rounded():
    exact = hidden(50, 30, 20, 5, "CE", scale=10.0)
    H = HiddenLayerHessian(exact.X.float(), exact.W.float(), exact.V.float(), exact.y, "CE")
    p = ((H.X.double() @ H.W.double().T).relu() @ H.V.double().T).softmax(1)
    close(H.output_layer.p, p, 1e-13)
    rounded = LinearHessian(H.output_layer.X, H.V, "CE").p
    assert (rounded - p).abs().max() > 1e-7
    close(LinearHessian(H.output_layer.X, H.V, "CE", probabilities=p).matrix(), H.vv())


@pytest.mark.usefixtures("unchecked")
def test_labels_and_places_of_any_type_and_room_that_does_not_fit():
    H = hidden(6, 3, 2, 4, "CE")
    expected = H.matrix()
    for y in (H.y.to(torch.uint8), H.y.int()):
        assert torch.equal(HiddenLayerHessian(H.X, H.W, H.V, y, "CE").matrix(), expected)
    close(H.tile(torch.tensor(3), 5), expected[3:4, 5:6])
    for out in (torch.zeros(15, 15), torch.zeros(H.order, H.order, dtype=torch.long)):
        for call in (H.matrix, H.output_layer.matrix, H.ww):
            with pytest.raises(ValueError, match=r"out must be a floating-point matrix of shape"):
                call(out=out)
    with pytest.raises(ValueError, match=r"probabilities must have the shape \(6, 4\), got \(6, 1\)"):
        LinearHessian(H.X, torch.ones(4, 3), "CE", torch.ones(6, 1))
    with pytest.raises(ValueError, match="number of pixels must be at least 1, got nan"):
        H.image(math.nan)
    with pytest.raises(ValueError, match="at least one row and column"):
        PooledImage(0, 3, 2, "mean", torch.device("cpu"))


@pytest.mark.usefixtures("unchecked")
def test_weights_of_samples_are_not_broadcast():
    X, weights = torch.randn(6, 3), torch.randn(6, 2)
    for call in (
        lambda: weighted_gram(X, weights[:1, 0]), lambda: weighted_gram(X, weights), lambda: weighted_gram(X.long(), X),
        lambda: weighted_block_norms(X, weights[:, 0]), lambda: weighted_gram_norms(squared_gram(X), weights[:1]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"weights need [12] dimensions and a row for each row"):
            call()
    with pytest.raises(ValueError, match="number of samples N must be at least 1"):
        weighted_block_norms(X[:0], weights[:0])
    close(weighted_gram_norms(squared_gram(X), weights.double()), weighted_block_norms(X, weights), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_model_that_is_sure_leaves_has_all_its_digits(dtype):
    v = torch.tensor([40.25, 29.5], dtype=dtype)  # logits 69.75 and 0
    H = HiddenLayerHessian(torch.ones(1, 1, dtype=dtype), torch.ones(2, 1, dtype=dtype),
                           torch.stack([v, 0 * v]), torch.tensor([0]), "CE")  # fmt: skip
    p = math.exp(-69.75) / (1 + math.exp(-69.75))
    expected = p * (1 - p) * torch.outer(v, v)
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 0}
    torch.testing.assert_close(H.ww(), expected, **tolerance)
    # v_k A_11 for the likeliest class, and the residual p - 1 where both belong to one neuron
    first = p * (1 - p) * v[:, None].expand(2, 2) - p * torch.eye(2, dtype=dtype)
    torch.testing.assert_close(H.wv()[:, :2], first, **tolerance)
    torch.testing.assert_close(H.tile(slice(0, 2), slice(2, 4)), first, **tolerance)
