"""`init_weights`: each way to start leaves the base alone, begins where it promises, and is a plain LoRA on disk."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from methods.oracle import assert_same, we_read_peft, written_back
from tiny import VOCAB, build, logits, stir
from torch import nn

import peftctl
from peftctl.engine import inputs
from peftctl.engine.attach import adapters_of, live, stacks, trained
from peftctl.engine.sample import Sample
from peftctl.errors import AdapterError

LORA = peftctl.METHODS["lora"]
STARTS = ("gaussian", "orthogonal", "pissa", "olora", "eva")
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
CASES = [(how, name) for how in STARTS for name in TARGETS]


def sample(rows: int = 3, length: int = 12, batches: int = 2) -> Sample:
    """Rows of which some tokens are padding and some are not trained."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCAB, (batches, rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 0, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[..., :4] = -100

    def micro_batches():
        for i, m, y in zip(ids, mask, labels, strict=True):
            yield {"input_ids": i, "attention_mask": m, "labels": y}

    def loss(model: nn.Module, batch) -> torch.Tensor:
        return model(**batch).loss * (batch["labels"][:, 1:] != -100).sum()

    return Sample(None, micro_batches, loss)


def started(how: str, name: str = "llama", seed: int = 0, **fields) -> nn.Module:
    torch.manual_seed(seed)
    model = build(name)
    settings = {"r": 4, "alpha": 6, "target_modules": TARGETS[name], "init_weights": how} | fields
    return peftctl.attach(model, LORA(**settings), sample=sample())


def matrix(host: nn.Module) -> torch.Tensor:
    """[out, in]."""
    return host.weight.T if type(host).__name__ == "Conv1D" else host.weight


@pytest.mark.parametrize(("how", "name"), CASES)
@pytest.mark.parametrize("rslora", [False, True])
def test_starts_at_the_base_and_leaves_it_alone(how, name, rslora):
    model, plain = started(how, name, use_rslora=rslora), build(name)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-6)
    kept = {key: p for key, p in model.named_parameters() if ".adapters." not in key}
    assert all(torch.equal(p, plain.get_parameter(key)) for key, p in kept.items())
    assert any(bool(a.lora_A.weight.any()) for a in adapters_of(model, "default").values())


