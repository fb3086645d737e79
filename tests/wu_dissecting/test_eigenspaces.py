"""Subspaces of Wu et al. and the eigenpairs of their App C against dense linear algebra."""

import numpy as np
import pytest
import torch

from common.hessian.layer import LayerHessian, layer_hessian
from common.wu_dissecting.eigenspaces import (
    correspondence,
    dominance_of_mean,
    each_pair,
    linear_range,
    matricized,
    nested_overlaps,
    overlap,
    overlap_of_uncorrelated,
    pairwise_overlaps,
    peaks,
    pseudovalues,
    rank_one_share,
    ratio_pseudovalues,
)  # fmt: skip
from common.wu_dissecting.networks import classifier
from common.wu_dissecting.output_hessian import gauss_newton_forms, output_approximation


def test_overlaps():
    generator = torch.Generator().manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(12, 5, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    assert overlap(U, U @ rotation) == pytest.approx(1)
    angles = torch.linalg.svdvals(U.T @ V)
    assert overlap(U, V) == pytest.approx(float(angles.square().mean()))
    nested = nested_overlaps(U, V)
    assert nested.tolist() == pytest.approx([overlap(U[:, :k], V[:, :k]) for k in range(1, 6)])


@pytest.mark.usefixtures("unchecked")
def test_bases_of_unequal_shape_are_refused():
    with pytest.raises(ValueError, match="equal shape"):
        overlap(torch.eye(4), torch.eye(4)[:, :3])


def test_pairs_of_models_and_their_jackknife():
    bases = [torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64)).Q for _ in range(4)]
    pairs = pairwise_overlaps(bases)
    assert pairs[1, 3].tolist() == pytest.approx(nested_overlaps(bases[1], bases[3]).tolist())
    every = np.array([pairs[i, j] for i in range(4) for j in range(i)])
    values = pseudovalues(pairs)
    np.testing.assert_allclose(values.mean(0), every.mean(0))
    without_first = np.array([pairs[i, j] for i in range(1, 4) for j in range(1, i)]).mean(0)
    np.testing.assert_allclose(values[0], 4 * every.mean(0) - 3 * without_first)
    with pytest.raises(ValueError, match="at least 3"):
        pseudovalues(pairs[:2, :2])


def test_up_to_the_linear_range_kronecker_takes_one_direction_of_the_inputs():
    generator = torch.Generator().manual_seed(1)
    X, B = torch.randn(2, 50, 6, generator=generator) + 1.5, torch.randn(2, 50, 5, 2, generator=generator)
    layers = [LayerHessian(x, b) for x, b in zip(X.double(), B.double(), strict=True)]
    tau, gamma = (torch.stack([getattr(H, side)[0] for H in layers]) for side in ("output_basis", "input_basis"))
    found = linear_range(tau, gamma)
    for H, k0 in zip(layers, found.tolist(), strict=True):
        assert 1 < k0 <= 5
        inputs = H.kronecker_places(k0 + 1)[2]
        assert (inputs[:k0] == 0).all() and (inputs[k0] > 0 or k0 == 5)
    few = torch.tensor([[5.0, 4.0, 1.0]]), torch.tensor([[3.0, 2.0]])  # 15, 12, 3 beside 10
    assert linear_range(*few).tolist() == linear_range(*(part.numpy() for part in few)).tolist() == [2]


def test_each_pair_of_models_counts_once():
    pairs = np.arange(27.0).reshape(3, 3, 3)
    assert each_pair(pairs).tolist() == [pairs[0, 1].tolist(), pairs[0, 2].tolist(), pairs[1, 2].tolist()]


def test_peaks_with_each_model_left_out():
    pairs = np.full((3, 3, 4), np.nan)
    for (i, j), values in {(0, 1): [0, 1, 9, 0], (0, 2): [0, 2, 0, 0], (1, 2): [5, 7, 0, 0]}.items():
        pairs[i, j] = pairs[j, i] = values
    assert peaks(pairs) == [2, 2, 2, 3]  # the sums are 5, 10, 9, 0; without model 2 pair (0, 1) is left
    with pytest.raises(ValueError, match="at least 3"):
        peaks(pairs[:2, :2])


