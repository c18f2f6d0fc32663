"""The output head in pieces is the output head whole: losses and gradients, of every kind of model that writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from peftctl import attach
from peftctl.engine.attach import trained
from peftctl.engine.sample import IGNORED
from peftctl.methods.full import Full
from peftctl.methods.lora import LoRA
from peftctl.models import output_head as heads
from peftctl.models.output_head import OutputHead, output_head
from peftctl.tasks.seq2seq import Seq2Seq
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
    "max_position_embeddings": 64,
}


def small(name: str, **more: Any) -> nn.Module:
    """A tiny model of the classes that transformers calls `name`."""
    config = getattr(tf, f"{name}Config")(**SMALL | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | more)
    return getattr(tf, f"{name}ForCausalLM")(config)  # type: ignore[no-any-return]


def bart() -> nn.Module:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 48))}
    heads_of = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=VOCAB, d_model=32, **sizes, **heads_of))
    model.final_logits_bias.normal_()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: build("llama"),
    "gpt2": lambda: build("gpt2"),
    "capped": lambda: small("Gemma2", final_logit_softcapping=0.5, query_pre_attn_scalar=8),
    "scaled": lambda: small("Cohere", logit_scale=0.25),
    "divided": lambda: small("Granite", logits_scaling=3.0),
    "biased": lambda: tf.PhiForCausalLM(tf.PhiConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"})),
    "t5": lambda: build("t5"),
    "bart": bart,
}


def made(name: str) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    """A model with a LoRA, its task, and a batch with padding of which some tokens are trained."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    attach(model, LoRA(r=2))
    stir(model)
    ids = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = torch.where((mask == 1) & (torch.arange(11) > 3), ids, IGNORED)
    task = Seq2Seq() if model.config.is_encoder_decoder else SFT()
    return model, task, {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = trained(model)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for rounding, which goes by the largest gradient of a model."""
    largest = max(float(one.abs().max()) for one in expected.values())
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=0, atol=1e-5 * largest, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_whole_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, batch = made(name)
    logits, labels = task.answers(model, batch)
    whole = F.cross_entropy(logits, labels, reduction="sum")
    expected = gradients(model, whole)

    monkeypatch.setattr(heads, "FEWEST", 4)  # several pieces, the last of them shorter
    monkeypatch.setattr(heads, "PIECE", {"cpu": 1})
    assert isinstance(output_head(model, task.answers, batch), OutputHead)
    loss = task.sums(model, batch)["loss"]
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=1e-6)
    assert_near(gradients(model, loss), expected)
    torch.testing.assert_close(task.answers(model, batch)[0], logits)  # the head is back


def test_any_loss_of_log_probabilities_has_its_gradient() -> None:
    model, task, batch = made("llama")
    logits, labels = task.answers(model, batch)
    expected = F.logsigmoid(logits.log_softmax(-1).gather(1, labels[:, None]).flatten()).sum()
    found = F.logsigmoid(task.logps(model, batch)).sum()
    assert_near(gradients(model, found), gradients(model, expected))


@pytest.mark.parametrize(
    "method", [LoRA(r=2, target_modules=["lm_head", "q_proj"]), Full()], ids=["adapted", "trained"]
)
def test_heads_that_are_trained(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build("llama")
    attach(model, method)
    stir(model)
    ids = torch.randint(3, VOCAB, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    logits, labels = SFT().answers(model, batch)
    whole = F.cross_entropy(logits, labels, reduction="sum")
    expected = gradients(model, whole)
    monkeypatch.setattr(heads, "FEWEST", 4)
    monkeypatch.setattr(heads, "PIECE", {"cpu": 1})
    assert_near(gradients(model, SFT().sums(model, batch)["loss"]), expected)


def test_whole_logits_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task, batch = made("llama")
    output_head(model, task.answers, batch)
    monkeypatch.setattr(heads, "FEWEST", 4)
    monkeypatch.setattr(heads, "PIECE", {"cpu": 1})
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[-1:] == (VOCAB,) and func is not torch.ops.aten.t.default:
                sizes.append(out.shape[:-1].numel())
            return out

    with Watch():
        task.sums(model, batch)["loss"].backward()
    pieces = [size for size in sizes if size != 32]  # the transposed weight is [32, vocabulary]
    assert len(pieces) >= 5
    assert max(pieces) == 4  # of 17 trained tokens


def test_a_model_that_does_more_to_its_logits_keeps_its_own_way() -> None:
    model, task, batch = made("llama")

    class Odd(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = (
                out.logits + 0.5 * out.logits.mean(dim=-1, keepdim=True) ** 2 + torch.arange(out.logits.shape[-1])
            )
            return out

    logits, labels = task.answers(model, batch)
    model.__class__ = Odd
    assert output_head(model, task.answers, batch) is None
    changed, _ = task.answers(model, batch)
    assert not torch.allclose(changed, logits)
    torch.testing.assert_close(task.sums(model, batch)["loss"], F.cross_entropy(changed, labels, reduction="sum"))


def test_rows_that_train_nothing_give_zero_with_a_graph() -> None:
    model, task, batch = made("llama")
    loss = task.sums(model, batch | {"labels": torch.full_like(batch["labels"], IGNORED)})["loss"]
    assert float(loss) == 0
    assert all(not g.any() for g in gradients(model, loss).values())