@pytest.mark.parametrize(("how", "name"), CASES)
def test_is_the_same_lora_in_peft_merged_and_loaded(how, name, tmp_path):
    model = started(how, name, use_rslora=how == "olora", bias="lora_only" if name == "gpt2" else "none")
    stir(model)
    expected = logits(model)
    assert not torch.allclose(expected, logits(build(name)), atol=1e-3)
    peftctl.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == (8 if how in ("pissa", "olora") else 4)
    assert_same(model, peft.PeftModel.from_pretrained(build(name), tmp_path).eval())
    loaded = peftctl.load(build(name), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(peftctl.merge(model)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_pissa_holds_the_main_part_of_the_weight(name):
    model = started("pissa", name)
    for adapter in adapters_of(model, "default").values():
        U, S, V = torch.linalg.svd(matrix(adapter.host))
        best = U[:, :4] @ torch.diag(S[:4]) @ V[:4]
        A, B = adapter.lora_A.weight, adapter.lora_B.weight
        torch.testing.assert_close((6 / 4) * B @ A, best, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(A @ A.T, torch.diag(S[:4]) / (6 / 4), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_starts_as_peft_does_but_for_the_base(how):
    ours = adapters_of(started(how), "default")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS["llama"], init_lora_weights=how)
    theirs = peft.get_peft_model(build("llama"), config)
    for site, adapter in ours.items():
        module = theirs.base_model.model.get_submodule(site)
        product = module.lora_B["default"].weight @ module.lora_A["default"].weight
        torch.testing.assert_close(adapter.lora_B.weight @ adapter.lora_A.weight, product, rtol=1e-4, atol=1e-6)


def test_olora_is_the_first_columns_of_q():
    for adapter in adapters_of(started("olora"), "default").values():
        Q, R = torch.linalg.qr(matrix(adapter.host))
        assert torch.equal(adapter.lora_B.weight, Q[:, :4])
        assert torch.equal(adapter.lora_A.weight, R[:4])


def test_orthogonal_factors_are_not_zero_and_cancel():
    for adapter in adapters_of(started("orthogonal"), "default").values():
        A, B = adapter.lora_A.weight, adapter.lora_B.weight
        assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 2
        torch.testing.assert_close(B @ A, torch.zeros_like(B @ A), rtol=0, atol=1e-7)


def test_gaussian_is_as_wide_as_in_peft():
    model = started("gaussian", r=32, target_modules=["down_proj", "embed_tokens"])
    *_, adapter = adapters_of(model, "default").values()
    assert float(adapter.lora_A.weight.std()) == pytest.approx(1 / 32, rel=0.1)
    assert not adapter.lora_B.weight.any()
    assert not adapters_of(model, "default")["model.embed_tokens"].lora_embedding_A.any()


@pytest.mark.parametrize("small_passes", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_eva_looks_at_what_goes_in_at_trained_tokens(name, small_passes, monkeypatch):
    if small_passes:
        monkeypatch.setattr(inputs, "PASS", 1)  # every site in a pass of its own
    model, plain = started("eva", name), build(name)
    for site, adapter in adapters_of(model, "default").items():
        seen: list[torch.Tensor] = []
        hook = plain.get_submodule(site).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        rows = []
        for batch in sample().batches():
            with torch.no_grad():
                plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            x = seen.pop()
            rows += [x[i, j] for i, j in (batch["labels"] != -100).nonzero().tolist() if batch["attention_mask"][i, j]]
        hook.remove()
        V = torch.linalg.svd(torch.stack(rows), full_matrices=False).Vh[:4]
        A = adapter.lora_A.weight
        torch.testing.assert_close((A @ V.T).abs(), torch.eye(4), rtol=0, atol=1e-4)
        assert bool((A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all())
        assert not adapter.lora_B.weight.any()


def test_eva_leaves_model_and_modes_as_they_were():
    model = build("llama").train()
    model.model.layers[0].eval()
    before = {key: module.training for key, module in model.named_modules()}
    peftctl.attach(model, LORA(r=2, init_weights="eva"), sample=sample())
    assert {key: m.training for key, m in model.named_modules() if key in before} == before
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("how", STARTS)
def test_everything_that_resuming_needs_is_live(how):
    model = started(how)
    stir(model)
    expected, state = logits(model), {key: t.detach().clone() for key, t in live(model).items()}
    again = started(how, seed=3)
    with torch.no_grad():
        for tensor in (t for a in adapters_of(again, "default").values() for t in a.state_dict().values()):
            tensor.add_(1.0)
        for key, tensor in live(again).items():
            tensor.copy_(state[key])
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_only_the_current_factors_are_trained(how):
    model = started(how)
    assert {key.rpartition(".adapters.default.")[2] for key in trained(model)} == {"lora_A.weight", "lora_B.weight"}
    model(input_ids=torch.arange(9)[None] + 3).logits.square().mean().backward()
    assert all(bool(p.grad.any()) for p in trained(model).values())


def test_a_little_training_is_not_rounded_away_in_half_precision():
    torch.manual_seed(0)
    model = peftctl.attach(build("llama"), LORA(r=4, target_modules=["q_proj"], init_weights="pissa"))
    adapter = next(iter(adapters_of(model, "default").values()))
    with torch.no_grad():
        adapter.lora_B.weight += 1e-4 * torch.randn(adapter.lora_B.weight.shape)
    x = torch.randn(64, 32)
    exact, half = adapter.update(x), adapter.update(x.bfloat16()).float()
    assert float((half - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_weights": "eva"}, "`eva` needs rows to look at"),
        (
            {"init_weights": "orthogonal", "r": 3},
            "`model.layers.0.self_attn.q_proj` has rank 3; choose an even",
        ),
        ({"init_weights": "pissa", "r": 33}, "is 32 by 32, so it has no 33 directions to start from"),
        (
            {"init_weights": "pissa", "target_modules": ["embed_tokens"]},
            "Embedding under a LoRAEmbedding, for",
        ),
        ({"init_weights": "loftq"}, "is not quantised, and that is what it makes up for"),
    ],
)
def test_what_cannot_start_says_why(fields, message):
    with pytest.raises(AdapterError, match=message):
        peftctl.attach(model := build("llama"), LORA(**({"r": 4, "target_modules": ["q_proj"]} | fields)))
    assert not list(stacks(model))


def test_a_start_and_an_adapter_to_start_from_exclude_each_other():
    with pytest.raises(ValueError, match="`pissa` is a start, as `init_from` is"):
        LORA(init_weights="pissa", init_from="somewhere")


def test_rows_without_a_trained_token_are_no_sample():
    none = sample()

    def untrained():
        for batch in none.batches():
            yield batch | {"labels": torch.full_like(batch["labels"], -100)}

    silent = Sample(None, untrained, lambda model, batch: model(input_ids=batch["input_ids"]).logits.sum())
    with pytest.raises(AdapterError, match="no trained token to look at"):
        peftctl.attach(build("llama"), LORA(r=4, init_weights="eva"), sample=silent)


@pytest.mark.parametrize("how", ["gaussian", "orthogonal", "eva"])
def test_we_read_what_peft_saves(how, tmp_path):
    config = peft.LoraConfig(
        r=4,
        target_modules=TARGETS["llama"],
        init_lora_weights=how,
        task_type="CAUSAL_LM",
        eva_config=peft.EvaConfig() if how == "eva" else None,
    )
    ours = we_read_peft("llama", config, tmp_path / "theirs")
    written_back(ours, tmp_path / "theirs", tmp_path / "ours", frozenset({"init_lora_weights", "eva_config"}))


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_what_peft_converts_is_read_and_what_it_does_not_is_refused(how, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=TARGETS["llama"], init_lora_weights=how, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(build("llama"), config).eval()
    theirs.save_pretrained(tmp_path / "start")
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match="makes the adapter one for a changed base"):
        peftctl.load(build("llama"), tmp_path / "theirs")
    theirs.peft_config["default"].init_lora_weights = True
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = peftctl.load(build("llama"), tmp_path / "plain")
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-5)
