r"""PAC-Bayes bound on the error of a stochastic network: Wu et al. (2022), App H, after Dziugaite and Roy (2017).

A prior P = N(w₀, λI) over the weights does not depend on the N samples S; a posterior Q may. With probability 1 − δ
over S, for all Q at once, kl(ê(Q)‖e(Q)) ≤ [KL(Q‖P) + ln(N/δ)]/(N − 1), where e is the error of a network drawn from Q
and ê that on S (Langford and Seeger; it follows from Maurer's [KL + ln(2√N/δ)]/N). The variance λ of the prior is
chosen after S was seen, among λ_j = c exp(−j/b), j = 1, 2, ...; giving each the confidence 6δ/(π²j²), which add up to
δ, makes the bound hold for all of them, at the price of 2 ln j + ln(π²/6) nats:

    B = [KL(Q‖P_j) + 2 ln j + ln(π²N/6δ)]/(N − 1),        j = b ln(c/λ_j).                                       (277)

(277) has P and Q of KL in the wrong order. ê(Q) is estimated from n independent draws of a network and a sample. Their
errors are Bernoulli variables of mean ê(Q), so that kl(their mean‖ê(Q)) ≤ ln(2/δ')/n with probability 1 − δ'
(Chernoff). Both are inverted, kl⁻¹(q|B) = max {p : kl(q‖p) ≤ B}, which grows with q and with B:

    e(Q) ≤ kl⁻¹( kl⁻¹(mean | ln(2/δ')/n) | B )            with probability 1 − δ − δ'.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from scipy import optimize
from torch import Tensor


@dataclass(frozen=True)
class Confidence:
    """With which probabilities the bound may fail, and the grid of prior variances; the values of App H.

    Attributes
    ----------
    delta
        Of the bound itself.
    delta_sampling
        δ', of the estimate of the stochastic network's error on the samples.
    b, c
        Of λ_j = c exp(−j/b).
    """

    delta: float = 0.025
    delta_sampling: float = 0.01
    b: float | int = 100
    c: float = 0.1

    def __post_init__(self) -> None:
        if not (0 < self.delta < 1 and 0 < self.delta_sampling < 1 and self.b > 0 and self.c > 0):
            raise ValueError(f"probabilities between 0 and 1 and positive b, c are needed, got {self}")

    @property
    def largest_prior(self) -> float:
        """ϱ = ½ ln λ_1: for λ between λ_1 and c, (277) has a negative term without bound, and no j."""
        return (math.log(self.c) - 1 / self.b) / 2

    def j(self, half_log_prior: float | Float[Tensor, "*E"]) -> float | Float[Tensor, "*E"]:
        """b ln(c/λ) at ϱ = ½ ln λ, which is an integer only on the grid."""
        return self.b * (math.log(self.c) - 2 * half_log_prior)


def binary_kl(q: float, p: float) -> float:
    """kl(q‖p) = q ln(q/p) + (1 − q) ln((1 − q)/(1 − p)) of two Bernoulli variables, in nats."""
    if not (0 <= q <= 1 and 0 <= p <= 1):
        raise ValueError(f"probabilities are needed, got {q}, {p}")
    if p in (0, 1):
        return 0.0 if q == p else math.inf
    first = q * math.log(q / p) if q > 0 else 0.0
    return first + ((1 - q) * (math.log1p(-q) - math.log1p(-p)) if q < 1 else 0.0)


def kl_inverse(q: float, bound: float) -> float:
    """The largest p with kl(q‖p) ≤ bound, rounded up: by 1e-12, and as if the bound were greater by 1e-15.

    Raises
    ------
    ValueError
        If q is no probability or the bound is negative.
    """
    if not (0 <= q <= 1 and bound >= 0):
        raise ValueError(f"a probability and a bound of at least 0 are needed, got {q}, {bound}")
    highest, raised = 1 - 1e-15, bound + 1e-15  # what kl loses in double precision
    if q >= highest or binary_kl(q, highest) <= raised:
        return 1.0
    root = optimize.brentq(lambda p: binary_kl(q, p) - raised, q, highest, xtol=1e-15, rtol=1e-14)
    return min(1.0, root + 1e-12)


def complexity(
    kl: Float[Tensor, "*E"], half_log_prior: Float[Tensor, "*E"], samples: int, confidence: Confidence
) -> Float[Tensor, "*E"]:
    """B_RE of (277), KL(Q‖P) in its right order, for j = b ln(c/λ) that need not be an integer; NaN for λ > c.

    Raises
    ------
    ValueError
        If there are fewer than two samples.
    """
    if samples < 2:
        raise ValueError(f"a bound needs at least 2 samples, got {samples}")
    j = confidence.j(half_log_prior)
    return (kl + 2 * j.log() + math.log(math.pi**2 * samples / (6 * confidence.delta))) / (samples - 1)


@dataclass(frozen=True)
class Bound:
    """A bound on the error of a stochastic network, and what it was made of.

    Attributes
    ----------
    bound
        Of e(Q), with probability 1 − δ − δ'.
    error, error_bound
        Mean error of the draws, and the bound of ê(Q) that they give.
    kl
        KL(Q‖P_j) in nats.
    j
        Of the prior variance.
    half_log_prior
        ϱ = ½ ln λ_j, which Table 10 prints as λ.
    """

    bound: float
    error: float
    error_bound: float
    kl: float
    j: int
    half_log_prior: float


def pac_bayes_bound(
    errors: int, draws: int, kl: Callable[[float], float], half_log_prior: float, samples: int, confidence: Confidence
) -> Bound:
    """The bound, after λ has been rounded to one of the λ_j.

    Of the two next to λ the better is taken; the bound holds for all j at once.

    Parameters
    ----------
    errors, draws
        Wrong answers among so many independent draws of a network and a sample.
    kl
        KL(Q‖P) as a function of ϱ = ½ ln λ.
    half_log_prior
        The optimized ϱ.
    samples
        N.

    Raises
    ------
    ValueError
        If there are no draws, more errors than draws, or fewer than 8 samples (below, Maurer's constant is not proved);
        if ϱ is not finite, or KL negative.
    """
    if not math.isfinite(half_log_prior):
        raise ValueError(f"half_log_prior must be finite, got {half_log_prior}")
    if not 0 <= errors <= draws or draws < 1 or samples < 8:
        raise ValueError(f"got {errors} errors in {draws} draws, {samples} samples; at least 1 draw and 8 samples")
    error = errors / draws
    error_bound = kl_inverse(error, math.log(2 / confidence.delta_sampling) / draws)
    found = []
    place = confidence.j(half_log_prior)
    for j in {max(1, math.floor(place)), max(1, math.ceil(place))}:
        rho = (math.log(confidence.c) - j / confidence.b) / 2
        nats = kl(rho)
        if not nats >= 0:
            raise ValueError(f"KL(Q‖P) must not be negative, got {nats}")
        union = 2 * math.log(j) + math.log(math.pi**2 * samples / (6 * confidence.delta))
        found.append(Bound(kl_inverse(error_bound, (nats + union) / (samples - 1)), error, error_bound, nats, j, rho))
    return min(found, key=lambda one: one.bound)


def with_more_draws(error_bound: float, draws: int, more: int, delta_sampling: float) -> float:
    """The bound of ê(Q) that as large a share of errors gives among ``more`` draws instead of ``draws``.

    Raises
    ------
    ValueError
        If no share of errors gives ``error_bound``.
    """
    nats = math.log(2 / delta_sampling)
    if not kl_inverse(0.0, nats / draws) < error_bound <= 1:
        raise ValueError(f"no share of errors among {draws} draws gives the bound {error_bound}")
    error = optimize.brentq(lambda q: kl_inverse(q, nats / draws) - error_bound, 0.0, error_bound, xtol=1e-12)
    return kl_inverse(error, nats / more)


def implied_union(bound: float, error_bound: float, kl: float, samples: int, confidence: Confidence) -> float:
    """The nats 2 ln j that a bound must have contained, from the other numbers of its row: (275), (277) solved for j.

    At least 0 for a j that the union over j = 1, 2, ... has.
    """
    return binary_kl(error_bound, bound) * (samples - 1) - kl - math.log(math.pi**2 * samples / (6 * confidence.delta))
