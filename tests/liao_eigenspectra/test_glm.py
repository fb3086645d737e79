"""G-GLMs: their samples, curvatures and Hessians, against exact moments and torch's own derivatives."""

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
    ContinuousResponse,
    DiscreteResponse,
    Features,
    curvature,
    eigenpair,
    eigenpairs,
    exponential_loss,
    halves,
    logistic_loss,
    phase_retrieval_loss,
    square_loss,
    squared_cosine,
)


def test_curvature_of_the_logistic_loss_however_sure_the_model_is():
    """All digits where that of torch's own has none; the same for both labels."""
    h = torch.cat([torch.linspace(-700, 700, 2801, dtype=torch.float64), torch.tensor([1e-9, -1e-9, 37.0, 37.5])])
    tail = torch.exp(-h.abs())
    for y in (-1.0, 1.0):
        g = curvature(logistic_loss, torch.full_like(h, y), h)
        torch.testing.assert_close(g, tail / (1 + tail) ** 2, rtol=1e-14, atol=0)
        value = logistic_loss(torch.full_like(h, y), h)
        torch.testing.assert_close(value, torch.nn.functional.softplus(-y * h, threshold=800), rtol=1e-14, atol=0)


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


@pytest.mark.parametrize("shape", ["matrix", "diagonal", "shares", "identity"])
def test_features_have_their_mean_and_covariance(shape):
    """Within five standard errors of a sample's first and second moments."""
    A = np.random.default_rng(0).standard_normal((3, 3))
    covariance, C = {
        "matrix": (A @ A.T + np.eye(3), A @ A.T + np.eye(3)),
        "diagonal": ([0.5, 1.0, 4.0], np.diag([0.5, 1.0, 4.0])),
        "shares": (([2.0, 9.0], [2 / 3, 1 / 3]), np.diag([2.0, 2.0, 9.0])),
        "identity": (None, np.eye(3)),
    }[shape]
    n, features = 40_000, Features(p=3, mean=[1.0, -2.0, 0.5], covariance=covariance)
    X = features.sample_features(n, torch.Generator().manual_seed(0)).numpy()
    scale = np.sqrt(np.diag(C))
    assert (np.abs(X.mean(0) - features.mean) < 5 * scale / math.sqrt(n)).all()
    assert (np.abs(np.cov(X.T) - C) < 5 * np.outer(scale, scale) * math.sqrt(2 / n)).all()
    basis = features.to_eigenbasis(np.eye(3)).T
    assert np.allclose(basis * features.eigenvalues @ basis.T, C)


def test_responses_are_drawn_from_their_law():
    n, eta, generator = 20_000, torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64), torch.Generator().manual_seed(0)
    y = LOGISTIC.sample(eta.repeat_interleave(n), generator).reshape(3, n)
    assert set(y.unique().tolist()) == {-1.0, 1.0}
    chance = torch.sigmoid(eta)
    assert ((y.eq(1).double().mean(1) - chance).abs() < 5 * (chance * (1 - chance) / n).sqrt()).all()
    assert torch.equal(PHASE_RETRIEVAL.sample(eta, generator), eta**2)
    noisy = ContinuousResponse(torch.square, noise=0.5).sample(eta.repeat_interleave(n), generator).reshape(3, n)
    assert ((noisy.mean(1) - eta**2).abs() < 5 * 0.5 / math.sqrt(n)).all()
    assert ((noisy.std(1) - 0.5).abs() < 5 * 0.5 / math.sqrt(2 * n)).all()


def test_hessian_is_the_second_derivative_of_the_loss():
    """Of the mean loss of a sample in w, by torch's own Hessian, at the responses that the generator gives."""
    glm = GLM(p=4, w=[0.5, -1.0, 0.0, 2.0], w_star=[1.0, 1.0, 0.0, 0.0], response=LOGISTIC, loss=exponential_loss)
    X = glm.sample_features(50, torch.Generator().manual_seed(0))
    y = LOGISTIC.sample(X @ torch.from_numpy(glm.w_star), torch.Generator().manual_seed(1))
    exact = torch.autograd.functional.hessian(lambda w: exponential_loss(y, X @ w).mean(), torch.from_numpy(glm.w))
    assert torch.allclose(glm.hessian(X, torch.Generator().manual_seed(1)), exact, rtol=1e-12)


