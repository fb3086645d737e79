r"""A layer's Hessian :math:`E[M\otimes xx^\top]` as an operator, and its Kronecker factors: Wu et al. (2022), (2), (3).

For a ReLU network and the cross-entropy loss, :math:`M=G^\top AG` with G the Jacobian of the logits by the layer's
output and :math:`A=\mathrm{diag}(p)-pp^\top=SS^\top`, :math:`S=\mathrm{diag}(\sqrt p)-p\sqrt p^\top`. So M is
:math:`BB^\top` with the m × c matrix :math:`B=G^\top S`, of rank c − 1, and a product with k vectors is two large
matrix products with X and two small ones a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

#: Entries of what is held at once for a product.
CHUNK = 2**25


class ConvergenceError(ArithmeticError):
    """Eigenpairs did not reach the tolerance; the message has the largest residual."""


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues of a symmetric operator.

    Attributes
    ----------
    values
        (k,) descending.
    vectors
        (d, k) orthonormal.
    residuals
        (k,) ‖Hv − λv‖/|λ|.
    products
        Number of vectors that the operator was applied to.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "d k"]
    residuals: Float[Tensor, " k"]
    products: int


@dataclass(frozen=True)
class LayerHessian:
    """E[BBᵀ ⊗ xxᵀ], the mean over samples; vectors are weight matrices, m × n, row by row.

    Attributes
    ----------
    X
        (N, n) inputs of the layer.
    B
        (N, m, r) factors of M.
    """

    X: Float[Tensor, "N n"]
    B: Float[Tensor, "N m r"]

    @property
    def shape(self) -> tuple[int, int]:
        """(mn, mn)."""
        size = self.B.shape[1] * self.X.shape[1]
        return size, size

    def __matmul__(self, V: Float[Tensor, "mn k"]) -> Float[Tensor, "mn k"]:
        """Product with k vectors: 4 N m n k floating-point operations, and 4 N m r k for M."""
        (N, n), (_, m, _) = self.X.shape, self.B.shape
        k = V.shape[1]
        wide = V.view(m, n, k).transpose(0, 1).reshape(n, m * k)
        out = torch.zeros_like(wide)
        for X, B in zip(*(a.split(max(1, CHUNK // (m * k))) for a in (self.X, self.B)), strict=True):
            images = (X @ wide).view(len(X), m, k)
            out.addmm_(X.T, (B @ (B.mT @ images)).view(len(X), m * k))
        return out.view(n, m, k).transpose(0, 1).reshape(m * n, k) / N

    def output_hessian(self) -> Float[Tensor, "m m"]:
        """E[M]."""
        N, m, _ = self.B.shape
        flat = self.B.transpose(0, 1).reshape(m, -1)
        return flat @ flat.T / N

    def autocorrelation(self) -> Float[Tensor, "n n"]:
        """E[xxᵀ]."""
        return self.X.T @ self.X / len(self.X)

    def kronecker_eigenpairs(self, k: int) -> tuple[Float[Tensor, " k"], Float[Tensor, "mn k"]]:
        """The k largest eigenvalues of E[M] ⊗ E[xxᵀ], (3), and their eigenvectors, products of those of the factors."""
        (mu, U), (nu, W) = (torch.linalg.eigh(factor) for factor in (self.output_hessian(), self.autocorrelation()))
        products = (mu[:, None] * nu).flatten()
        values, places = products.topk(k)
        i, j = places // len(nu), places % len(nu)
        return values, (U[:, None, i] * W[None, :, j]).reshape(-1, k)

    def top_eigenpairs(
        self, k: int, *, tolerance: float = 1e-4, block: int = 8, most: int | None = None
    ) -> Eigenpairs:
        """The k largest eigenpairs by block Lanczos with full reorthogonalization, started at the Kronecker product's.

        Parameters
        ----------
        tolerance
            Of every residual, relative to its eigenvalue.
        block
            Vectors multiplied at once.
        most
            Largest dimension of the Krylov space; 3 k + 40 blocks if not given.

        Raises
        ------
        ValueError
            If k is not between 1 and the dimension.
        ConvergenceError
            If the space has that dimension and some residual is too large.
        """
        size = self.shape[0]
        if not 1 <= k <= size:
            raise ValueError(f"the number of eigenpairs must lie in 1..{size}, got {k}")
        block = min(block, size)
        most = min(size, most or 3 * k + 40 * block)
        _, start = self.kronecker_eigenpairs(min(size, block))
        Q = torch.empty(size, most, dtype=self.X.dtype, device=self.X.device)
        HQ = torch.empty_like(Q)
        new, filled = torch.linalg.qr(start).Q, 0
        while True:
            width = min(new.shape[1], most - filled)
            Q[:, filled : filled + width] = new[:, :width]
            HQ[:, filled : filled + width] = self @ Q[:, filled : filled + width].contiguous()
            filled += width
            checked = filled <= 8 * block or filled == most or filled % (8 * block) < block
            if checked and filled >= min(most, k + 2 * block):
                basis, image = Q[:, :filled], HQ[:, :filled]
                T = basis.T @ image
                values, C = torch.linalg.eigh((T + T.T) / 2)
                values, C = values[-k:].flip(0), C[:, -k:].flip(1)
                vectors = basis @ C
                residuals = torch.linalg.vector_norm(image @ C - vectors * values, dim=0) / values.abs()
                if residuals.max() <= tolerance or filled == size:
                    return Eigenpairs(values, vectors, residuals, filled)
                if filled == most:
                    raise ConvergenceError(f"after {filled} products the largest residual is {residuals.max():.1e}")
            new = HQ[:, filled - width : filled]
            for _ in range(2):  # twice is enough
                new = new - Q[:, :filled] @ (Q[:, :filled].T @ new)
            new = torch.linalg.qr(new).Q
            new = torch.linalg.qr(new - Q[:, :filled] @ (Q[:, :filled].T @ new)).Q


def perceptron_layer(
    weights: Sequence[Float[Tensor, "out in"]], biases: Sequence[Float[Tensor, " out"]], X: Float[Tensor, "N d"],
    layer: int,
) -> LayerHessian:  # fmt: skip
    """Hessian of the mean cross-entropy loss by one layer's weights, of a fully connected ReLU network.

    Parameters
    ----------
    weights, biases
        From the first layer to the output.
    X
        Inputs of the network.
    layer
        Index into ``weights``.

    Raises
    ------
    ValueError
        If there is no such layer.
    """
    if not 0 <= layer < len(weights):
        raise ValueError(f"layer must be between 0 and {len(weights) - 1}, got {layer}")
    x, inputs, masks = X, [], []
    for W, b in zip(weights, biases, strict=True):
        inputs.append(x)
        z = torch.addmm(b, x, W.T)
        masks.append(z > 0)
        x = z.relu()
    p = z.softmax(1)
    root = p.sqrt()
    B = torch.diag_embed(root) - p[:, :, None] * root[:, None, :]
    for W, mask in zip(reversed(weights[layer + 1 :]), reversed(masks[layer:-1]), strict=True):
        B = mask[:, :, None] * (W.T @ B)
    return LayerHessian(inputs[layer], B)
