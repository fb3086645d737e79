r"""Generalized generalized linear models (G-GLMs): features, responses, losses, and the Hessian at a given w.

Section 1.1 of Liao & Mahoney (2021), "Hessian Eigenspectra of More Realistic Nonlinear Models". Features
:math:`x_i \sim N(\mu, C)` in :math:`\mathbb{R}^p`; a response :math:`y_i` drawn from :math:`f(y \mid w_*^\top x_i)`,
(1); a loss :math:`\ell(y, w^\top x)`, (3). The Hessian at w, independent of the sample, is (4)

.. math:: H = \frac1n \sum_i g_i\, x_i x_i^\top, \qquad g_i = \partial^2 \ell(y_i, h) / \partial h^2 |_{h = w^\top x_i}.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import SupportsIndex

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from common.data.synthetic import gaussian_features
from common.hessian.gram import weighted_gram

#: A loss of responses and predictions, in this order (torch's own losses have the other), elementwise and
#: differentiable twice in the second by torch.
ElementwiseLoss = Callable[[Tensor, Tensor], Tensor]


# What is checked ----------------------------------------------------------------------------------------------------


def whole_number(name: str, value: object, least: int = 1) -> int:
    """A value as an int, NumPy's whole numbers too.

    Raises
    ------
    ValueError
        If it is no whole number, or less than ``least``; the message has the name.
    """
    number = operator.index(value) if hasattr(value, "__index__") and np.ndim(value) == 0 else None
    if isinstance(value, bool | np.bool_) or number is None or number < least:
        kind = "a positive whole number" if least == 1 else f"a whole number from {least} up"
        raise ValueError(f"{name} must be {kind}, not {value!r}")
    return number


def finite_array(name: str, value: object, shape: tuple[int | None, ...]) -> Float[np.ndarray, "..."]:
    """A value as an array of float64, of a shape in which None stands for any number from 1 up.

    Raises
    ------
    ValueError
        If it is not real and finite, or of another shape; the message has the name.
    """
    try:
        array = np.asarray(value.detach() if isinstance(value, Tensor) else value)
        array = array.astype(float) if array.dtype.kind in "biuf" or not array.size else None
    except (TypeError, ValueError):
        array = None
    size = ", ".join("any" if n is None else str(n) for n in shape)
    count = "finite numbers" if shape else "a finite number"
    if len(shape) == 1 and shape[0]:
        count = f"{shape[0]} {count}"
    wanted = f"{name} must be {count}" + (f", in an array of shape ({size})" if shape else "")
    if array is None:
        raise ValueError(f"{wanted}, got {value!r:.40}")
    if array.ndim != len(shape) or any(n < 1 if m is None else n != m for n, m in zip(array.shape, shape, strict=True)):
        raise ValueError(f"{wanted}, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{wanted}, got {array[~np.isfinite(array)][0]}")
    return array


def _axes(value: object) -> int:
    """Number of axes of an array, 2 also for rows of different lengths."""
    try:
        return np.ndim(value)
    except ValueError:
        return 2


def positive_number(name: str, value: object) -> float:
    """A value as a float.

    Raises
    ------
    ValueError
        If it is not one positive, finite number; the message has the name.
    """
    try:
        number = float(finite_array(name, value, ()))
    except ValueError:
        number = 0.0
    if number <= 0:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return number


def _elementwise(name: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Values of a function at tensors of one axis, refused unless there is one for each entry, made of it alone."""
    try:
        values = function(*inputs)
        parts = [function(*(x[k : k + 1] for x in inputs)) for k in range(len(inputs[0]))]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{name} must take tensors of one axis, and fails with them: {error}") from error
    for result, count in ((values, len(inputs[0])), *((part, 1) for part in parts)):
        if not isinstance(result, Tensor) or result.shape != (count,):
            got = (
                f"a tensor of shape {tuple(result.shape)}"
                if isinstance(result, Tensor)
                else f"a {type(result).__name__}"
            )
            raise ValueError(
                f"{name} must be elementwise, a tensor of as many values as it is given (no mean and no sum of them, "
                f"in torch's losses reduction='none'): for {count} it gives {got}"
            )
    values, alone = values.detach(), torch.cat(parts).detach()
    if not values.is_floating_point() or not values.isfinite().all():
        at = ", ".join(f"{x[~values.isfinite()][0]:g}" for x in inputs) if values.is_floating_point() else ""
        raise ValueError(
            f"{name} must be real and finite" + (f"; it is not at ({at})" if at else f", not {values.dtype}")
        )
    if not torch.allclose(values, alone, rtol=1e-5, atol=1e-8 * float(values.abs().max())):
        raise ValueError(f"{name} must be elementwise: each value may depend on its own entry only, not on the others")
    return values