@pytest.mark.parametrize("rank", [0, 1, -1])
def test_eigenpair(rank):
    A = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values, vectors = np.linalg.eigh((A + A.T).numpy())
    value, vector = eigenpair(A + A.T, rank)
    assert value == pytest.approx(values[rank])
    assert squared_cosine(vector, 3 * vectors[:, rank]) == pytest.approx(1)
    assert squared_cosine(vector, vectors[:, 2]) == pytest.approx(0, abs=1e-20)


def test_eigenpairs_come_in_the_order_of_the_ranks():
    A = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values, vectors = np.linalg.eigh((A + A.T).numpy())
    for ranks in ([0, 1, -1], [-2, -1], [3, 0]):
        for rank, (value, vector) in zip(ranks, eigenpairs(A + A.T, ranks), strict=True):
            assert value == pytest.approx(values[rank])
            assert squared_cosine(vector, vectors[:, rank]) == pytest.approx(1)


@pytest.mark.parametrize("p", [4, 5])
def test_halves(p):
    assert np.linalg.norm(halves(p)) == pytest.approx(1)
    assert (halves(p) < 0).tolist() == [k < p // 2 for k in range(p)]


def model(**changes):
    return GLM(
        **{"p": 3, "w": [2.0, 0.0, 0.0], "w_star": [1.0, 1.0, 0.0], "response": LOGISTIC, "loss": logistic_loss}
        | changes
    )


def features():
    return model().sample_features(5, torch.Generator().manual_seed(0))


NAN, HALF = math.nan, torch.eye(3, dtype=torch.float64)[:2]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Features(p=0), "p must be a positive whole number, not 0"),
        (lambda: Features(p=True), "p must be a positive whole number, not True"),
        (lambda: Features(p=3.0), "p must be a positive whole number, not 3.0"),
        (lambda: Features(p="3"), "p must be a positive whole number, not '3'"),
        (
            lambda: Features(p=3, w=[1.0, 2.0]),
            r"w must be 3 finite numbers, in an array of shape \(3\), got shape \(2,\)",
        ),
        (
            lambda: Features(p=3, w_star=2.0),
            r"w_star must be 3 finite numbers, in an array of shape \(3\), got shape \(\)",
        ),
        (lambda: Features(p=3, w="abc"), "w must be 3 finite numbers, .*got 'abc'"),
        (lambda: Features(p=3, w=[1.0, 2.0, 3j]), "w must be 3 finite numbers"),
        (lambda: Features(p=3, mean=[1.0, 2.0, NAN]), "mean must be 3 finite numbers, .*got nan"),
        (lambda: Features(p=3, covariance=([1.0, 2.0], [0.5, 0.5])), "do not share out 3 places"),
        (lambda: Features(p=2, covariance=([1.0, 2.0], [1.5, -0.5])), "do not share out 2 places"),
        (lambda: Features(p=2, covariance=([1.0, 2.0], [0.5, 0.25])), "do not share out 2 places"),
        (lambda: Features(p=2, covariance=(1.0, 2.0)), r"eigenvalues of the covariance must be .* got shape \(\)"),
        (
            lambda: Features(p=3, covariance=(1.0, 2.0, 3.0)),
            r"as a pair must be \(eigenvalues, weights\), got 3 things",
        ),
        (lambda: Features(p=2, covariance=[]), r"eigenvalues of the covariance must be 2 .* got shape \(0,\)"),
        (lambda: Features(p=2, covariance=[1.0, -1.0]), "2 positive eigenvalues, .*; the smallest is -1"),
        (lambda: Features(p=2, covariance=[[1.0, 2.0], [2.0, 1.0]]), "2 positive eigenvalues, .*; the smallest is -1"),
        (lambda: Features(p=2, covariance=[[1.0, 1.0], [1.0, 1.0]]), "2 positive eigenvalues"),
        (lambda: Features(p=2, covariance=[[1.0, 0.5], [0.0, 1.0]]), "symmetric matrix of order 2"),
        (
            lambda: Features(p=2, covariance=[[1.0, NAN], [NAN, 1.0]]),
            "the covariance must be finite numbers, .*got nan",
        ),
        (lambda: Features(p=2, covariance=[[1.0, 0.5], [0.0]]), r"the covariance must be .* of shape \(2, 2\)"),
        (lambda: Features(p=2, covariance=np.eye(3)), r"the covariance must be .* got shape \(3, 3\)"),
        (lambda: model(kinks=(NAN,)), "the kinks must be finite numbers, .*got nan"),
        (lambda: model(loss=lambda h: h), "the loss must take tensors of one axis, and fails with them"),
        (lambda: model(loss=lambda y, h: (y - h).tolist()), "for 13 it gives a list"),
        (lambda: model(response=ContinuousResponse(lambda eta: eta.log())), r"finite; it is not at \(-"),
        (lambda: model(response=ContinuousResponse(lambda eta: 1.0)), "function of the response must be elementwise"),
        (lambda: ContinuousResponse(torch.square, noise=-1.0), "noise of the response is .* not negative, got -1"),
        (lambda: DiscreteResponse((), LOGISTIC.probability), r"values of the response must be .* got shape \(0,\)"),
        (lambda: model().hessian(features()[:, :2], torch.Generator()), r"X must be .* of shape \(n, 3\)"),
        (lambda: model().hessian(features()[:0], torch.Generator()), r"X must be .* n ≥ 1"),
        (
            lambda: model().hessian(features().long(), torch.Generator()),
            "X must be finite real numbers .* got torch.int64",
        ),
        (lambda: model().hessian(features() * NAN, torch.Generator()), "X must be finite real numbers"),
        (lambda: model().sample_features(0, torch.Generator()), "n must be a positive whole number, not 0"),
        (lambda: eigenpair(torch.eye(3), 3), "rank must be at most 2, got 3"),
        (lambda: eigenpair(torch.eye(3), -4), "rank must be a whole number from -3 up, not -4"),
        (lambda: eigenpair(torch.eye(3).roll(1, 0), 0), "H must be a symmetric matrix"),
        (lambda: eigenpair(HALF, 0), "H must be a symmetric matrix"),
        (lambda: squared_cosine(np.zeros(2), np.ones(2)), "a and b must not be zero"),
        (lambda: squared_cosine(np.ones(3), np.ones(2)), r"b must be 3 finite numbers, .* got shape \(2,\)"),
        (lambda: halves(0), "p must be a positive whole number, not 0"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


def test_whole_numbers_of_numpy_are_whole_numbers():
    p = np.int64(4)
    glm = GLM(p=p, w=halves(p), response=LOGISTIC, loss=logistic_loss)
    assert glm.p == 4
    assert type(glm.p) is int
    (H,) = glm.sample_hessians(np.int32(9), np.uint8(1), torch.Generator().manual_seed(0))
    assert eigenpair(H, np.int64(0))[0] == pytest.approx(float(np.linalg.eigvalsh(H)[0]))


# What a loss and a response must be -----------------------------------------------------------------------------------

CONTRACT = settings(max_examples=40, deadline=None, derandomize=True)
LOSSES = {
    "logistic": (logistic_loss, lambda y, h: torch.sigmoid(h) * torch.sigmoid(-h)),
    "phase retrieval": (phase_retrieval_loss, lambda y, h: 3 * h**2 - y),
    "square": (square_loss, lambda y, h: torch.ones_like(h)),
    "cosine": (lambda y, h: y * torch.cos(h), lambda y, h: -y * torch.cos(h)),
}
BREAKS = {
    "mean": (lambda value, h: value.mean(), "reduction='none'"),
    "sum": (lambda value, h: value.sum(), "reduction='none'"),
    "mean, kept as an axis": (lambda value, h: value.mean(0, keepdim=True), "elementwise"),
    "mean, spread out": (lambda value, h: value.mean().expand(len(value)), "its own entry only"),
    "divided by n": (lambda value, h: value / len(value), "its own entry only"),
    "of centred h": (lambda value, h: value + (h - h.mean()) ** 2, "its own entry only"),
    "sorted": (lambda value, h: value.sort().values + h.cumsum(0) ** 2, "its own entry only"),
    "noise": (lambda value, h: value + torch.rand(value.shape), "its own entry only"),
    "column": (lambda value, h: value[:, None], "elementwise"),
    "array": (lambda value, h: value.detach().numpy(), "gives a ndarray"),
    "number": (lambda value, h: 0.5, "gives a float"),
    "whole numbers": (lambda value, h: value.long(), "real and finite, not torch.int64"),
    "infinite": (lambda value, h: value / (h > h.max() - 1e-9).logical_not(), "finite; it is not at"),
    "not a number": (lambda value, h: value + (h - 1e9).sqrt(), "finite; it is not at"),
    "detached": (lambda value, h: value.detach(), "differentiate twice in h"),
    "in part detached": (lambda value, h: value + h.detach() * h, "differentiate twice in h: its values deny"),
}


@CONTRACT
@given(loss=st.sampled_from(sorted(LOSSES)), broken=st.sampled_from(sorted(BREAKS)), size=st.floats(0.1, 5))
def test_a_loss_that_is_not_elementwise_or_not_differentiable_is_refused(loss, broken, size):
    whole, (spoil, message) = LOSSES[loss][0], BREAKS[broken]
    assert model(w=[size, 0.0, 0.0], loss=whole).loss is whole
    with pytest.raises(ValueError, match=message) as refusal:
        model(w=[size, 0.0, 0.0], loss=lambda y, h: spoil(whole(y, h), h))
    assert "\n" not in str(refusal.value)


@CONTRACT
@given(loss=st.sampled_from(sorted(LOSSES)), factor=st.floats(-3, 3), seed=st.integers(0, 99))
def test_curvature_of_any_loss_is_its_second_derivative(loss, factor, seed):
    h = 3 * torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y, (value, exact) = h.sign(), LOSSES[loss]
    measured = curvature(lambda y, h: factor * value(y, h) + 2 * h, y, h)
    torch.testing.assert_close(measured, factor * exact(y, h))


def test_a_loss_that_cannot_be_differentiated_twice_is_refused():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            ctx.save_for_backward(h)
            return h**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, slope):
            return 2 * ctx.saved_tensors[0] * slope

    with pytest.raises(ValueError, match="torch can differentiate twice in h: its values deny"):
        model(loss=lambda y, h: Once.apply(h))


