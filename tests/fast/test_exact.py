"""The fast path computes what the model computes: losses and gradients, whatever the layout, the method, the model."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from peftctl import attach
from peftctl.data.batches import Layout
from peftctl.data.encode import Encoded
from peftctl.engine.attach import acting, trained
from peftctl.fast import faster
from peftctl.fast.flash import Flash
from peftctl.fast.plain import Plain
from peftctl.methods.adalora import AdaLoRA
from peftctl.methods.dora import DoRA
from peftctl.methods.ia3 import IA3
from peftctl.methods.layers import Layers
from peftctl.methods.lora import LoRA
from peftctl.methods.oft import OFT
from peftctl.methods.prefix import Prefix
from peftctl.methods.prompt import Prompt
from peftctl.methods.vera import VeRA
from peftctl.models.recomputing import recompute
from peftctl.tasks.sft import SFT
from tests.tiny import VOCAB, build, stir

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}


def small(name: str, **more: Any) -> nn.Module:
    config = getattr(tf, f"{name}Config")(**SMALL | more)
    return getattr(tf, f"{name}ForCausalLM")(config)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: build("llama"),
    "scaled-rope": lambda: small("Llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "window": lambda: small("Mistral", sliding_window=5),
    "biases": lambda: small("Qwen2"),
    "head-norms": lambda: small("Qwen3"),
    "gemma": lambda: small("Gemma", hidden_activation="gelu_pytorch_tanh"),
    "fused": lambda: small("Phi3"),
    "unturned": lambda: small("SmolLM3", no_rope_layer_interval=2),
}

METHODS = {
    "lora": LoRA(r=3),
    "query-value": LoRA(r=2, alpha=3, target_modules=["q_proj", "v_proj"]),
    "embedded": LoRA(r=2, target_modules=["embed_tokens", "up_proj"]),
    "start": LoRA(r=2, init_weights="pissa"),
    "dora": DoRA(r=2),
    "adalora": AdaLoRA(init_r=3, target_r=2),
    "vera": VeRA(r=4),
    "ia3": IA3(),
    "oft": OFT(block_size=4),
    "prompt": Prompt(num_virtual_tokens=3),
}

PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LAYOUTS = (None, "lines", "flat")
LENGTHS = (9, 4, 14, 1, 11, 8)


def rows(shared: int = 0) -> list[Encoded]:
    """Rows of which about half the tokens are trained, the first `shared` the same in all."""
    generator = torch.Generator().manual_seed(1)
    begin = torch.randint(3, VOCAB, (shared,), generator=generator).tolist()
    drawn = (torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS)
    made = [array("i", [*begin, *ids]) for ids in drawn]
    return [Encoded(ids, ((len(ids) // 2 or 1, len(ids)),) if len(ids) > 1 else ()) for ids in made]


def batch(layout: Any, shared: int = 0) -> dict[str, Tensor]:
    one = Layout(rows(shared), 6, 0, layout)
    (part,) = one.micro_batches(range(6))
    return one.batch(part, torch.device("cpu"))


def made(name: str, method: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).train()
    attach(model, method)
    stir(model)
    return model


def computed(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and the gradients of a batch."""
    loss = SFT().sums(model, given)["loss"]
    named = trained(model)
    return {"loss": loss.detach(), **dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    """The loss, and every gradient as far as the largest of them counts."""
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=share, atol=0)
    largest = max(float(one.norm()) for key, one in expected.items() if key != "loss")
    for key, gradient in found.items():
        assert float((gradient - expected[key]).norm()) <= share * largest, key


@pytest.fixture(params=["compiled", "plain", "flash"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr("peftctl.fast.available", lambda: None)
    if request.param == "flash":
        flash(monkeypatch)


def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, on the CPU: torch's attention, uncompiled functions."""
    monkeypatch.setattr("peftctl.fast.tools", lambda *_: (Plain(), Flash))


def silent(text: str) -> None:
    assert "without compiled kernels" in text, text


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model(name: str, layout: Any) -> None:
    model = made(name, LoRA(r=3))
    expected = computed(model, batch(layout))
    with faster(model, silent) as fast:
        assert fast
        assert_near(computed(model, batch(layout)), expected, 1e-5)
    assert "forward" not in vars(model.model)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name: str) -> None:
    model = made("llama", METHODS[name])
    given = batch(None)
    expected = computed(model, given)
    with faster(model, silent):
        assert_near(computed(model, given), expected, 1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "window"])
