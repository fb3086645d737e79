"""Algorithm 1 of Wu et al. (2022), App H: posteriors whose bound is made small, in bases that follow their means.

What descends is (278), the error's surrogate on the samples plus √(B/2), B of (277). Its gradient comes from outputs
that are drawn instead of weights (:mod:`common.wu_dissecting.pac_bayes.posterior`): one network for each sample of a
batch instead of one for all, equal in the mean, less noise.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import index

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.cache import Checkpoint
from common.wu_dissecting.pac_bayes.bases import Weights, eigenvectors, kronecker_factors
from common.wu_dissecting.pac_bayes.bound import Confidence, complexity
from common.wu_dissecting.pac_bayes.posterior import Posteriors, check_labelled, log_abs

#: Added to the seeds of the order of samples, so that it does not share a stream with the noise.
ORDER = 2**29


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
        self, x: Float[Tensor, "E B n1"], y: Int[Tensor, " B"], noise: Sequence[Float[Tensor, "E B _"]]
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
        j = self.confidence.j(rho)
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
        If there are fewer samples than in a batch, they and their labels do not fit the network, or only some methods
        have learned bases.
    FloatingPointError
        If the objective stops being finite.
    """
    N = len(y)
    if schedule.batch_size > N:
        raise ValueError(f"a batch of {schedule.batch_size} samples needs as many, got {N}")
    check_labelled(prior_weights, X, y)
    if len({method.mixed for method in methods}) != 1:
        raise ValueError("all methods, at least one, must have learned bases, or none")
    y, seed = y.long(), index(seed)
    q = Posteriors.start(weights, prior_weights, len(methods), mixed=methods[0].mixed)
    first = eigenvectors(X.T @ X / N)  # of the first layer, for all time
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
                    V = eigenvectors(autocorrelation) if layer else q.inputs[0][e] if epoch else first
                    q.change_basis(e, layer, eigenvectors(output), V)
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
