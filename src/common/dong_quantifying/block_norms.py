r"""Norms of Hessian blocks at random initialization: Theorems 1 and 2 of Dong et al. (2025), checked and corrected.

Features are standard Gaussian, weights follow LeCun initialization, and :math:`d, N \to \infty` with
:math:`d/N \to \gamma`. Then a block :math:`\frac1N \sum_n \lambda_n x_n x_n^\top` whose weights depend on the
data through finitely many projections has

.. math:: \tfrac1d \|H\|_F^2 \to \gamma\, E[\lambda^2 \mid V] + E[\lambda \mid V]^2,

conditionally on the output weights V, which all samples share. The mean over V of the second term is
:math:`E[\lambda\lambda']` for two independent samples with the *same* V. Equations (91) and (92) of the paper
print :math:`(E\lambda)^2` instead, which loses the covariance of :math:`\lambda` and :math:`\lambda'`.

All functions use the paper's normalization: no factor 2 in the Hessian of the MSE loss, see its (3), (8), (9).
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import quad
from torch import Tensor

#: A number, or one for each draw.
Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class SampledValue:
    """A value found by sampling, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, samples: Float[Tensor, "R"]) -> "SampledValue":
        """Mean and standard error of independent samples.

        Raises
        ------
        ValueError
            If there are fewer than two.
        """
        if len(samples) < 2:
            raise ValueError(f"a standard error needs at least 2 independent samples, got {len(samples)}")
        return cls(samples.mean().item(), samples.std().item() / math.sqrt(len(samples)))

    def interval(self, width: float = 1.96) -> tuple[float, float]:
        """The value plus and minus ``width`` standard errors."""
        return self.value - width * self.error, self.value + width * self.error

    def deviation(self, value: float) -> float:
        """How many standard errors ``value`` lies above the sampled one."""
        difference = value - self.value
        if self.error == 0:
            return math.copysign(math.inf, difference) if difference else 0.0
        return difference / self.error


# ---------------------------------------------------------------------------------------------------------------
# Theorem 1: linear model, cross-entropy


@dataclass(frozen=True)
class LinearMoments:
    """E[h1], E[h1²], E[h2], E[h2²] of Section 7.1 at C classes, with h1 = p_1 (1 - p_1) and h2 = p_1 p_2."""

    classes: int
    h1: float
    h1_squared: float
    h2: float
    h2_squared: float

    def g_ii(self, gamma: float) -> float:
        """Limit of ||H_ii||²/d, (22); the paper prints the norm without its square."""
        return gamma * self.h1_squared + self.h1**2

    def g_ij(self, gamma: float) -> float:
        """Limit of ||H_ij||²/d, (23)."""
        return gamma * self.h2_squared + self.h2**2


def _check_classes(C: int, least: int = 2) -> None:
    if C < least:
        raise ValueError(f"the number of classes C must be at least {least}, got {C}")


def check_least(least: int, **counts: float) -> None:
    """See to it that no count is below ``least``.

    Raises
    ------
    ValueError
        If one is.
    """
    for name, count in counts.items():
        if not count >= least:
            raise ValueError(f"{name} must be at least {least}, got {count}")


def _moments_from_power_sums(C: int, s2: Number, s3: Number, s4: Number, s2_squared: Number) -> tuple[Number, ...]:
    """The four moments, by exchangeability, from the expected power sums s_k = E[sum_c p_c^k] and E[(sum_c p_c²)²].

    Without the expectations, from one draw of p or from many, it gives samples whose means are the moments.
    """
    pairs = C * (C - 1)
    return (1 - s2) / C, (s2 - 2 * s3 + s4) / C, (1 - s2) / pairs, (s2_squared - s4) / pairs


