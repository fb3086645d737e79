"""Gaussian posteriors over the weights of a network, diagonal in bases of their own: Wu et al. (2022), App H.

Q draws W = U (M + Ξ ∘ exp ς) Vᵀ for every layer, Ξ standard normal: a diagonal Gaussian in the basis of U ⊗ V, columns
of orthogonal matrices. With the eigenvectors of E[M] and E[xxᵀ] that is a diagonal in the eigenbasis of the
Kronecker-factored Hessian, (279), (280). P is the same in every orthogonal basis, and KL is taken in this one. What is
kept and optimized are the rotated M, so that a step rotates the layer's inputs and outputs, Vᵀx and Uz, instead of its
weights. U and V may depend on the samples, since they belong to Q.

**Drawing without weights.** Given the input x of a layer, which earlier layers' weights determine, W x is Gaussian, as
it is linear in Ξ: UᵀWx has independent entries of mean M Vᵀx and variance (exp 2ς)(Vᵀx)², entry by entry. One sample
passed through the network with such outputs drawn in every layer has therefore exactly the law that it has in a network
drawn from Q, at the cost of two products a layer, and samples that pass together have independent networks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.wu_dissecting.pac_bayes.bases import Weights, kronecker_factors, rotate, turn_back
from common.wu_dissecting.pac_bayes.bound import Bound, Confidence, pac_bayes_bound

#: Draws of a network and a sample that are passed on at once.
DRAWS_AT_ONCE = 2000


def gaussian_kl(
    mean: Float[Tensor, "*E m n"], log_std: Float[Tensor, "*E m n"], prior_mean: Float[Tensor, "*E m n"],
    half_log_prior: Float[Tensor, "*E"], rows: Float[Tensor, "*E m"] | None = None,
    columns: Float[Tensor, "*E n"] | None = None,
) -> Float[Tensor, "*E"]:  # fmt: skip
    """KL(Q‖P) in nats, of the matrix M + A (Ξ ∘ exp ς) Cᵀ under Q and P = N(prior mean, λ I), λ = exp 2ϱ.

    ½ Σ_ij [s_ij ‖a_i‖² ‖c_j‖²/λ − 1 − ln(s_ij/λ)] + ‖M − M₀‖²/2λ, s = exp 2ς, since det A = det C = 1; ‖a_i‖² and
    ‖c_j‖², the squared lengths of the columns of A and C, are ``rows`` and ``columns``, 1 for the diagonal Gaussian.
    """
    rho = half_log_prior[..., None, None]
    s = (2 * log_std).exp()
    if rows is not None and columns is not None:
        s = s * rows[..., :, None] * columns[..., None, :]
    return ((s + (mean - prior_mean).square()) * (-2 * rho).exp() / 2 - 0.5 - log_std + rho).sum((-2, -1))


def with_one(x: Tensor) -> Tensor:
    """The input of a bias behind the others."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def log_abs(weights: Tensor) -> Tensor:
    """ς with s = w², no less than 1e-12: a weight of 0 would have an infinite KL."""
    return weights.abs().clamp_min(1e-6).log()