@CONTRACT
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
    slope=st.floats(-3, 3),
    broken=st.sampled_from(["", "scaled", "one left out", "negative", "not a number", "softmax over samples"]),
)
def test_probabilities_that_are_none_are_refused(weights, slope, broken):
    values = tuple(range(len(weights)))

    def probability(y, eta):
        logits = torch.stack([math.log(weight) + slope * k * eta for k, weight in enumerate(weights)])
        chance = logits.softmax(0)[y]
        if broken == "scaled":
            return chance * 0.99
        if broken == "one left out":
            return chance * (y != values[-1])
        if broken == "negative":
            return chance + (1 if y == 0 else -1) if len(values) > 1 else -chance
        if broken == "not a number":
            return chance * math.nan
        return logits[y].softmax(0) if broken == "softmax over samples" else chance

    response = DiscreteResponse(values, probability)
    if not broken:
        assert model(response=response).response is response
        return
    with pytest.raises(ValueError, match=r"probabilit(y|ies) of (a|the) response must be") as refusal:
        model(response=response)
    assert "\n" not in str(refusal.value)


def test_sampled_hessians_are_drawn_one_after_the_other():
    model = GLM(p=4, w=halves(4), response=LOGISTIC, loss=logistic_loss)
    generator = torch.Generator().manual_seed(0)
    hessians = list(model.sample_hessians(9, 3, generator))
    again = torch.Generator().manual_seed(0)
    for H in hessians:
        assert torch.equal(H, model.hessian(model.sample_features(9, again), again))
    assert not torch.equal(hessians[0], hessians[1])
