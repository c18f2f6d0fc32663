"""GraLoRA: its equation block by block, its size, what cannot be cut; folders that cross to HF PEFT and back."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from methods.oracle import TASKS, peft_reads_ours, we_read_peft, written_back
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny import build, stir
from transformers import LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl import recipe as recipes
from peftctl.engine.attach import adapters_of, trained
from peftctl.errors import AdapterError

GRALORA = peftctl.METHODS["gralora"]
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "t5": ["q", "v", "wo"],
    "bert": ["query", "value", "intermediate.dense"],
}
# PEFT's fields -> ours
NAMES = {"gralora_k": "k", "gralora_dropout": "dropout"}
VARIANTS = {
    "plain": {},
    "four blocks": {"r": 8, "gralora_k": 4, "alpha": 12},
    "one block": {"gralora_k": 1},
    "hybrid": {"hybrid_r": 3},
    "own biases": {"bias": "gralora_only"},
    "all biases": {"bias": "all"},
    "all linears": {"target_modules": "all-linear"},
}
CASES = [(name, variant) for name in TARGETS for variant in VARIANTS]
HEADS = {"bert": {"modules_to_save": ["classifier"]}}
"""What PEFT trains of every sequence classifier."""


def fields(name: str, variant: str) -> dict:
    return {"r": 4, "alpha": 8, "target_modules": TARGETS[name]} | VARIANTS[variant]


@pytest.mark.parametrize("hybrid", [0, 3])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_equation_block_by_block(k, hybrid):
    method = GRALORA(r=8, k=k, hybrid_r=hybrid, alpha=12, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peftctl.attach(build("llama"), method)
    stir(model)
    rank = 8 // k
    for site, adapter in adapters_of(model, "default").items():
        host = model.get_submodule(site)
        out_features, in_features = host.weight.shape
        update = torch.zeros(out_features, in_features)
        rows, columns = out_features // k, in_features // k
        for j in range(k):
            for n in range(k):
                A_jn = adapter.gralora_A[n, :, j * rank : (j + 1) * rank].T
                B_jn = adapter.gralora_B[j, n * rank : (n + 1) * rank].T
                assert (A_jn.shape, B_jn.shape) == ((rank, columns), (rows, rank))
                update[j * rows : (j + 1) * rows, n * columns : (n + 1) * columns] = B_jn @ A_jn
        if hybrid:
            update += adapter.gralora_B_general.weight @ adapter.gralora_A_general.weight
        x = torch.randn(2, 3, in_features)
        expected = x @ (host.weight + 12 / (8 + hybrid) * update).T
        torch.testing.assert_close(host(x), expected, rtol=1e-4, atol=1e-4)


def test_it_trains_as_much_as_lora_and_reaches_a_higher_rank():
    with torch.device("meta"):
        skeletons = [LlamaForCausalLM(LlamaConfig()) for _ in range(2)]
    targets = ["q_proj", "v_proj"]
    counts = [
        sum(p.numel() for p in trained(peftctl.attach(skeleton, method)).values())
        for skeleton, method in zip(
            skeletons,
            [GRALORA(r=8, k=2, target_modules=targets), peftctl.METHODS["lora"](r=8, target_modules=targets)],
            strict=True,
        )
    ]
    assert counts == [4_194_304, 4_194_304]
    model = peftctl.attach(build("llama"), GRALORA(r=4, k=4, target_modules=["q_proj"]))
    stir(model)
    for adapter in adapters_of(model, "default").values():
        assert torch.linalg.matrix_rank(adapter.matrix()) == 16


def test_start():
    torch.manual_seed(0)
    model = peftctl.attach(build("llama"), GRALORA(r=64, k=2, target_modules=["down_proj"]))
    for adapter in adapters_of(model, "default").values():
        assert not adapter.gralora_B.any()
        largest = adapter.gralora_A.abs().amax((1, 2)) * (48 / 2) ** 0.5  # uniform up to 1 / sqrt(inputs of a block)
        assert ((largest > 0.95) & (largest <= 1)).all()


def test_what_cannot_be_cut_is_named():
    with pytest.raises(AdapterError) as caught:
        peftctl.attach(build("llama"), GRALORA(r=5, k=5, target_modules=["q_proj", "down_proj"]))
    texts = [problem.text for problem in caught.value.problems]
    assert texts[0] == "method.k: `model.layers.0.self_attn.q_proj` [32, 32] cannot be cut into 5 x 5 blocks"
    assert len(texts) == 4


def test_a_rank_that_cannot_be_shared_is_told_when_the_recipe_is_read():
    with pytest.raises(ValidationError, match="the rank 6 cannot be shared by 4 blocks"):
        recipes.read_method({"type": "gralora", "r": 6, "k": 4})


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_peft_reads_what_we_save(name, variant, tmp_path):
    ours = {NAMES.get(key, key): value for key, value in fields(name, variant).items()}
    peft_reads_ours(name, "gralora", ours | HEADS.get(name, {}), tmp_path)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_we_read_what_peft_saves(name, variant, tmp_path):
    config = peft.GraloraConfig(**fields(name, variant), gralora_dropout=0.1, task_type=TASKS[name])
    ours = we_read_peft(name, config, tmp_path / "theirs")
    if (name, variant) != ("bert", "all biases"):  # PEFT repeats the biases of the head under other names
        written_back(ours, tmp_path / "theirs", tmp_path / "ours", frozenset({"modules_to_save"}))


@pytest.mark.parametrize(
    ("changes", "shape", "text"),
    [
        (
            {"r": 8},
            None,
            r"r: `model.layers.0.mlp.down_proj` has an A of \[2, 24, 4\], the config says \[2, inputs / 2, 8\]",
        ),
        ({"gralora_k": 4}, None, r"the config says \[4, inputs / 4, 4\]"),
        ({"gralora_k": 3}, None, "gralora_k: 3 does not divide the rank 4"),
        ({"gralora_k": 0}, None, "gralora_k: expected a whole number of at least 1"),
        ({"hybrid_r": -1}, None, "hybrid_r: expected a number from 0"),
        ({"hybrid_r": 2}, None, "gralora_A_general.weight` is missing"),
        ({"alpha": "8"}, None, "alpha: expected a number"),
        ({}, (2, 23, 4), r"has shape \[2, 23, 4\], the model wants \[2, 24, 4\]"),
        ({}, (4,), r"has an A of \[4\]"),
    ],
)
def test_a_folder_that_contradicts_itself(changes, shape, text, tmp_path):
    peftctl.save(peftctl.attach(build("llama"), GRALORA(r=4)), tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    if shape is not None:
        key = "base_model.model.model.layers.0.mlp.down_proj.gralora_A"
        save_file(load_file(weights) | {key: torch.zeros(shape)}, weights)
    model = build("llama")
    with pytest.raises(AdapterError, match=text):
        peftctl.load(model, tmp_path)
    assert not adapters_of(model)
