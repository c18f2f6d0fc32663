"""Adapters on 4- and 8-bit bases: read as they compute, learn, cross to the real `peft`, never merge in place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import peftctl
from peftctl.engine import hosts
from peftctl.engine.attach import adapters_of
from peftctl.errors import AdapterError, NotMergeable
from peftctl.models.base import Model, load

SPECIAL = {"vocab_size": tiny.VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
# multiples of 64: bitsandbytes' AVX-512 code misreads the scales of other widths
NETWORKS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=192, **HEADS, **SPECIAL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **SPECIAL)),
}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
HELD = {"nf4": ("nf4", True), "nf4 single": ("nf4", False), "fp4": ("fp4", True), "fp4 single": ("fp4", False)}
HELD |= {"int8": ("int8", True)}
CASES = [(name, held) for name in NETWORKS for held in HELD]
CLOSE = {"nf4": 0.99, "fp4": 0.98, "int8": 0.9999}
"""Least cosine of a weight with itself after it was rounded."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each network with a tokenizer of whole words, as `save_pretrained` writes them."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{number}" for number in range(4, tiny.VOCAB))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    found = {}
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def quantised(folder: Path, held: str) -> nn.Module:
    kind, double = HELD[held]
    block: Any = {"quantization": kind, "double_quantization": double, "dtype": "float32", "device": "cpu"}
    return load(Model(name_or_path=str(folder), **block)).model


def plain(folder: Path) -> nn.Module:
    return load(Model(name_or_path=str(folder), dtype="float32", device="cpu")).model


def lora(name: str, **more: Any) -> Any:
    return peftctl.METHODS["lora"](r=4, alpha=8, target_modules=TARGETS[name], **more)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors, bit for bit."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".adapters." not in n}


@pytest.mark.parametrize(("name", "held"), CASES)
def test_a_host_reads_as_the_weight_that_it_computes_with(name: str, held: str, folders: dict[str, Path]) -> None:
    model, whole = quantised(folders[name], held), plain(folders[name])
    pairs = [(m, whole.get_submodule(n)) for n, m in model.named_modules() if hosts.is_quantised(m)]
    assert len(pairs) == {"llama": 14, "gpt2": 8}[name]
    tiny.logits(model)  # 8-bit layers move their scales in the first forward
    for host, original in pairs:
        weight, right = hosts.weight(host), hosts.weight(original)
        assert weight.shape == right.shape == hosts.features(host)[::-1]
        alike = torch.cosine_similarity(weight.flatten().float(), right.flatten(), 0).item()
        assert CLOSE[HELD[held][0]] < alike < 1.0
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(3))
        bias = hosts.bias(host)
        y = x @ weight.float().T + (0 if bias is None else bias)
        loose = HELD[held][0] == "int8"  # rounds its input to 8 bits too
        torch.testing.assert_close(host(x), y, rtol=0, atol=0.02 if loose else 1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantisation_is_the_recipes_choice(kind: str, folders: dict[str, Path]) -> None:
    states = []
    for held in (kind, f"{kind} single"):
        model = quantised(folders["llama"], held)
        host = next(m for m in model.modules() if hosts.is_quantised(m))
        assert host.weight.quant_state.quant_type == kind
        states.append(host.weight.quant_state.nested)
    assert states == [True, False]


@pytest.mark.parametrize(("name", "held"), CASES)
def test_starts_at_the_base_and_learns(name: str, held: str, folders: dict[str, Path]) -> None:
    model = quantised(folders[name], held)
    base, before = tiny.logits(model), bits(model)
    peftctl.attach(model, lora(name))
    assert torch.equal(tiny.logits(model), base)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert len(trained) == 2 * len(adapters_of(model, "default")) == 2 * len(TARGETS[name]) * 2
    batch = tiny.inputs(model)
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model.train()(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    after = bits(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with peftctl.bare(model.eval()):
        assert torch.equal(tiny.logits(model), base)


@pytest.mark.parametrize(("name", "held"), CASES)
def test_merge_is_refused_and_changes_nothing(name: str, held: str, folders: dict[str, Path]) -> None:
    model = peftctl.attach(quantised(folders[name], held), lora(name))
    tiny.stir(model)
    before = tiny.logits(model)
    with pytest.raises(NotMergeable) as error:
        peftctl.merge(model)
    problems = error.value.problems
    assert len(problems) == len(adapters_of(model, "default"))  # every site is named, not only the first
    assert {hint for _, hint in problems} == {"merge into the unquantised base: `peftctl merge`"}
    assert all("stored in 4 or 8 bits" in text for text, _ in problems)
    assert torch.equal(tiny.logits(model), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_merge_folds_what_is_not_quantised(name: str, folders: dict[str, Path]) -> None:
    site = "lm_head" if name == "llama" else "wte"  # GPT-2's is tied to its head, which must stay as it was
    model = quantised(folders[name], "nf4")
    base = tiny.logits(model)
    peftctl.attach(model, peftctl.METHODS["lora"](r=4, alpha=8, target_modules=[site]))
    tiny.stir(model)
    before = tiny.logits(model)
    assert not torch.allclose(before, base, atol=1e-2)
    peftctl.merge(model)
    assert not adapters_of(model)
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(tiny.logits(model), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "held"), CASES)
def test_peft_reads_it_on_the_same_base(name: str, held: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = peftctl.attach(quantised(folders[name], held), lora(name))
    base = tiny.logits(model)
    tiny.stir(model)
    ours, tokens = tiny.logits(model), tiny.greedy(model)
    assert not torch.allclose(ours, base, atol=1e-2)
    peftctl.save(model, tmp_path)
    peftctl.detach(model)
    assert torch.equal(tiny.logits(model), base)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(tiny.logits(theirs), ours, rtol=1e-5, atol=1e-6)
    assert tiny.greedy(theirs) == tokens


@pytest.mark.parametrize(("name", "held"), [("llama", "nf4"), ("llama", "int8"), ("gpt2", "fp4"), ("gpt2", "int8")])
def test_what_peft_saves_loads_here(name: str, held: str, folders: dict[str, Path], tmp_path: Path) -> None:
    options = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[name], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(quantised(folders[name], held), options).eval()
    tiny.stir(theirs)
    theirs.save_pretrained(tmp_path)
    ours = peftctl.load(quantised(folders[name], held), tmp_path)
    torch.testing.assert_close(tiny.logits(ours), tiny.logits(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "held"), CASES)
def test_a_quantised_linear_is_not_trained_whole(name: str, held: str, folders: dict[str, Path]) -> None:
    model = quantised(folders[name], held)
    base = tiny.logits(model)
    whole = {"llama": "o_proj", "gpt2": "mlp.c_fc"}[name]
    with pytest.raises(AdapterError, match=r"method\.modules_to_save: .* stored in 4 or 8 bits cannot be trained"):
        peftctl.attach(model, lora(name, modules_to_save=[whole]))
    assert not adapters_of(model)
    assert torch.equal(tiny.logits(model), base)


def test_the_head_stays_whole_and_can_be_trained(folders: dict[str, Path]) -> None:
    model = quantised(folders["llama"], "nf4")
    assert hosts.kind(model.lm_head) == "Linear"
    base = tiny.logits(model)
    peftctl.attach(model, lora("llama", modules_to_save=["lm_head"]))
    torch.testing.assert_close(tiny.logits(model), base, rtol=0, atol=1e-6)
    assert adapters_of(model, "default")["lm_head"].copy.weight.requires_grad
