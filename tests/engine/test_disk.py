"""Adapter folders: read strictly, written the same each time, and understood as HF PEFT understands them."""

from __future__ import annotations

import peft
import pytest
import torch
from engine.folders import CONFIG, WEIGHTS, B, made, refusal, rewrite, tensors
from safetensors.torch import save_file
from tiny import VOCAB, build, logits, stir
from torch import nn

import peftctl
from peftctl.engine.attach import adapters_of, trained
from peftctl.errors import AdapterError, StorageError


def test_every_wrong_tensor_is_told_with_file_and_key(tmp_path):
    made(tmp_path, target_modules=["q_proj", "v_proj"])
    other = B.replace("q_proj", "v_proj")
    rewrite(
        tmp_path,
        **{
            B + "lora_B.weight": None,
            B + "lora_A.weight": torch.zeros(4, 31),
            other + "lora_A.weight": torch.full((4, 32), torch.nan),
            other + "lora_B.weight": torch.zeros(16, 4, dtype=torch.int64),
            B.replace("layers.0", "layers.7") + "lora_A.weight": torch.zeros(4, 32),
            B + "lora_C.weight": torch.zeros(1),
        },
    )
    with refusal(build("llama")) as problems:
        peftctl.load(build("llama"), tmp_path)
    file = tmp_path / WEIGHTS
    expected = {
        f"{file}: `{B}lora_B.weight` is missing",
        f"{file}: `{B}lora_A.weight` has shape [4, 31], the model wants [4, 32]",
        f"{file}: `{other}lora_A.weight` is not finite",
        f"{file}: `{other}lora_B.weight` holds I64, which is no floating-point type",
        f"{file}: `{B.replace('layers.0', 'layers.7')}lora_A.weight` is not part of this adapter",
        f"{file}: `{B}lora_C.weight` is not part of this adapter",
    }
    assert {text.partition("; ")[0] for text in problems} == expected


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_one_number_that_is_not_finite_is_enough(value, tmp_path):
    made(tmp_path)
    tensor = tensors(tmp_path)[B + "lora_B.weight"]
    tensor[-1, -1] = value
    rewrite(tmp_path, **{B + "lora_B.weight": tensor})
    model = build("llama")
    with refusal(model) as problems:
        peftctl.load(model, tmp_path)
    assert problems == [f"{tmp_path / WEIGHTS}: `{B}lora_B.weight` is not finite; None"]


def test_a_number_too_large_for_float32_is_refused(tmp_path):
    made(tmp_path)
    rewrite(tmp_path, **{B + "lora_B.weight": torch.full((32, 4), 1e300, dtype=torch.float64)})
    model = build("llama")
    with refusal(model) as problems:
        peftctl.load(model, tmp_path)
    assert "is not finite" in problems[0]


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.modules_to_save.weight",
        "model.layers.0.original_module.self_attn.q_proj.weight",
    ],
)
def test_no_file_reaches_the_base(key, tmp_path):
    made(tmp_path)
    model = build("llama")
    site = key.replace(".base_layer", "").replace(".modules_to_save", "").replace(".original_module", "")
    rewrite(tmp_path, **{"base_model.model." + key: torch.full_like(model.get_parameter(site), 3.0)})
    with refusal(model) as problems:
        peftctl.load(model, tmp_path)
    assert len(problems) == 1
    assert f"`base_model.model.{key}`" in problems[0]


