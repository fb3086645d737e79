r"""PAC-Bayes bounds for stochastic networks: Wu et al. (2022), Section 6, App H, after Dziugaite and Roy (2017).

**The bound.** A prior P = N(w₀, λI) over the weights does not depend on the N samples S; a posterior Q may. With
probability 1 − δ over S, for all Q at once, kl(ê(Q)‖e(Q)) ≤ [KL(Q‖P) + ln(N/δ)]/(N − 1), where e is the error of a
network drawn from Q and ê that on S (Langford and Seeger; it follows from Maurer's [KL + ln(2√N/δ)]/N). The variance
λ of the prior is chosen after S was seen, among λ_j = c exp(−j/b), j = 1, 2, ...; giving each the confidence
6δ/(π²j²), which add up to δ, makes the bound hold for all of them, at the price of 2 ln j + ln(π²/6) nats:

    B = [KL(Q‖P_j) + 2 ln j + ln(π²N/6δ)]/(N − 1),        j = b ln(c/λ_j).                                       (277)

(277) has P and Q of KL in the wrong order. ê(Q) is estimated from n independent draws of a network and a sample. Their
errors are Bernoulli variables of mean ê(Q), so that kl(their mean‖ê(Q)) ≤ ln(2/δ')/n with probability 1 − δ'
(Chernoff). Both are inverted, kl⁻¹(q|B) = max {p : kl(q‖p) ≤ B}, which grows with q and with B:

    e(Q) ≤ kl⁻¹( kl⁻¹(mean | ln(2/δ')/n) | B )            with probability 1 − δ − δ'.

**The posterior.** Q draws W = U (M + Ξ ∘ exp ς) Vᵀ for every layer, Ξ standard normal: a diagonal Gaussian in the basis
of U ⊗ V, columns of orthogonal matrices. With the eigenvectors of E[M] and E[xxᵀ] that is a diagonal in the eigenbasis
of the Kronecker-factored Hessian, (279), (280). P is the same in every orthogonal basis, and KL is taken in this one.
What is kept and optimized are the rotated M, so that a step rotates the layer's inputs and outputs, Vᵀx and Uz, instead
of its weights. U and V may depend on S, since they belong to Q.

**Drawing without weights.** Given the input x of a layer, which earlier layers' weights determine, W x is Gaussian, as
it is linear in Ξ: UᵀWx has independent entries of mean M Vᵀx and variance (exp 2ς)(Vᵀx)², entry by entry. One sample
passed through the network with such outputs drawn in every layer has therefore exactly the law that it has in a network
drawn from Q, at the cost of two products a layer, and samples that pass together have independent networks. The
optimization takes its gradient from the same draws (one network for each sample of a batch instead of one for all:
equal in the mean, less noise).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from scipy import optimize
from torch import Tensor, nn

from common.dong_quantifying.full_batch import Checkpoint
from common.hessian.layer import layer_hessian

#: Of every layer (m, n + 1), the bias last.
Weights = Sequence[Float[Tensor, "m n1"]]
#: Added to the seeds of the order of samples, so that it does not share a stream with the noise.
ORDER = 2**29
#: Draws of a network and a sample that are passed on at once.
DRAWS_AT_ONCE = 2000


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
    b: float = 100
    c: float = 0.1

    def __post_init__(self) -> None:
        if not (0 < self.delta < 1 and 0 < self.delta_sampling < 1 and self.b > 0 and self.c > 0):
            raise ValueError(f"probabilities between 0 and 1 and positive b, c are needed, got {self}")

    @property
    def largest_prior(self) -> float:
        """ϱ = ½ ln λ_1: for λ between λ_1 and c, (277) has a negative term without bound, and no j."""
        return (math.log(self.c) - 1 / self.b) / 2


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


def complexity(
    kl: Float[Tensor, "*E"], half_log_prior: Float[Tensor, "*E"], samples: int, confidence: Confidence
) -> Float[Tensor, "*E"]:
    """B_RE of (277), KL(Q‖P) in its right order, for j = b ln(c/λ) that need not be an integer."""
    j = confidence.b * (math.log(confidence.c) - 2 * half_log_prior)
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
        If there are no draws, more errors than draws, or fewer than 8 samples (below, Maurer's constant is not proved).
    """
    if not 0 <= errors <= draws or draws < 1 or samples < 8:
        raise ValueError(f"got {errors} errors in {draws} draws, {samples} samples; at least 1 draw and 8 samples")
    error = errors / draws
    error_bound = kl_inverse(error, math.log(2 / confidence.delta_sampling) / draws)
    found = []
    place = confidence.b * (math.log(confidence.c) - 2 * half_log_prior)
    for j in {max(1, math.floor(place)), max(1, math.ceil(place))}:
        rho = (math.log(confidence.c) - j / confidence.b) / 2
        nats = kl(rho)
        union = 2 * math.log(j) + math.log(math.pi**2 * samples / (6 * confidence.delta))
        found.append(Bound(kl_inverse(error_bound, (nats + union) / (samples - 1)), error, error_bound, nats, j, rho))
    return min(found, key=lambda one: one.bound)


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

    def mean_weights(self, e: int) -> list[Float[Tensor, "m n1"]]:
        """Means in the standard basis."""
        return [turn_back(M[e], U[e], V[e]) for M, U, V in zip(self.mean, self.outputs, self.inputs, strict=True)]

    def variances(self) -> list[Float[Tensor, "E m n1"]]:
        """exp 2ς of every layer."""
        return [(2 * log_std).exp_() for log_std in self.log_std]

    def logits(
        self, x: Float[Tensor, "E B n1"], noise: Sequence[Float[Tensor, "E B m"]], variances: Sequence[Tensor],
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
            Where to leave what :class:`Descent` needs of every layer.
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


class Descent:
    """Adam on the objective (278) of E posteriors, the gradient written out by hand.

    The surrogate of the error is the cross-entropy in bits, which is at least 1 wherever the answer is wrong.

    Parameters
    ----------
    posteriors
        Are changed in place.
    N
        Number of all samples.
    """

    def __init__(self, posteriors: Posteriors, N: int, confidence: Confidence):
        self.posteriors, self.N, self.confidence = posteriors, N, confidence
        for parameter in posteriors.parameters():
            parameter.grad = torch.zeros_like(parameter)
        # Buffers: the memory of a large temporary costs more than what is computed in it.
        self._s, self._difference = ([torch.empty_like(mean) for mean in posteriors.mean] for _ in range(2))
        device = posteriors.half_log_prior.device
        captured = device.type == "cuda"
        fast = [*posteriors.log_std, posteriors.half_log_prior]
        slow = [parameter for parameter in posteriors.parameters() if all(parameter is not other for other in fast)]
        self.optimizer = torch.optim.Adam(
            [{"params": group, "lr": torch.tensor(0.0, device=device) if captured else 0.0} for group in (slow, fast)],
            fused=True, capturable=captured,
        )  # fmt: skip
        self.optimizer.step()  # all gradients are 0: it only makes the optimizer's state
        for moments in self.optimizer.state.values():
            moments["step"].zero_()
        self._generator = torch.Generator(device)
        self._replay: Callable[[Tensor], Tensor] | None = None

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        state = {f"posterior:{k}": tensor for k, tensor in enumerate(self.posteriors.tensors())}
        for k, parameter in enumerate(self.posteriors.parameters()):
            state |= {f"adam:{k}:{name}": tensor for name, tensor in self.optimizer.state[parameter].items()}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """What :meth:`state` gave, in place."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def gradient(
        self, x: Float[Tensor, "E B n1"], y: Int[Tensor, " B"], noise: Sequence[Float[Tensor, "E B m"]]
    ) -> Float[Tensor, " E"]:
        """The objective on a batch; the gradient of its sum over E is left in ``.grad`` of the parameters."""
        q, passed = self.posteriors, []
        for log_std, s in zip(q.log_std, self._s, strict=True):
            torch.mul(log_std, 2, out=s).exp_()
        log_p = q.logits(x, noise, self._s, passed).log_softmax(2)
        answers = y[None, :, None].expand(len(x), -1, 1)
        loss = -log_p.gather(2, answers).mean((1, 2)) / math.log(2)
        delta = log_p.exp_().scatter_add_(2, answers, -torch.ones_like(answers, dtype=x.dtype))
        delta /= len(y) * math.log(2)

        # KL = Σ over layers of T/2λ + mn (ϱ − ½) − Σς, with T = Σ s ‖a_i‖² ‖c_j‖² + ‖M − M₀‖².
        rho = q.half_log_prior
        lengths = [q.column_lengths(layer, x.dtype) for layer in range(len(passed))]
        traces, nats = 0, 0
        for layer, (s, difference) in enumerate(zip(self._s, self._difference, strict=True)):
            torch.sub(q.mean[layer], q.prior_mean[layer], out=difference)
            distance = torch.linalg.vector_norm(difference, dim=(1, 2))
            traces = traces + distance.square() + _weighted_sum(s, lengths[layer])
            nats = nats + s[0].numel() * (rho - 0.5) - q.log_std[layer].sum((1, 2))
        nats = nats + traces / 2 * (-2 * rho).exp()
        root = (complexity(nats, rho, self.N, self.confidence) / 2).sqrt()
        weight = 1 / (4 * root * (self.N - 1))  # dR/dKL
        precision = weight * (-2 * rho).exp()
        j = self.confidence.b * (math.log(self.confidence.c) - 2 * rho)
        size = sum(s[0].numel() for s in self._s)
        rho.grad.copy_(weight * (size - 4 * self.confidence.b / j) - precision * traces)

        for layer in reversed(range(len(passed))):
            x, seen, squares, std, drawn, _ = passed[layer]
            s, M, log_std = self._s[layer], q.mean[layer], q.log_std[layer]
            delta = delta @ q.outputs[layer]
            torch.bmm(delta.mT, x, out=M.grad).addcmul_(self._difference[layer], precision[:, None, None])
            A, C = q.mixing[layer] if q.mixing else (None, None)
            by_std = (delta if A is None else delta @ A).mul(noise[layer]).div_(2 * std)
            torch.bmm(by_std.mT, squares, out=log_std.grad).mul_(2)
            below = (by_std @ s).mul_(seen).mul_(2) if layer or q.mixing else None
            if q.mixing:
                a, c = lengths[layer]
                weighted = precision[:, None, None] * s
                log_std.grad.addcmul_(precision[:, None, None] * a[:, :, None], c[:, None, :])
                A.grad.copy_((delta.mT @ drawn + A * (weighted @ c[:, :, None]).mT).tril_(-1))
                C.grad.copy_((x.mT @ below + C * (weighted.mT @ a[:, :, None]).mT).tril_(-1))
                below = below @ C.mT
            else:
                log_std.grad.add_(precision[:, None, None])
            log_std.grad.mul_(s).sub_(weight[:, None, None])
            if layer:
                below += delta @ M
                delta = (below[:, :, :-1] @ q.inputs[layer].mT).mul_(passed[layer - 1][-1] > 0)
        return loss + root

    def set_rates(self, lr: float, lr_spread: float) -> None:
        """Step sizes of the means and learned bases, and of ς and ϱ."""
        for group, rate in zip(self.optimizer.param_groups, (lr, lr_spread), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # a captured graph has its address
            else:
                group["lr"] = rate

    def pass_through(
        self, X: Sequence[Float[Tensor, "N n1"]], y: Int[Tensor, " N"], batch_size: int, seed: int
    ) -> Float[Tensor, " E"]:
        """One epoch of whole batches in random order; the mean objective.

        ``X`` are the inputs as each posterior sees them, the same in every epoch.
        """
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(ORDER + seed)).to(y.device)
        batches = len(y) // batch_size

        def step(rows: Int[Tensor, " B"]) -> Float[Tensor, " E"]:
            x = torch.stack([seen[rows] for seen in X])
            widths = [M.shape[1] for M in self.posteriors.mean]
            noise = [
                torch.randn(*x.shape[:2], m, dtype=x.dtype, device=x.device, generator=self._generator) for m in widths
            ]
            objective = self.gradient(x, y[rows], noise)
            self.optimizer.step()
            self.posteriors.half_log_prior.clamp_(max=self.confidence.largest_prior)
            return objective

        if y.is_cuda and self._replay is None:
            self._replay = self._captured(step, order[:batch_size])
        self._generator.manual_seed(seed)
        total = torch.zeros_like(self.posteriors.half_log_prior)
        for rows in order[: batches * batch_size].view(batches, batch_size):
            total += (self._replay or step)(rows)
        return total / batches

    def _captured(self, step: Callable[[Tensor], Tensor], rows: Int[Tensor, " B"]) -> Callable[[Tensor], Tensor]:
        """A step as a CUDA graph: its many small kernels are replayed without being launched one by one."""
        kept = {name: tensor.clone() for name, tensor in self.state().items()}
        fixed, side = rows.clone(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose and allocate before anything can be captured
                step(fixed)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph):
            objective = step(fixed)
        self.restore(kept)

        def replay(rows: Int[Tensor, " B"]) -> Float[Tensor, " E"]:
            fixed.copy_(rows)
            graph.replay()
            return objective

        return replay


def _weighted_sum(s: Float[Tensor, "E m n1"], lengths: Sequence[Tensor]) -> Float[Tensor, " E"]:
    if not lengths:
        return s.sum((1, 2))
    a, c = lengths
    return (a * (s @ c[:, :, None])[:, :, 0]).sum(1)


def rotate(W: Float[Tensor, "m n1"], U: Float[Tensor, "m m"], V: Float[Tensor, "n n"]) -> Float[Tensor, "m n1"]:
    """TOHESSIAN, (279): Uᵀ W V and, for the bias, Uᵀ b; in double precision, as it is done again and again."""
    turned = U.double().T @ W.double()
    return torch.cat([turned[:, :-1] @ V.double(), turned[:, -1:]], 1).to(W.dtype)


def turn_back(M: Float[Tensor, "m n1"], U: Float[Tensor, "m m"], V: Float[Tensor, "n n"]) -> Float[Tensor, "m n1"]:
    """TOSTANDARD, (280): U M Vᵀ."""
    return rotate(M, U.T, V.T)


def with_one(x: Tensor) -> Tensor:
    """The input of a bias behind the others."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def log_abs(weights: Tensor) -> Tensor:
    """ς with s = w², no less than 1e-12: a weight of 0 would have an infinite KL."""
    return weights.abs().clamp_min(1e-6).log()


@dataclass(frozen=True)
class Method:
    """How the bases of the posterior are found: a row of Table 10.

    Attributes
    ----------
    rotated
        Into the eigenbases of E[M] and E[xxᵀ] at the posterior's mean; BASE stays in the standard basis.
    repeated
        Every η epochs (ITER) instead of once at the beginning (APPR).
    decays
        η is multiplied by 10 whenever the step size is divided by 10 (ITER(D)).
    approximated
        M̃ of (272) in place of E[M] (ITER.M).
    mixed
        Bases that are learned, from the eigenbases on. Our addition.
    """

    rotated: bool = True
    repeated: bool = False
    decays: bool = False
    approximated: bool = False
    mixed: bool = False


METHODS = {
    "BASE": Method(rotated=False), "APPR": Method(), "ITER": Method(repeated=True),
    "ITER(D)": Method(repeated=True, decays=True), "ITER.M": Method(repeated=True, approximated=True),
    "LEARNED": Method(mixed=True),
}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """Of the optimization; the defaults are those of App H.

    Attributes
    ----------
    lr, lr_spread
        τ of the means (and learned bases), and of ς and ϱ. In App H they are equal; ς has the farthest way to go, and
        when epochs are few a larger step takes it there.
    decay_every
        Both become a tenth after so many epochs, a hundredth after twice as many, ...
    hessian_every, hessian_samples
        η in epochs (Algorithm 1 counts iterations, the text epochs), and the samples that the bases are found from.
    """

    epochs: int = 2000
    lr: float = 0.001
    lr_spread: float = 0.001
    decay_every: int = 400
    hessian_every: int = 10
    hessian_samples: int = 10_000
    batch_size: int = 128

    def __post_init__(self) -> None:
        sizes = self.epochs, self.decay_every, self.hessian_every, self.hessian_samples, self.batch_size
        if min(sizes) < 1 or not (self.lr > 0 and self.lr_spread > 0):
            raise ValueError(f"positive sizes are needed, got {self}")

    def finds_bases(self, epoch: int, method: Method) -> bool:
        """Whether the bases are found anew before that epoch."""
        every = self.hessian_every * 10 ** (epoch // self.decay_every if method.decays else 0)
        return method.rotated and (epoch == 0 or (method.repeated and epoch % every == 0))


def kronecker_factors(
    weights: Weights, X: Float[Tensor, "N n"], *, approximated: bool = False
) -> list[tuple[Float[Tensor, "m m"], Float[Tensor, "n n"]]]:
    """E[M], or M̃ of (272), and E[xxᵀ] of every layer of the network with these weights."""
    network = nn.Sequential()
    for k, W in enumerate(weights, start=1):
        layer = nn.Linear(W.shape[1] - 1, len(W), dtype=W.dtype, device=W.device)
        layer.load_state_dict({"weight": W[:, :-1], "bias": W[:, -1]})
        network.add_module(f"fc{k}", layer)
        if k < len(weights):
            network.add_module(f"relu_fc{k}", nn.ReLU())
    layers = [layer_hessian(network, f"fc{k}", X) for k in range(1, len(weights) + 1)]
    outputs = [layer.output_hessian for layer in layers]
    if approximated:
        S = torch.eye(len(weights[-1]), dtype=X.dtype, device=X.device)
        for p in reversed(range(len(weights) - 1)):
            S = S @ weights[p + 1][:, :-1] / 2
            outputs[p] = S.T @ outputs[-1] @ S
    return [(output, layer.autocorrelation) for output, layer in zip(outputs, layers, strict=True)]


def _eigenvectors(matrix: Tensor) -> Tensor:
    """Eigenvectors, those of the largest eigenvalues first, orthogonal to the last digit of their type."""
    return torch.linalg.eigh(matrix.double()).eigenvectors.flip(1).to(matrix.dtype)


def tighten(
    weights: Weights, prior_weights: Weights, X: Float[Tensor, "N n"], y: Int[Tensor, " N"],
    methods: Sequence[Method], *, schedule: Schedule, confidence: Confidence,
    seed: int, progress: str = "", checkpoint: Checkpoint | None = None,
) -> Posteriors:  # fmt: skip
    """Algorithm 1 for several methods at once, from one network.

    Adam takes the place of the plain descent that is printed: along a direction that does not matter for the loss a
    step raises ς by less than τ/4R(N − 1), by less than 0.01 in the 2000 epochs of App H, and so leaves Q where it was.

    Parameters
    ----------
    weights, prior_weights
        Of the trained network, around which Q starts, and of its initialization w₀, which may not depend on X, y.
    methods
        All with learned bases, or none.
    checkpoint
        Where to leave the state, and to take it up; the result does not depend on an interruption.

    Raises
    ------
    ValueError
        If there are fewer samples than in a batch, or only some methods have learned bases.
    FloatingPointError
        If the objective stops being finite.
    """
    N = len(y)
    if schedule.batch_size > N:
        raise ValueError(f"a batch of {schedule.batch_size} samples needs as many, got {N}")
    if len({method.mixed for method in methods}) != 1:
        raise ValueError("all methods must have learned bases, or none")
    q = Posteriors.start(weights, prior_weights, len(methods), mixed=methods[0].mixed)
    first = _eigenvectors(X.T @ X / N)  # of the first layer, for all time
    chosen = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[: schedule.hessian_samples]
    samples = X[chosen.to(X.device)]
    descent = Descent(q, N, confidence)
    start = 0
    if checkpoint is not None and (found := checkpoint.load()) is not None:
        start = int(found["epoch"])
        descent.restore(found)
    for epoch in range(start, schedule.epochs):
        for e, method in enumerate(methods):
            if schedule.finds_bases(epoch, method):
                factors = kronecker_factors(q.mean_weights(e), samples, approximated=method.approximated)
                for layer, (output, autocorrelation) in enumerate(factors):
                    V = _eigenvectors(autocorrelation) if layer else q.inputs[0][e] if epoch else first
                    q.change_basis(e, layer, _eigenvectors(output), V)
                    if epoch == 0:
                        q.log_std[layer][e] = log_abs(q.mean[layer][e])
        if epoch == start:
            seen = q.rotated(X)
        decay = 0.1 ** (epoch // schedule.decay_every)
        descent.set_rates(schedule.lr * decay, schedule.lr_spread * decay)
        objective = descent.pass_through(seen, y, schedule.batch_size, seed * 100_003 + epoch)
        if not objective.isfinite().all():
            raise FloatingPointError(f"the objective is not finite after epoch {epoch + 1}")
        if progress and (epoch + 1) % max(1, schedule.epochs // 10) == 0:
            print(f"{progress}: {epoch + 1} of {schedule.epochs} epochs, objective {objective.tolist()}", flush=True)
        if checkpoint is not None:
            checkpoint.offer(lambda epoch=epoch: descent.state() | {"epoch": torch.tensor(epoch + 1)})
    return q


@torch.no_grad()
def count_errors(q: Posteriors, X: Float[Tensor, "N n"], y: Int[Tensor, " N"], draws: int, seed: int) -> list[int]:
    """Wrong answers of every posterior among independent draws of a network and, uniformly, a sample."""
    generator = torch.Generator(y.device).manual_seed(seed)
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
    """The bound of every posterior."""
    wrong = count_errors(q, X, y, draws, seed)
    return [
        pac_bayes_bound(wrong[e], draws, lambda rho, e=e: float(q.kl(rho)[e]), float(rho), len(y), confidence)
        for e, rho in enumerate(q.half_log_prior)
    ]


def spread_along_curvature(
    q: Posteriors, e: int, X: Float[Tensor, "N n"]
) -> list[tuple[Float[Tensor, " k"], Float[Tensor, " k"]]]:
    """Of every layer the curvature along each direction of the posterior's basis, descending, and the variance there.

    The curvature is that of E[M] ⊗ E[xxᵀ] at the posterior's mean, (uᵀE[M]u)(vᵀE[xxᵀ]v), k = m n; biases are left out.
    """
    found = []
    for layer, (M, C) in enumerate(kronecker_factors(q.mean_weights(e), X)):
        U, V = q.outputs[layer][e], q.inputs[layer][e]
        curvature = torch.outer((U * (M @ U)).sum(0), (V * (C @ V)).sum(0)).flatten()
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