def linear_moments(C: int) -> LinearMoments:
    r"""Moments of Section 7.1 by quadrature, to about eight digits at any C >= 2.

    With :math:`S = \sum_c e^{Z_c}` and :math:`S^{-k} = \int_0^\infty t^{k-1} e^{-tS} dt / (k-1)!`, an expectation
    over C Gaussians factors into powers of :math:`\varphi_a(t) = E[e^{aZ} e^{-t e^Z}]`, for instance
    :math:`E\sum_c p_c^a = \frac{C}{(a-1)!} \int t^{a-1} \varphi_a(t)\, \varphi_0(t)^{C-1} dt`. The paper draws
    10⁶ Gaussian vectors instead.

    Raises
    ------
    ValueError
        If C < 2.
    """
    _check_classes(C)
    # Trapezoidal rule: converges geometrically for the Gaussian weight.
    z = np.linspace(-12.0, 12.0, 1201)
    weight = np.exp(-(z**2) / 2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)

    def phi(a: int, t: float) -> float:
        return float(weight @ np.exp(a * z - t * np.exp(z)))

    def log_phi0(t: float) -> float:
        return math.log1p(-float(weight @ -np.expm1(-t * np.exp(z))))

    def integral(k: int, *powers: int) -> float:
        """1/(k-1)! times the integral of t^(k-1) prod_a phi_a(t) phi_0(t)^(C-len(powers)) over t > 0, in u = log t."""

        def integrand(u: float) -> float:
            t = math.exp(u)
            product = math.prod(phi(a, t) for a in powers)
            return product * math.exp((C - len(powers)) * log_phi0(t) + k * u)

        centre = math.log(k / (C * math.sqrt(math.e)))
        value, _ = quad(integrand, centre - 24, centre + 12, limit=400, epsabs=0, epsrel=1e-10, points=[centre])
        return value / math.factorial(k - 1)

    s2, s3, s4 = C * integral(2, 2), C * integral(3, 3), C * integral(4, 4)
    return LinearMoments(C, *_moments_from_power_sums(C, s2, s3, s4, s4 + C * (C - 1) * integral(4, 2, 2)))


