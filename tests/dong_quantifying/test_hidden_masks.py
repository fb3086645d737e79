"""Masks of two neurons: closed forms against simulated networks, with error bars, and against limits."""

import math

import pytest
import torch

from common.dong_quantifying.block_norms import SampledValue
from common.dong_quantifying.hidden_masks import MaskNorms, block_ratio, mask_norms, shared_activity_variance
from common.dong_quantifying.networks import lecun_weights
from common.hessian.hidden_layer import HiddenLayerHessian


def samples(N=40, d=5):
    """Neither isotropic nor centred."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, d, generator=generator) * torch.arange(1, d + 1) + 0.5


def simulated(X, C, loss, draws, scale=1.0):
    """Mean squared norms of the blocks of H_ww over networks, off and on the diagonal; float64 samples."""
    m, rows = 4, []
    y = torch.zeros(len(X), dtype=torch.int64)
    for k in range(draws):
        W, V = lecun_weights([X.shape[1], m, C], torch.Generator().manual_seed(k))
        norms = HiddenLayerHessian(scale * X, W, V, y, loss).mean_squared_norms("ww")
        rows.append([norms.off_diagonal, norms.diagonal])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("loss", ["MSE", "CE"])
@pytest.mark.parametrize("C", [2, 5])
def test_block_ratio_is_that_of_simulated_networks(loss, C):
    X = samples()
    scale = 1.0 if loss == "MSE" else 1e-3  # the logits are small: p = 1/C
    off, diagonal = simulated(X, C, loss, 1500, scale).T
    ratio = block_ratio([mask_norms(X)], C, loss)
    gap = SampledValue.of(off - ratio * diagonal)  # of mean 0
    assert abs(gap.deviation(0.0)) < 4.5
    assert gap.error < 0.07 * off.mean()


def test_over_draws_of_the_samples_both_norms_are_averaged_before_their_ratio():
    few, many = MaskNorms(3.0, 1.0), MaskNorms(1.0, 0.5)
    assert block_ratio([few, many], 2, "MSE") == pytest.approx(1.5 / 4 / 4)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        block_ratio([], 2, "MSE")


def test_mask_norms_are_those_of_simulated_masks():
    X = samples().double()
    generator = torch.Generator().manual_seed(1)
    active = (X @ torch.randn(5, 4000, 2, generator=generator, dtype=torch.float64).reshape(5, -1) > 0).double()
    i, j = active.reshape(len(X), 4000, 2).unbind(2)
    K2 = (X @ X.T) ** 2 / len(X) ** 2
    for expected, a in zip(mask_norms(X), (i, i * j), strict=True):
        found = SampledValue.of(((K2 @ a) * a).sum(0))
        assert abs(found.deviation(expected)) < 4.5
        assert found.error < 0.03 * expected


def test_isotropic_samples_have_the_limits_of_the_paper():
    N = d = 1500
    X = torch.randn(N, d, generator=torch.Generator().manual_seed(2))
    ii, ij = mask_norms(X)
    assert ii / d == pytest.approx(3 / 4, rel=0.01)  # (1 + 2γ)/4 and (1 + 4γ)/16 of (100), (101)
    assert ij / d == pytest.approx(5 / 16, rel=0.01)


@pytest.mark.parametrize(("d", "N"), [(2, 10), (3, 30), (20, 20)])
def test_variance_of_the_number_of_shared_samples(d, N):
    generator = torch.Generator().manual_seed(d)
    X, W = torch.randn(4000, N, d, generator=generator), torch.randn(4000, d, 2, generator=generator)
    count = (X @ W > 0).all(2).sum(1).double()
    squares = SampledValue.of((count - N / 4) ** 2 / (3 * N / 16))
    assert abs(squares.deviation(shared_activity_variance(d, N))) < 4.5
    assert squares.error < 0.06


def test_variance_of_the_number_of_shared_samples_in_its_limit():
    for gamma in (0.5, 1.0, 3.0):
        expected = 1 + 4 / (3 * math.pi**2 * gamma)
        assert shared_activity_variance(round(2000 * gamma), 2000) == pytest.approx(expected, rel=2e-3)
    assert shared_activity_variance(2, 7) == pytest.approx(1 + 16 / 3 * 6 / 48, rel=1e-9)  # θ uniform: Var q = 1/48


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mask_norms(torch.zeros(2, 3)), "no angle"),
        (lambda: block_ratio([mask_norms(samples())], 1, "CE"), "C must be at least 2"),
        (lambda: block_ratio([mask_norms(samples())], 2, "hinge"), "'CE' or 'MSE'"),
        (lambda: shared_activity_variance(1, 5), "d must be at least 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
