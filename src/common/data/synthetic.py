"""Generated data: Gaussian features, labels independent of them, and the K-cluster data of Dong et al."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.data import DataSource


class LabelledData(NamedTuple):
    """Inputs with their labels and the note that says where they came from.

    Attributes
    ----------
    x
        Inputs, the first axis over samples.
    y
        Labels, int64, counted from 0.
    source
        For the record.
    """

    x: Float[Tensor, "N ..."]
    y: Int[Tensor, " N"]
    source: DataSource


class ClusteredData(NamedTuple):
    """K-cluster data, see :func:`clusters`.

    Attributes
    ----------
    x
        Features (N, d), sorted by cluster.
    y
        Labels (N,), int64, counted from 0.
    n_clusters
        The number of clusters that the data have.
    source
        For the record.
    """

    x: Float[Tensor, "N d"]
    y: Int[Tensor, " N"]
    n_clusters: int
    source: DataSource


def _require_positive(**sizes: object) -> None:
    """Refuse, by name, a size that is not a positive whole number."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive whole number, not {value!r}")


def generated(what: str, samples: int, generator: torch.Generator) -> DataSource:
    """Note for the record on ``samples`` generated data, such as ``what="standard Gaussian features"``."""
    origin = f"generated, seed {generator.initial_seed()}"
    return DataSource(name=what, origin=origin, sha256=None, samples=samples)


def gaussian_features(
    d: int, N: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "N d"]:
    """Features x_n ~ N(0, I_d), independent (Assumption 1 of Dong et al.).

    Parameters
    ----------
    d, N
        Dimension and number of the samples.
    generator
        Source of randomness; the features lie on its device.
    dtype
        Floating-point type of the features.

    Returns
    -------
    Tensor
        One sample a row, (N, d).

    Raises
    ------
    ValueError
        If a size is not a positive whole number.
    """
    _require_positive(d=d, N=N)
    return torch.randn(N, d, generator=generator, dtype=dtype, device=generator.device)


def random_labels(C: int, N: int, *, generator: torch.Generator) -> Int[Tensor, " N"]:
    """Labels uniform on 0, …, C − 1 and independent of everything.

    Parameters
    ----------
    C, N
        Number of classes and of labels.
    generator
        Source of randomness; the labels lie on its device.

    Returns
    -------
    Tensor
        Labels (N,), int64.

    Raises
    ------
    ValueError
        If a size is not a positive whole number.
    """
    _require_positive(C=C, N=N)
    return torch.randint(C, (N,), generator=generator, device=generator.device)


def balanced_labels(C: int, n_samples_per_class: int, *, device: torch.device | str = "cpu") -> Int[Tensor, " N"]:
    """Labels 0, …, 0, 1, …, 1, …, C − 1, each ``n_samples_per_class`` times; N = C · n_samples_per_class.

    Parameters
    ----------
    C, n_samples_per_class
        Number of classes and of samples in each.
    device
        Where the labels lie.

    Returns
    -------
    Tensor
        Labels (N,), int64, sorted.

    Raises
    ------
    ValueError
        If a size is not a positive whole number.
    """
    _require_positive(C=C, n_samples_per_class=n_samples_per_class)
    return torch.arange(C, device=device).repeat_interleave(n_samples_per_class)


def gaussian_data(
    C: int, n_samples_per_class: int, d: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> LabelledData:
    """Gaussian features with labels that say nothing of them (Dong et al., Appendix B.3).

    Every class has ``n_samples_per_class`` samples, all from the same N(0, I_d): the labels are random
    although they stand in order. Section 3.1 uses d = C = 500 and 10 samples a class.

    Parameters
    ----------
    C, n_samples_per_class, d
        Number of classes, of samples in each, and dimension.
    generator
        Source of randomness; the data lie on its device.
    dtype
        Floating-point type of the features.

    Returns
    -------
    LabelledData
        Features (N, d) and labels (N,), N = C · n_samples_per_class.

    Raises
    ------
    ValueError
        If a size is not a positive whole number.
    """
    _require_positive(C=C, n_samples_per_class=n_samples_per_class, d=d)
    N = C * n_samples_per_class
    x = gaussian_features(d, N, generator=generator, dtype=dtype)
    y = balanced_labels(C, n_samples_per_class, device=generator.device)
    what = f"standard Gaussian features, random labels, N={N}, d={d}, C={C}"
    return LabelledData(x, y, generated(what, N, generator))


def clusters(
    n_total: int, n_classes: int, n_clusters: int, d: int, *, generator: torch.Generator, noise: float = 0.05,
    exact: bool = False, dtype: torch.dtype = torch.float32,
) -> ClusteredData:  # fmt: skip
    """K-cluster data (Dong et al., Appendix B.2).

    Each of the C = ``n_classes`` classes has ⌊K/C⌋ clusters of ⌊n_total/K⌋ samples, K = ``n_clusters``.
    The clusters' centres are uniform on the unit sphere of R^d; a sample is its centre plus
    N(0, noise² I_d). Unless C divides K there are fewer clusters than K, and unless K divides
    ``n_total`` fewer samples: the result says how many.

    Parameters
    ----------
    n_total, n_classes, n_clusters, d
        Nominal number of samples, number of classes, nominal number of clusters, dimension.
    generator
        Source of randomness; the data lie on its device.
    noise
        Standard deviation of each coordinate about the centre.
    exact
        Make all K clusters, some classes getting ⌊K/C⌋ and others one more, where the paper's recipe drops the rest.
    dtype
        Floating-point type of the features.

    Returns
    -------
    ClusteredData
        Features (N, d), labels (N,) and the true number of clusters, C · ⌊K/C⌋ unless ``exact``; N is
        that number times ⌊n_total/K⌋.

    Raises
    ------
    ValueError
        If a size is not a positive whole number, if there are more classes than clusters, if no sample is
        left for a cluster, or if ``noise`` is negative.

    Notes
    -----
    For d = 2 the paper's listing puts the centres on a circle of radius 5; no figure uses it, nor does this.
    """
    _require_positive(n_total=n_total, n_classes=n_classes, n_clusters=n_clusters, d=d)
    if n_classes > n_clusters:
        raise ValueError(f"more classes than clusters: {n_classes} classes need at least as many, not {n_clusters}")
    if n_total < n_clusters:
        raise ValueError(f"no sample for a cluster: {n_total} samples are fewer than {n_clusters} clusters")
    if not noise >= 0:
        raise ValueError(f"noise is a standard deviation and cannot be {noise}")
    per_cluster = n_total // n_clusters
    K = n_clusters if exact else n_clusters // n_classes * n_classes
    N = K * per_cluster
    centres = torch.nn.functional.normalize(gaussian_features(d, K, generator=generator, dtype=dtype))
    x = centres.repeat_interleave(per_cluster, dim=0)
    x += noise * gaussian_features(d, N, generator=generator, dtype=dtype)
    y = (torch.arange(K, device=generator.device) * n_classes // K).repeat_interleave(per_cluster)
    what = f"clusters about {K} unit vectors, noise {noise:g}, N={N}, d={d}, C={n_classes}"
    return ClusteredData(x, y, K, generated(what, N, generator))
