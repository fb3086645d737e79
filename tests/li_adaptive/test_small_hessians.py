"""Hessians of small random networks: diagonal blocks and symmetry, against closed forms."""

import numpy as np
import pytest
import torch

from common.hessian.spectral_measure import asymmetry
from common.li_adaptive.hinge_hessian import formed_hessian, margins
from common.li_adaptive.networks import initialize, perceptron
from common.li_adaptive.small_hessians import (
    FixedDropout,
    around_a_dead_layer,
    asymmetries,
    diagonal_share,
    goe_asymmetries,
    largest_diagonal_entry,
    layer_sizes,
    masked_convnet,
    negative_share,
    norm_bound,
    random_hessians,
    skewness,
)


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    return x, torch.sign(x[:, 0]), generator


def test_diagonal_blocks_vanish_and_two_layers_are_symmetric():
    x, y, generator = problem()
    H, sizes = random_hessians([4, 5], 3, x, y, generator)
    assert H.shape == (3, 25, 25) and sizes == [20, 5]
    assert (diagonal_share(H, sizes) == 0).all()
    assert (asymmetries(torch.linalg.eigvalsh(H).numpy()) < 1e-9).all()
    assert not torch.equal(H[0], H[1])
    standardized, sizes = random_hessians([4, 5], 3, x, y, generator, standardize=True)
    assert (diagonal_share(standardized, sizes) > 0.01).all()


def test_three_layers_are_not_symmetric():
    x, y, generator = problem()
    H, _ = random_hessians([4, 5, 5], 3, x, y, generator)
    eigenvalues = torch.linalg.eigvalsh(H).numpy()
    assert (asymmetries(eigenvalues) > 1e-3).all()
    cubes = torch.einsum("nij,njk,nki->n", H, H, H).numpy() / H.shape[1]
    np.testing.assert_allclose(skewness(eigenvalues), cubes / (eigenvalues**2).mean(1) ** 1.5, atol=1e-10)


def test_a_mask_and_pooling_do_not_change_that():
    generator = torch.Generator().manual_seed(1)
    network = masked_convnet(generator)
    H = formed_hessian(network, torch.randn(6, 1, 10, 10, generator=generator, dtype=torch.float64), torch.ones(6))
    sizes = layer_sizes(network)
    assert sum(sizes) == len(H)
    assert largest_diagonal_entry(H, sizes) == 0
    shifted = H + 2 * H.abs().max() * torch.eye(len(H))
    assert largest_diagonal_entry(shifted, sizes) == 1
    masked = FixedDropout()(torch.ones(2, 4))
    assert masked.tolist() == [[0, 2, 0, 2]] * 2


def test_statistics_of_known_spectra():
    eigenvalues = np.array([[-2.0, 0.0, 0.0, 1.0, 1.0], [-1.0, -1.0, 0.0, 1.0, 1.0]])
    np.testing.assert_allclose(skewness(eigenvalues), [-6 / 5 / (6 / 5) ** 1.5, 0])
    np.testing.assert_allclose(negative_share(eigenvalues), [1 / 3, 1 / 2])
    assert asymmetries(eigenvalues)[1] == 0
    assert asymmetries(eigenvalues)[0] == asymmetry(eigenvalues[0], np.full(5, 0.2)) > 0


def test_asymmetry_of_the_gaussian_ensemble_falls_with_its_dimension():
    rng = np.random.default_rng(0)
    few, many = (goe_asymmetries(N, 20, rng) for N in (10, 80))
    assert few.shape == (20,) and many.mean() < few.mean() / 3


def test_samples_beyond_their_margin_are_refused():
    x, y, generator = problem()
    with pytest.raises(ValueError, match="beyond its margin"):
        random_hessians([4, 5], 3, 1e3 * x, y, generator)


@pytest.mark.filterwarnings("error")
def test_zero_spectra_have_no_skewness_and_no_share():
    assert skewness(np.zeros((2, 3))).tolist() == [0, 0]
    assert np.isnan(negative_share(np.array([[0.0, 0.0], [-1.0, 0.0]]))[0])
    with pytest.raises(ValueError, match="floor must not be negative"):
        negative_share(np.ones((1, 2)), -1.0)


