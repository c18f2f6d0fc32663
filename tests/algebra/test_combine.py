from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import build, logits

import peftctl
from peftctl.algebra.combine import combined
from peftctl.algebra.lora_folder import read_lora_folder, write_lora_folder
from peftctl.errors import AdapterError

UNLIKE = {
    "ranks and scales": ({"r": 4}, {"r": 6, "alpha": 3, "use_rslora": True}),
    "sites": ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["v_proj", "down_proj"]}),
    "patterns": ({"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"up_proj": 1}}),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens"]}),
}


def write(folders, weights, output, how="linear", **options):
    result, report = combined([read_lora_folder(folder) for folder in folders], weights, how, **options)
    write_lora_folder(result, output)
    return report


def weighted(folders, weights, shape="llama"):
    """The logits of the adapters active together."""
    model = build(shape)
    for number, folder in enumerate(folders):
        peftctl.load(model, folder, name=f"a{number}")
    return logits(peftctl.activate(model, {f"a{number}": weight for number, weight in enumerate(weights)}))


def product(update):
    return update.scale * (update.B.double() @ update.A.double())


@pytest.mark.parametrize("how", ["linear", "cat"])
@pytest.mark.parametrize("fields", UNLIKE.values(), ids=UNLIKE)
def test_a_sum_computes_what_the_weighted_adapters_compute_together(make, tmp_path, how, fields):
    folders = [make(seed, **each) for seed, each in enumerate(fields)]
    write(folders, [0.7, 0.3], tmp_path / "sum", how)
    wanted = weighted(folders, [0.7, 0.3])
    assert not torch.allclose(wanted, logits(build("llama")), atol=1e-2)
    torch.testing.assert_close(logits(peftctl.load(build("llama"), tmp_path / "sum")), wanted, rtol=1e-5, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "sum").eval()
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-5, atol=1e-5)


def test_gpt2_and_negative_weights(make, tmp_path):
    folders = [make(seed, shape="gpt2") for seed in range(3)]
    write(folders, [1.0, -0.5, 0.25], tmp_path / "sum")
    theirs = peft.PeftModel.from_pretrained(build("gpt2"), tmp_path / "sum").eval()
    torch.testing.assert_close(logits(theirs), weighted(folders, [1.0, -0.5, 0.25], "gpt2"), rtol=1e-5, atol=1e-5)


def test_a_sum_has_the_rank_that_it_needs(make, tmp_path):
    folders = [make(0), make(1), make(2)]
    result, _ = combined([read_lora_folder(folder) for folder in (*folders, folders[0])], [1.0, 1.0, 1.0, 2.0])
    assert {update.rank for update in result.updates.values()} == {12}
    beside, _ = combined([read_lora_folder(folder) for folder in folders[:2]], [1.0, 1.0], "cat")
    assert {update.rank for update in beside.updates.values()} == {8}


def test_svd_is_the_best_of_its_rank(make):
    adapters = [read_lora_folder(make(seed)) for seed in range(2)]
    result, report = combined(adapters, [0.7, 0.3], "svd", r=3)
    for site in report["sites"]:
        matrix = sum(w * product(a.updates[site["site"]]) for w, a in zip((0.7, 0.3), adapters, strict=True))
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(product(result.updates[site["site"]]), u[:, :3] @ s[:3].diag() @ v[:3])
        assert site["energy"] == pytest.approx(float(s[:3].square().sum() / s.square().sum()))
    assert 0.3 < report["energy"] < 0.99
    assert {u.rank for u in combined(adapters, [0.7, 0.3], "svd")[0].updates.values()} == {4}


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_where_peft_adds_the_updates_it_makes_the_same(make, tmp_path, how):
    folders = [make(0), make(1, r=6, alpha=3)]
    theirs = peft.PeftModel.from_pretrained(build("llama"), folders[0], adapter_name="a").eval()
    theirs.load_adapter(folders[1], "b")
    rank = {"svd_rank": 3} if how == "svd" else {}
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", how, **rank)
    theirs.set_adapter("both")
    write(folders, [0.7, 0.3], tmp_path / "sum", how, **({"r": 3} if how == "svd" else {}))
    ours = logits(peftctl.load(build("llama"), tmp_path / "sum"))
    torch.testing.assert_close(ours, logits(theirs), rtol=1e-4, atol=1e-4)


