"""Small random networks, samples and posteriors, in double precision, for the tests of the bounds."""

import itertools

import pytest
import torch

from common.wu_dissecting.pac_bayes.posterior import Posteriors


def _layers(seed, widths=(7, 5, 4, 3)):
    generator = torch.Generator().manual_seed(seed)
    sizes = itertools.pairwise(widths)
    return [0.5 * torch.randn(m, n + 1, generator=generator, dtype=torch.float64) for n, m in sizes]


def _samples(N, seed=0, n=7, classes=3):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(N, n, generator=generator, dtype=torch.float64)
    return X, X[:, :classes].argmax(1)


def _orthogonal(size, generator):
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def _posteriors(E, mixed, seed=0):
    q = Posteriors.start(_layers(seed), _layers(seed + 1), E, mixed=mixed)
    generator = torch.Generator().manual_seed(seed)
    for e in range(E):
        for layer, mean in enumerate(q.mean):
            m, n = mean.shape[1], mean.shape[2] - 1
            q.change_basis(e, layer, _orthogonal(m, generator), _orthogonal(n, generator))
    q.half_log_prior = torch.linspace(-2, -1.3, E, dtype=torch.float64)
    for part in (part for pair in q.mixing for part in pair):
        part += 0.2 * torch.randn(part.shape, generator=generator, dtype=torch.float64).tril(-1)
    return q


@pytest.fixture
def random_layers():
    """Weights of a network: of a seed, and of widths if others are wanted than 7, 5, 4, 3."""
    return _layers


@pytest.fixture
def samples():
    """Normal features and the labels that are their largest."""
    return _samples


@pytest.fixture
def orthogonal():
    """An orthogonal matrix of a size, from a generator."""
    return _orthogonal


@pytest.fixture
def random_posteriors():
    """E posteriors around one network, in random bases, with ϱ that differ."""
    return _posteriors
