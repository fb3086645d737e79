"""The Hessian in eight numbers, against the one that automatic differentiation forms."""

import pytest
import torch

from common.dong_quantifying.cross_layer import structure


def network(N=11, d=3, C=4, m=3):
    generator = torch.Generator().manual_seed(0)
    X, W, V = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((N, d), (m, d), (C, m)))
    return X, torch.randint(C, (N,), generator=generator), W, V


def mean_loss(X, y, W, V, loss):
    f = torch.relu(X @ W.T) @ V.T
    if loss == "CE":
        return torch.nn.functional.cross_entropy(f, y)
    return ((f - torch.nn.functional.one_hot(y, len(V))) ** 2).sum(1).mean()


@pytest.mark.parametrize("loss", ["CE", "MSE"])
def test_structure_is_that_of_the_hessian_of_autograd(loss):
    X, y, W, V = network()
    (m, d), C = W.shape, len(V)

    def of_parameters(theta):
        return mean_loss(X, y, theta[: m * d].reshape(m, d), theta[m * d :].reshape(C, m), loss)

    H = torch.func.hessian(of_parameters)(torch.cat([W.flatten(), V.flatten()]))
    ww, wv, vv = H[: m * d, : m * d], H[: m * d, m * d :].reshape(m, d, C, m), H[m * d :, m * d :]
    found = structure(X, y, W, V, loss)
    assert found.ww == pytest.approx(ww.square().sum().item())
    assert found.vv == pytest.approx(vv.square().sum().item())
    assert found.cross == pytest.approx(wv.square().sum().item())
    assert found.stripe_columns == pytest.approx(sum(wv[k, :, :, k].square().sum().item() for k in range(m)))
    for part, size, ratio in ((ww, d, found.ratio_ww), (vv, m, found.ratio_vv)):
        count = len(part) // size
        blocks = part.reshape(count, size, count, size).square().sum((1, 3))
        off = (blocks.sum() - blocks.trace()) / (count - 1)
        assert ratio == pytest.approx((off / blocks.trace()).item(), abs=1e-12)


@pytest.mark.parametrize("loss", ["CE", "MSE"])
def test_the_first_term_is_the_curvature_of_the_outputs_alone(loss):
    # d²/dW dV of Σ_n g_n·f(x_n) with g = ∂ℓ/∂f held fast is the first term of (11) and (18); no Gauss-Newton part.
    X, y, W, V = network()

    def outputs(W, V):
        return torch.relu(X @ W.T) @ V.T

    f = outputs(W, V).requires_grad_()
    value = (
        torch.nn.functional.cross_entropy(f, y) if loss == "CE" else (f - torch.eye(len(V))[y]).square().sum() / len(X)
    )
    (g,) = torch.autograd.grad(value, f)
    curvature = torch.func.jacrev(torch.func.grad(lambda W, V: (g * outputs(W, V)).sum()), argnums=1)(W, V)
    found = structure(X, y, W, V, loss)
    assert found.first_term == pytest.approx(curvature.square().sum().item())
    residual = g * len(X) / (1 if loss == "CE" else 2)
    assert found.residual == pytest.approx(residual.square().sum(1).mean().sqrt().item())