@dataclass
class Posteriors:
    """E Gaussian posteriors over the weights of equal ReLU networks, each in its own bases.

    A layer of m outputs and n inputs has m × (n + 1) weights, the bias last, its input 1.

    Attributes
    ----------
    outputs, inputs
        Of every layer U (E, m, m) and V (E, n, n), orthogonal.
    mean, log_std, prior_mean
        Of every layer M, ς and the rotated w₀, (E, m, n + 1).
    prior_weights
        Of every layer w₀, (m, n + 1).
    half_log_prior
        (E,) ϱ = ½ ln λ.
    mixing
        Empty, or of every layer (A, C), (E, m, m) and (E, n + 1, n + 1), triangular with 1 on the diagonal: Q draws
        U (M + A (Ξ ∘ exp ς) Cᵀ) Vᵀ, diagonal in a basis that is learned and need not be orthogonal. Our addition.
    """

    outputs: list[Tensor]
    inputs: list[Tensor]
    mean: list[Tensor]
    log_std: list[Tensor]
    prior_mean: list[Tensor]
    prior_weights: Weights
    half_log_prior: Float[Tensor, " E"]
    mixing: list[tuple[Tensor, Tensor]]

    @classmethod
    def start(cls, weights: Weights, prior_weights: Weights, E: int, *, mixed: bool = False) -> "Posteriors":
        """In the standard basis, around a network, with s = w² and ϱ = −3 (Algorithm 1)."""

        def repeated(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [tensor.expand(E, *tensor.shape).clone() for tensor in tensors]

        def unit(size: int) -> Tensor:
            return torch.eye(size, dtype=weights[0].dtype, device=weights[0].device)

        outputs, inputs = repeated([unit(len(w)) for w in weights]), repeated([unit(w.shape[1] - 1) for w in weights])
        mixing = [tuple(repeated([unit(len(w)), unit(w.shape[1])])) for w in weights] if mixed else []
        rho = weights[0].new_full((E,), -3.0)
        found = cls(outputs, inputs, repeated(weights), [], repeated(prior_weights), prior_weights, rho, mixing)
        found.log_std = [log_abs(mean) for mean in found.mean]
        return found

    def tensors(self) -> list[Tensor]:
        """All that is in it."""
        mixing = [part for pair in self.mixing for part in pair]
        lists = self.outputs, self.inputs, self.mean, self.log_std, self.prior_mean, mixing
        return [*(tensor for group in lists for tensor in group), self.half_log_prior]

    def parameters(self) -> list[Tensor]:
        """What is optimized."""
        return [*self.mean, *self.log_std, self.half_log_prior, *(part for pair in self.mixing for part in pair)]

    def change_basis(self, e: int, layer: int, U: Float[Tensor, "m m"], V: Float[Tensor, "n n"]) -> None:
        """Let U and V be the bases of one layer; the mean network stays, ς keep their places (Algorithm 1)."""
        old = turn_back(self.mean[layer][e], self.outputs[layer][e], self.inputs[layer][e])
        self.mean[layer][e] = rotate(old, U, V)
        self.prior_mean[layer][e] = rotate(self.prior_weights[layer], U, V)
        self.outputs[layer][e], self.inputs[layer][e] = U, V

    def mean_weights(self, e: int) -> list[Float[Tensor, "_ _"]]:
        """Means in the standard basis."""
        return [turn_back(M[e], U[e], V[e]) for M, U, V in zip(self.mean, self.outputs, self.inputs, strict=True)]

    def variances(self) -> list[Float[Tensor, "E _ _"]]:
        """exp 2ς of every layer."""
        return [(2 * log_std).exp_() for log_std in self.log_std]

    def logits(
        self, x: Float[Tensor, "E rows n1"], noise: Sequence[Float[Tensor, "E B _"]], variances: Sequence[Tensor],
        passed: list[tuple] | None = None, places: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "E B classes"]:  # fmt: skip
        """Of samples that each pass through a network of their own.

        Parameters
        ----------
        x
            Rotated by the first V, with a 1 at the end: :meth:`rotated`.
        noise
            Independent standard normal numbers for the outputs of every layer.
        variances
            :meth:`variances`.
        passed
            Where to leave what the gradient needs of every layer.
        places
            Rows of x of the B samples, all rows in turn by default: samples that are drawn again and again need the
            mean and the variance of the first layer only once.
        """
        for layer, (U, M, s) in enumerate(zip(self.outputs, self.mean, variances, strict=True)):
            seen = x @ self.mixing[layer][1] if self.mixing else x
            squares = seen.square()
            std, z = (squares @ s.mT).sqrt_(), x @ M.mT
            if places is not None and layer == 0:
                std, z = std[:, places], z[:, places]
            drawn = std * noise[layer]
            z = z.add_(drawn @ self.mixing[layer][0].mT if self.mixing else drawn) @ U.mT
            if passed is not None:
                passed.append((x, seen, squares, std, drawn, z))
            if layer < len(self.mean) - 1:
                x = with_one(z.relu_() @ self.inputs[layer + 1])
        return z

    def rotated(self, X: Float[Tensor, "N n"]) -> list[Float[Tensor, "N n1"]]:
        """Inputs as each posterior sees them, one tensor for all that share the first V."""
        found: list[Tensor] = []
        for e, V in enumerate(self.inputs[0]):
            same = [k for k in range(e) if torch.equal(V, self.inputs[0][k])]
            found.append(found[same[0]] if same else with_one(X @ V))
        return found

    def kl(self, half_log_prior: float | None = None) -> Float[Tensor, " E"]:
        """KL(Q‖P) in nats, in double precision, for another ϱ than the one at hand if it is given."""
        rho = self.half_log_prior.double()
        rho = rho if half_log_prior is None else torch.full_like(rho, half_log_prior)
        total = torch.zeros_like(rho)
        for layer, parts in enumerate(zip(self.mean, self.log_std, self.prior_mean, strict=True)):
            total += gaussian_kl(*(part.double() for part in parts), rho, *self.column_lengths(layer, torch.float64))
        return total

    def column_lengths(self, layer: int, dtype: torch.dtype) -> list[Tensor]:
        """‖a_i‖² and ‖c_j‖² of the columns of A and C, if there are any."""
        return [part.to(dtype).square().sum(1) for part in self.mixing[layer]] if self.mixing else []


def check_labelled(weights: Weights, X: Float[Tensor, "N n"], y: Int[Tensor, " N"]) -> None:
    """Whether samples and labels fit a network: a label that is none of the classes would count as an error.

    Raises
    ------
    ValueError
        If not, or if there are none.
    """
    n, classes = weights[0].shape[1] - 1, len(weights[-1])
    if X.shape != (len(y), n) or y.ndim != 1 or not len(y) or X.dtype != weights[0].dtype or not X.isfinite().all():
        given = f"X {tuple(X.shape)} {X.dtype}, y {tuple(y.shape)}"
        needed = f"samples X (N, {n}), finite and {weights[0].dtype}, and labels y (N,) are needed"
        raise ValueError(f"{needed}, N ≥ 1; got {given}")
    if y.is_floating_point() or y.min() < 0 or y.max() >= classes:
        raise ValueError(f"labels y must be whole numbers in 0..{classes - 1}, got {y.min()}..{y.max()}")


@torch.no_grad()
def count_errors(q: Posteriors, X: Float[Tensor, "N n"], y: Int[Tensor, " N"], draws: int, seed: int) -> list[int]:
    """Wrong answers of every posterior among independent draws of a network and, uniformly, a sample.

    Raises
    ------
    ValueError
        If samples and labels do not fit the network, or there are no draws.
    """
    check_labelled(q.prior_weights, X, y)
    if draws < 1:
        raise ValueError(f"the number of draws must be at least 1, got {draws}")
    generator = torch.Generator(y.device).manual_seed(index(seed))
    seen, variances, wrong = q.rotated(X), q.variances(), y.new_zeros(len(q.half_log_prior))
    drawn = torch.randint(len(y), (draws,), generator=generator, device=y.device).sort().values
    for rows in drawn.split(DRAWS_AT_ONCE):
        different, places = rows.unique_consecutive(return_inverse=True)
        shape = len(seen), len(rows)
        noise = [torch.randn(*shape, M.shape[1], dtype=X.dtype, device=y.device, generator=generator) for M in q.mean]
        logits = q.logits(torch.stack([one[different] for one in seen]), noise, variances, places=places)
        wrong += (logits.argmax(2) != y[rows]).sum(1)
    return wrong.tolist()


def bounds(
    q: Posteriors, X: Float[Tensor, "N n"], y: Int[Tensor, " N"], *, draws: int, seed: int, confidence: Confidence
) -> list[Bound]:
    """The bound of every posterior.

    Raises
    ------
    ValueError
        As :func:`count_errors` and :func:`~common.wu_dissecting.pac_bayes.bound.pac_bayes_bound`.
    """
    wrong = count_errors(q, X, y, draws, seed)
    return [
        pac_bayes_bound(wrong[e], draws, lambda rho, e=e: float(q.kl(rho)[e]), float(rho), len(y), confidence)
        for e, rho in enumerate(q.half_log_prior)
    ]


def spread_along_curvature(
    q: Posteriors, e: int, X: Float[Tensor, "N n"]
) -> list[tuple[Float[Tensor, " _"], Float[Tensor, " _"]]]:
    """Of every layer the curvature along each direction of the posterior's basis, descending, and the variance there.

    The curvature is that of E[M] ⊗ E[xxᵀ] at the posterior's mean, (uᵀE[M]u)(vᵀE[xxᵀ]v), k = m n; biases are left out.
    """
    found = []
    for layer, (M, autocorrelation) in enumerate(kronecker_factors(q.mean_weights(e), X)):
        U, V = q.outputs[layer][e], q.inputs[layer][e]
        curvature = torch.outer((U * (M @ U)).sum(0), (V * (autocorrelation @ V)).sum(0)).flatten()
        variance = (2 * q.log_std[layer][e]).exp()
        if q.mixing:
            A, C = (part[e] for part in q.mixing[layer])
            variance = A.square() @ variance @ C.square().T
        order = curvature.argsort(descending=True)
        found.append(tuple(part.double().cpu() for part in (curvature[order], variance[:, :-1].flatten()[order])))
    return found


def binned_by_rank(
    curvature: Float[Tensor, " k"], variance: Float[Tensor, " k"], points: int = 200
) -> dict[str, Float[Tensor, " points"]]:
    """``rank`` (mean), ``curvature`` and ``variance`` (geometric means) between logarithmically spaced ranks.

    nan where there is no rank between two.
    """
    ranks = torch.arange(1, len(curvature) + 1, dtype=torch.float64)
    edges = torch.logspace(0, math.log10(len(curvature) + 1), points + 1, dtype=torch.float64).long()
    place = torch.searchsorted(edges[1:-1], ranks.long(), right=True)
    count = torch.bincount(place, minlength=points)
    logs = {"curvature": curvature.clamp_min(1e-300).log(), "variance": variance.clamp_min(1e-300).log()}
    means = {key: (torch.bincount(place, part, minlength=points) / count).exp() for key, part in logs.items()}
    return {"rank": torch.bincount(place, ranks, minlength=points) / count, **means}
