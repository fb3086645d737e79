"""Training: full-batch Adam with a cosine schedule on the one-hidden-layer network, and plain gradient descent.

The network is f(x) = V σ(W x) of Dong et al. (2025), Section 3.3, with σ the ReLU and no biases. Its two losses
are those that the paper writes down,

    ℓ_MSE = 1/N Σ_n ‖V σ(W x_n) − e_{y_n}‖²                                        (7)
    ℓ_CE  = 1/N Σ_n [log Σ_c exp(v_c·σ(W x_n)) − v_{y_n}·σ(W x_n)]                 (13)

with neither the 1/C of :class:`torch.nn.MSELoss` nor a 1/2. The gradients are written out by hand. With
F = σ(W Xᵀ) (m × N), either loss needs of the labels only V_y (N × m, the rows of V at the labels) and the class
sums B = F Y / N (m × C, Y the one-hot labels), so that

    ∇_Vᵀ ℓ_MSE = 2 (F Fᵀ/N Vᵀ − B),     ∇_F ℓ_MSE = 2/N (VᵀV F − V_yᵀ),
    ∇_Vᵀ ℓ_CE  = F P/N − B,             ∇_F ℓ_CE  = 1/N (Vᵀ Pᵀ − V_yᵀ),     ∇_W = (∇_F ∘ 1[F > 0]) X.

Under MSE no matrix with N × C entries appears. Samples pass forward and backward in chunks that the processor's
cache holds, so that X is read once a step and the logits never leave the cache. The weights lie as m × d and
m × C: of all layouts the one in which these products, m wide, run fastest.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.cache import Checkpoint, cached
from common.devices import side_by_side

LOSSES = ("CE", "MSE")
#: β₁, β₂ and ε of Adam (Kingma and Ba, Algorithm 1), the values that torch takes as well.
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
#: Entries of a chunk of features or logits: 1 MiB in float32, about a second-level cache; on a GPU, all there is.
CHUNK_CPU, CHUNK_GPU = 2**18, 2**28
#: Powers of 2 up to this size and their sums neither overflow nor lose a digit, in float32 either.
SAFE_EXPONENT = 80.0


@dataclass(frozen=True)
class TrainingResult:
    """A training and what it passed through; every field is a tensor, so that ``vars`` of it can be kept in a file.

    Attributes
    ----------
    steps
        (K,) the kept steps, ascending: 0 is the initialization, T the end.
    W, V
        (K, m, d) and (K, C, m), the weights after that many steps.
    losses
        (T + 1,) the loss after 0, 1, ..., T steps.
    gradient_norm
        () Euclidean norm of the gradient after the last step: whether the training has converged.
    accuracy
        (K,) share of the samples whose largest logit is that of their label.
    """

    steps: Int[Tensor, "K"]
    W: Float[Tensor, "K m d"]
    V: Float[Tensor, "K C m"]
    losses: Float[Tensor, "T1"]
    gradient_norm: Float[Tensor, ""]
    accuracy: Float[Tensor, "K"]


class _FullBatch:
    """Loss and gradient on all samples at once, every buffer made beforehand.

    ``parameters`` and ``gradient`` are flat, m (d + C) long: W (m × d), then Vᵀ (m × C), of which ``W``, ``Vt``,
    ``dW``, ``dVt`` are views. A chunk of samples goes forward and backward while its features are in the cache.
    """

    def __init__(self, X: Tensor, y: Tensor, W: Tensor, V: Tensor, loss: str):
        (N, d), (C, m) = X.shape, V.shape
        self.shapes = (m, d), (m, C)
        self.parameters = torch.cat([W.flatten(), V.T.flatten()])
        self.gradient = torch.empty_like(self.parameters)
        (self.W, self.Vt), (self.dW, self.dVt) = self.split(self.parameters), self.split(self.gradient)
        self.X, self.y = X.clone(memory_format=torch.contiguous_format), y.clone()
        self.by_class = torch.argsort(y, stable=True)
        self.class_starts = torch.searchsorted(y[self.by_class], torch.arange(C, device=y.device))
        self.F, self.dF, self.Vy, self.scratch = (X.new_empty(m, N) for _ in range(4))
        self.Ft = X.new_empty(N, m)
        self.normalizer, self.shift = X.new_empty(N), X.new_empty(N)
        rows = min(N, max(1, (CHUNK_GPU if X.is_cuda else CHUNK_CPU) // (d if loss == "MSE" else max(d, C))))
        self.logits = X.new_empty(rows if loss == "CE" else 0, C)
        wide = [a.split(rows, 1) for a in (self.X.T, self.F, self.dF, self.Vy, self.scratch)]
        self.chunks = list(zip(*wide, self.normalizer.split(rows), self.shift.split(rows), strict=True))
        self.loss_and_gradient = self.mean_square if loss == "MSE" else self.cross_entropy

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a flat vector (or of several, in the last dimension) as W and Vᵀ."""
        (m, d), (_, C) = self.shapes
        return flat[..., : m * d].unflatten(-1, (m, d)), flat[..., m * d :].unflatten(-1, (m, C))

    def _class_sums(self) -> Tensor:
        """B = F Y / N, (m, C)."""
        self.Ft.copy_(self.F.T)
        sums = torch.nn.functional.embedding_bag(self.by_class, self.Ft, self.class_starts, mode="sum")
        return sums.T.div_(len(self.y))

    def mean_square(self) -> Tensor:
        """ℓ_MSE of (7), a scalar, and its gradient into ``gradient``."""
        N = len(self.y)
        torch.index_select(self.Vt, 1, self.y, out=self.Vy)
        VtV = self.Vt @ self.Vt.T
        self.dW.zero_()
        for Xt, F, dF, Vy, active, _, _ in self.chunks:
            torch.mm(self.W, Xt, out=F).relu_()
            torch.addmm(Vy, VtV, F, beta=-1, out=dF)
            self.dW.addmm_(dF.mul_(torch.sign(F, out=active)), Xt.T)
        self.dW.mul_(2 / N)
        B = self._class_sums()
        torch.addmm(B, self.F @ self.F.T, self.Vt, beta=-1, alpha=1 / N, out=self.dVt)
        loss = 1 + (self.Vt * (self.dVt - B)).sum()
        self.dVt.mul_(2)
        return loss

    def cross_entropy(self) -> Tensor:
        """ℓ_CE of (13), a scalar, and its gradient into ``gradient``.

        From N ∇_W, F P and the normalizers s, the row sums of E = 2^(logits log₂e − shift). The logits are taken as
        they are; only in a chunk where they might be so large that this costs digits is the largest of each sample
        subtracted first. torch's vectorized 2^z is three times as fast as its exp. P = E/s is never formed: s divides
        the m columns on either side of it instead of the C of E.
        """
        torch.index_select(self.Vt, 1, self.y, out=self.Vy)
        Vt_base_2 = self.Vt * math.log2(math.e)
        largest = Vt_base_2.abs().amax(1)
        self.shift.zero_()
        self.gradient.zero_()
        for Xt, F, dF, Vy, scratch, s, shift in self.chunks:
            E = self.logits[: len(s)]
            torch.mm(self.W, Xt, out=F).relu_()
            torch.mm(F.T, Vt_base_2, out=E)
            if (largest @ F).max() > SAFE_EXPONENT:
                torch.amax(E, 1, out=shift)
                E.sub_(shift[:, None])
            torch.sum(E.exp2_(), 1, out=s)
            self.dVt.addmm_(torch.div(F, s, out=scratch), E)
            torch.mm(self.Vt, E.T, out=dF).div_(s).sub_(Vy)
            self.dW.addmm_(dF.mul_(torch.sign(F, out=scratch)), Xt.T)
        N = len(self.y)
        B = self._class_sums()
        self.dW.div_(N)
        self.dVt.div_(N).sub_(B)
        return math.log(2) * (self.normalizer.log2() + self.shift).mean() - (self.Vt * B).sum()


