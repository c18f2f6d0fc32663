"""DoRA's own arithmetic: eq. 5 and its gradient computed slowly, on every kind of host."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny import build, logits, stir
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import peftctl
from peftctl.engine import hosts
from peftctl.engine.attach import adapters_of, trained
from peftctl.errors import AdapterError
from peftctl.methods.dora import Magnified, updated_norms

DORA = peftctl.METHODS["dora"]
IN, OUT, SCALE = 12, 20, 2.0


class ScaledEmbedding(nn.Embedding):
    """As Gemma has it."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed_scale * super().forward(ids)


def conv1d() -> Conv1D:
    """With a bias that is not zero."""
    host = Conv1D(OUT, IN)
    nn.init.normal_(host.bias)
    return host


HOSTS = {
    "linear": lambda: nn.Linear(IN, OUT),
    "no bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": conv1d,
    "embedding": lambda: nn.Embedding(IN, OUT),
    "scaled embedding": lambda: ScaledEmbedding(IN, OUT),
}


def adapted(kind: str = "linear", dtype: torch.dtype = torch.float32, **fields) -> tuple[nn.Module, nn.Module, Tensor]:
    """A host under DoRA that has moved from its start, its adapter, and something to feed it."""
    torch.manual_seed(0)
    model = nn.Sequential(HOSTS[kind]().to(dtype))
    peftctl.attach(model, DORA(r=4, alpha=4 * SCALE, target_modules=["0"], **fields))
    stir(model)
    is_embedding = isinstance(model[0], nn.Embedding)
    x = torch.randint(IN, (3, 5)) if is_embedding else torch.randn(3, 5, IN, dtype=dtype)
    return model[0], adapters_of(model, "default")["0"], x


def slowly(host: nn.Module, adapter: nn.Module, x: Tensor) -> Tensor:
    """Equation 5 as it stands: W' is built, and so is its norm, a constant to the gradient."""
    A, B = adapter.factors()
    updated = hosts.weight(host).float() + SCALE * B @ A
    W = adapter.lora_magnitude_vector[:, None] * updated / updated.detach().norm(dim=1, keepdim=True)
    if isinstance(host, nn.Embedding):
        return getattr(host, "embed_scale", 1.0) * F.embedding(x, W.T)
    return F.linear(x.float(), W, hosts.bias(host))


@pytest.mark.parametrize("kind", HOSTS)
def test_equation_5(kind):
    host, adapter, x = adapted(kind)
    expected = slowly(host, adapter, x)
    torch.testing.assert_close(host(x), expected, rtol=1e-5, atol=1e-5)
    plain = hosts.weight(host) + SCALE * adapter.factors()[1] @ adapter.factors()[0]
    assert not torch.allclose(plain.norm(dim=1), adapter.lora_magnitude_vector, atol=1e-2)  # the gain is not one


@pytest.mark.parametrize("kind", HOSTS)
def test_gradients_are_those_of_equation_5_with_a_constant_norm(kind):
    host, adapter, x = adapted(kind)
    inputs = [p for p in adapter.parameters() if p.requires_grad]
    if x.is_floating_point():
        inputs.append(x.requires_grad_(True))
    upstream = torch.randn(3, 5, OUT)
    ours = torch.autograd.grad(host(x), inputs, upstream)
    expected = torch.autograd.grad(slowly(host, adapter, x), inputs, upstream)
    assert len(ours) == (3 if isinstance(host, nn.Embedding) else 4)
    for found, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (2, 3), ()], ids=["rows", "batch of rows", "one row"])
def test_backward_by_hand(with_bias, shape):
    torch.manual_seed(0)
    y, low = (torch.randn(*shape, size, dtype=torch.float64, requires_grad=True) for size in (5, 2))
    B, m = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((5, 2), (5,)))
    norm, bias = torch.rand(5, dtype=torch.float64) + 0.5, torch.randn(5, dtype=torch.float64) if with_bias else None
    assert torch.autograd.gradcheck(lambda *given: Magnified.apply(*given, norm, 0.7, bias), (y, low, B, m))


def test_backward_takes_what_is_not_contiguous():
    host, adapter, x = adapted()
    upstream = torch.randn(OUT, 5, 3).permute(2, 1, 0)
    x = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(True)
    ours, right = (torch.autograd.grad(f(x), x, upstream)[0] for f in (host, lambda x: slowly(host, adapter, x)))
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
def test_factored_norms(dtype, rtol):
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(size, generator=generator) for size in ((OUT, IN), (4, IN), (OUT, 4)))
    W = W.to(dtype)
    expected = (W.double() + SCALE * B.double() @ A.double()).norm(dim=1).float()
    torch.testing.assert_close(updated_norms(W, A, B, SCALE), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_that_cancels_the_weight_blows_nothing_up(dtype):
    torch.manual_seed(0)
    A, B = torch.randn(4, IN), torch.randn(OUT, 4)
    W = -SCALE * B @ A  # in bfloat16 rounding makes the factored square of some rows negative
    norms = updated_norms(W.to(dtype), A, B, SCALE)
    assert bool((norms > torch.finfo(dtype).eps ** 0.5 * W.norm(dim=1)).all())
    assert bool((norms < 3 * torch.finfo(dtype).eps ** 0.5 * W.norm(dim=1)).all())


def test_outputs_whose_weights_are_zero_stay_finite():
    model = nn.Sequential(nn.Linear(IN, OUT))
    with torch.no_grad():
        model[0].weight[3] = 0
    peftctl.attach(model, DORA(r=4, target_modules=["0"]))
    y = model(torch.randn(5, IN))
    assert torch.equal(y[:, 3], model[0].bias[3].expand(5))
    y.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in trained(model).values())


