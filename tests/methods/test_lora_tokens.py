"""`trainable_token_indices`: single rows of an embedding and of a tied head, against a slow copy and against PEFT."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import gpt2, inputs, llama, logits, stir, t5
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import peftctl
from peftctl.engine.attach import adapters_of, trained
from peftctl.errors import AdapterError

LORA = peftctl.METHODS["lora"]
TOKENS = [40, 7, 91, 12]  # not in order, as the rows on disk are not


def gemma() -> nn.Module:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=96, num_key_value_heads=2, **sizes, **ids))


MODELS = {
    "llama": llama,
    "tied llama": lambda: llama(tied=True),
    "gpt2": gpt2,  # tied
    "t5": t5,  # tied in four places
    "gemma": gemma,  # tied, and multiplies its embeddings
}
EMBEDDING = {"gpt2": "transformer.wte", "t5": "shared"}
LINEAR = {"gpt2": "c_attn", "t5": "q"}
TIED = {"llama": 1, "t5": 4}
"""Modules that share the weight of the embedding, itself among them; two where not said."""


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def attached(name: str, **fields) -> nn.Module:
    settings = {"r": 4, "target_modules": [LINEAR.get(name, "q_proj")], "trainable_token_indices": TOKENS} | fields
    return peftctl.attach(made(name), LORA(**settings))


def embedding(name: str) -> str:
    return EMBEDDING.get(name, "model.embed_tokens")


def rows(model: nn.Module, name: str) -> nn.Parameter:
    return adapters_of(model, "default")[embedding(name)].trainable_tokens_delta


def seen(model: nn.Module) -> torch.Tensor:
    """Logits for rows in which the trained tokens stand."""
    batch = inputs(model)
    batch["input_ids"][:, 2:6] = torch.tensor(TOKENS)
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", MODELS)
def test_is_the_model_with_other_rows_wherever_they_are(name):
    model, plain = attached(name), made(name)
    torch.testing.assert_close(seen(model), seen(plain), rtol=0, atol=1e-6)
    with torch.no_grad():
        rows(model, name).add_(torch.randn(4, 32, generator=torch.Generator().manual_seed(3)))
        plain.get_submodule(embedding(name)).weight[TOKENS] = rows(model, name)  # all that is tied to it follows
    torch.testing.assert_close(seen(model), seen(plain), rtol=1e-5, atol=1e-6)
    with peftctl.bare(model):
        assert torch.equal(seen(model), seen(made(name)))


@pytest.mark.parametrize("name", MODELS)
def test_trains_the_rows_once_and_by_every_use(name):
    model = attached(name)
    keys = [key for key in trained(model) if "lora_" not in key]
    assert keys == [f"{embedding(name)}.adapters.default.trainable_tokens_delta"]
    assert sum("Rows" in type(a).__name__ for a in adapters_of(model, "default").values()) == TIED.get(name, 2)
    plain = made(name)
    batch = inputs(model)
    batch["input_ids"][:, 2:6] = torch.tensor(TOKENS)
    for each in (model, plain):
        out = each(**batch).logits
        F.cross_entropy(out.flatten(0, 1), torch.arange(out.shape[:2].numel()) % 96).backward()
    expected = plain.get_submodule(embedding(name)).weight.grad[TOKENS]
    torch.testing.assert_close(rows(model, name).grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_merges_into_what_is_tied_and_stays_tied(name):
    model = attached(name)
    stir(model)
    expected = seen(model)
    tied = model.config.tie_word_embeddings
    merged = peftctl.merge(model)
    torch.testing.assert_close(seen(merged), expected, rtol=1e-5, atol=1e-5)
    head = merged.get_output_embeddings().weight
    assert (head is merged.get_input_embeddings().weight) == tied == merged.config.tie_word_embeddings


@pytest.mark.parametrize("form", ["list", "mapping"])
@pytest.mark.parametrize("name", MODELS)
def test_crosses_to_peft_and_back(name, form, tmp_path):
    indices = TOKENS if form == "list" else {embedding(name): TOKENS}
    ours = attached(name, trainable_token_indices=indices)
    stir(ours)
    peftctl.save(ours, tmp_path / "ours")
    key = f"base_model.model.{embedding(name)}.token_adapter.trainable_tokens_delta"
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {k for k in stored if "lora_" not in k} == {key}
    assert torch.equal(stored[key], rows(ours, name))
    theirs = peft.PeftModel.from_pretrained(made(name), tmp_path / "ours").eval()
    torch.testing.assert_close(seen(ours), seen(theirs), rtol=1e-5, atol=1e-6)

    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    target = LINEAR.get(name, "q_proj")
    config = peft.LoraConfig(r=4, target_modules=[target], trainable_token_indices=indices, task_type=task)
    theirs = peft.get_peft_model(made(name), config).eval()
    stir(theirs, seed=8)
    theirs.save_pretrained(tmp_path / "theirs")
    read = peftctl.load(made(name), tmp_path / "theirs")
    assert not torch.allclose(seen(read), seen(ours), atol=1e-3)
    torch.testing.assert_close(seen(read), seen(theirs), rtol=1e-5, atol=1e-6)
    peftctl.save(read, tmp_path / "again")
    a, b = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "again"))
    assert a["trainable_token_indices"] == b["trainable_token_indices"]


def test_an_untied_head_has_rows_of_its_own(tmp_path):
    indices = {"embed_tokens": [5, 3], "lm_head": [9]}
    ours = attached("llama", trainable_token_indices=indices)
    stir(ours)
    peftctl.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(made("llama"), tmp_path).eval()
    torch.testing.assert_close(seen(ours), seen(theirs), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen(peftctl.load(made("llama"), tmp_path)), seen(ours))
    expected = seen(ours)
    torch.testing.assert_close(seen(peftctl.merge(ours)), expected, rtol=1e-5, atol=1e-5)


def test_a_tied_head_named_with_the_same_tokens_follows_and_with_others_does_not():
    same = attached("tied llama", trainable_token_indices={"embed_tokens": [5, 3], "lm_head": [5, 3]})
    assert len([key for key in trained(same) if "tokens_delta" in key]) == 1
    model = attached("tied llama", trainable_token_indices={"embed_tokens": [5, 3], "lm_head": [9]})
    assert len([key for key in trained(model) if "tokens_delta" in key]) == 2
    stir(model)
    expected = seen(model)
    merged = peftctl.merge(model)
    torch.testing.assert_close(seen(merged), expected, rtol=1e-5, atol=1e-5)
    assert not merged.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable_token_indices": [5, 96]}, "`model.embed_tokens` has no row 96; its rows are 0 to 95"),
        ({"trainable_token_indices": [5, 5]}, "a token of `model.embed_tokens` is given twice"),
        ({"trainable_token_indices": []}, "no tokens of `model.embed_tokens` are given"),
        ({"trainable_token_indices": {"embeddings": [1]}}, "matches no module of LlamaForCausalLM"),
        ({"trainable_token_indices": {"norm": [1]}}, "is a LlamaRMSNorm, no embedding and no output head"),
        ({"target_modules": ["embed_tokens"]}, "`model.embed_tokens` is adapted as a whole too"),
        ({"modules_to_save": ["lm_head"]}, "`lm_head` is adapted as a whole too"),
    ],
)
def test_what_cannot_be_says_why(fields, message):
    with pytest.raises(AdapterError, match=message):
        attached("tied llama", **fields)


def test_a_model_that_tells_no_embedding_wants_a_mapping():
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(8, 4)
            self.out = nn.Linear(4, 2)

    with pytest.raises(AdapterError, match="does not tell which embedding"):
        peftctl.attach(Bag(), LORA(trainable_token_indices=[1]))
    model = peftctl.attach(Bag(), LORA(r=2, trainable_token_indices={"words": [1]}))
    assert set(adapters_of(model, "default")) == {"words", "out"}


@pytest.mark.parametrize("value", ["all", [1.5], [[1]], {"embed_tokens": 3}, [True]])
def test_a_strange_config_is_refused(value, tmp_path):
    model = attached("llama")
    peftctl.save(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"trainable_token_indices": value}))
    with pytest.raises(AdapterError, match="trainable_token_indices: expected a list of numbers"):
        peftctl.load(made("llama"), tmp_path)
    path.write_text(json.dumps(config | {"trainable_token_indices": None}))
    with pytest.raises(AdapterError, match="is not part of this adapter"):
        peftctl.load(made("llama"), tmp_path)


def test_half_precision_and_generation():
    model = peftctl.attach(made("tied llama").bfloat16(), LORA(r=2, trainable_token_indices=TOKENS))
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    assert model.generate(inputs(model)["input_ids"], max_new_tokens=3, pad_token_id=0).shape == (2, 12)