# Losses and responses -----------------------------------------------------------------------------------------------


def logistic_loss(y: Tensor, h: Tensor) -> Tensor:
    """ln(1 + exp(-y h)) for y = ±1, the negative log-likelihood of :data:`LOGISTIC`; its curvature is at most 1/4.

    Written such that torch's second derivative has all digits however large y h is: that of ``logsigmoid`` is zero from
    y h = 37 on.
    """
    margin = y * h
    tail = torch.log1p(torch.exp(torch.where(margin > 0, -margin, margin)))
    return torch.where(margin > 0, tail, tail - margin)


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

    Raises
    ------
    ValueError
        If torch cannot differentiate the loss twice in h.
    """
    h = h.detach().requires_grad_()
    try:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(loss(y, h).sum(), h, create_graph=True)
            if not slope.requires_grad:
                return torch.zeros_like(h).detach()
            (second,) = torch.autograd.grad(slope.sum(), h, allow_unused=True, materialize_grads=True)
    except RuntimeError as error:
        raise ValueError(
            f"the loss, of y and then h, must be one that torch can differentiate twice in h: {error}"
        ) from error
    return second.detach()


def finite_curvature(loss: ElementwiseLoss, y: Float[Tensor, " n"], h: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The same as :func:`curvature`, refused if it is not finite."""
    g = curvature(loss, y, h)
    if not g.isfinite().all():
        raise ValueError(f"the curvature of the loss is not finite at h = {h[~g.isfinite()][0]:g}")
    return g


def _check_loss(loss: ElementwiseLoss, y: Float[Tensor, " n"], h: Float[Tensor, " n"]) -> None:
    """Refuse a loss that is not elementwise, or whose curvature its values deny at half of the places."""
    value = _elementwise("the loss", loss, y, h)
    g, denied = finite_curvature(loss, y, h), torch.ones_like(h, dtype=torch.bool)
    for step in (0.05, 1e-3, 1e-5):  # one of them suits the loss
        rounding = 10 * torch.finfo(value.dtype).eps / step**2
        if rounding < 1e-2:
            second = (loss(y, h + step) - 2 * value + loss(y, h - step)).detach() / step**2
            denied &= ((second - g).abs() <= 0.01 * g.abs() + rounding * value.abs().max()).logical_not()
    if denied.sum() > len(h) / 2:
        raise ValueError(
            f"the loss, of y and then h, must be one that torch can differentiate twice in h: its values deny the "
            f"curvature {g[denied][0]:g} that torch has at h = {h[denied][0]:g}; is a part of it detached?"
        )


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

    Raises
    ------
    ValueError
        If there are no values, or one of them or of the kinks is not finite.
    """

    values: tuple[float | int, ...]
    probability: Callable[[float, Tensor], Tensor]
    kinks: tuple[float | int, ...] = ()

    def __post_init__(self):
        finite_array("the values of the response", self.values, (None,))
        _check_kinks(self.kinks)

    def check(self, eta: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Try the response at some η, shape (n,), and give possible values there.

        Raises
        ------
        ValueError
            If the probabilities are not elementwise, not finite, negative, or do not add up to 1.
        """
        name = "the probability of a response"
        chance = torch.stack([_elementwise(name, lambda x, y=y: self.probability(y, x), eta) for y in self.values])
        off = (chance.min(0).values < 0) | ((chance.sum(0) - 1).abs() > 1e-6)
        if off.any():
            there = [round(x, 9) for x in chance[:, off][:, 0].tolist()]
            raise ValueError(
                f"the probabilities of the response must be nonnegative and add up to 1 at every η: at "
                f"η = {eta[off][0]:g} those of {list(self.values)} are {there}"
            )
        return torch.tensor(self.values, dtype=eta.dtype)[torch.arange(len(eta)) % len(self.values)]

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

    Raises
    ------
    ValueError
        If the noise is negative or not finite, or a kink is not finite.
    """

    function: Callable[[Tensor], Tensor]
    noise: float | int = 0.0
    kinks: tuple[float | int, ...] = ()

    def __post_init__(self):
        if finite_array("the noise of the response", self.noise, ()) < 0:
            raise ValueError(f"the noise of the response is a standard deviation, not negative, got {self.noise}")
        _check_kinks(self.kinks)

    def check(self, eta: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Try the response at some η, shape (n,), and give its values without noise there.

        Raises
        ------
        ValueError
            If the function is not elementwise or not finite.
        """
        return _elementwise("the function of the response", self.function, eta)

    def sample(self, eta: Float[Tensor, " n"], generator: torch.Generator) -> Float[Tensor, " n"]:
        """Draw a response for each η, shape (n,)."""
        y = self.function(eta)
        if self.noise:
            y = y + self.noise * torch.randn(eta.shape, generator=generator, dtype=eta.dtype)
        return y


