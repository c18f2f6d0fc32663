"""Prompt, P-tuning and prefix: their equations, padding, caches, generation, several at once, refusals."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import VOCAB, build, inputs, logits, stir
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
)

import peftctl
from peftctl.engine.attach import adapters_of, trained
from peftctl.engine.sample import IGNORED, Sample
from peftctl.engine.virtual_tokens import Virtual, woven
from peftctl.errors import AdapterError
from peftctl.models.recomputing import recompute
from peftctl.tasks.sft import SFT

N = 4
ALL = ("prompt", "p_tuning", "prefix")
DECODERS = ("llama", "gpt2", "mixtral")
IDS = torch.tensor([[5, 17, 33, 60, 8, 71]])


def made(method: str, **fields: Any) -> Any:
    return peftctl.METHODS[method](num_virtual_tokens=N, **fields)


def adapted(method: str, shape: str, **fields: Any) -> Any:
    model = peftctl.attach(build(shape), made(method, **fields))
    stir(model)
    with torch.no_grad():
        for p in trained(model).values():
            p.mul_(3)
    return model


def virtual(model: Any, name: str = "default") -> Virtual:
    return next(a for a in adapters_of(model, name).values() if isinstance(a, Virtual))


def padded(ids: torch.Tensor, pads: int) -> dict[str, torch.Tensor]:
    """`ids` after some padding, and a longer row beside it."""
    long = torch.arange(10, 10 + ids.shape[1] + pads).unsqueeze(0)
    both = torch.cat([torch.cat([torch.zeros(1, pads, dtype=torch.long), ids], 1), long])
    mask = torch.ones_like(both)
    mask[0, :pads] = 0
    return {"input_ids": both, "attention_mask": mask}


@pytest.mark.parametrize("shape", DECODERS)
def test_a_prompt_is_read_as_embeddings_before_those_of_the_row(shape):
    model, plain = adapted("prompt", shape), build(shape)
    embeds = torch.cat([virtual(model).vectors()[None], plain.get_input_embeddings()(IDS)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(inputs_embeds=embeds).logits[:, N:])


@pytest.mark.parametrize("shape", DECODERS)
def test_a_prefix_of_the_keys_and_values_of_tokens_is_those_tokens(shape):
    plain, first = build(shape), torch.arange(20, 20 + N).unsqueeze(0)
    with torch.no_grad():
        cache = plain(input_ids=first, use_cache=True).past_key_values
        blocks = [t[0] for layer in cache.layers for t in (layer.keys, layer.values)]  # [heads, n, d] each
        model = peftctl.attach(build(shape), made("prefix"))
        virtual(model).vectors().copy_(torch.stack(blocks).permute(2, 0, 1, 3).flatten(1))
        whole = plain(input_ids=torch.cat([first, IDS], dim=1)).logits[:, N:]
        torch.testing.assert_close(model(input_ids=IDS).logits, whole)


def test_the_networks_compute_what_their_equations_say():
    sigmoid = torch.sigmoid
    encoder = virtual(adapted("p_tuning", "llama", encoder_hidden_size=6)).encoder
    a, b, c = (encoder.mlp[i] for i in (0, 2, 4))
    hidden = (encoder.embedding @ a.weight.T + a.bias).clamp(min=0)
    by_hand = (hidden @ b.weight.T + b.bias).clamp(min=0) @ c.weight.T + c.bias
    torch.testing.assert_close(encoder(), by_hand)

    encoder = virtual(adapted("p_tuning", "llama", encoder="lstm", encoder_hidden_size=6)).encoder
    x = encoder.embedding
    for layer in range(2):
        ways = []
        for way in ("", "_reverse"):
            kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            W, U, p, q = (getattr(encoder.lstm[layer], f"{kind}_l0{way}") for kind in kinds)
            h, s, states = torch.zeros(6), torch.zeros(6), []
            for row in x.flip(0) if way else x:
                i, f, g, o = (W @ row + p + U @ h + q).chunk(4)
                s = sigmoid(f) * s + sigmoid(i) * g.tanh()
                h = sigmoid(o) * s.tanh()
                states.append(h)
            ways.append(torch.stack(states[::-1] if way else states))
        x = torch.cat(ways, dim=1)
    a, b = encoder.mlp[0], encoder.mlp[2]
    torch.testing.assert_close(encoder(), (x @ a.weight.T + a.bias).clamp(min=0) @ b.weight.T + b.bias)

    encoder = virtual(adapted("prefix", "llama", projection=True, encoder_hidden_size=6)).encoder
    a, b = encoder.mlp[0], encoder.mlp[2]
    by_hand = (encoder.embedding @ a.weight.T + a.bias).tanh() @ b.weight.T + b.bias
    torch.testing.assert_close(encoder(), by_hand)
    assert by_hand.shape == (N, 2 * 2 * 2 * 8)  # keys and values of two layers, two heads of eight


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("shape", DECODERS)
@pytest.mark.parametrize("pads", [1, 3])
def test_a_row_padded_on_the_left_is_the_row_alone(method, shape, pads):
    model, batch = adapted(method, shape), padded(IDS, pads)
    if shape == "mixtral":  # which expert a token gets is a matter of rounding no more than elsewhere
        model.config.output_router_logits = False
    with torch.no_grad():
        alone = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        torch.testing.assert_close(model(**batch).logits[:1, pads:], alone, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)[0, IDS.shape[1] :]
    assert model.generate(**batch, **options)[0, IDS.shape[1] + pads :].tolist() == alone.tolist()


@pytest.mark.parametrize("method", ["prompt", "p_tuning"])
def test_an_encoder_reads_a_row_padded_on_the_left_as_the_row_alone(method):
    model, batch = adapted(method, "t5"), padded(IDS, 3)
    batch["decoder_input_ids"] = IDS[:, :3].expand(2, -1)
    with torch.no_grad():
        alone = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), decoder_input_ids=IDS[:, :3]).logits
        torch.testing.assert_close(model(**batch).logits[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("shape", [*DECODERS, "t5"])
def test_generation_with_the_cache_is_generation_without(method, shape):
    model = adapted(method, shape)
    batch = {k: v for k, v in inputs(model).items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 6, "pad_token_id": 0}
    for how in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True, "top_k": 5}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(model.generate(**batch, **options, **how, use_cache=use_cache).tolist())
        assert found[0] == found[1], how


@pytest.mark.parametrize("method", ALL)
def test_generation_follows_the_forward(method):
    model, ids = adapted(method, "llama"), IDS
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert greedy_of(model, input_ids=IDS) == ids.tolist()
    embeds = model.get_input_embeddings()(IDS)
    from_embeds = greedy_of(model, inputs_embeds=embeds, attention_mask=torch.ones_like(IDS))
    assert from_embeds == ids[:, IDS.shape[1] :].tolist()


def greedy_of(model: Any, **given: Any) -> list[list[int]]:
    return model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0).tolist()


@pytest.mark.parametrize("method", ALL)
def test_columns_of_logits_are_those_of_the_ids_given(method):
    model = adapted(method, "llama")
    with torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False).logits
        assert whole.shape[1] == IDS.shape[1]
        columns = torch.tensor([1, 4])
        some = model(input_ids=IDS, use_cache=False, logits_to_keep=columns).logits
        torch.testing.assert_close(some, whole[:, columns])
        torch.testing.assert_close(model(input_ids=IDS, logits_to_keep=2).logits, whole[:, -2:])
        torch.testing.assert_close(model(IDS, torch.ones_like(IDS)).logits, whole)  # by place
        own = torch.nn.functional.cross_entropy(whole[0, :-1], IDS[0, 1:])
        torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, own, rtol=0.3, atol=0.3)


@pytest.mark.parametrize("method", ALL)
def test_the_loss_of_training_ignores_virtual_tokens_and_padding(method):
    model, batch = adapted(method, "llama"), padded(IDS, 3)
    labels = batch["input_ids"].clone()
    labels[batch["attention_mask"] == 0] = IGNORED
    labels[:, :6] = IGNORED
    with torch.no_grad():
        whole = model(**batch).logits[:, :-1].flatten(0, 1)
        by_hand = torch.nn.functional.cross_entropy(whole, labels[:, 1:].flatten(), reduction="sum")
        torch.testing.assert_close(SFT().loss(model, batch | {"labels": labels}), by_hand)


@pytest.mark.parametrize("first", ALL)
@pytest.mark.parametrize("second", ALL)
def test_two_at_once_are_read_one_after_the_other(first, second):
    model = build("llama")
    for seed, (name, method) in enumerate((("a", first), ("b", second))):
        peftctl.attach(model, made(method), name)
        stir(model, seed)
    peftctl.activate(model, ["a", "b"])
    batch = padded(IDS, 3)
    with torch.no_grad():
        alone = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        torch.testing.assert_close(model(**batch).logits[:1, 3:], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(input_ids=IDS).logits, alone)
    cached, plain = (model.generate(**batch, max_new_tokens=5, use_cache=use, do_sample=False) for use in (True, False))
    assert cached.tolist() == plain.tolist()


def test_two_prompts_are_one_long_prompt():
    model = build("llama")
    for seed, name in enumerate("ab"):
        peftctl.attach(model, made("prompt"), name)
        stir(model, seed)
    peftctl.activate(model, ["a", "b"])
    own = model.get_input_embeddings()(IDS)[0]
    both = torch.cat([virtual(model, "a").vectors(), virtual(model, "b").vectors(), own])
    with torch.no_grad():
        expected = build("llama")(inputs_embeds=both[None]).logits[:, 2 * N :]
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(
    ("method", "fields", "numbers"),
    [
        ("prompt", {}, N * 32),
        ("p_tuning", {"encoder_hidden_size": 8}, N * 32 + (32 * 8 + 8) + (8 * 8 + 8) + (8 * 32 + 32)),
        ("prefix", {}, N * 2 * 2 * 16),
        ("prefix", {"projection": True, "encoder_hidden_size": 8}, N * 16 + (16 * 8 + 8) + (8 * 64 + 64)),
    ],
)
def test_counts(method, fields, numbers):
    model = peftctl.attach(build("llama"), made(method, **fields))
    assert sum(p.numel() for p in trained(model).values()) == numbers


def test_virtual_tokens_are_woven_in_after_the_padding():
    own = torch.tensor([[0, 0, 1, 2], [0, 3, 4, 5], [6, 7, 8, 9], [0, 0, 0, 0]])
    mixed = woven(torch.full((4, 2), -1), own, torch.tensor([2, 1, 0, 4]))
    assert mixed.tolist() == [[0, 0, -1, -1, 1, 2], [0, -1, -1, 3, 4, 5], [-1, -1, 6, 7, 8, 9], [0, 0, 0, 0, -1, -1]]


def test_a_prompt_starts_from_words():
    plain = build("llama")
    table = plain.get_input_embeddings().weight
    start = virtual(peftctl.attach(build("llama"), made("prompt"))).vectors()
    assert all(any(torch.equal(row, entry) for entry in table) for row in start)
    noise = virtual(peftctl.attach(build("llama"), peftctl.METHODS["prompt"](num_virtual_tokens=99, init="random")))
    assert noise.vectors().std().item() == pytest.approx(table.std().item(), rel=0.1)

    tokenizer = lambda text: {"input_ids": [7, 8, 9]}  # noqa: E731
    sample = Sample(tokenizer, lambda: iter(()), SFT().loss)
    told = made("prompt", init="text", init_text="three words here")
    start = virtual(peftctl.attach(build("llama"), told, sample=sample)).vectors()
    assert torch.equal(start, table[torch.tensor([7, 8, 9, 7])])
    with pytest.raises(AdapterError, match=r"method\.init") as caught:
        peftctl.attach(plain, told)
    assert "vocabulary" in str(caught.value.problems[0].hint)
    assert not peftctl.engine.attach.methods(plain)
    for fields in ({"init": "text"}, {"init_text": "words"}):
        with pytest.raises(ValueError, match="init"):
            made("prompt", **fields)


@pytest.mark.parametrize(
    ("method", "fields"), [("p_tuning", {}), ("p_tuning", {"encoder": "lstm"}), ("prefix", {"projection": True})]
)
def test_the_network_is_kept_beside_and_trains_on(method, fields, tmp_path):
    model = adapted(method, "llama", **fields)
    peftctl.save(model, tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}
    again = peftctl.load(build("llama"), tmp_path)
    assert trained(again).keys() == trained(model).keys()
    assert all(torch.equal(p, trained(model)[name]) for name, p in trained(again).items())
    (tmp_path / "resume.safetensors").unlink()
    flat = peftctl.load(build("llama"), tmp_path)
    assert list(trained(flat)) == ["adapters.default.prompt_embeddings"]
    assert torch.equal(logits(flat), logits(model))


def test_dropout_of_the_lstm_is_not_written(tmp_path):
    model = adapted("p_tuning", "llama", encoder="lstm", encoder_dropout=0.5).train()
    assert not torch.equal(logits(model), logits(model))
    peftctl.save(model, tmp_path)
    assert virtual(model).encoder.training
    written = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(written, virtual(model.eval()).vectors())


@pytest.mark.parametrize("method", ALL)
def test_a_model_that_reads_no_tokens_is_refused(method):
    with pytest.raises(AdapterError, match="reads no tokens"):
        peftctl.attach(build("vit"), made(method))


def test_a_classifier_that_looks_for_the_last_token_takes_a_prefix_only():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=3, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    for method in ("prompt", "p_tuning"):
        with pytest.raises(AdapterError, match="by its id"):
            peftctl.attach(model, made(method))
    peftctl.attach(model, made("prefix"))
    stir(model)
    right = torch.cat([IDS, torch.zeros(1, 3, dtype=torch.long)], 1)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=right, attention_mask=(right > 0).long()).logits, model(input_ids=IDS).logits
        )


def test_a_prefix_refuses_sliding_windows_and_checkpointing():
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(AdapterError, match="Sliding"):
        peftctl.attach(MistralForCausalLM(config), made("prefix"))
    model = adapted("prefix", "llama").train()
    recompute(model)
    with pytest.raises(AdapterError, match="gradient checkpointing"):
        model(input_ids=IDS)
    model.eval()(input_ids=IDS)


@pytest.mark.parametrize("method", ALL)
def test_caches_that_do_not_fit_are_refused(method):
    model = adapted(method, "llama")
    with pytest.raises(AdapterError, match="virtual tokens"):
        model.generate(input_ids=IDS, max_new_tokens=3, cache_implementation="static", disable_compile=True)
    cache = DynamicCache()
    with peftctl.bare(model), torch.no_grad():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
    with pytest.raises(AdapterError, match="made without them"):
        model(input_ids=IDS[:, :1], attention_mask=torch.ones(1, IDS.shape[1] + 1), past_key_values=cache)


def test_it_says_why_it_cannot_be_merged():
    with pytest.raises(peftctl.errors.NotMergeable, match="no weight of it can hold"):
        peftctl.merge(adapted("prompt", "llama"))


def test_a_tokenizer_of_nothing_is_refused():
    told = made("prompt", init="text", init_text="x")
    sample = Sample(lambda text: {"input_ids": []}, lambda: iter(()), SFT().loss)
    with pytest.raises(AdapterError, match="init_text"):
        peftctl.attach(build("llama"), told, sample=sample)


@pytest.mark.parametrize("method", ALL)
def test_the_forward_keeps_its_signature(method):
    model = build("llama")
    before = inspect.signature(model.forward)
    assert inspect.signature(peftctl.attach(model, made(method)).forward) == before
