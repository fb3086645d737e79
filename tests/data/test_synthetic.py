"""Generated data: the recipes of Dong et al., Appendix B, and sizes that make no sense."""

import pytest
import torch

from common.data import synthetic


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_gaussian_features():
    x = synthetic.gaussian_features(4, 50_000, generator=generator(), dtype=torch.float64)
    assert x.shape == (50_000, 4) and x.dtype == torch.float64
    assert torch.allclose(x.mean(0), torch.zeros(4, dtype=torch.float64), atol=0.03)
    assert torch.allclose(x.T @ x / len(x), torch.eye(4, dtype=torch.float64), atol=0.03)
    a, b, c = (synthetic.gaussian_features(4, 10, generator=generator(seed)) for seed in (0, 0, 1))
    assert a.dtype == torch.float32 and torch.equal(a, b) and not torch.equal(a, c)


def test_labels():
    y = synthetic.random_labels(5, 50_000, generator=generator())
    assert y.dtype == torch.int64 and (y.bincount(minlength=5) - 10_000).abs().max() < 400
    assert synthetic.balanced_labels(3, 2).tolist() == [0, 0, 1, 1, 2, 2]


def test_gaussian_data_of_section_3():
    x, y, source = synthetic.gaussian_data(500, 10, 500, generator=generator(7))
    assert x.shape == (5000, 500) and (y.bincount() == 10).all() and len(y.bincount()) == 500
    assert source.name == "standard Gaussian features, random labels, N=5000, d=500, C=500"
    assert (source.origin, source.sha256, source.samples, source.stand_in) == ("generated, seed 7", None, 5000, False)


@pytest.mark.parametrize(
    ("n_total", "C", "K", "true_K", "N"),
    [
        (5000, 2, 2, 2, 5000),
        (5000, 2, 250, 250, 5000),
        (5000, 500, 750, 500, 3000),
        (5000, 500, 1250, 1000, 4000),
        (7, 1, 1, 1, 7),
    ],
)
def test_cluster_recipe(n_total, C, K, true_K, N):
    """Counts, labels, unit centres and noise; "K=750" of Figure 11 has 500 clusters."""
    d = 64
    x, y, n_clusters, source = synthetic.clusters(n_total, C, K, d, generator=generator())
    assert (n_clusters, x.shape, source.samples) == (true_K, (N, d), N)
    assert y.bincount(minlength=C).tolist() == [N // C] * C
    centres = synthetic.clusters(n_total, C, K, d, generator=generator(), noise=0.0).x
    assert torch.allclose(centres.norm(dim=1), torch.ones(N))
    distinct, counts = centres.unique(dim=0, return_counts=True)
    assert len(distinct) == true_K and (counts == n_total // K).all()
    assert (x - centres).std() == pytest.approx(0.05, rel=0.1)
    label = {tuple(c): int(v) for c, v in zip(centres.tolist(), y, strict=True)}
    assert [label[tuple(c)] for c in centres.tolist()] == y.tolist()  # no cluster has two classes


def test_cluster_centres_are_uniform_on_the_sphere():
    centres = synthetic.clusters(20_000, 1, 20_000, 3, generator=generator(), noise=0.0, dtype=torch.float64).x
    assert centres.mean(0).abs().max() < 0.02
    height = centres[:, 0].abs().sort().values[::2000]  # uniform on [0, 1], as Archimedes knew
    assert torch.allclose(height, torch.arange(0, 1, 0.1, dtype=torch.float64), atol=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: synthetic.clusters(100, 5, 4, 3, generator=g), "more classes than clusters: 5 classes need"),
        (lambda g: synthetic.clusters(10, 2, 100, 64, generator=g), "no sample for a cluster: 10 samples are fewer"),
        (lambda g: synthetic.clusters(10, 0, 1, 3, generator=g), "n_classes must be a positive whole number, not 0"),
        (lambda g: synthetic.clusters(10, 1, 1, 3, generator=g, noise=-1.0), "noise is a standard deviation"),
        (lambda g: synthetic.gaussian_data(0, 10, 3, generator=g), "C must be a positive whole number, not 0"),
        (lambda g: synthetic._require_positive(N=2.5), "N must be a positive whole number, not 2.5"),
        (lambda g: synthetic.random_labels(True, 5, generator=g), "C must be a positive whole number, not True"),
    ],
)
def test_bad_sizes(call, message):
    with pytest.raises(ValueError, match=message):
        call(generator())
