"""Algorithm 1 of Wu et al. (2022), App H, with the plain descent that it prints: how far it moves the variances.

Line 13 subtracts τ ∂/∂ς of the objective, the surrogate loss plus R = √(B/2). With ∂R/∂KL = 1/4R(N − 1) and
∂KL/∂ς = s/λ − 1, a direction that does not matter for the loss rises in one step by

    τ (1 − s/λ)/4R(N − 1),

and is at rest where s = λ only, ½ ln λ − ln|w| above its start.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.wu_dissecting.pac_bayes.bases import Weights, kronecker_factors
from common.wu_dissecting.pac_bayes.bound import Confidence, complexity
from common.wu_dissecting.pac_bayes.optimize import ORDER, Descent
from common.wu_dissecting.pac_bayes.posterior import Posteriors, check_labelled

#: The share of the weights of the first layer that count as flat: those of the smallest curvature.
FLAT = 0.1


def flattest(weights: Weights, X: Float[Tensor, "N n"]) -> Int[Tensor, " k"]:
    """Places in the first layer's weights, row by row and without biases, of the smallest E[M]_ii E[x_j²], a tenth."""
    M, autocorrelation = kronecker_factors(weights, X)[0]
    curvature = torch.outer(M.diagonal(), autocorrelation.diagonal()).flatten()
    return curvature.argsort(stable=True)[: max(1, round(FLAT * len(curvature)))]


def plain_descent(
    weights: Weights, prior_weights: Weights, X: Float[Tensor, "N n"], y: Int[Tensor, " N"], *, epochs: int, lr: float,
    decay_every: int, batch_size: int, confidence: Confidence, seed: int, progress: str = "",
) -> dict[str, Tensor]:  # fmt: skip
    """Lines 2 to 14 of Algorithm 1 in the standard basis (BASE), from s = w² and ϱ = −3.

    In double precision: in single precision steps of 1e-8 are lost beside ς of about −4.

    Parameters
    ----------
    weights, prior_weights
        Of the trained network and of its initialization.
    lr, decay_every
        τ, which becomes a tenth after so many epochs, a hundredth after twice as many, ...

    Returns
    -------
    dict
        Numbers. Of the flattest weights of the first layer ``rise``, the mean of ς less its start; ``derived``, to what
        the formula above adds up along the way; ``needed``, the mean of ϱ less the start of ς. Of all weights
        ``largest``, the largest rise, and ``at_most``, Σ τ/4R(N − 1). ``kl`` and ``kl_before`` in nats.

    Raises
    ------
    ValueError
        If there are fewer samples than in a batch, or they and their labels do not fit the network.
    """
    N = len(y)
    if batch_size > N:
        raise ValueError(f"a batch of {batch_size} samples needs as many, got {N}")
    check_labelled(prior_weights, X, y)
    weights, prior_weights = ([w.double() for w in parts] for parts in (weights, prior_weights))
    X = X.double()
    q = Posteriors.start(weights, prior_weights, 1)
    descent, places = Descent(q, N, confidence), flattest(weights, X)
    before = [log_std.clone() for log_std in q.log_std]
    seen, kl_before, y = q.rotated(X)[0], q.kl(), y.long()
    derived, at_most = torch.zeros_like(kl_before), torch.zeros_like(kl_before)
    generator = torch.Generator(X.device).manual_seed(seed)

    def flat(tensors: list[Tensor]) -> Tensor:
        return tensors[0][0, :, :-1].flatten()[places.to(X.device)]

    for epoch in range(epochs):
        rate = lr * 0.1 ** (epoch // decay_every)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(ORDER + seed * 100_003 + epoch)).to(y.device)
        for rows in order[: N // batch_size * batch_size].view(-1, batch_size):
            root = (complexity(q.kl(), q.half_log_prior.double(), N, confidence) / 2).sqrt()
            step = rate / (4 * root * (N - 1))
            over_prior = (2 * (flat(q.log_std).double() - q.half_log_prior.double())).exp()
            derived += step * (1 - over_prior).mean()
            at_most += step
            sizes = [(1, batch_size, M.shape[1]) for M in q.mean]
            noise = [torch.randn(size, dtype=X.dtype, device=X.device, generator=generator) for size in sizes]
            descent.gradient(seen[None, rows], y[rows], noise)
            for parameter in q.parameters():
                parameter.add_(parameter.grad, alpha=-rate)
            q.half_log_prior.clamp_(max=confidence.largest_prior)
        if progress and (epoch + 1) % max(1, epochs // 4) == 0:
            print(f"{progress}: {epoch + 1} of {epochs} epochs of plain descent", flush=True)
    rises = [now - start for now, start in zip(q.log_std, before, strict=True)]
    found = {
        "rise": flat(rises).double().mean(), "derived": derived[0],
        "needed": (q.half_log_prior - flat(before)).double().mean(),
        "largest": torch.stack([rise.max() for rise in rises]).max(), "at_most": at_most[0],
        "kl": q.kl()[0], "kl_before": kl_before[0],
    }  # fmt: skip
    return {name: value.detach().cpu() for name, value in found.items()}
