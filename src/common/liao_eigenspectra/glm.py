r"""Generalized generalized linear models (G-GLMs): features, responses, losses, and the Hessian at a given w.

Section 1.1 of Liao & Mahoney (2021), "Hessian Eigenspectra of More Realistic Nonlinear Models". Features
:math:`x_i \sim N(\mu, C)` in :math:`\mathbb{R}^p`; a response :math:`y_i` drawn from :math:`f(y \mid w_*^\top x_i)`,
(1); a loss :math:`\ell(y, w^\top x)`, (3). The Hessian at w, independent of the sample, is (4)

.. math:: H = \frac1n \sum_i g_i\, x_i x_i^\top, \qquad g_i = \partial^2 \ell(y_i, h) / \partial h^2 |_{h = w^\top x_i}.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from common.data.synthetic import gaussian_features
from common.hessian.gram import weighted_gram

#: A loss of responses and predictions, elementwise and differentiable twice in the second by torch.
ElementwiseLoss = Callable[[Tensor, Tensor], Tensor]


def logistic_loss(y: Tensor, h: Tensor) -> Tensor:
    """ln(1 + exp(-y h)) for y = ±1, the negative log-likelihood of :data:`LOGISTIC`; its curvature is at most 1/4."""
    return -torch.nn.functional.logsigmoid(y * h)


def exponential_loss(y: Tensor, h: Tensor) -> Tensor:
    """exp(-y h) for y = ±1; its curvature is not bounded (Section 2.1)."""
    return torch.exp(-y * h)


def square_loss(y: Tensor, h: Tensor) -> Tensor:
    """(y - h)² / 2, of curvature 1 (Section 3.1)."""
    return (y - h) ** 2 / 2


def phase_retrieval_loss(y: Tensor, h: Tensor) -> Tensor:
    """(y - h²)² / 4, of curvature 3 h² - y (Remark 1)."""
    return (y - h**2) ** 2 / 4


def curvature(loss: ElementwiseLoss, y: Float[Tensor, " n"], h: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """g of (6), the second derivative of the loss in h, by automatic differentiation.

    Parameters
    ----------
    loss
        Elementwise; a part of it that is linear in h counts as curvature zero.
    y, h
        Responses and predictions, shape (n,).

    Returns
    -------
    Tensor, shape (n,)
    """
    h = h.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss(y, h).sum(), h, create_graph=True)
        if not slope.requires_grad:
            return torch.zeros_like(h).detach()
        (second,) = torch.autograd.grad(slope.sum(), h, allow_unused=True, materialize_grads=True)
    return second.detach()


@dataclass(frozen=True)
class DiscreteResponse:
    """A response with finitely many values.

    Parameters
    ----------
    values
        The values.
    probability
        P(y | η) of a value y at η = w*ᵀx, elementwise in η; the values' probabilities add up to 1.
    kinks
        Places η where a probability is not smooth, such as (0.0,) for the sign of η.
    """

    values: tuple[float | int, ...]
    probability: Callable[[float, Tensor], Tensor]
    kinks: tuple[float | int, ...] = ()

    def sample(self, eta: Float[Tensor, " n"], generator: torch.Generator) -> Float[Tensor, " n"]:
        """Draw a response for each η, shape (n,)."""
        uniform = torch.rand(eta.shape, generator=generator, dtype=eta.dtype)
        chance = torch.stack([self.probability(y, eta) for y in self.values]).cumsum(0)
        index = (uniform > chance).sum(0).clamp(max=len(self.values) - 1)
        return torch.tensor(self.values, dtype=eta.dtype)[index]


@dataclass(frozen=True)
class ContinuousResponse:
    """A function of η = w*ᵀx, with Gaussian noise or without.

    Parameters
    ----------
    function
        y as a function of η, elementwise.
    noise
        Standard deviation of what is added.
    kinks
        Places η where the function is not smooth.
    """

    function: Callable[[Tensor], Tensor]
    noise: float | int = 0.0
    kinks: tuple[float | int, ...] = ()

    def sample(self, eta: Float[Tensor, " n"], generator: torch.Generator) -> Float[Tensor, " n"]:
        """Draw a response for each η, shape (n,)."""
        y = self.function(eta)
        if self.noise:
            y = y + self.noise * torch.randn(eta.shape, generator=generator, dtype=eta.dtype)
        return y


Response = DiscreteResponse | ContinuousResponse

#: The logistic model (2).
LOGISTIC = DiscreteResponse((-1.0, 1.0), lambda y, eta: torch.sigmoid(y * eta))
#: The noiseless phase retrieval model y = η².
PHASE_RETRIEVAL = ContinuousResponse(torch.square)


@dataclass(frozen=True, eq=False, kw_only=True)
class Features:
    """Gaussian features and the two directions that the responses and the loss look at.

    Parameters
    ----------
    p
        Dimension.
    mean, w, w_star
        μ, w, w*, shape (p,); zero if left out.
    covariance
        C, positive definite: the identity if left out; its eigenvalues, shape (p,), if it is diagonal; a pair
        (eigenvalues, weights), each shape (K,), for a diagonal matrix in which eigenvalue k fills the next
        ``weights[k] * p`` places; or a matrix, shape (p, p).

    Raises
    ------
    ValueError
        If a shape does not fit, a value is not finite, C is not symmetric and positive definite, or the weights do
        not share out p places.
    """

    p: int
    mean: ArrayLike | None = None
    w: ArrayLike | None = None
    w_star: ArrayLike | None = None
    covariance: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None

    def __post_init__(self):
        if isinstance(self.p, bool) or not isinstance(self.p, int) or self.p < 1:
            raise ValueError(f"p must be a positive whole number, not {self.p!r}")
        for name in ("mean", "w", "w_star"):
            value = getattr(self, name)
            vector = np.zeros(self.p) if value is None else np.asarray(value, dtype=float)
            if vector.shape != (self.p,) or not np.isfinite(vector).all():
                raise ValueError(f"{name} must be {self.p} finite numbers, got shape {vector.shape}")
            object.__setattr__(self, name, vector)
        _ = self.eigenvalues

    @cached_property
    def _eigen(self) -> tuple[np.ndarray, np.ndarray | None]:
        if self.covariance is None:
            return np.ones(self.p), None
        if isinstance(self.covariance, tuple):
            values, weights = (np.asarray(x, dtype=float) for x in self.covariance)
            counts = np.rint(weights * self.p).astype(int)
            if values.shape != weights.shape or np.abs(counts - weights * self.p).max() > 1e-6:
                raise ValueError(f"the weights {weights.tolist()} do not share out {self.p} places")
            values, basis = np.repeat(values, counts), None
        else:
            values, basis = np.asarray(self.covariance, dtype=float), None
            if values.ndim == 2:
                if values.shape != (self.p, self.p) or not np.allclose(values, values.T, rtol=1e-10, atol=1e-12):
                    raise ValueError(f"the covariance must be a symmetric matrix of order {self.p}")
                values, basis = np.linalg.eigh(values)
        if values.shape != (self.p,) or not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"the covariance must have {self.p} positive eigenvalues")
        return values, basis

    @property
    def eigenvalues(self) -> Float[np.ndarray, " p"]:
        """Eigenvalues of C, shape (p,), in the order of :meth:`to_eigenbasis`."""
        return self._eigen[0]

    def to_eigenbasis(self, vectors: Float[np.ndarray, "p ..."]) -> Float[np.ndarray, "p ..."]:
        """Coordinates of vectors, shape (p, ...), in the basis of C's eigenvectors."""
        basis = self._eigen[1]
        return vectors if basis is None else basis.T @ vectors

    def sample_features(self, n: int, generator: torch.Generator) -> Float[Tensor, "n p"]:
        """Draw features x_i ~ N(μ, C), one a row, shape (n, p), in float64."""
        X = gaussian_features(self.p, n, generator=generator, dtype=torch.float64)
        if self.covariance is not None:
            X *= torch.from_numpy(np.sqrt(self.eigenvalues))
            if self._eigen[1] is not None:
                X = X @ torch.from_numpy(self._eigen[1].T.copy())
        return X.add_(torch.from_numpy(self.mean))


