"""LeCun initialization."""

import pytest
import torch

from common.dong_quantifying.networks import lecun_weights


def test_weights_have_variance_one_over_fan_in():
    weights = lecun_weights([400, 100, 900], torch.Generator().manual_seed(0))
    assert [tuple(w.shape) for w in weights] == [(100, 400), (900, 100)]
    for w in weights:  # the relative error of a variance is sqrt(2/n)
        assert w.var().item() * w.shape[1] == pytest.approx(1, abs=4.5 * (2 / w.numel()) ** 0.5)
        assert abs(w.mean().item()) < 4.5 * (w.shape[1] * w.numel()) ** -0.5


@pytest.mark.parametrize("widths", [[3], [3, 0]])
def test_too_few_widths_are_refused(widths):
    with pytest.raises(ValueError, match="at least two widths"):
        lecun_weights(widths, torch.Generator())