class _OneThread:
    """One BLAS thread while any training runs: what one gives depends on no setting, nor on what runs beside it.

    Probabilities below 1e-38 count as zero: such numbers are many in a trained network, and a product with them takes
    five times as long.
    """

    def __init__(self) -> None:
        self._lock, self._running, self._threads = threading.Lock(), 0, 1

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._running == 0:
                self._threads = torch.get_num_threads()
            self._running += 1
            torch.set_num_threads(1)  # of this thread of Python
            torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(False)
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    torch.set_num_threads(self._threads)


_one_thread = _OneThread()


def _check(X: Tensor, y: Tensor, W: Tensor, V: Tensor, loss: str, steps: int, lr: float, keep: Sequence[int]) -> None:
    (N, d), (C, m) = X.shape, V.shape
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; known are {', '.join(LOSSES)}")
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"the learning rate must be positive and finite, got {lr}")
    if outside := [t for t in keep if not 0 <= t <= steps]:
        raise ValueError(f"steps to keep must lie in 0..{steps}, got {outside}")
    if min(N, d, C, m) == 0:
        raise ValueError(f"nothing to train: N = {N} samples, d = {d}, m = {m}, C = {C}; each must be at least 1")
    if y.shape != (N,) or W.shape != (m, d):
        raise ValueError(
            f"shapes do not fit: X {tuple(X.shape)}, y {tuple(y.shape)}, W {tuple(W.shape)}, V {tuple(V.shape)}"
        )
    if len({(a.dtype, a.device) for a in (X, W, V)}) > 1 or not X.is_floating_point():
        raise ValueError(f"X, W, V must share one floating-point type and device: {X.dtype}, {W.dtype}, {V.dtype}")
    if int(y.min()) < 0 or int(y.max()) >= C:
        raise ValueError(f"labels must lie in 0..{C - 1}, got {int(y.min())}..{int(y.max())}")
    for name, tensor in {"X": X, "W": W, "V": V}.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds infinities or NaN")


