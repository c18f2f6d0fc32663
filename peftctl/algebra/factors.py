"""Low-rank matrices as their factors: norms, angles and best approximations without ever building the product.

U = B A,  B [out, r], A [r, in].  With B = Qb Rb and A^T = Qa Ra (QR), the small core Rb Ra^T [r, r] has the singular
values of U. All arithmetic is in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


class Factors(NamedTuple):
    """An update U = B A of one weight, its scale included."""

    A: Tensor
    """[r, in]"""
    B: Tensor
    """[out, r]"""

    @property
    def rank(self) -> int:
        """Columns of B."""
        return len(self.A)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [out, k], singular values [k] from the largest, V^T [k, in]; k is at most r."""
        left, right = torch.linalg.qr(self.B.double()), torch.linalg.qr(self.A.double().T)
        u, s, v = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
        return left.Q @ u, s, v @ right.Q.T

    def singular(self) -> Tensor:
        """Singular values, from the largest."""
        core: Tensor = torch.linalg.qr(self.B.double()).R @ torch.linalg.qr(self.A.double().T).R.T
        values: Tensor = torch.linalg.svdvals(core)
        return values

    def norm(self) -> float:
        """Frobenius norm."""
        return float(torch.linalg.vector_norm(self.singular()))


class Cut(NamedTuple):
    """The best approximation of a matrix by one of low rank, and what it keeps."""

    factors: Factors
    kept: float
    """Sum of the squares that are kept."""
    total: float
    """Sum of the squares of the whole."""

    @property
    def energy(self) -> float:
        """Share of the sum of squares that is kept; 1 of nothing."""
        return energy(self.kept, self.total)


def energy(kept: float, total: float) -> float:
    """`kept` as a share of `total`; all of nothing is kept."""
    return min(kept / total, 1.0) if total else 1.0


def stacked(terms: Sequence[tuple[float, Factors]]) -> Factors:
    """The weighted sum of updates of one weight, exactly: their factors side by side."""
    A = torch.cat([factors.A.double() for _, factors in terms])
    return Factors(A, torch.cat([weight * factors.B.double() for weight, factors in terms], dim=1))


def inner(first: Factors, second: Factors) -> float:
    """Sum of the products of the entries of two updates."""
    across = first.B.double().T @ second.B.double()
    return float((across * (first.A.double() @ second.A.double().T)).sum())


def reduced(factors: Factors, rank: int | None = None) -> Cut:
    """The best approximation of at most `rank`; without one, the lowest rank that loses nothing in float64."""
    u, s, v = factors.svd()
    if rank is None:
        size = torch.linalg.vector_norm(factors.A.double()) * torch.linalg.vector_norm(factors.B.double())
        s = s * (s > float(size) * max(len(u), v.shape[1]) * EPS)  # the rest is rounding of terms that cancel
        rank = max(int(s.count_nonzero()), 1)
    kept = s[:rank]
    root = kept.sqrt()  # shared by both factors, so that neither learns much faster than the other
    cut = Factors(root[:, None] * v[:rank], u[:, :rank] * root)
    return Cut(cut, float(kept.square().sum()), float(s.square().sum()))


def approximated(matrix: Tensor, rank: int) -> Cut:
    """The best approximation of a dense matrix [out, in] of at most `rank`.

    The main directions are eigenvectors of its smaller Gram matrix, and the matrix is projected on them: a tenth of the
    time of a full SVD, and as good, because what is kept is exact whatever the precision of the directions.
    """
    matrix = matrix.double()
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    basis = torch.linalg.eigh(tall.T @ tall).eigenvectors.flip(1)[:, :rank]
    image = tall @ basis
    length = torch.linalg.vector_norm(image, dim=0)
    root = length.sqrt()
    left, right = image / torch.where(root > 0, root, 1.0), root[:, None] * basis.T
    factors = Factors(left.T, right.T) if wide else Factors(right, left)
    return Cut(factors, float(length.square().sum()), float(matrix.square().sum()))
