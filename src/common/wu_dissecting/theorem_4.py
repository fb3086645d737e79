r"""Two layers at initialization: Theorems 4.1, 4.2 and Appendix B of Wu et al. (2022), as printed and corrected.

Inputs have iid entries of mean μ and variance σ², weights W⁽¹⁾ ~ N(0, 1/d), W = W⁽²⁾ ~ N(0, 1/n); x ↦ u = W⁽¹⁾x, gates
D = diag(1[u > 0]), logits z = WDu, A = diag(p) − ppᵀ, M = E[D Wᵀ A W D], expectations given the weights.

Lemma B.1, (44), (45), takes the sum of n independent N(0, 1/n) for N(0, 1/n); it is N(0, 1). So the part
μ Σ_i W⁽¹⁾_pi of a preactivation, the same for all inputs, does not vanish, and a gate is no fair coin: with
g_p = Σ_i W⁽¹⁾_pi ~ N(0, 1)

    q_p = E[D_pp | W] = Φ(μ g_p/σ),       E_W[q^k] = E_g[Φ(g √(κ/(1 − κ)))^k],       κ = μ²/(μ² + σ²),

κ the cosine of two inputs. The mean of q is 1/2, that of q² is r = 1/4 + arcsin(κ)/(2π). With Q = diag(q), Ā = E[A]

    ‖M − Q Wᵀ Ā W Q‖_F → 0,      top c − 1 space {Q Wᵀ a : a ⟂ 1},      λ_i(M)/λ_i(Ā) → r,

while WQWᵀ → I/2 and WQ²Wᵀ → rI, so that the printed space R{W_i} ∖ {1ᵀW} overlaps with it by (1/2)²/r, for every c.
At the paper's inputs max(0, N(0, 1)), κ = 1/π, that is 0.829 instead of 1.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from common.hessian.layer import layer_hessian
from common.wu_dissecting.eigenspaces import overlap
from common.wu_dissecting.gates import (
    COSINE,
    RECTIFIED,
    gate_moment,
    limit_of_overlap,
    next_cosine,
)
from common.wu_dissecting.networks import classifier
from common.wu_dissecting.output_hessian import mean_curvature, range_of_contrasts, row_space_without_sum


def mean_logit_moments(cosine: float = COSINE, square: float = 0.5) -> tuple[float, float]:
    """Mean square of E[z_i | W] over weights, and the variance of z_i given W: (98), (99) of Lemma B.10, corrected.

    Given W the logits tend to N(W h, v I), with h = E[y] not 0. The mean of h² over units is E[x²] J(κ)/(2π) with J = π
    times :func:`next_cosine`; v is E[y²] less that.

    Parameters
    ----------
    square
        E[x²] of an input entry.
    """
    of_mean = square * float(next_cosine(cosine)) / 2
    return of_mean, square / 2 - of_mean


def curvature_of_logits(
    mean: Float[Tensor, "W c"], variance: float, *, samples: int, generator: torch.Generator
) -> Tensor:
    """Ā = E[diag(p) − ppᵀ] of logits N(mean, variance I), (W, c, c), over the same draws for all means."""
    z = torch.randn(samples, mean.shape[1], generator=generator, dtype=mean.dtype) * variance**0.5
    p = (mean[:, None] + torch.cat([z, -z])).softmax(2)
    return mean_curvature(p)


def spread_of_curvature(c: int, *, weights: int, samples: int, generator: torch.Generator) -> float:
    """λ₁/λ_{c−1} of Ā, mean over weights, by the corrected law of the logits; 1 by the printed one (Lemma B.12).

    Parameters
    ----------
    weights, samples
        Numbers of draws of E[z | W] and, twice, of z given W.
    """
    of_mean, variance = mean_logit_moments()
    mean = torch.randn(weights, c, generator=generator, dtype=torch.float64) * of_mean**0.5
    values = [
        torch.linalg.eigvalsh(curvature_of_logits(part, variance, samples=samples, generator=generator))
        for part in mean.split(50)
    ]
    values = torch.cat(values)
    return float((values[:, -1] / values[:, 1]).mean())


@dataclass(frozen=True)
class TwoLayers:
    """One draw of inputs and weights.

    Attributes
    ----------
    X
        (N, d) inputs.
    first, second
        (n, d) W⁽¹⁾ and (c, n) W⁽²⁾.
    mean, variance
        Of an input entry.
    """

    X: Float[Tensor, "N d"]
    first: Float[Tensor, "n d"]
    second: Float[Tensor, "c n"]
    mean: float
    variance: float

    @classmethod
    def draw(
        cls, n: int, d: int, c: int, *, samples: int, generator: torch.Generator, shift: float | None = None
    ) -> "TwoLayers":
        """Inputs max(0, N(0, 1)), or N(shift, 1) if that is given, W⁽¹⁾ ~ N(0, 1/d), W⁽²⁾ ~ N(0, 1/n), in this order.

        Raises
        ------
        ValueError
            If there are fewer than 2 classes, no inputs or samples, or fewer hidden units than classes.
        """
        if not 2 <= c <= n or d < 1 or samples < 1:
            given = f"n = {n}, d = {d}, c = {c}, {samples} samples"
            raise ValueError(f"2 classes, as many hidden units, an input and a sample are needed at least, got {given}")
        X = torch.randn(samples, d, generator=generator)
        X = X.relu() if shift is None else X + shift
        W1, W2 = torch.randn(n, d, generator=generator) / d**0.5, torch.randn(c, n, generator=generator) / n**0.5
        return cls(X, W1, W2, *(RECTIFIED if shift is None else (shift, 1.0)))

    @cached_property
    def gates(self) -> Float[Tensor, " n"]:
        """q = Φ(μ Σ_i W_pi/(σ √(Σ_i W_pi²))), given the weights alone; exact for Gaussian inputs."""
        W = self.first.double()
        return torch.special.ndtr(self.mean * W.sum(1) / (self.variance * W.square().sum(1)).sqrt())

    @property
    def printed_space(self) -> Float[Tensor, "n k"]:
        """Basis of R{W_i} ∖ {1ᵀW}, k = c − 1: the orthogonal complement of the sum of the rows in their span."""
        return row_space_without_sum(self.second.double())

    @property
    def derived_space(self) -> Float[Tensor, "n k"]:
        """Basis of {QWᵀa : a ⟂ 1}."""
        return range_of_contrasts(self.second.double() * self.gates)


class OutputMeasures(NamedTuple):
    """What Theorem 4.2 and Appendix B say of M, measured in one draw.

    Attributes
    ----------
    row_sum
        Mean square of Σ_j W⁽²⁾_ij over i: Lemma B.1.
    gate
        Mean square of a gate's mean over units: Lemma B.9.
    logit_mean, logit_variance
        Means over i of E[z_i | W]² and of Var(z_i | W): Lemma B.10.
    curvature
        λ₁/λ_{c−1} of E[A]: Lemma B.12.
    eight
        ‖M* − (8)‖_F/‖M*‖_F, M* = E[DDᵀ] ∘ WᵀE[A]W as Theorem 4.2 defines it.
    eight_corrected
        The same with Q WᵀE[A]W Q + diag(q_p (1 − q_p) (WᵀE[A]W)_pp).
    trace_share
        Share of the trace of M* in its top c − 1 eigenvalues; 1/2 if both terms of (8) have the same trace.
    eigenvalues
        Mean of λ_i(M)/λ_i(E[A]), i < c; 1/4 by (8).
    projection
        ‖WMWᵀ‖²_F/‖M‖²_F, (192).
    residual, residual_derived
        ‖M − WᵀE[A]W/4‖_F/‖M‖_F, (224), and with Q WᵀE[A]W Q instead.
    same_space
        1 − Overlap(S₁, S₂) of the top c − 1 spaces of M and M*, (42).
    ratio
        λ_c/λ_{c−1} of M, (7), (43).
    printed, derived
        1 − overlap of S₁ with R{W_i} ∖ {1ᵀW} and with {QWᵀa : a ⟂ 1}.
    between
        1 − overlap of these two: of weights alone, no inputs.
    """

    row_sum: float
    gate: float
    logit_mean: float
    logit_variance: float
    curvature: float
    eight: float
    eight_corrected: float
    trace_share: float
    eigenvalues: float
    projection: float
    residual: float
    residual_derived: float
    same_space: float
    ratio: float
    printed: float
    derived: float
    between: float


def output_measures(layers: TwoLayers) -> OutputMeasures:
    """M and M* over the inputs of a draw, from the formula (4) with gates and probabilities."""
    W, N, (c, n) = layers.second, len(layers.X), layers.second.shape
    u = layers.X @ layers.first.T
    D = (u > 0).to(u.dtype)
    z = u.relu() @ W.T
    p = z.softmax(1)
    A = mean_curvature(p).double()
    PW, M = p @ W, torch.zeros(n, n)
    for k in range(c):
        B = p[:, k, None].sqrt() * (W[k] - PW) * D
        M.addmm_(B.T, B)
    M, both, q, W = (M / N).double(), (D.T @ D / N).double(), layers.gates, W.double()
    core = W.T @ A @ W
    star, corrected = both * core, q[:, None] * core * q
    diagonal = torch.diag(core.diagonal())
    (values, vectors), (values_star, vectors_star) = (torch.linalg.eigh(matrix) for matrix in (M, star))
    top, of_A = values[-c:].flip(0), torch.linalg.eigvalsh(A)[1:].flip(0)
    S1, norm, norm_star = vectors[:, 1 - c :], torch.linalg.norm(M), torch.linalg.norm(star)
    spaces = layers.printed_space, layers.derived_space
    measures = dict(
        row_sum=W.sum(1).square().mean(), gate=D.mean(0).double().square().mean(),
        logit_mean=z.mean(0).square().mean(), logit_variance=z.var(0).mean(), curvature=of_A[0] / of_A[-1],
        eight=torch.linalg.norm(star - (core + diagonal) / 4) / norm_star,
        eight_corrected=torch.linalg.norm(star - corrected - diagonal * (q - q.square())) / norm_star,
        trace_share=values_star[1 - c :].sum() / values_star.sum(), eigenvalues=(top[:-1] / of_A).mean(),
        projection=(torch.linalg.norm(W @ M @ W.T) / norm) ** 2, residual=torch.linalg.norm(M - core / 4) / norm,
        residual_derived=torch.linalg.norm(M - corrected) / norm,
        same_space=1 - overlap(S1, vectors_star[:, 1 - c :]), ratio=top[-1] / top[-2],
        printed=1 - overlap(S1, spaces[0]), derived=1 - overlap(S1, spaces[1]), between=1 - overlap(*spaces),
    )  # fmt: skip
    return OutputMeasures(**{name: float(value) for name, value in measures.items()})


class Constant(NamedTuple):
    """A limit that the paper prints of one of :class:`OutputMeasures`, and the one that is derived.

    Attributes
    ----------
    key
        Name of the measure.
    statement, source, note
        What it is, where it stands, what is wrong with it.
    printed, derived
        Its limit as the width grows.
    with_width
        Whether it nears its limit as 1/n, or has it at all widths, on average over weights.
    """

    key: str
    statement: str
    source: str
    printed: float
    derived: float
    with_width: bool
    note: str


def constants(c: int, seed: int = 0) -> list[Constant]:
    """All of Appendix B that hangs on Lemma B.1, in its order, for c classes.

    Parameters
    ----------
    seed
        Of the draws that the derived value of Lemma B.12 is a mean of.
    """
    generator = torch.Generator().manual_seed(seed)
    r, o, variance = gate_moment(2), limit_of_overlap(), RECTIFIED[1] ** 2
    of_mean, of_variance = mean_logit_moments()
    spread = spread_of_curvature(c, weights=2000, samples=1000, generator=generator)
    return [
        Constant(
            "row_sum", "mean square of Σ_j W⁽²⁾_ij", "Lemma B.1, (44), (45)", 0.0, 1.0, False,
            "The variance of a sum of n independent N(0, 1/n) is 1 at every n; 1/n is that of their mean.",
        ),
        Constant(
            "gate", "mean over units of E[D_pp]²", "Lemma B.9, (81), (89), (126)", 0.25, r, False,
            "By Lemma B.1 the mean of every preactivation is dropped. It is N(0, 1/(2π)) over the weights, so that a "
            "gate given the weights is Bernoulli(q_p), q_p = Φ(Σ_i W_pi/√(π − 1)), and no fair coin.",
        ),
        Constant(
            "logit_mean", "mean square of E[z_i] given the weights", "Lemma B.10, (91), (99)", 0.0, of_mean, False,
            "E[z] = W⁽²⁾E[y] is dropped by Lemma B.1; its entries are N(0, 0.1234) over the weights.",
        ),
        Constant(
            "logit_variance", "variance of z_i given the weights", "Lemma B.10, (98), (99)", variance, of_variance,
            False, "The activations are rectified Gaussians about means that differ, not about 0.",
        ),
        Constant(
            "curvature", "λ₁/λ_{c−1} of E[A]", "Lemma B.12, (108), (120)", 1.0, spread, False,
            "The lemma takes the limit of E[A] for one constant matrix, with logits N(0, γI): then its c − 1 "
            "eigenvalues are equal, by exchangeability. With E[z] not 0 it is random with the weights. Its rank stays "
            "c − 1. The derived value is the mean over E[z] of the corrected law.",
        ),
        Constant(
            "eight", "‖M* − (8)‖_F/‖M*‖_F", "Theorem 4.2, (8), (140) to (143)", 0.0, (1 - o**2) ** 0.5, True,
            "The factor 1/4 is E[D_p]E[D_q] of fair coins; it is q_p q_q, and q_p on the diagonal.",
        ),
        Constant(
            "trace_share", "share of the trace of M* in its top c − 1 eigenvalues", "Theorem 4.2, (8)", 0.5, 2 * r,
            True, "The two terms of (8) are said to have the same trace. With the corrected gates their traces are as "
            "r to 1/2 − r.",
        ),
        Constant(
            "eigenvalues", "λ_i(M)/λ_i(E[A]), mean over i < c", "Theorem 4.2, (8), (144)", 0.25, r, True,
            "It is the mean of q², not the square of its mean.",
        ),
        Constant(
            "projection", "‖WMWᵀ‖²_F/‖M‖²_F", "(137), Lemma B.14, (192), (199)", 1.0, o**2, True,
            "The projection onto the rows of W does lose information: M lives on those of WQ.",
        ),
        Constant(
            "residual", "‖M − WᵀE[A]W/4‖_F/‖M‖_F", "Theorem 4.2, (224), (228)", 0.0, (1 - o**2) ** 0.5, True,
            "M tends to QWᵀE[A]WQ with Q = diag(q) instead.",
        ),
        Constant(
            "printed", "1 − overlap of the top c − 1 space of M with R{W_i} ∖ {1ᵀW}",
            "Theorem 4.2 in words, (229), (230)", 0.0, 1 - o, True,
            "The top space is that of {QWᵀa : a ⟂ 1}; its overlap with the printed one tends to "
            "1/(1 + (2/π) arcsin(1/π)) = 0.829 for every c.",
        ),
    ]  # fmt: skip


class HessianMeasures(NamedTuple):
    """What the theorems say of the first layer's Hessian H, measured in one draw.

    Attributes
    ----------
    overlap
        1 − Overlap(V₁, V₂) of the top c − 1 spaces of H and of its Kronecker product (5).
    printed, derived
        1 − overlap of V₁ with the printed and the derived space of M, each times 1/√d: Corollary B.5.
    ratio
        λ_c/λ_{c−1} of H, (6).
    output
        1 − overlap of the top space of E[M] with the printed one in the same draw.
    """

    overlap: float
    printed: float
    derived: float
    ratio: float
    output: float


def hessian_measures(layers: TwoLayers) -> HessianMeasures:
    """H over the inputs of a draw, by block Lanczos."""
    (c, n), d = layers.second.shape, layers.X.shape[1]
    network = classifier(f"F-{n}", (d, 1, 1), c)
    biases = {"fc1.bias": torch.zeros(n), "fc2.bias": torch.zeros(c)}
    network.load_state_dict({"fc1.weight": layers.first, "fc2.weight": layers.second} | biases)
    H = layer_hessian(network, "fc1", layers.X)
    found = H.top_eigenpairs(c)
    V1, one = found.vectors[:, : c - 1], torch.full((d, 1), d**-0.5, dtype=torch.float64)
    return HessianMeasures(
        1 - overlap(V1, H.kronecker_eigenpairs(c - 1)[1]),
        1 - overlap(V1, torch.kron(layers.printed_space, one)),
        1 - overlap(V1, torch.kron(layers.derived_space, one)),
        float(found.values[-1] / found.values[-2]),
        1 - overlap(H.output_basis[1][:, : c - 1], layers.printed_space),
    )