@pytest.mark.usefixtures("unchecked")
def test_samples_and_sizes_that_do_not_fit_are_refused():
    x, y, generator = problem()
    H = torch.ones(1, 4, 4)
    for call, message in (
        (lambda: diagonal_share(H, [1, 2]), r"add up to the dimension 4, got \[1, 2\]"),
        (lambda: largest_diagonal_entry(H[0], [3, 2]), "add up to the dimension 4"),
        (lambda: goe_asymmetries(0, 2, np.random.default_rng(0)), "dimension must be at least 1, got 0"),
        (lambda: random_hessians([4, 5], 0, x, y, generator), "number of networks must be at least 1"),
        (lambda: random_hessians([4, 5], 1, x, y[:, None], generator), "one label a sample"),
        (lambda: random_hessians([4, 5], 1, x, y * 0, generator), "must be ±1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    found, _ = random_hessians([4, 5], 1, x.float(), y.float(), generator)
    assert found.dtype == torch.float64


def test_samples_beyond_the_margin_are_taken_where_asked_for_and_add_nothing():
    x, y, _ = problem()
    shape, how = ([4, 5, 5], 3), {"scale": 2.0, "inside": False}
    seeds = [torch.Generator().manual_seed(4) for _ in range(2)]
    H, _ = random_hessians(*shape, 5 * x, y, seeds[0], **how)
    for k in range(3):
        network = perceptron(shape[0]).double()
        initialize(network, "fan-in", seeds[1], scale=2.0)
        active = margins(network, 5 * x, y) < 1
        assert 0 < active.sum() < len(y)  # some samples are beyond their margin, not all
        share = float(active.double().mean())
        torch.testing.assert_close(H[k], share * formed_hessian(network, 5 * x[active], y[active]))
    with pytest.raises(ValueError, match="beyond its margin"):
        random_hessians(*shape, 5 * x, y, torch.Generator().manual_seed(4), scale=2.0)


def test_a_dead_layer_is_a_local_minimum_of_risk_one():
    x, y, generator = problem()
    found = around_a_dead_layer([4, 16, 8], x, y, radius=1e-3, points=20, generator=generator)
    assert (found.risk == 1).all() and (found.gradient == 0).all() and found.hessian == 0
    wide = around_a_dead_layer([4, 16, 8], x, y, radius=1e-9, points=1, generator=generator)
    assert wide.risk.tolist() == [1] and wide.gradient.tolist() == [0]
    with pytest.raises(ValueError, match="two hidden layers"):
        around_a_dead_layer([4, 8], x, y, radius=1e-3, points=2, generator=generator)
    with pytest.raises(ValueError, match="no unit of the first layer"):
        around_a_dead_layer([4, 8, 8], x, y, radius=1e3, points=2, generator=generator)


def test_the_two_sides_of_theorem_1c_for_two_weights():
    # T = w₂ max(0, w₁ x): ∇²T = x (0 1; 1 0) for w₁ x > 0, so its norm is |x|
    network = perceptron([1, 1]).double()
    for layer, weight in ((network[0], 1.0), (network[2], 0.1)):
        layer.weight.data.fill_(weight)
    x = torch.tensor([[1.0], [2.0], [-3.0], [20.0]], dtype=torch.float64)
    y = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    found = norm_bound(network, x, y)  # the last sample is beyond its margin, the third has its unit off
    assert found.norm == pytest.approx(abs(-1 + 2) / 4) and found.largest == pytest.approx(20)
    assert found.signed == pytest.approx(-1 / 4) and found.modulus == pytest.approx(3 / 4)


def test_the_bound_holds_with_moduli_and_not_with_signs():
    x, y, generator = problem()
    x, y = torch.cat([x, -x]), torch.cat([y, -y])
    network = perceptron([4, 5, 5]).double()
    initialize(network, "fan-in", generator, scale=0.2)
    found = norm_bound(network, x, y)
    assert found.signed == 0 and found.norm > 0
    assert found.norm <= found.largest * found.modulus
