"""Weights, samples and labels of any type, shape and size: the right number, or one line that names what is wrong."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.dong_quantifying import block_norms
from common.dong_quantifying.block_norms import HiddenMoments, SampledValue, hidden_moments, sampled_linear_moments
from common.dong_quantifying.block_norms_sampled import hidden_block_norms, linear_block_norms, mask_limits
from common.dong_quantifying.cross_layer import structure
from common.dong_quantifying.full_batch import gradient_descent
from common.hessian.neuron_blocks import neuron_block_norms

DTYPES = (torch.float32, torch.float64)


def dense(X, y, weights, loss):
    """The whole Hessian in double precision, by autograd, and the sizes of the layers."""
    sizes = [W.numel() for W in weights]

    def at(theta):
        h = X
        for W, part in zip(weights, theta.split(sizes), strict=True):
            h, z = (h @ part.view_as(W).T).relu(), h @ part.view_as(W).T
        if loss == "CE":
            return torch.nn.functional.cross_entropy(z, y)
        return (z - torch.nn.functional.one_hot(y, z.shape[1])).square().sum(1).mean()

    return torch.autograd.functional.hessian(at, torch.cat([W.flatten() for W in weights])), sizes


def problem(draw):
    """Samples, labels and weights of any type, a loss, and the same in double precision."""
    N, d, m, C = draw.choice([1, 2, 5]), draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 4)
    generator = torch.Generator().manual_seed(draw.randint(0, 2**30))

    def normal(*shape):
        found = torch.randn(*shape, generator=generator, dtype=torch.float64).to(draw.choice(DTYPES))
        if draw.random() < 0.3:
            found = found.mT.contiguous().mT
        return found.requires_grad_(draw.random() < 0.2)

    X, W, V = normal(N, d), normal(m, d), normal(C, m)
    with torch.no_grad():
        V *= draw.choice([0, 1, 1, 30])  # sure, or without a clue
        W *= draw.choice([1, 1, 1, 0])  # dead
    y = torch.randint(C, (N,), generator=generator)
    if draw.random() < 0.3:
        y = (X.double() @ W.double().T).relu().mm(V.double().T).argmax(1)
    exact = [part.detach().double() for part in (X, W, V)]
    y = y.to(draw.choice([torch.int64, torch.int32, torch.uint8]))
    return X, y, W, V, draw.choice(["CE", "MSE"]), exact


def check(draw):
    X, y, W, V, loss, exact = problem(draw)
    given = [part.clone() for part in (X, y, W, V)]
    H, (first, _) = dense(exact[0], y.long(), exact[1:], loss)
    m, C, d = len(W), len(V), X.shape[1]
    blocks = H[:first, :first].reshape(m, d, m, d).square().sum((1, 3)), H[first:, first:].reshape(C, m, C, m)
    norms = blocks[0], blocks[1].square().sum((1, 3))
    cross = H[:first, first:].square().sum()
    found = structure(X, y, W, V, loss)

    def close(value, expected, scale):
        assert value == pytest.approx(float(expected), rel=2e-4, abs=1e-12 * float(scale) + 1e-22)

    close(found.cross, cross, cross)
    for part, ratio, squares in (("ww", found.ratio_ww, norms[0]), ("vv", found.ratio_vv, norms[1])):
        close(getattr(found, part), squares.sum(), squares.sum())
        k, diagonal = len(squares), squares.trace()
        if k == 1 or not squares.any():
            assert math.isnan(ratio)
        elif diagonal > 1e-20:
            close(ratio, (squares.sum() - diagonal) / diagonal / (k - 1), 1)
    weights = [W, V]
    for layer, squares in enumerate(norms):
        some = neuron_block_norms(weights, X, loss, layer, 2)
        expected = squares[: len(some), : len(some)]
        torch.testing.assert_close(some.double(), expected, rtol=5e-4, atol=1e-9 * float(expected.max()) + 1e-22)
    assert all(torch.equal(a, b) for a, b in zip(given, (X, y, W, V), strict=True))


@pytest.mark.usefixtures("unchecked")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_norms_of_blocks_are_those_of_autograd(seed):
    check(random.Random(seed))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("loss", ["CE", "MSE"])
def test_one_neuron_one_class_and_dead_units_have_no_ratio(loss):
    X, y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(5, dtype=torch.long)
    one = structure(X, y, X[:1], torch.ones(2, 1), loss)
    H = dense(X.double(), y, [X[:1].double(), torch.ones(2, 1).double()], loss)[0]
    assert math.isnan(one.ratio_ww) and one.ww == pytest.approx(float(H[:3, :3].square().sum()), rel=1e-5, abs=1e-12)
    alone = structure(X, y, X[:2], torch.ones(1, 2), loss)
    assert math.isnan(alone.ratio_vv) and math.isfinite(alone.vv)
    dead = structure(X, y, torch.zeros(2, 3), torch.ones(2, 2), loss)
    assert math.isnan(dead.ratio_ww) and math.isnan(dead.ratio_vv) and dead.ww == dead.vv == 0


def test_a_network_that_is_sure_of_all_answers_has_the_residual_that_is_left():
    X = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    W, V = torch.eye(3), 90 * torch.eye(3)
    X = X.abs() + 2 * torch.eye(3).repeat(3, 1)
    y = X.argmax(1)
    few, many = structure(X, y, W, V, "CE"), structure(X.double(), y, W.double(), V.double(), "CE")
    assert 0 < many.residual < 1e-6
    assert few.residual == pytest.approx(many.residual, rel=1e-4)
    assert few.first_term == pytest.approx(many.first_term, rel=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_limits_do_not_overflow_and_have_no_negative_widths():
    m = np.int64(200)
    assert block_norms.h_ij_limit_printed(0.1, m) == block_norms.h_ij_limit_printed(0.1, 200) > 0
    assert 0 < block_norms.h_ij_limit(0.1, 10**6) < block_norms.h_ij_limit(0.1, 10**5)
    counts = [2, 100_000]
    found = [
        next(linear_block_norms(3, 4, some, 1, torch.Generator().manual_seed(0)))
        for some in (counts, np.array(counts, dtype=np.int32))
    ]
    assert torch.equal(*found)
    for limit in ("h_ii_limit", "h_ij_limit"):
        with pytest.raises(ValueError, match="m must be at least 1, got -5"):
            getattr(block_norms, limit)(0.1, -5)
    for limit in ("q_ii_limit", "q_ij_limit", "q_ii_limit_printed", "q_ij_limit_printed"):
        for m in (0, -5):
            with pytest.raises(ValueError, match=f"m must be at least 1, got {m}"):
                getattr(block_norms, limit)(m)
    with pytest.raises(ValueError, match="m must be at least 1, got 0"):
        block_norms.u_ii(0.1, 3, 0)
    with pytest.raises(ValueError, match="C must be at least 1, got -2"):
        block_norms.u_ij(0.1, -2, 3)


@pytest.mark.usefixtures("unchecked")
def test_samples_of_nothing_are_refused():
    generator = torch.Generator().manual_seed(0)
    for call, message in (
        (lambda: sampled_linear_moments(3, 0, generator), "draws must be at least 2, got 0"),
        (lambda: hidden_moments(3, 2, 0, 5, generator), "draws must be at least 1, got 0"),
        (lambda: SampledValue.of(torch.ones(1)), "at least 2 independent samples, got 1"),
        (lambda: HiddenMoments(*torch.ones(10, 1)).h_ii(0.1), "at least 2 independent samples, got 1"),
        (lambda: next(linear_block_norms(0, 4, [2], 1, generator)), "d must be at least 1, got 0"),
        (lambda: next(linear_block_norms(3, 0, [2], 1, generator)), "N must be at least 1, got 0"),
        (lambda: next(hidden_block_norms(3, 4, 2, [2], 0, generator)), "realizations must be at least 1, got 0"),
        (lambda: mask_limits(0.01, 2, (4, 8), 2, generator), "d must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert SampledValue(1.0, 0.0).deviation(2.0) == math.inf and SampledValue(1.0, 0.0).deviation(1.0) == 0


def test_a_loss_may_leave_a_parameter_out_and_gradients_may_be_off():
    with torch.no_grad():
        x, y = gradient_descent(lambda x, y: x**2 / 2, [torch.tensor(1.0), torch.tensor(3.0)], steps=3, lr=0.5)
    assert (float(x), float(y)) == (0.125, 3)
