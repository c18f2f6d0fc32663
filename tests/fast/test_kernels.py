"""The compiled kernels compute what torch's operations compute, and a machine without a compiler does without them."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor

from peftctl.fast import compiled as module
from peftctl.fast.compiled import available
from peftctl.fast.fused import Fused, fused
from peftctl.fast.plain import Plain

DTYPES = [torch.float32, torch.bfloat16]
NEAR = {torch.float32: 1e-5, torch.bfloat16: 0.02}
PLAIN = Plain()


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def compiled() -> Any:
    found = available()
    if found is None:
        pytest.skip("no compiler here")
    return found


@pytest.fixture(params=["compiled", pytest.param("fused", marks=pytest.mark.slow)])
def kernels(request: pytest.FixtureRequest) -> Any:
    """Those of a CPU; those of a GPU, which the same compiler makes for a CPU here."""
    if request.param == "compiled":
        return request.getfixturevalue("compiled")
    found = fused(torch.device("cpu"))
    assert found
    return found


def assert_near(found: Tensor, expected: Tensor) -> None:
    allowed = NEAR[found.dtype]
    torch.testing.assert_close(found, expected, rtol=allowed, atol=allowed * float(expected.abs().max()))


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("width", [8, 33, 576])
def test_norm(kernels: Any, dtype: torch.dtype, shift: float, width: int) -> None:
    x, dy, residual = (numbers(7, width, dtype=dtype) for _ in range(3))
    weight = 1 - shift + 0.1 * numbers(width, dtype=dtype)
    (y, r), (expected, inverse) = (one.norm(x, weight, 1e-5, shift) for one in (kernels, PLAIN))
    assert_near(y, expected)
    assert_near(r, inverse)
    for added in (residual, None):
        assert_near(*(one.norm_backward(dy, x, weight, r, shift, added) for one in (kernels, PLAIN)))
    exact = x.float().requires_grad_()
    PLAIN.norm(exact, weight.float(), 1e-5, shift)[0].backward(dy.float())
    assert exact.grad is not None
    assert_near(kernels.norm_backward(dy, x, weight, r, shift, None), exact.grad.to(dtype))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate(kernels: Any, dtype: torch.dtype, activation: Any) -> None:
    g, u, da = (4 * numbers(5, 37, dtype=dtype) for _ in range(3))
    assert_near(*(one.gate(g, u, activation) for one in (kernels, PLAIN)))
    (mine, theirs) = ([one.clone() for one in (da, g, u)] for _ in range(2))
    kernels.gate_backward_(*mine, activation)
    PLAIN.gate_backward_(*theirs, activation)
    exact = [one.float().requires_grad_() for one in (g, u)]
    PLAIN.gate(*exact, activation).backward(da.float())
    for found, expected, truth in zip(mine, theirs, (None, *exact), strict=True):
        assert_near(found, expected)
        if truth is not None and truth.grad is not None:
            assert_near(found, truth.grad.to(dtype))


@pytest.mark.parametrize("turned", [True, False])
def test_arrange_and_restore(compiled: Any, dtype: torch.dtype, turned: bool) -> None:
    x, index = numbers(9, 3, 8, dtype=dtype), torch.tensor([[4, 0, 7], [8, 2, -1]])
    turn = tuple(numbers(9, 8, dtype=dtype) for _ in range(2)) if turned else None
    rows, expected = (one.arrange(x, index, turn, 0.3) for one in (compiled, PLAIN))
    assert_near(rows, expected)
    assert not rows[1, :, 2].any()
    back, there = (torch.zeros_like(x) for _ in range(2))
    compiled.restore_(back, rows, index, turn, 0.7)
    PLAIN.restore_(there, rows, index, turn, 0.7)
    assert_near(back, there)
    assert not back[[1, 3, 5, 6]].any()
    if dtype == torch.float32:  # restoring is the transpose of arranging
        one, other = torch.randn_like(x), torch.randn_like(rows)
        back.zero_()
        compiled.restore_(back, other, index, turn, 0.3)
        assert_near((compiled.arrange(one, index, turn, 0.3) * other).sum(), (one * back).sum())


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("offset", [0, 5])
def test_attend(compiled: Any, dtype: torch.dtype, offset: int, window: int) -> None:
    scores, d = (numbers(2, 3 * 6, offset + 6, dtype=dtype) for _ in range(2))
    mine, theirs = scores.clone(), scores.clone()
    compiled.attend_(mine, 6, offset, window)
    PLAIN.attend_(theirs, 6, offset, window)
    assert_near(mine, theirs)
    torch.testing.assert_close(mine.float().sum(-1), torch.ones(2, 18), rtol=0, atol=NEAR[dtype])
    seen = (mine[0, :6] > 0).sum(dim=-1).tolist()
    assert seen == [min(offset + i + 1, window or 99) for i in range(6)]
    here, there = d.clone(), d.clone()
    compiled.attend_backward_(here, theirs, 6, offset, window)
    PLAIN.attend_backward_(there, theirs, 6, offset, window)
    assert_near(here, there)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_soften(kernels: Any, dtype: torch.dtype, cap: float | None) -> None:
    logits, labels = 4 * numbers(5, 131, dtype=dtype), torch.randint(131, (5,))
    exact = logits.float().clone().requires_grad_()
    shown = exact if cap is None else cap * torch.tanh(exact / cap)
    truth = shown.log_softmax(-1).gather(1, labels[:, None]).flatten()
    truth.sum().backward()
    assert exact.grad is not None
    for one in (kernels, PLAIN):
        given = logits.clone()
        found = one.soften(given, labels, cap, True)
        torch.testing.assert_close(found, truth.detach(), rtol=NEAR[dtype], atol=NEAR[dtype])
        assert_near(given, exact.grad.to(dtype))
        unchanged = one.soften(logits.clone(), labels, cap, False)
        torch.testing.assert_close(unchanged, found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_stay_visible(kernels: Any, value: float) -> None:
    logits = torch.randn(2, 40)
    logits[0, 3] = value
    found = kernels.soften(logits.clone(), torch.tensor([5, 5]), None, True)
    assert bool(torch.isfinite(found[0])) == (value == -float("inf"))
    assert torch.isfinite(found[1])
    x = torch.randn(2, 16)
    x[0, 3] = value
    assert not torch.isfinite(kernels.norm(x, torch.ones(16), 1e-5, 0.0)[0][0]).all()


def test_results_do_not_depend_on_threads_or_neighbours(compiled: Any) -> None:
    scores = torch.randn(4, 12, 6).bfloat16()
    whole = scores.clone()
    compiled.attend_(whole, 6, 0, 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        alone = scores[2:3].clone()
        compiled.attend_(alone, 6, 0, 0)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone[0], whole[2])


def test_there_may_be_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    find = available.__wrapped__
    monkeypatch.setenv("PEFTCTL_FAST_KERNELS", "off")
    assert find() is None
    monkeypatch.delenv("PEFTCTL_FAST_KERNELS")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert find() is None
    monkeypatch.undo()
    monkeypatch.setenv("PEFTCTL_HOME", str(tmp_path))

    def broken(*args: Any, **kwargs: Any) -> None:
        raise subprocess.CalledProcessError(1, "c++")

    monkeypatch.setattr(module.subprocess, "run", broken)
    assert find() is None
    assert list((tmp_path / "kernels").iterdir()) == []


def test_kernels_are_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, compiled: Any) -> None:
    find = available.__wrapped__
    monkeypatch.setenv("PEFTCTL_HOME", str(tmp_path))
    assert find() is not None
    (made,) = (tmp_path / "kernels").iterdir()
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
    assert find() is not None
    assert [*(tmp_path / "kernels").iterdir()] == [made]


def test_without_a_compiler_a_gpu_has_plain_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    fused.cache_clear()
    monkeypatch.setattr(Fused, "__init__", lambda self: vars(self).update(norm=broken))
    assert fused(torch.device("cpu")) is None
    fused.cache_clear()


def test_functions_that_compute_wrongly_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fused.cache_clear()
    monkeypatch.setattr(Fused, "__init__", lambda self: vars(self).update(turn=lambda x, turn: 2 * x))
    assert fused(torch.device("cpu")) is None
    fused.cache_clear()


def broken(*_: Any) -> Any:
    raise FileNotFoundError("cc")