@dataclass(frozen=True, eq=False, kw_only=True)
class GLM(Features):
    """A G-GLM: :class:`Features` with a response and a loss.

    Parameters
    ----------
    response
        The model of y, (1).
    loss
        Elementwise in y and h, in torch; (3).
    kinks
        Places h where the curvature of the loss is not smooth for some y.

    Examples
    --------
    >>> glm = GLM(p=3, w=[1.0, 0.0, 0.0], response=LOGISTIC, loss=square_loss)
    >>> glm.hessian(glm.sample_features(1000, torch.Generator().manual_seed(0)), torch.Generator()).shape
    torch.Size([3, 3])
    """

    response: Response
    loss: ElementwiseLoss
    kinks: tuple[float | int, ...] = ()

    def weights(self, X: Float[Tensor, "n p"], generator: torch.Generator) -> Float[Tensor, " n"]:
        """The curvatures g_i of (6) at given features, with responses drawn for them, shape (n,)."""
        y = self.response.sample(X @ torch.from_numpy(self.w_star).to(X.dtype), generator)
        return curvature(self.loss, y, X @ torch.from_numpy(self.w).to(X.dtype))

    def hessian(self, X: Float[Tensor, "n p"], generator: torch.Generator) -> Float[Tensor, "p p"]:
        """The Hessian (4) at given features, Gaussian or not, with responses drawn for them, shape (p, p)."""
        return weighted_gram(X, self.weights(X, generator) / len(X))

    def sample_hessians(self, n: int, draws: int, generator: torch.Generator) -> Iterator[Float[Tensor, "p p"]]:
        """Hessians of independent samples of n, one after the other, each of shape (p, p)."""
        for _ in range(draws):
            yield self.hessian(self.sample_features(n, generator), generator)


def eigenpair(H: Float[Tensor, "p p"], rank: int) -> tuple[float, Float[np.ndarray, " p"]]:
    """One eigenvalue of a symmetric matrix and its unit eigenvector, shape (p,), without the others.

    Parameters
    ----------
    H
        Symmetric, shape (p, p).
    rank
        0 for the smallest, 1 for the next, ...; -1 for the largest.
    """
    index = rank % len(H)
    values, vectors = scipy.linalg.eigh(H.numpy(), subset_by_index=(index, index))
    return float(values[0]), vectors[:, 0]


def squared_cosine(a: Float[np.ndarray, " p"], b: Float[np.ndarray, " p"]) -> float:
    """Squared cosine of the angle between two vectors, shape (p,), the alignment of Section 3.2."""
    return float((a @ b) ** 2 / ((a @ a) * (b @ b)))


def halves(p: int) -> Float[np.ndarray, " p"]:
    """The unit vector [-1, ..., -1, 1, ..., 1]/√p of the paper's figures, shape (p,)."""
    return np.where(np.arange(p) < p // 2, -1.0, 1.0) / np.sqrt(p)