def _check_kinks(kinks: tuple[float | int, ...]) -> None:
    if len(kinks):
        finite_array("the kinks", kinks, (None,))


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

    p: SupportsIndex
    mean: ArrayLike | None = None
    w: ArrayLike | None = None
    w_star: ArrayLike | None = None
    covariance: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None

    def __post_init__(self):
        object.__setattr__(self, "p", whole_number("p", self.p))
        for name in ("mean", "w", "w_star"):
            value = getattr(self, name)
            vector = np.zeros(self.p) if value is None else finite_array(name, value, (self.p,))
            object.__setattr__(self, name, vector)
        _ = self.eigenvalues

    @cached_property
    def _eigen(self) -> tuple[np.ndarray, np.ndarray | None]:
        name, basis, smallest = "the covariance", None, 0.0
        if self.covariance is None:
            return np.ones(self.p), None
        if isinstance(self.covariance, tuple):
            if len(self.covariance) != 2:
                raise ValueError(f"{name} as a pair must be (eigenvalues, weights), got {len(self.covariance)} things")
            values = finite_array(f"the eigenvalues of {name}", self.covariance[0], (None,))
            weights = finite_array(f"the weights of {name}", self.covariance[1], (len(values),))
            counts = np.rint(weights * self.p).astype(int)
            if counts.sum() != self.p or (counts < 0).any() or np.abs(counts - weights * self.p).max() > 1e-6:
                raise ValueError(f"the weights {weights.tolist()} do not share out {self.p} places")
            values = np.repeat(values, counts)
        elif _axes(self.covariance) == 2:
            C = finite_array(name, self.covariance, (self.p, self.p))
            if np.abs(C - C.T).max() > 1e-10 * np.abs(C).max():
                raise ValueError(f"{name} must be a symmetric matrix of order {self.p}; (C + C.T) / 2 is one")
            values, basis = np.linalg.eigh(C)
            smallest = self.p * np.finfo(float).eps * values[-1]  # what rounding makes of zero
        else:
            values = finite_array(f"the eigenvalues of {name}", self.covariance, (self.p,))
        if not (values > smallest).all():
            raise ValueError(
                f"{name} must have {self.p} positive eigenvalues, so that it is positive definite; the smallest is "
                f"{values.min():.3g}"
            )
        return values, basis

    @property
    def eigenvalues(self) -> Float[np.ndarray, " p"]:
        """Eigenvalues of C, shape (p,), in the order of :meth:`to_eigenbasis`."""
        return self._eigen[0]

    def to_eigenbasis(self, vectors: Float[np.ndarray, "p ..."]) -> Float[np.ndarray, "p ..."]:
        """Coordinates of vectors, shape (p, ...), in the basis of C's eigenvectors."""
        basis = self._eigen[1]
        return vectors if basis is None else basis.T @ vectors

    def sample_features(self, n: SupportsIndex, generator: torch.Generator) -> Float[Tensor, "n p"]:
        """Draw features x_i ~ N(μ, C), one a row, shape (n, p), in float64."""
        X = gaussian_features(self.p, whole_number("n", n), generator=generator, dtype=torch.float64)
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

    Raises
    ------
    ValueError
        As for :class:`Features`; or if, tried at some h and η, the loss or the response is not elementwise or not
        finite, the loss not twice differentiable, or the probabilities of the response are no probabilities.

    Examples
    --------
    >>> glm = GLM(p=3, w=[1.0, 0.0, 0.0], response=LOGISTIC, loss=square_loss)
    >>> glm.hessian(glm.sample_features(1000, torch.Generator().manual_seed(0)), torch.Generator()).shape
    torch.Size([3, 3])
    """

    response: Response
    loss: ElementwiseLoss
    kinks: tuple[float | int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        _check_kinks(self.kinks)
        t, root = torch.linspace(-3, 3, 13, dtype=torch.float64), np.sqrt(self.eigenvalues)
        h, eta = (
            float(v @ self.mean) + (float(np.linalg.norm(root * self.to_eigenbasis(v))) or 1e-3) * t
            for v in (self.w, self.w_star)
        )
        y = self.response.check(eta)
        for shift in range(2):  # each h with two of the responses
            _check_loss(self.loss, y.roll(shift), h)

    def weights(self, X: Float[Tensor, "n p"], generator: torch.Generator) -> Float[Tensor, " n"]:
        """The curvatures g_i of (6) at given features, with responses drawn for them, shape (n,).

        Raises
        ------
        ValueError
            If X is not of this shape, n ≥ 1, or not real and finite.
        """
        if X.ndim != 2 or X.shape[1] != self.p or not len(X) or not X.is_floating_point() or not X.isfinite().all():
            raise ValueError(
                f"X must be finite real numbers of shape (n, {self.p}), n ≥ 1, got {X.dtype} of {tuple(X.shape)}"
            )
        y = self.response.sample(X @ torch.from_numpy(self.w_star).to(X.dtype), generator)
        return curvature(self.loss, y, X @ torch.from_numpy(self.w).to(X.dtype))

    def hessian(self, X: Float[Tensor, "n p"], generator: torch.Generator) -> Float[Tensor, "p p"]:
        """The Hessian (4) at given features, Gaussian or not, with responses drawn for them, shape (p, p)."""
        return weighted_gram(X, self.weights(X, generator) / len(X))

    def sample_hessians(
        self, n: SupportsIndex, draws: SupportsIndex, generator: torch.Generator
    ) -> Iterator[Float[Tensor, "p p"]]:
        """Hessians of independent samples of n, one after the other, each of shape (p, p)."""
        for _ in range(whole_number("draws", draws, least=0)):
            yield self.hessian(self.sample_features(n, generator), generator)


def eigenpair(H: Float[Tensor, "p p"], rank: SupportsIndex) -> tuple[float, Float[np.ndarray, " p"]]:
    """One eigenvalue of a symmetric matrix and its unit eigenvector, shape (p,); see :func:`eigenpairs`."""
    (pair,) = eigenpairs(H, [rank])
    return pair


def eigenpairs(H: Float[Tensor, "p p"], ranks: Sequence[SupportsIndex]) -> list[tuple[float, Float[np.ndarray, " p"]]]:
    """Eigenvalues of a symmetric matrix and their unit eigenvectors, shape (p,), from one factorization.

    Parameters
    ----------
    H
        Symmetric, shape (p, p).
    ranks
        0 for the smallest, 1 for the next, ...; -1 for the largest. None that lies outside their range is computed.

    Raises
    ------
    ValueError
        If H is not symmetric or not finite, or there is no eigenvalue of such a rank.
    """
    matrix, index = finite_array("H", H, (None, None)), [whole_number("rank", k, least=-len(H)) for k in ranks]
    if matrix.shape[0] != matrix.shape[1] or np.abs(matrix - matrix.T).max() > 1e-5 * np.abs(matrix).max():
        raise ValueError("H must be a symmetric matrix")
    if max(index) >= len(H):
        raise ValueError(f"rank must be at most {len(H) - 1}, got {max(index)}")
    index = [k % len(H) for k in index]
    first = min(index)
    values, vectors = scipy.linalg.eigh(H.numpy(), subset_by_index=(first, max(index)))
    return [(float(values[k - first]), vectors[:, k - first]) for k in index]


def squared_cosine(a: Float[np.ndarray, " p"], b: Float[np.ndarray, " p"]) -> float:
    """Squared cosine of the angle between two vectors, shape (p,), the alignment of Section 3.2.

    Raises
    ------
    ValueError
        If one is zero or not finite, or they are not of one length.
    """
    a = finite_array("a", a, (None,))
    b = finite_array("b", b, (len(a),))
    if not (a.any() and b.any()):
        raise ValueError("a and b must not be zero, as a vector of no length makes no angle")
    return float((a @ b) ** 2 / ((a @ a) * (b @ b)))


def halves(p: SupportsIndex) -> Float[np.ndarray, " p"]:
    """The unit vector [-1, ..., -1, 1, ..., 1]/√p of the paper's figures, shape (p,)."""
    p = whole_number("p", p)
    return np.where(np.arange(p) < p // 2, -1.0, 1.0) / np.sqrt(p)