def test_half_precision_keeps_small_changes_of_magnitude():
    """A gain of 1.003 is 1 in bfloat16: multiplied by it, no output would change."""
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False)).bfloat16()
    peftctl.attach(model, DORA(r=4, target_modules=["0"]))
    x = torch.randn(400, IN, dtype=torch.bfloat16)
    with torch.no_grad():
        before = model(x).double()
        adapters_of(model)["0.adapters.default"].lora_magnitude_vector *= 1.003
        gain = float((model(x).double() * before).sum() / before.square().sum())
    assert gain == pytest.approx(1.003, abs=3e-4)


def test_the_norm_is_that_of_the_weight_as_it_is_now():
    host, adapter, x = adapted()
    with torch.no_grad():
        host.weight.mul_(torch.linspace(0.5, 2, IN))
    torch.testing.assert_close(host(x), slowly(host, adapter, x), rtol=1e-5, atol=1e-5)


def test_dropout_acts_on_the_update_alone():
    host, adapter, x = adapted(dropout=0.5)
    host.train()
    with torch.no_grad():
        assert not torch.equal(host(x), host(x))
        torch.manual_seed(0)
        mean = host(x[:1].expand(20_000, -1, -1)).mean(0)
        torch.testing.assert_close(mean, slowly(host, adapter, x[0]), rtol=0.05, atol=0.1)
        adapter.lora_B.weight.zero_()
        assert torch.equal(host(x), host(x))  # what the magnitude does to W x is not dropped
        host.eval()
        torch.testing.assert_close(host(x), slowly(host, adapter, x), rtol=1e-5, atol=1e-5)


def test_a_trained_bias_is_the_one_that_is_added():
    host, adapter, x = adapted(bias="lora_only")
    expected = slowly(host, adapter, x) - host.bias + adapter.bias
    torch.testing.assert_close(host(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", HOSTS)
def test_two_active_ones_merge_into_what_they_compute(kind):
    torch.manual_seed(0)
    model = nn.Sequential(HOSTS[kind]())
    for seed, name in enumerate(("a", "b")):
        peftctl.attach(model, DORA(r=4, target_modules=["0"]), name)
        stir(model, seed)
    peftctl.activate(model, ["a", "b"])
    x = adapted(kind)[2]
    expected = model(x)
    torch.testing.assert_close(peftctl.merge(model)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_hosts(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 128, quant_type=kind, compute_dtype=torch.float32)).to("cpu")
    x = torch.randn(3, 64)
    base = model(x)
    peftctl.attach(model, DORA(r=4, alpha=4 * SCALE, target_modules=["0"]))
    assert torch.equal(model(x), base)
    stir(model)
    adapter = adapters_of(model, "default")["0"]
    torch.testing.assert_close(model(x), slowly(model[0], adapter, x), rtol=1e-4, atol=1e-4)
    model(x).square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in trained(model).values())


def test_how_many_parameters_the_paper_trains():
    """Llama 7B, rank 32, on q, k, v, up and down: 0.84 % of its parameters (table 1)."""
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig())
    total = sum(p.numel() for p in skeleton.parameters())
    targets = [f"{name}_proj" for name in ("q", "k", "v", "up", "down")]
    counted = sum(p.numel() for p in trained(peftctl.attach(skeleton, DORA(r=32, target_modules=targets))).values())
    assert counted == 56_098_816 + 32 * (4 * 4096 + 11008)
    assert counted / (total + counted) == pytest.approx(0.0084, abs=5e-5)


def test_its_update_has_no_weight_to_multiply():
    model = peftctl.attach(build("llama"), DORA(r=4))
    with pytest.raises(AdapterError, match="no weight update to multiply"):
        peftctl.activate(model, {"default": 0.5})


def test_the_magnitude_learns_at_the_rate_of_a():
    method = DORA(r=4, lora_plus_ratio=16.0)
    named = trained(peftctl.attach(build("llama"), method))
    slow, fast = method.groups(named, 1e-3)
    counts = {leaf: sum(name.endswith(leaf) for name in named) for leaf in ("lora_B.weight", "lora_magnitude_vector")}
    assert len(fast["params"]) == counts["lora_B.weight"] == 14
    assert len(slow["params"]) == 14 + counts["lora_magnitude_vector"] == 28


def test_the_magnitude_matters():
    model = peftctl.attach(build("llama"), DORA(r=4))
    before = logits(model)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.lora_magnitude_vector.mul_(1.1)
    assert not torch.allclose(logits(model), before, atol=1e-3)


@pytest.mark.parametrize("how", ["pissa", "olora", "loftq"])
def test_starts_away_from_the_weight_are_refused(how):
    with pytest.raises(ValueError, match=f"init_weights: `{how}` starts away from the weight"):
        DORA(init_weights=how)


@pytest.mark.parametrize("how", ["gaussian", "orthogonal"])
def test_other_starts_are_the_base(how):
    model = peftctl.attach(build("gpt2"), DORA(r=4, init_weights=how))
    torch.testing.assert_close(logits(model), logits(build("gpt2")), rtol=1e-5, atol=1e-5)
