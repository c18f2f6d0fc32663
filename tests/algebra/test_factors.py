from __future__ import annotations

import math

import pytest
import torch

from peftctl.algebra.factors import Factors, approximated, inner, reduced, stacked


def factors(seed: int, out: int = 12, rank: int = 3, inputs: int = 9) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, inputs, generator=generator), torch.randn(out, rank, generator=generator))


def product(f: Factors) -> torch.Tensor:
    return f.B.double() @ f.A.double()


@pytest.mark.parametrize("rank", [1, 3, 20], ids=["one", "low", "more than the matrix has"])
def test_singular_values_and_norm_are_those_of_the_product(rank):
    f = factors(0, rank=rank)
    wanted = torch.linalg.svdvals(product(f))
    torch.testing.assert_close(f.singular()[: len(wanted)], wanted[: len(f.singular())], rtol=1e-10, atol=1e-10)
    assert f.norm() == pytest.approx(float(product(f).norm()), rel=1e-12)


def test_the_svd_multiplies_to_the_product():
    u, s, v = factors(1).svd()
    torch.testing.assert_close(u @ s.diag() @ v, product(factors(1)), rtol=1e-10, atol=1e-10)


def test_sums_and_products_of_updates():
    a, b = factors(0), factors(1, rank=5)
    both = stacked([(0.7, a), (-0.3, b)])
    torch.testing.assert_close(product(both), 0.7 * product(a) - 0.3 * product(b))
    assert inner(a, b) == pytest.approx(float((product(a) * product(b)).sum()), rel=1e-10)


def test_a_difference_of_equals_is_zero_to_the_last_digits():
    a = factors(0)
    assert stacked([(1.0, a), (-1.0, a)]).norm() < 1e-14 * a.norm()


def test_no_rank_is_kept_that_is_not_needed():
    a = factors(0)
    cut = reduced(stacked([(0.5, a), (0.25, a), (1.0, factors(1, rank=2))]))
    assert cut.factors.rank == 5
    assert cut.energy == pytest.approx(1.0, abs=1e-14)
    nothing = reduced(Factors(torch.zeros(2, 9), torch.randn(12, 2)))
    assert (nothing.factors.rank, nothing.energy) == (1, 1.0)


@pytest.mark.parametrize(("out", "inputs"), [(12, 9), (9, 12)])
@pytest.mark.parametrize("rank", [2, 40])
def test_no_matrix_of_that_rank_is_nearer(out, inputs, rank):
    matrix = torch.randn(out, inputs, generator=torch.Generator().manual_seed(3))
    cut = approximated(matrix, rank)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = u[:, :rank] @ s[:rank].diag() @ v[:rank]
    torch.testing.assert_close(product(cut.factors), best, rtol=1e-8, atol=1e-8)
    assert cut.energy == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), rel=1e-10)


def test_a_matrix_of_low_rank_is_kept_whole():
    matrix = product(factors(0, rank=2))
    cut = approximated(matrix, 6)
    torch.testing.assert_close(product(cut.factors), matrix, rtol=1e-10, atol=1e-10)
    assert math.isclose(cut.energy, 1.0, abs_tol=1e-12)