def test_what_cancels_is_zero(make):
    adapter = read_lora_folder(make())
    result, report = combined([adapter, adapter], [0.5, -0.5])
    assert {update.rank for update in result.updates.values()} == {1}
    assert all(float(product(update).abs().max()) < 1e-12 for update in result.updates.values())
    assert report["energy"] == 1.0


def slow_ties(updates, weights, density):
    """Entry by entry, as the paper's algorithm has it."""
    trimmed = []
    for update in updates:
        order = sorted(update.flatten().abs().tolist(), reverse=True)
        smallest = order[max(round(density * len(order)), 1) - 1]
        trimmed.append(torch.where(update.abs() >= smallest, update, 0.0))
    merged = torch.zeros_like(updates[0])
    for row in range(merged.shape[0]):
        for column in range(merged.shape[1]):
            entries = [(w, float(t[row, column])) for w, t in zip(weights, trimmed, strict=True)]
            mass = sum(w * value for w, value in entries)
            agreeing = [(w, value) for w, value in entries if w * value * mass > 0]
            if agreeing:
                merged[row, column] = sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing)
    return merged


def test_ties_is_the_papers(make):
    adapters = [read_lora_folder(make(seed, target_modules=["q_proj"])) for seed in range(3)]
    result, report = combined(adapters, [0.5, 0.2, 0.3], "ties", r=32, density=0.3)
    for site, update in result.updates.items():
        wanted = slow_ties([product(adapter.updates[site]).float() for adapter in adapters], [0.5, 0.2, 0.3], 0.3)
        assert float((wanted == 0).float().mean()) > 0.2
        torch.testing.assert_close(product(update).float(), wanted, rtol=1e-4, atol=1e-6)
    assert report["energy"] == pytest.approx(1.0)
    low, report = combined(adapters, [0.5, 0.2, 0.3], "ties", density=0.3)
    assert {update.rank for update in low.updates.values()} == {4}
    assert report["energy"] < 0.95


def test_dare_drops_and_rescales(make):
    adapter = read_lora_folder(make(target_modules=["q_proj", "up_proj"]))
    result, _ = combined([adapter], [1.0], "dare", r=48, density=0.25)
    kept = []
    for site, update in result.updates.items():
        ratio = product(update) / product(adapter.updates[site])
        near_four, near_zero = (ratio - 4).abs() < 1e-2, ratio.abs() < 1e-2
        assert bool((near_four | near_zero).float().mean() > 0.99)  # but entries too small for float32
        kept.append(float(near_four.float().mean()))
    assert sum(kept) / len(kept) == pytest.approx(0.25, abs=0.03)
    whole, _ = combined([adapter], [1.0], "dare", r=48, density=1.0)
    for site, update in whole.updates.items():
        torch.testing.assert_close(product(update), product(adapter.updates[site]), rtol=1e-4, atol=1e-5)


def test_dare_follows_its_seed(make):
    adapters = [read_lora_folder(make(seed)) for seed in range(2)]
    first, again, other = (combined(adapters, [1.0, 1.0], "dare", seed=seed)[0].updates for seed in (3, 3, 4))
    assert all(torch.equal(first[site].A, again[site].A) for site in first)
    assert not any(torch.equal(first[site].A, other[site].A) for site in first)