def test_a_copy_of_the_base_beside_an_embedding_is_accepted_and_not_read(tmp_path):
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    stir(theirs)
    theirs.eval().save_pretrained(tmp_path)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in tensors(tmp_path)
    model = peftctl.load(build("llama"), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    assert all(".lora_" in key for key in trained(model))


def test_names_without_the_prefix_are_not_accepted(tmp_path):
    made(tmp_path)
    plain = {key.removeprefix("base_model.model."): t for key, t in tensors(tmp_path).items()}
    save_file(plain, tmp_path / WEIGHTS)
    model = build("llama")
    with refusal(model) as problems:
        peftctl.load(model, tmp_path)
    assert sum("is missing" in text for text in problems) == len(plain)
    assert sum("is not part of this adapter" in text for text in problems) == len(plain)


def test_an_adapter_of_another_base_lists_what_does_not_fit(tmp_path):
    made(tmp_path)
    model = build("gpt2")
    with refusal(model) as problems:
        peftctl.load(model, tmp_path)
    assert len(problems) == len(tensors(tmp_path))
    assert all("another base?" in text for text in problems)


def test_a_refusal_leaves_earlier_adapters_active_and_trainable(tmp_path):
    good, bad = made(tmp_path / "good"), made(tmp_path / "bad")
    rewrite(bad, **{B + "lora_A.weight": torch.full((4, 32), torch.nan)})
    model = peftctl.load(build("llama"), good, "a")
    with refusal(model):
        peftctl.load(model, bad, "b")
    with refusal(model):
        peftctl.load(model, good, "a")
    assert trained(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_read_into_float32(dtype, tmp_path):
    made(tmp_path)
    rewrite(tmp_path, **{key: t.to(dtype) for key, t in tensors(tmp_path).items()})
    model = peftctl.load(build("llama"), tmp_path)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bias": "all", "use_rslora": True},
        {"rank_pattern": {r"layers\.1\..*": 2}, "alpha_pattern": {"^model.layers.0.*": 5}, "dropout": 0.1},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_saving_what_was_loaded_gives_the_same_bytes(fields, tmp_path):
    first = made(tmp_path / "first", **fields)
    model = peftctl.load(build("llama"), first, "other")
    second = peftctl.save(model, tmp_path / "second", "other")
    for name in (CONFIG, WEIGHTS):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    peftctl.save(model, second, "other")
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {r".*layers\.1\..*": 2}, "alpha_pattern": {r".*layers\.0\..*q_proj": 3}},
        {"rank_pattern": {r"^model\.layers\.0\.self_attn\.(q|k)_proj": 8}, "alpha_pattern": {r"^layers\.0.*": 99}},
        {"rank_pattern": {r"layers\.\d+\.self_attn\.q_proj": 6, "q_proj": 2}, "alpha_pattern": {"proj": 7}},
        {"rank_pattern": {r"(?:q|v)_proj": 3, "down.proj": 5}, "alpha_pattern": {r"[qv]_proj": 1, "down_proj$": 64}},
    ],
)
def test_patterns_mean_what_they_mean_to_peft(patterns, tmp_path):
    targets = ["q_proj", "v_proj", "down_proj"]
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **patterns))
    stir(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    read = peftctl.load(build("llama"), tmp_path / "theirs")
    torch.testing.assert_close(logits(read), logits(theirs), rtol=1e-5, atol=1e-6)
    made_here = peftctl.attach(
        build("llama"), peftctl.METHODS["lora"](r=4, alpha=8, target_modules=targets, **patterns)
    )
    for site, adapter in adapters_of(made_here, "default").items():
        layer = theirs.get_submodule("base_model.model." + site)
        assert (adapter.scale, adapter.lora_A.out_features) == (layer.scaling["default"], layer.r["default"])


def test_a_head_with_parts_and_all_biases_cross_to_and_from_peft(tmp_path):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    def roberta() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        return RobertaForSequenceClassification(RobertaConfig(vocab_size=VOCAB, num_labels=3, **sizes)).eval()

    theirs = peft.get_peft_model(
        roberta(), peft.LoraConfig(r=2, bias="all", task_type="SEQ_CLS", target_modules=["query"])
    )
    stir(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    model = peftctl.load(roberta(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-6)
    peftctl.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(roberta(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-6)


def test_a_name_that_ends_another_name_is_not_taken_for_it(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.ModuleDict({"lin": nn.Linear(3, 3)})
            self.whole = nn.ModuleDict({"part": nn.ModuleDict({"lin": nn.Linear(3, 3)})})

    model = peftctl.attach(Twice(), peftctl.METHODS["lora"](r=2, target_modules=r"part\.lin"))
    peftctl.save(model, tmp_path)
    assert list(adapters_of(peftctl.load(Twice(), tmp_path), "default")) == ["part.lin"]


def test_saving_says_what_is_wrong(tmp_path):
    model = peftctl.attach(build("llama"), peftctl.METHODS["lora"](r=4, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="adapter `b`: not attached to this model; attached: `default`"):
        peftctl.save(model, tmp_path, "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="the adapter could not be written"):
        peftctl.save(model, tmp_path / "file")
    with torch.no_grad():
        for parameter in list(trained(model).values())[:2]:
            parameter.fill_(torch.nan)
    with pytest.raises(AdapterError) as caught:
        peftctl.save(model, tmp_path / "folder")
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "folder").exists()


def test_weights_of_activation_are_not_saved(tmp_path):
    made(tmp_path / "one")
    model = peftctl.load(build("llama"), tmp_path / "one")
    peftctl.activate(model, {"default": 0.25})
    peftctl.save(model, tmp_path / "two")
    expected = logits(peftctl.load(build("llama"), tmp_path / "one"))
    assert torch.equal(logits(peftctl.load(build("llama"), tmp_path / "two")), expected)


def test_a_folder_of_a_skeleton_is_read_without_its_weights(tmp_path):
    made(tmp_path, modules_to_save=["lm_head"])
    with torch.device("meta"):
        skeleton = build("llama")
    peftctl.load(skeleton, tmp_path)
    real = peftctl.load(build("llama"), tmp_path)
    for key, parameter in trained(skeleton).items():
        assert torch.equal(parameter, trained(real)[key])