def cosine_annealing(step: int, steps: int, lr: float) -> float:
    """Learning rate of step ``step`` = 0, ..., ``steps`` − 1: lr (1 + cos(π t/T))/2, from ``lr`` down to 0."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def train_full_batch(
    X: Float[Tensor, "N d"],
    y: Int[Tensor, "N"],
    W: Float[Tensor, "m d"],
    V: Float[Tensor, "C m"],
    *,
    loss: str,
    steps: int,
    lr: float,
    keep: Sequence[int],
    progress: str = "",
    checkpoint: Checkpoint | None = None,
) -> TrainingResult:
    """Train f(x) = V σ(W x) on all samples at once by Adam, its learning rate annealed to 0 along a cosine.

    Step t gives what ``torch.optim.Adam(lr=lr)`` with ``CosineAnnealingLR(T_max=steps)`` gives. On a CPU it runs
    on one thread whatever the setting, so that the same arguments give the same bits.

    Parameters
    ----------
    X
        (N, d) features; their type and device are those of the whole computation.
    y
        (N,) labels in 0, ..., C − 1.
    W, V
        (m, d) and (C, m), the initial weights; left as they are.
    loss
        ``"CE"``, (13), or ``"MSE"``, (7).
    steps
        T, the number of steps.
    lr
        The learning rate at the start.
    keep
        Steps in 0, ..., T after which to keep the weights.
    progress
        If not empty, this word, the step and the loss are printed ten times on the way.
    checkpoint
        Where to leave the state, and to take it up; the result does not depend on any interruption.

    Returns
    -------
    TrainingResult

    Raises
    ------
    ValueError
        If the loss is unknown, the data are empty, not finite or do not fit each other, a label lies outside
        0, ..., C − 1, ``steps`` is negative, ``lr`` not positive, or ``keep`` outside 0, ..., T.

    Examples
    --------
    With V = 0 every class is equally likely, and the loss is log C:

    >>> result = train_full_batch(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.zeros(2, 2),
    ...                           loss="CE", steps=0, lr=1e-4, keep=[0])
    >>> round(float(result.losses[0]), 4)
    0.6931
    """
    _check(X, y, W, V, loss, steps, lr, keep)
    with _one_thread():
        network = _FullBatch(X, y, W, V, loss)
        theta, gradient = network.parameters, network.gradient
        first_moment, second_moment, denominator = (torch.zeros_like(theta) for _ in range(3))
        slot = {t: k for k, t in enumerate(sorted(set(keep)))}
        kept, losses = theta.new_zeros(len(slot), len(theta)), theta.new_zeros(steps + 1)
        at = torch.zeros((), dtype=torch.int64)
        state = {
            "step": at, "theta": theta, "first_moment": first_moment, "second_moment": second_moment,
            "kept": kept, "losses": losses,
        }  # fmt: skip
        if checkpoint is not None and (found := checkpoint.load()) is not None:
            for name, tensor in state.items():
                tensor.copy_(found[name])
        for t in range(int(at), steps + 1):
            if checkpoint is not None:
                checkpoint.offer(lambda t=t: {**state, "step": at.fill_(t)})
            losses[t] = network.loss_and_gradient()
            if t in slot:
                kept[slot[t]] = theta
            if progress and t % max(1, steps // 10) == 0:
                print(f"{progress}: step {t} of {steps}, loss {float(losses[t]):.5g}", flush=True)
            if t < steps:
                first_moment.lerp_(gradient, 1 - BETA_1)
                second_moment.mul_(BETA_2).addcmul_(gradient, gradient, value=1 - BETA_2)
                torch.sqrt(second_moment, out=denominator)
                denominator.div_(math.sqrt(1 - BETA_2 ** (t + 1))).add_(EPSILON)
                rate = cosine_annealing(t, steps, lr) / (1 - BETA_1 ** (t + 1))
                theta.addcdiv_(first_moment, denominator, value=-rate)
        W_kept, Vt_kept = network.split(kept)
        V_kept = Vt_kept.mT
        hits = [(((X @ w.T).relu_() @ v.T).argmax(1) == y).sum() for w, v in zip(W_kept, V_kept, strict=True)]
        return TrainingResult(
            steps=torch.tensor(sorted(slot), dtype=torch.int64),
            W=W_kept.contiguous(),
            V=V_kept.contiguous(),
            losses=losses,
            gradient_norm=torch.linalg.vector_norm(gradient),
            accuracy=torch.tensor([int(h) for h in hits], dtype=theta.dtype) / len(y),
        )


def gradient_descent(
    loss: Callable[..., Float[Tensor, ""]], parameters: Sequence[Float[Tensor, "..."]], *, steps: int, lr: float
) -> tuple[Float[Tensor, "..."], ...]:
    """Plain gradient descent, θ ← θ − lr ∇ℓ(θ), on any loss that autograd can differentiate.

    Parameters
    ----------
    loss
        Takes the parameters, one argument each, and gives a scalar.
    parameters
        Where to start; left as they are.
    steps, lr
        Number of steps and their length.

    Returns
    -------
    tuple of Tensor
        The parameters after the last step, detached.

    Raises
    ------
    ValueError
        If ``steps`` is negative or ``lr`` not positive.

    Examples
    --------
    >>> (x,) = gradient_descent(lambda x: x**2 / 2, [torch.tensor(1.0)], steps=3, lr=0.5)
    >>> float(x)
    0.125
    """
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"the learning rate must be positive and finite, got {lr}")
    at = tuple(p.detach().clone() for p in parameters)
    for _ in range(steps):
        leaves = [p.requires_grad_() for p in at]
        with torch.enable_grad():
            gradient = torch.autograd.grad(loss(*leaves), leaves, materialize_grads=True)
        at = tuple((p - lr * g).detach() for p, g in zip(at, gradient, strict=True))
    return at


def trained(trainings: Sequence[dict[str, object]]) -> list[TrainingResult]:
    """Trainings by the arguments of :func:`train_full_batch`, two at a time on a CPU, each kept in a file.

    Raises
    ------
    ValueError
        As :func:`train_full_batch`.
    """
    return side_by_side(lambda arguments: TrainingResult(**cached(train_full_batch, arguments)), trainings)