def test_a_folder_is_the_same_byte_for_byte_each_time(make, tmp_path):
    folders = [make(0), make(1)]
    for name in ("one", "two"):
        write(folders, [0.7, 0.3], tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_modules_trained_whole_are_averaged_by_weight(make, tmp_path):
    fields = {"shape": "bert", "modules_to_save": ["classifier"], "bias": "lora_only"}
    folders = [make(seed, **fields) for seed in range(2)]
    write(folders, [1.5, 0.5], tmp_path / "sum")
    a, b, mean = (load_file(folder / "adapter_model.safetensors") for folder in (*folders, tmp_path / "sum"))
    for key in ("base_model.model.classifier.weight", *(key for key in a if key.endswith("base_layer.bias"))):
        torch.testing.assert_close(mean[key], 0.75 * a[key] + 0.25 * b[key])
    peftctl.load(build("bert"), tmp_path / "sum")
    peft.PeftModel.from_pretrained(build("bert"), tmp_path / "sum")


def test_copies_of_the_base_come_along_and_must_be_of_one_base(make, tmp_path):
    copy = "lm_head.base_layer.weight"
    with_copy, plain = (read_lora_folder(make(seed, target_modules=["lm_head", "q_proj"])) for seed in range(2))
    with_copy.others[copy] = build("llama").lm_head.weight.detach()
    for pair in ((with_copy, plain), (plain, with_copy)):
        result, _ = combined(pair, [1.0, -1.0])
        assert torch.equal(result.others[copy], with_copy.others[copy])
    write_lora_folder(combined((plain, with_copy), [0.5, 0.5])[0], tmp_path / "sum")
    peftctl.load(build("llama"), tmp_path / "sum")
    plain.others[copy] = with_copy.others[copy] + 1
    with pytest.raises(AdapterError, match=f"`{copy}` is of another base than in"):
        combined([with_copy, plain], [0.5, 0.5])


def test_adapters_that_cannot_be_one_are_refused_with_every_reason(make):
    whole = read_lora_folder(make(0, shape="bert", modules_to_save=["classifier"]))
    other = read_lora_folder(make(1, shape="bert", bias="lora_only"))
    with pytest.raises(AdapterError) as caught:
        combined([whole, other], [0.5, 0.5])
    texts = [text for text, _ in caught.value.problems]
    assert any(": bias: `lora_only`" in text for text in texts)
    assert any("`classifier.weight`, trained whole in another, is missing" in text for text in texts)
    llama = read_lora_folder(make(2, target_modules=["k_proj"]))
    llama.updates["model.layers.0.self_attn.k_proj"] = llama.updates["model.layers.0.self_attn.k_proj"].__class__(
        torch.randn(4, 40), torch.randn(16, 4)
    )
    with pytest.raises(AdapterError, match=r"k_proj` is \[16, 40\], in .* \[16, 32\]; adapters of one base only"):
        combined([read_lora_folder(make(3, target_modules=["k_proj"])), llama], [0.5, 0.5])
    with pytest.raises(AdapterError, match="whose sum is above 0"):
        combined([whole, whole], [1.0, -1.0])


def test_what_the_first_adapter_lacks_has_to_agree_among_the_others(make):
    site, copy = "model.layers.0.self_attn.k_proj", "lm_head.base_layer.weight"
    first, second, third = (read_lora_folder(make(seed, target_modules=["lm_head", "q_proj"])) for seed in range(3))
    second.others[copy] = build("llama").lm_head.weight.detach()
    third.others[copy] = second.others[copy] + 1
    Update = type(next(iter(first.updates.values())))
    second.updates[site] = Update(torch.randn(4, 32), torch.randn(16, 4))
    third.updates[site] = Update(torch.randn(4, 40), torch.randn(16, 4))
    with pytest.raises(AdapterError) as caught:
        combined([first, second, third], [0.4, 0.3, 0.3])
    texts = [text for text, _ in caught.value.problems]
    assert any(f"`{copy}` is of another base than in {second.place}" in text for text in texts)
    assert any(f"`{site}` is [16, 40], in {second.place} [16, 32]" in text for text in texts)
