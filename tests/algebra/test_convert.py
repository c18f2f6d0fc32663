from __future__ import annotations

import peft
import pytest
import tiny_heads
import torch
from methods.settings import SETTINGS
from tiny import build, logits, stir
from tiny_chat import tokenizer

import peftctl
from peftctl import METHODS
from peftctl.algebra.convert import converted
from peftctl.algebra.lora_folder import write_lora_folder
from peftctl.errors import AdapterError, NotMergeable

FULL = 48
"""No matrix of the tiny models has a higher rank."""
UPDATES = [m for m in ("dora", "adalora", "vera", "gralora", "mora", "oft", "ia3", "qalora") if m in METHODS]
NONE = [m for m in ("bottleneck", "reft", "bitfit", "layers", "prompt", "prefix", "p_tuning") if m in METHODS]


def fields(method, shape):
    return {**SETTINGS[method].fields, **SETTINGS[method].on(shape)}


@pytest.mark.parametrize("method", UPDATES)
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_at_full_rank_the_lora_is_the_adapter(make, make_base, tmp_path, method, shape):
    folder = make(0, shape, method, **fields(method, shape))
    result, report = converted(folder, make_base(shape), FULL)
    write_lora_folder(result, tmp_path / "lora")
    wanted = logits(peftctl.load(build(shape), folder))
    assert not torch.allclose(wanted, logits(build(shape)), atol=1e-3)
    torch.testing.assert_close(logits(peftctl.load(build(shape), tmp_path / "lora")), wanted, rtol=1e-4, atol=1e-4)
    theirs = peft.PeftModel.from_pretrained(build(shape), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-4, atol=1e-4)
    assert report["energy"] == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_at_a_lower_rank_it_is_the_best_and_says_what_it_keeps(make, make_base, method):
    folder = make(0, "llama", method, **fields(method, "llama"))
    result, report = converted(folder, make_base(), 3)
    merged, base = peftctl.merge(peftctl.load(build("llama"), folder)), build("llama")
    for site in report["sites"]:
        change = (merged.get_submodule(site["site"]).weight - base.get_submodule(site["site"]).weight).detach().double()
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        update = result.updates[site["site"]]
        assert (update.rank, site["rank"]) == (3, 3)
        torch.testing.assert_close(update.B @ update.A, u[:, :3] @ s[:3].diag() @ v[:3], rtol=1e-3, atol=1e-5)
        assert site["energy"] == pytest.approx(float(s[:3].square().sum() / s.square().sum()), rel=1e-4)
    assert report["energy"] < 0.95


def test_the_update_of_a_method_that_leaves_the_weight_alone_is_not_rounded_against_it(make, make_base):
    folder = make(0, "llama", "vera", **fields("vera", "llama"))
    model = peftctl.load(build("llama"), folder)
    result, _ = converted(folder, make_base(dtype=torch.bfloat16), FULL)  # whose own rounding is a thousand times more
    for site, update in result.updates.items():
        wanted = model.get_submodule(site).adapters["default"].matrix().detach()
        torch.testing.assert_close((update.B @ update.A).float(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", NONE)
def test_what_is_no_update_is_refused_with_the_reason(make, make_base, method):
    shape = "gpt2" if method == "bitfit" else "llama"
    folder = make(0, shape, method, **fields(method, shape))
    with pytest.raises(NotMergeable, match=rf"`{method}` is no update of linears and embeddings.*; `peftctl methods"):
        converted(folder, make_base(shape), 4)


def test_a_lora_is_sent_to_resize(make, make_base):
    with pytest.raises(AdapterError, match="a LoRA already; `peftctl adapters resize` changes its rank"):
        converted(make(), make_base(), 4)


@pytest.mark.parametrize("name", ["bert inside", "t5"])
def test_of_other_kinds_of_model(tmp_path, name):
    head, made = tiny_heads.BASES[name]
    torch.manual_seed(0)
    made().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    head = head.with_labels(tiny_heads.LABELS if head.classifies else ())
    saved = {"modules_to_save": ["classifier"]} if head.classifies else {}
    model = tiny_heads.plain(tmp_path / "base", head)
    peftctl.attach(model, METHODS["dora"](r=4, alpha=8, target_modules="attention", **saved))
    stir(model)
    folder = peftctl.save(model, tmp_path / "dora")
    result, _ = converted(folder, tmp_path / "base", 64)
    write_lora_folder(result, tmp_path / "lora")
    again = peftctl.load(tiny_heads.plain(tmp_path / "base", head), tmp_path / "lora")
    wanted = tiny_heads.logits(model, head)
    torch.testing.assert_close(tiny_heads.logits(again, head), wanted, rtol=1e-4, atol=1e-4)
