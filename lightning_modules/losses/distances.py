"""Distances between embeddings, each in two forms: of all pairs of a batch, and of pairs named row by row.

`matrix(z)`: (B, D) → (B, B), `matrix(z, rows)` the rows of it that a slice names; `pairs(x, y)`: two (T, D) → (T,).
Both differentiable, with gradient 0 (not NaN) between equal points. The losses take any module with these two methods.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError


def unit(z: Tensor, shortest: float = 1e-2) -> Tensor:
    """`z` (N, D), each row divided by its length, or by `shortest` where it is shorter than that: 0 stays 0.

    So a gradient grows by at most 1 / `shortest`; by F.normalize's default, that of an embedding that is 0 would grow
    by 1e12. Embeddings of the encoders here are at least 0.17 long before training.
    """
    return F.normalize(z, dim=1, eps=shortest)


def squared_euclidean_matrix(z: Tensor, rows: slice = slice(None)) -> Tensor:
    """‖zᵢ − zⱼ‖² as a matrix product: (B, D) → (B, B) or the `rows` of it, never negative."""
    # Distances do not change with the origin, but rounding does: around the mean, close points lose fewer digits.
    z = z - z.mean(0).detach()
    norms = z.square().sum(1)
    return torch.addmm(norms[rows, None] + norms, z[rows], z.T, alpha=-2).clamp_min(0)


class EuclideanDistance(nn.Module):
    """‖x − y‖, or its square.

    Args:
        squared: the square, as in FaceNet (Schroff et al., 2015) and LMNN.
        normalize: project the embeddings onto the unit sphere first, where distances are at most 2 (squared: 4).
    """

    def __init__(self, squared: bool = False, normalize: bool = False) -> None:
        super().__init__()
        self.squared, self.normalize = squared, normalize

    @property
    def largest(self) -> float:
        """No two embeddings are farther apart."""
        return (4.0 if self.squared else 2.0) if self.normalize else float("inf")

    def project(self, z: Tensor) -> Tensor:
        return unit(z) if self.normalize else z

    def matrix(self, z: Tensor, rows: slice = slice(None)) -> Tensor:
        return self._root(squared_euclidean_matrix(self.project(z), rows))

    def pairs(self, x: Tensor, y: Tensor) -> Tensor:
        return self._root((self.project(x) - self.project(y)).square().sum(1))

    def _root(self, squares: Tensor) -> Tensor:
        return squares if self.squared else squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


class MahalanobisDistance(EuclideanDistance):
    """√((x − y)ᵀ M (x − y)) with a learned M = LᵀL, which is positive semi-definite whatever L becomes.

    The same as the Euclidean distance behind a linear layer L without bias (E. P. Xing et al., "Distance Metric
    Learning", 2002; K. Weinberger & L. Saul, 2009, section 2.1). L starts as the identity.

    Args:
        dim: width of the embeddings, the encoder's `z_dim`.
        squared: the square, as in LMNN.
    """

    def __init__(self, dim: int, squared: bool = False) -> None:
        super().__init__(squared)
        if dim < 1:
            raise InputError(f"MahalanobisDistance dim {dim}: must be at least 1")
        self.factor = nn.Parameter(torch.eye(dim))

    def project(self, z: Tensor) -> Tensor:
        return z @ self.factor.T.to(z.dtype)


class CosineDistance(nn.Module):
    """1 − cos(x, y), between 0 and 2."""

    largest = 2.0

    def matrix(self, z: Tensor, rows: slice = slice(None)) -> Tensor:
        z = unit(z)
        return 1 - z[rows] @ z.T

    def pairs(self, x: Tensor, y: Tensor) -> Tensor:
        return 1 - (unit(x) * unit(y)).sum(1)