def test_a_product_of_two_vectors_has_rank_one_and_corresponds_to_both():
    U, V = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (3, 5))
    h = torch.stack([torch.kron(U[:, 1], V[:, 4]), torch.kron(U[:, 0], V[:, 2])], 1)
    torch.testing.assert_close(matricized(h, 3)[0], U[:, 1, None] * V[:, 4])
    torch.testing.assert_close(rank_one_share(h, 3), torch.ones(2, dtype=torch.float64))
    with_inputs, with_outputs = correspondence(h, U, V)
    for found, places in ((with_inputs, (4, 2)), (with_outputs, (1, 0))):
        expected = torch.zeros(len(found), 2, dtype=torch.float64)
        expected[list(places), [0, 1]] = 1
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_the_approximation_of_eigenpairs_has_the_equations_of_appendix_c():
    # equal inputs: every layer's input is its mean, so that the approximation is exact for the first term of (251)
    generator = torch.Generator().manual_seed(0)
    network = classifier("F-4", (5, 1, 1), 3).double()
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    X = torch.randn(1, 5, 1, 1, generator=generator, dtype=torch.float64).repeat(7, 1, 1, 1)
    layers = [layer_hessian(network, name, X) for name in ("fc1", "fc2")]
    F = torch.cat([
        part.flatten(1, -2) for layer in layers
        for part in (torch.einsum("zmr,zn->zmnr", layer.B, layer.X), layer.B[:, :, None])
    ], 1)  # fmt: skip
    first_term = torch.einsum("zpr,zqr->pq", F, F) / len(X)
    V = torch.randn(len(first_term), 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(gauss_newton_forms(layers, V), (V * (first_term @ V)).sum(0))
    found = output_approximation(layers, 2)
    values, vectors = torch.linalg.eigh(first_term)
    # σ‖w‖² are the diagonal of a product that the w_i do not diagonalize: sums agree, and the space does
    assert float(found.values.sum()) == pytest.approx(float(values[-2:].sum()))
    assert overlap(found.basis, vectors[:, -2:]) == pytest.approx(1)


def test_a_mean_dominates_the_autocorrelation_by_its_size():
    generator = torch.Generator().manual_seed(0)
    N, n = 4000, 6
    noise, B = torch.randn(N, n, generator=generator), torch.randn(N, 2, 2, generator=generator)
    mean = torch.tensor([0.0, 3.0, 0.0, -4.0, 0.0, 0.0])
    dot, ratio = dominance_of_mean(LayerHessian(noise + mean, B))
    assert dot == pytest.approx(1, abs=0.01)
    assert ratio == pytest.approx(1 + 25, rel=0.15)  # |mean|^2 + 1 beside 1
    dot, ratio = dominance_of_mean(LayerHessian(noise - noise.mean(0) + 0.001 * mean, B))
    assert dot < 0.9
    assert 1 <= ratio < 1.2


def test_a_ratio_of_means_over_pairs_with_the_error_of_its_denominator():
    rng = np.random.default_rng(3)

    def pairs_of(level, models=6):
        a = rng.normal(size=models)
        pairs = level + 0.1 * (a[:, None] + a[None])  # what two models have in common is in both of their pairs
        return np.where(np.eye(models, dtype=bool), np.nan, pairs)

    one, constant = pairs_of(2.0), np.where(np.eye(6, dtype=bool), np.nan, 4.0)
    np.testing.assert_allclose(ratio_pseudovalues(one, constant), pseudovalues(one) / 4)
    np.testing.assert_allclose(ratio_pseudovalues(3 * one, one), 3.0)
    both = np.stack([one, constant], 2)
    np.testing.assert_allclose(ratio_pseudovalues(both, constant[:, :, None])[:, 0], pseudovalues(one) / 4)
    without = [np.nanmean(np.delete(np.delete(one, i, 0), i, 1)) for i in range(6)]
    np.testing.assert_allclose(pseudovalues(both)[:, 0], 6 * np.nanmean(one) - 5 * np.array(without))
    covered, naive = 0, 0
    for _ in range(300):
        above, below = pairs_of(2.0), pairs_of(1.0)
        for values, count in ((ratio_pseudovalues(above, below), 0), (pseudovalues(above) / np.nanmean(below), 1)):
            half = 2.571 * values.std(ddof=1) / 6**0.5
            inside = abs(values.mean() - 2) < half
            covered, naive = covered + (not count and inside), naive + (count and inside)
    assert covered / 300 > 0.88 > naive / 300
    with pytest.raises(ValueError, match="at least 3"):
        ratio_pseudovalues(np.ones((2, 2)), np.ones((2, 2)))


def test_spaces_that_are_partly_along_one_input_overlap_by_the_product_of_their_shares():
    """Simulated: (A ⊗ t₁, rest) with random A, against the law with the shares that (265) measures."""
    m, n, k, rng = 12, 30, 5, np.random.default_rng(4)
    t = np.linalg.qr(rng.normal(size=(n, 2)) + 1)[0]
    firsts = [t[:, 0], 0.8 * t[:, 0] + 0.6 * t[:, 1]]
    shares, found = (0.9, 0.6), []
    for _ in range(400):
        spaces, measured = [], []
        for first, share_of, place in zip(firsts, shares, (0, 1), strict=True):
            A, B = (np.linalg.qr(rng.normal(size=(m, k)))[0] for _ in range(2))
            others = np.linalg.svd(np.array(firsts), full_matrices=True)[2][2 + place]  # of neither first vector
            h = share_of**0.5 * np.kron(A, first[:, None]) + (1 - share_of) ** 0.5 * np.kron(B, others[:, None])
            spaces.append(torch.from_numpy(h))
            on_first = torch.from_numpy(first[:, None].copy())
            measured.append(float(correspondence(spaces[-1], torch.eye(m).double(), on_first)[0].mean()))
        assert measured == pytest.approx(shares)
        found.append(overlap(*spaces))
    law = overlap_of_uncorrelated(np.array([[1, 0.64], [0.64, 1]]), np.array(shares), k, m)[0, 1]
    assert abs(np.mean(found) - law) < 4 * np.std(found) / 20
    assert np.std(found) / 20 < 0.02 * law