def test_a_common_beginning_is_computed_once(name: str, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = made(name, LoRA(r=3)), batch(layout, shared=20)
    expected = computed(model, given)
    seen: list[int] = []
    with faster(model, silent):
        norm = model.model.norm.forward
        monkeypatch.setattr(model.model.norm, "forward", lambda x: seen.append(len(x)) or norm(x))
        assert_near(computed(model, given), expected, 1e-5)
    packed_padding = given["input_ids"].numel() - sum(LENGTHS) - 6 * 20 if layout == "lines" else 0
    if not packed_padding:
        assert seen == [sum(LENGTHS) + 20]


@pytest.mark.parametrize("block", [4, 256])
def test_long_rows_go_block_by_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftctl.fast.attention.BLOCK", block)
    monkeypatch.setattr("peftctl.fast.attention.KEPT", 7)  # the probabilities of some blocks are computed again
    for name in ("llama", "window"):
        model, given = made(name, LoRA(r=3)), batch(None)
        expected = computed(model, given)
        with faster(model, silent):
            assert_near(computed(model, given), expected, 1e-5)


@pytest.mark.usefixtures("kernels")
def test_gradient_checkpointing_computes_the_same_with_dropout_too() -> None:
    model, given = made("llama", LoRA(r=3, dropout=0.3)), batch(None)
    with faster(model, silent):
        torch.manual_seed(3)
        expected = computed(model, given)
        state = torch.get_rng_state()
        recompute(model)
        torch.manual_seed(3)
        assert_near(computed(model, given), expected, 1e-6)
        assert torch.equal(torch.get_rng_state(), state)  # recomputing takes nothing from the next step


def test_dropout_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same features dropped for every token, both ways agree."""
    model, given = made("llama", LoRA(r=3, dropout=0.25)), batch(None)

    def dropped(x: Tensor, p: float, train: bool) -> tuple[Tensor, Tensor]:
        mask = torch.arange(x.shape[-1]).remainder(4).bool().expand(x.shape)
        return x * mask / (1 - p), mask

    monkeypatch.setattr(torch, "native_dropout", dropped)
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: dropped(x, self.p, True)[0] if self.training else x)
    expected = computed(model, given)
    with faster(model, silent):
        assert_near(computed(model, given), expected, 1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["llama", "head-norms", "gemma"])
def test_in_half_precision_it_is_as_near_the_truth(name: str) -> None:
    model = made(name, LoRA(r=3))
    given = batch(None)
    truth = computed(model, given)
    model.to(torch.bfloat16)
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()
    there = computed(model, given)
    with faster(model, silent):
        here = computed(model, given)

    def error(one: dict[str, Tensor]) -> float:
        return sum(float((one[key].float() - truth[key]).norm()) for key in truth if key != "loss")

    assert error(here) <= 1.1 * error(there)


def test_the_reference_is_the_base() -> None:
    model, given = made("llama", LoRA(r=3)), batch(None)
    with torch.no_grad(), acting(model, []):
        expected = SFT().loss(model, given)
        with faster(model, silent):
            torch.testing.assert_close(SFT().loss(model, given), expected)


def test_what_is_called_otherwise_takes_the_models_own_way() -> None:
    model = made("llama", LoRA(r=3)).eval()
    ids = batch(None)["input_ids"][:2, :6]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    hidden = model(ids, output_hidden_states=True).hidden_states
    with faster(model, silent):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
        assert len(model(ids, output_hidden_states=True).hidden_states) == len(hidden)
        left = torch.ones_like(ids)
        left[0, :2] = 0
        torch.testing.assert_close(
            model(ids, attention_mask=left, use_cache=False).logits[0, 2:],
            model(ids[:1, 2:], use_cache=False).logits[0],
        )


@pytest.mark.parametrize(
    ("build_it", "method", "why"),
    [
        (lambda: build("gpt2"), LoRA(r=2), "is not built as Llama is"),
        (lambda: build("mixtral"), LoRA(r=2, target_modules=["q_proj"]), "`layers.0.mlp` has `experts`, `gate`"),
        (lambda: small("Gemma2"), LoRA(r=2), "has `post_feedforward_layernorm`, `pre_feedforward_layernorm`"),
        (lambda: small("Llama", attention_dropout=0.1), LoRA(r=2), "dropout of attention probabilities"),
        (lambda: build("llama"), Layers(modules=["model.layers.1"]), "adapter around"),
        (lambda: small("Phi3", rope_parameters=PARTIAL), LoRA(r=2), "a part of each head"),
        (lambda: small("Granite", residual_multiplier=0.5), LoRA(r=2), "`layers.0` computes something else"),
        (lambda: small("Granite", embedding_multiplier=3.0), LoRA(r=2), "GraniteForCausalLM computes something else"),
    ],
)
def test_what_it_cannot_do_is_said(build_it: Callable[[], nn.Module], method: Any, why: str) -> None:
    torch.manual_seed(0)
    model = build_it().eval()
    attach(model, method)
    said: list[str] = []
    given = batch(None)
    expected = computed(model, given)
    with faster(model, said.append) as fast:
        assert not fast
        assert_near(computed(model, given), expected, 1e-5)
    assert len(said) == 1
    assert said[0].startswith("no fast path for this model: ")
    assert why in said[0]


def test_a_prefix_keeps_its_cache() -> None:
    model, given = made("llama", Prefix(num_virtual_tokens=3)), batch(None)
    expected = computed(model, given)
    with faster(model, silent):
        assert_near(computed(model, given), expected, 1e-5)


def test_a_second_backward_pass_is_refused() -> None:
    model = made("llama", LoRA(r=3))
    with faster(model, silent):
        loss = SFT().loss(model, batch(None))
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second backward"):
            loss.backward()


def test_what_a_card_cannot_compute_switches_the_fast_path_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    flash(monkeypatch)
    monkeypatch.setattr(Flash, "seen", missing)
    said: list[str] = []
    with faster(made("llama", LoRA(r=3)), said.append) as fast:
        assert fast is None
    assert said == ["no fast path for this model: no kernel image is available"]


def test_several_forwards_before_a_backward() -> None:
    model = made("llama", LoRA(r=3))
    one, other = batch(None), replace_ids(batch("flat"))
    expected = [computed(model, given) for given in (one, other)]
    with faster(model, silent):
        loss = SFT().loss(model, one) + SFT().loss(model, other)
        found = torch.autograd.grad(loss, list(trained(model).values()))
    for (key, first), second, gradient in zip(
        list(expected[0].items())[1:], list(expected[1].values())[1:], found, strict=True
    ):
        torch.testing.assert_close(gradient, first + second, rtol=1e-3, atol=1e-4, msg=key)


def replace_ids(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return given | {"input_ids": (given["input_ids"] * 7) % VOCAB}