def sampled_linear_moments(C: int, draws: int, generator: torch.Generator) -> tuple[LinearMoments, LinearMoments]:
    """Moments of Section 7.1 by the paper's Monte Carlo, and their standard errors.

    Every draw of C Gaussians serves all C classes and all pairs of classes, which are exchangeable: ``draws``
    vectors reach the error of about ``draws * C`` draws of the pair (h1, h2). Memory is bounded by 64 MB.

    Raises
    ------
    ValueError
        If C < 2 or draws < 2.
    """
    _check_classes(C)
    check_least(2, draws=draws)
    chunk = max(1, min(draws, 2**21 // C))
    sums = []
    for start in range(0, draws, chunk):
        p = torch.softmax(torch.randn(min(chunk, draws - start), C, generator=generator), dim=1)
        square = p * p
        s2 = square.sum(1, dtype=torch.float64)
        s3 = (square * p).sum(1, dtype=torch.float64)
        s4 = (square * square).sum(1, dtype=torch.float64)
        sums.append(torch.stack([s2, s3, s4, s2**2]))
    sums = torch.cat(sums, dim=1)
    moments = [SampledValue.of(samples) for samples in _moments_from_power_sums(C, *sums)]
    return LinearMoments(C, *(m.value for m in moments)), LinearMoments(C, *(m.error for m in moments))


def g_ii_limit(gamma: float) -> float:
    """Limit of C² g_ii as C grows, (24)."""
    return gamma * math.e + 1


def g_ij_limit(gamma: float) -> float:
    """Limit of C⁴ g_ij as C grows, (25)."""
    return gamma * math.e**2 + 1


# ---------------------------------------------------------------------------------------------------------------
# Theorem 2: one hidden layer of m ReLU neurons


@dataclass(frozen=True)
class HiddenMoments:
    """Moments of Section 7.2 at C classes and m neurons, one sample for each independent draw of V (and of W).

    Attributes
    ----------
    xi, xi_squared, xi_pair : Tensor, shape (R,)
        Conditional on V: E[ξ], E[ξ²], E[ξ]²; averaged over the neurons, which are exchangeable. At a finite d they are
        conditional on W, too, and the last two are E[ξ² |x|⁴]/d² and E[ξξ' (x·x')²]/d of two samples x and x'.
    eta, eta_squared, eta_pair : Tensor, shape (R,)
        The same for η, averaged over the pairs of neurons.
    q_ii, q_ij : Tensor, shape (R,)
        Squared norms of E[p_i (1 - p_i) σσᵀ | V] and E[p_i p_j σσᵀ | V], averaged over classes and their pairs.
    q_ii_own, q_ij_own : Tensor, shape (R,)
        E[(p_i (1 - p_i))² |σ|⁴ | V] and E[(p_i p_j)² |σ|⁴ | V]: what a sample contributes together with itself.
    d : float
        Dimension of the samples, infinite in the limit.
    """

    xi: Float[Tensor, "R"]
    xi_squared: Float[Tensor, "R"]
    xi_pair: Float[Tensor, "R"]
    eta: Float[Tensor, "R"]
    eta_squared: Float[Tensor, "R"]
    eta_pair: Float[Tensor, "R"]
    q_ii: Float[Tensor, "R"]
    q_ij: Float[Tensor, "R"]
    q_ii_own: Float[Tensor, "R"]
    q_ij_own: Float[Tensor, "R"]
    d: float = math.inf

    def q_ii_at(self, N: int) -> SampledValue:
        r"""E||H_{v_i v_i}||² under CE with N samples of dimension d: q_ii and 1/N of the pairs of one with itself."""
        return SampledValue.of(self.q_ii + (self.q_ii_own - self.q_ii) / N)

    def q_ij_at(self, N: int) -> SampledValue:
        """E||H_{v_i v_j}||² under CE with N samples of dimension d, like :meth:`q_ii_at`."""
        return SampledValue.of(self.q_ij + (self.q_ij_own - self.q_ij) / N)

    def h_ii_at(self, N: int) -> SampledValue:
        """E||H_{w_i w_i}||²/d under CE with N samples of dimension d.

        Raises
        ------
        ValueError
            If these are moments of the limit.
        """
        return self._at(N, self.xi_squared, self.xi_pair)

    def h_ij_at(self, N: int) -> SampledValue:
        """E||H_{w_i w_j}||²/d under CE with N samples of dimension d, like :meth:`h_ii_at`."""
        return self._at(N, self.eta_squared, self.eta_pair)

    def _at(self, N: int, own: Tensor, pair: Tensor) -> SampledValue:
        if math.isinf(self.d):
            raise ValueError("these are moments of the limit, d is infinite")
        return SampledValue.of(self.d / N * own + (1 - 1 / N) * pair)

    def h_ii(self, gamma: float) -> SampledValue:
        """Limit of E||H_{w_i w_i}||²/d under CE: (91) with E over V taken of the square, not before it."""
        return SampledValue.of(gamma * self.xi_squared + self.xi_pair)

    def h_ij(self, gamma: float) -> SampledValue:
        """Limit of E||H_{w_i w_j}||²/d under CE: (92), corrected like :meth:`h_ii`."""
        return SampledValue.of(gamma * self.eta_squared + self.eta_pair)

    def h_ii_printed(self, gamma: float) -> float:
        """The right-hand side of (91) as printed."""
        return gamma * self.xi_squared.mean().item() + self.xi.mean().item() ** 2

    def h_ij_printed(self, gamma: float) -> float:
        """The right-hand side of (92) as printed."""
        return gamma * self.eta_squared.mean().item() + self.eta.mean().item() ** 2


def _of_pairs(samples: Float[Tensor, "S K"], weights: Float[Tensor, "S S"] | None) -> Float[Tensor, "K"]:
    """Unbiased estimate of E[x x' w(x, x')] from independent samples along dim 0: the mean of x_s x_t w_st over s ≠ t.

    Without weights it is one of E[x]².
    """
    S = len(samples)
    if weights is None:
        return (samples.sum(0) ** 2 - (samples**2).sum(0)) / (S * (S - 1))
    return ((weights.clone().fill_diagonal_(0) @ samples) * samples).sum(0) / (S * (S - 1))


def _projections(
    m: int, d: int, samples: int, generator: torch.Generator
) -> tuple[Float[Tensor, "S m"], Float[Tensor, "S"], Float[Tensor, "S S"]]:
    """Projections W x of samples in d dimensions on one draw of W, and E[|x|⁴ | W x]/d² and E[(x·x')² | W x, W x']/d.

    What lies outside the rows of W is independent of the projections and need not be drawn.
    """
    W = torch.randn(m, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    triangle = torch.linalg.qr(W.T, mode="r").R
    rank = len(triangle)
    u = torch.randn(samples, rank, generator=generator, dtype=torch.float64)
    square = (u**2).sum(1)
    rest = d - rank
    own = (square**2 + 2 * square * rest + rest * (rest + 2)) / d**2
    return u @ triangle, own, ((u @ u.T).square_() + rest) / d


def hidden_moments(
    C: int, m: int, draws: int, samples: int, generator: torch.Generator, *, d: int | None = None
) -> HiddenMoments:
    """Moments of Section 7.2 by Monte Carlo over V (``draws`` times) and, for each V, over z (``samples`` times).

    The projections W x of a sample are replaced by z ~ N(0, I_m), as the paper's decoupling allows; at a finite ``d``
    a W is drawn with each V, which all samples share as they share V. Products of two expectations given the same V
    are estimated without bias from pairs of different samples.

    Raises
    ------
    ValueError
        If C < 2, m < 2, samples < 2, draws < 1 or d < 1.
    """
    _check_classes(C)
    check_least(1, draws=draws, d=math.inf if d is None else d)
    if m < 2 or samples < 2:
        raise ValueError(f"at least 2 neurons and 2 samples are needed, got m = {m} and samples = {samples}")
    upper = torch.triu_indices(m, m, offset=1)
    rows = []
    for _ in range(draws):
        V = torch.randn(C, m, generator=generator, dtype=torch.float64) / math.sqrt(m)
        if d is None:
            z, lengths, angles = torch.randn(samples, m, generator=generator, dtype=torch.float64), 1.0, None
        else:
            z, lengths, angles = _projections(m, d, samples, generator)
            lengths = lengths[:, None]
        s = z.clamp(min=0)
        active = (z > 0).to(z.dtype)
        p = torch.softmax(s @ V.T, dim=1)
        mean = p @ V
        second = (p @ (V[:, :, None] * V[:, None, :]).reshape(C, m * m)).reshape(samples, m, m)
        covariance = (second - mean[:, :, None] * mean[:, None, :]) * active[:, :, None] * active[:, None, :]
        xi = covariance.diagonal(dim1=1, dim2=2)
        eta = covariance[:, upper[0], upper[1]]
        gram = (s @ s.T).square_()
        own = gram.diagonal() / samples
        gram = gram.fill_diagonal_(0) / (samples * (samples - 1))
        variance = p * (1 - p)
        squares = p * p
        same = p @ p.T
        rows.append(
            torch.stack([
                xi.mean(), (lengths * xi**2).mean(), _of_pairs(xi, angles).mean(),
                eta.mean(), (lengths * eta**2).mean(), _of_pairs(eta, angles).mean(),
                (gram * (variance @ variance.T)).sum() / C,
                (gram * (same**2 - squares @ squares.T)).sum() / (C * (C - 1)),
                own @ (variance**2).sum(1) / C,
                own @ (squares.sum(1) ** 2 - (squares**2).sum(1)) / (C * (C - 1)),
            ])
        )  # fmt: skip
    return HiddenMoments(*torch.stack(rows, dim=1), math.inf if d is None else d)


def h_ii_limit(gamma: float, m: int) -> float:
    """Limit of h_ii as C grows, (30): right as printed, since ξ tends to 1(z_i > 0)/m whatever V."""
    check_least(1, m=m)
    return (1 + 2 * gamma) / (4 * m**2)


def u_ii(gamma: float, C: int, m: int) -> float:
    """E||H_{w_i w_i}||²/d under MSE at any C, where (100) leaves the output weights out; limit (31) is right."""
    check_least(1, C=C, m=m)
    return C * (C + 2) / m**2 * (1 + 2 * gamma) / 4


def u_ij(gamma: float, C: int, m: int) -> float:
    """E||H_{w_i w_j}||²/d under MSE at any C, where (101) leaves the output weights out; limit (31) is right."""
    check_least(1, C=C, m=m)
    return C / m**2 * (1 + 4 * gamma) / 16


def quadrant_moment(k: int, rho: float) -> float:
    r"""Integral of :math:`(xy)^k e^{\rho xy}` over the positive quadrant under the standard Gaussian, k = 0, 1, 2.

    :math:`J_0 = (1/4 + \arcsin(\rho)/2\pi)/\sqrt{1-\rho^2}`, the orthant probability of two Gaussians with
    correlation ρ over :math:`\sqrt{1-\rho^2}`, and :math:`J_{k+1} = dJ_k/d\rho`. In (67), :math:`a_{11} = J_1(1/m)`,
    :math:`a_{12} = J_2(1/m)`,
    :math:`a_{21} = J_1(2/m)` and :math:`a_{22} = J_2(2/m)`.

    Raises
    ------
    ValueError
        If rho >= 1, where the integral diverges: for ρ = 2/m already at m = 2, where (67) calls it finite, or if
        rho <= -1, where the formula does not hold.
    """
    if not -1 < rho < 1:
        raise ValueError(f"the integral diverges at rho = {rho:g}: with rho = k/m, m must exceed k")
    s = 1 - rho**2
    theta = 0.25 + math.asin(rho) / (2 * math.pi)
    if k == 0:
        return theta / math.sqrt(s)
    if k == 1:
        return theta * rho / s**1.5 + 1 / (2 * math.pi * s)
    if k == 2:
        return theta * (1 + 2 * rho**2) / s**2.5 + 3 * rho / (2 * math.pi * s**2)
    raise ValueError(f"k must be 0, 1 or 2, got {k}")


def _rho(k: int, m: int) -> float:
    check_least(1, m=m)
    return k / m


def _b(rho: float) -> float:
    r""":math:`E[e^{\rho \sigma(x)\sigma(y)}] = 3/4 + J_0(\rho)`; (67) prints 3/4 + J_0/4, which is not 1 at ρ = 0."""
    return 0.75 + quadrant_moment(0, rho)


def _b_printed(rho: float) -> float:
    return 0.75 + quadrant_moment(0, rho) / 4


def h_ij_limit_printed(gamma: float, m: int) -> float:
    """Limit of C h_ij as (30) prints it: the term of γ alone."""
    check_least(3, m=m)
    ratio = math.sqrt(m / (m - 2))
    return gamma * (m - 1) ** 2 / (4 * (m - 2) ** 3 * m) * ((ratio + 1) / 2) ** (m - 2)


def h_ij_limit(gamma: float, m: int) -> float:
    r"""Limit of C h_ij: (30) plus the term that E over V leaves behind, by the delta method.

    Given z and z', the delta method gives :math:`C\,E[\eta\eta'] \to
    e^{s\cdot s'/m} \prod_{i=1,2} 1(z_i, z_i' > 0)\,(1/m + s_i s_i'/m^2)` with s = σ(z). At z' = z this is (95). Its
    mean over independent z, z' is :math:`(J_0/m + J_1/m^2)^2\, b^{m-2}` at ρ = 1/m, not zero.
    """
    rho = _rho(1, m)
    pair = (quadrant_moment(0, rho) / m + quadrant_moment(1, rho) / m**2) ** 2 * _b(rho) ** (m - 2)
    return h_ij_limit_printed(gamma, m) + pair


def q_ii_limit(m: int) -> float:
    r"""Limit of C² q_ii: :math:`E[(s\cdot s')^2 e^{s\cdot s'/m}]`, which is (32) with the right b_1."""
    rho = _rho(1, m)
    a1, a2, b = quadrant_moment(1, rho), quadrant_moment(2, rho), _b(rho)
    return m * a2 * b ** (m - 1) + m * (m - 1) * a1**2 * b ** (m - 2)


def q_ii_limit_printed(m: int) -> float:
    """Limit of C² q_ii as (32) and (67) print it."""
    rho = _rho(1, m)
    a1, a2, b = quadrant_moment(1, rho), quadrant_moment(2, rho), _b_printed(rho)
    return m * a2 * b ** (m - 1) + m * (m - 1) * a1**2 * b ** (m - 2)


def q_ij_limit(m: int) -> float:
    r"""Limit of C⁴ q_ij: :math:`E[(s\cdot s')^2 e^{2s\cdot s'/m}]`; (33) has a wrong b_2 and a wrong exponent."""
    rho = _rho(2, m)
    a1, a2, b = quadrant_moment(1, rho), quadrant_moment(2, rho), _b(rho)
    return m * a2 * b ** (m - 1) + m * (m - 1) * a1**2 * b ** (m - 2)


def q_ij_limit_printed(m: int) -> float:
    """Limit of C⁴ q_ij as (33) and (67) print it, with b_2^(m-1) in both terms."""
    rho = _rho(2, m)
    a1, a2, b = quadrant_moment(1, rho), quadrant_moment(2, rho), _b_printed(rho)
    return m * a2 * b ** (m - 1) + m * (m - 1) * a1**2 * b ** (m - 1)


@dataclass(frozen=True)
class LimitSamples:
    """Independent samples, shape (R,), whose means are limits at C = ∞; see :func:`sampled_limits`."""

    xi_squared: Float[Tensor, "R"]
    xi_pair: Float[Tensor, "R"]
    eta_squared: Float[Tensor, "R"]
    eta_pair: Float[Tensor, "R"]
    q_ii: Float[Tensor, "R"]
    q_ij: Float[Tensor, "R"]

    def h_ii(self, gamma: float) -> SampledValue:
        """Limit of h_ii."""
        return SampledValue.of(gamma * self.xi_squared + self.xi_pair)

    def h_ij(self, gamma: float) -> SampledValue:
        """Limit of C h_ij."""
        return SampledValue.of(gamma * self.eta_squared + self.eta_pair)


def sampled_limits(m: int, draws: int, generator: torch.Generator) -> LimitSamples:
    r"""Sample the expectations at C = ∞ themselves, where no bias of order 1/C can hide or feign an error.

    At C = ∞ the softmax weights given z are the tilted law :math:`v \sim N(\sigma(z)/m, I/m)`, so that only z and an
    independent z' are left to draw. Coordinate pairs (z_k, z'_k) come from an even mixture of independence and of the
    Gaussian whose density is proportional to :math:`e^{\rho z z'}` times the independent one, ρ = 2/m, and are
    reweighted to independence: weights and exponentials stay bounded together, and all moments are finite.

    Raises
    ------
    ValueError
        If m < 3, where (33) is infinite.
    """
    check_least(3, m=m)
    rho = 2 / m
    z = torch.randn(draws, m, generator=generator, dtype=torch.float64)
    y = torch.randn(draws, m, generator=generator, dtype=torch.float64)
    tilted = torch.rand(draws, m, generator=generator, dtype=torch.float64) < 0.5
    y = torch.where(tilted, rho * z + math.sqrt(1 - rho**2) * y, y)
    scale = torch.where(tilted, 1 / math.sqrt(1 - rho**2), 1.0)
    z, y = scale * z, scale * y
    log_weight = -torch.log((1 + math.sqrt(1 - rho**2) * torch.exp(rho * z * y)) / 2).sum(1)
    s, t = z.clamp(min=0), y.clamp(min=0)
    overlap = (s * t).sum(1)
    pair = torch.exp(overlap / m + log_weight)
    both = (z > 0) & (y > 0)
    # At z' = z, (95), one vector is enough; drawn with variance 1/(1 - 2/m) its weight cancels the growing exponential.
    wide = torch.randn(draws, m, generator=generator, dtype=torch.float64)
    first_positive = (wide[:, 0] > 0).to(wide.dtype)
    wide = wide / math.sqrt(1 - 2 / m)
    s_wide = wide.clamp(min=0)
    own = torch.exp((s_wide**2 - wide**2).sum(1) / m) * (1 - 2 / m) ** (-m / 2)
    own = own * ((wide > 0) * (1 / m + s_wide**2 / m**2))[:, :2].prod(1)
    return LimitSamples(
        xi_squared=first_positive / m**2,
        xi_pair=torch.exp(log_weight) * both[:, 0] / m**2,
        eta_squared=own,
        eta_pair=pair * (both * (1 / m + s * t / m**2))[:, :2].prod(1),
        q_ii=overlap**2 * pair,
        q_ij=overlap**2 * torch.exp(2 * overlap / m + log_weight),
    )
