r"""How far the spectrum of one matrix is from its limit: a measure for distances that knows no theory.

Eigenvalues repel each other, so that their distribution function is nearer to its limit than that of independent draws.
The measure is matrices of the separable covariance model, :math:`\frac1n X^\top D X` with D independent of X, whose
limit was known before Theorem 1 of Liao & Mahoney (2021). A sample is turned into one by drawing anew the coordinates
that g depends on, and taking away the mean: of the features nothing else knows of g. This changes the distribution
function of the eigenvalues by at most (k + 1)/p, k the number of these coordinates; that the limit is the same is what
Theorem 1 says. The distance of such matrices from *their own mean* is what a single matrix has by chance.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from common.hessian.gram import weighted_gram
from common.liao_eigenspectra.glm import GLM
from common.liao_eigenspectra.law import Directions
from common.liao_eigenspectra.marchenko_pastur import MarchenkoPastur
from common.liao_eigenspectra.spikes import Eigenspectrum


def independent_features(glm: GLM, X: Float[Tensor, "n p"], generator: torch.Generator) -> Float[Tensor, "n p"]:
    """Features that are independent of the curvatures of X, in the basis of C's eigenvectors, with mean zero.

    Parameters
    ----------
    X
        Features of the model, shape (n, p).

    Returns
    -------
    Tensor, shape (n, p)
        X - μ, in which the coordinates along span{C^{1/2} w, C^{1/2} w*} of C^{-1/2} (X - μ) are drawn anew.
    """
    R, root = torch.from_numpy(Directions.of(glm).basis.copy()), torch.from_numpy(np.sqrt(glm.eigenvalues))
    centred = torch.from_numpy(glm.to_eigenbasis((X - torch.from_numpy(glm.mean)).numpy().T).T.copy())
    fresh = torch.randn(len(X), R.shape[1], generator=generator, dtype=X.dtype)
    return centred + (fresh - (centred / root) @ R) @ (R.T * root)


def own_distances(eigenvalues: Float[np.ndarray, "R p"]) -> Float[np.ndarray, " R"]:
    """Kolmogorov-Smirnov distance of each spectrum, shape (R, p), from the mean of the others.

    Raises
    ------
    ValueError
        If there are fewer than 3 spectra, too few for a mean.
    """
    if len(eigenvalues) < 3:
        raise ValueError(f"spectra are held against the mean of the others: 3 are needed, got {len(eigenvalues)}")
    others = (np.delete(eigenvalues, k, axis=0).ravel() for k in range(len(eigenvalues)))
    return np.array(
        [stats.ks_2samp(v, rest, method="asymp").statistic for v, rest in zip(eigenvalues, others, strict=True)]
    )


def compared_spectra(
    glm: GLM, n: int, draws: int, generator: torch.Generator
) -> tuple[list[Float[Tensor, "p p"]], Float[np.ndarray, "R p"], Float[np.ndarray, "R p"]]:
    """Hessians, their eigenvalues, and those of the same with features that are independent of the curvatures.

    Returns
    -------
    list of Tensor; array, array, each of shape (draws, p)
    """
    hessians, values, reference = [], [], []
    for _ in range(draws):
        X = glm.sample_features(n, generator)
        g = glm.weights(X, generator) / n
        hessians.append(weighted_gram(X, g))
        values.append(np.linalg.eigvalsh(hessians[-1].numpy()))
        reference.append(np.linalg.eigvalsh(weighted_gram(independent_features(glm, X, generator), g).numpy()))
    return hessians, np.array(values), np.array(reference)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Samples of a Hessian beside its limiting law, the nearest Marčenko-Pastur law and what chance makes.

    Attributes
    ----------
    hessians, eigenvalues
        Samples, each of shape (p, p), and their eigenvalues, shape (draws, p).
    distances, nearest
        Kolmogorov-Smirnov distances of the eigenvalues, predicted spikes left out, from the limiting law and from the
        Marčenko-Pastur law that is nearest to it, shape (draws,).
    chance
        Distances of matrices with independent curvatures from their own mean, :func:`own_distances`, shape (draws,).
    bound
        By which the mean of ``distances`` may exceed that of ``chance``: (k + 1)/p, the most that k coordinates and a
        mean can do, or half of the limit's distance from the nearest Marčenko-Pastur law, whichever is less.
    """

    hessians: list[Float[Tensor, "p p"]]
    eigenvalues: Float[np.ndarray, "R p"]
    distances: Float[np.ndarray, " R"]
    nearest: Float[np.ndarray, " R"]
    chance: Float[np.ndarray, " R"]
    bound: float

    @classmethod
    def of(cls, glm: GLM, H: Eigenspectrum, n: int, draws: int, generator: torch.Generator) -> "Comparison":
        """Draw at least 3 samples of a model whose limiting spectrum is H."""
        hessians, values, reference = compared_spectra(glm, n, draws, generator)
        closest, bulks = MarchenkoPastur.fitted(H), [H.without_spikes(v) for v in values]
        coordinates = Directions.of(glm).basis.shape[1] + 1
        return cls(
            hessians,
            values,
            distances=np.array([H.distance(v) for v in bulks]),
            nearest=np.array([closest.distance(v) for v in bulks]),
            chance=own_distances(reference),
            bound=min(coordinates / glm.p, closest.distance_from_limit(H) / 2),
        )
