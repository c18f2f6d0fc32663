from __future__ import annotations

import json

import peft
import pytest
import torch
from tiny import build, inputs, logits

import peftctl
from peftctl.algebra.lora_folder import read_lora_folder, write_lora_folder
from peftctl.algebra.resize import resized
from peftctl.engine.disk import fill, fitting

FIELDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 3, "down_proj": 10}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


def write(folder, r, tmp_path, **options):
    result, report = resized(read_lora_folder(folder), r, **options)
    write_lora_folder(result, tmp_path / f"r{r}")
    return tmp_path / f"r{r}", report


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_more_ranks_compute_the_same_here_and_in_peft(make, tmp_path, fields):
    folder = make(**fields)
    before = logits(peftctl.load(build("llama"), folder))
    assert not torch.allclose(before, logits(build("llama")), atol=1e-2)
    grown, report = write(folder, 16, tmp_path)
    torch.testing.assert_close(logits(peftctl.load(build("llama"), grown)), before, rtol=1e-6, atol=1e-6)
    theirs = peft.PeftModel.from_pretrained(build("llama"), grown).eval()
    torch.testing.assert_close(logits(theirs), before, rtol=1e-5, atol=1e-6)
    assert {update.rank for update in read_lora_folder(grown).updates.values()} == {16}
    assert report["energy"] == 1.0


def test_every_new_rank_can_learn(make, tmp_path):
    grown, _ = write(make(target_modules=["q_proj", "embed_tokens"]), 6, tmp_path)
    method = peftctl.METHODS["lora"](r=6, alpha=12, target_modules=["q_proj", "embed_tokens"])
    model = peftctl.attach(build("llama"), method)
    fill(model, "default", fitting(model, grown)[1])
    batch = inputs(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        if name.endswith("lora_B.weight"):  # new A random, new B zero
            assert (gradient[:, 4:].abs().amax(0) > 0).all()
        if name.endswith("lora_embedding_A"):  # new A zero, new B random
            assert (gradient[4:].abs().amax(1) > 0).all()


def test_the_ranks_that_were_there_keep_their_bits_and_new_ones_follow_the_seed(make):
    adapter = read_lora_folder(make())
    (first, _), (again, _), (other, _) = (resized(adapter, 7, seed) for seed in (0, 0, 1))
    for site, update in adapter.updates.items():
        assert torch.equal(first.updates[site].A[:4], update.A)
        assert torch.equal(first.updates[site].B[:, :4], update.B)
        assert first.updates[site].scale == update.scale
        assert torch.equal(first.updates[site].A, again.updates[site].A)
        assert not torch.equal(first.updates[site].A, other.updates[site].A)
        bound = update.shape[1] ** -0.5
        assert 0.5 * bound < float(first.updates[site].A[4:].abs().max()) <= bound


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_fewer_ranks_are_the_best_of_that_rank_and_say_what_they_keep(make, tmp_path, fields):
    folder = make(**fields)
    small, report = write(folder, 2, tmp_path)
    before, after = read_lora_folder(folder).updates, read_lora_folder(small).updates
    kept = total = 0.0
    for site in report["sites"]:
        old, new = before[site["site"]], after[site["site"]]
        u, s, v = torch.linalg.svd(old.scale * (old.B @ old.A).double(), full_matrices=False)
        best = u[:, :2] @ s[:2].diag() @ v[:2]
        torch.testing.assert_close(new.scale * (new.B @ new.A).double(), best, rtol=1e-4, atol=1e-5)
        assert (new.rank, new.scale) == (2, pytest.approx(old.scale))
        assert site["energy"] == pytest.approx(float(s[:2].square().sum() / s.square().sum()), rel=1e-5)
        kept, total = kept + float(s[:2].square().sum()), total + float(s.square().sum())
    assert report["energy"] == pytest.approx(kept / total, rel=1e-5)
    assert report["energy"] < 0.999


def test_what_was_padded_shrinks_without_loss(make, tmp_path):
    folder = make()
    grown, _ = write(folder, 12, tmp_path)
    back, report = write(grown, 4, tmp_path)
    assert report["energy"] == pytest.approx(1.0, abs=1e-12)
    ours, theirs = (logits(peftctl.load(build("llama"), where)) for where in (folder, back))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gpt2_convolutions_of_its_own_kind_and_biases_and_heads_come_along(make, tmp_path):
    folder = make(shape="bert", bias="all", modules_to_save=["classifier"])
    before = logits(peftctl.load(build("bert"), folder))
    grown, _ = write(folder, 8, tmp_path)
    torch.testing.assert_close(logits(peftctl.load(build("bert"), grown)), before, rtol=1e-6, atol=1e-6)
    folder = make(seed=1, shape="gpt2")
    grown, _ = write(folder, 9, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("gpt2"), grown).eval()
    torch.testing.assert_close(logits(theirs), logits(peftctl.load(build("gpt2"), folder)), rtol=1e-5, atol=1e-6)


def test_a_scale_of_zero_stays_one(make, tmp_path):
    folder = make()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    write_lora_folder(resized(read_lora_folder(folder), 2)[0], tmp_path / "small")
    assert torch.equal(logits(peftctl.load(build("llama"), tmp_path / "small")), logits(build("llama")))
