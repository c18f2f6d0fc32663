"""LoReFT against its equation put there by hooks, its positions by hand, generation with the cache, folders, errors."""

from __future__ import annotations

import json
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import build, inputs, logits, stir
from torch import Tensor, nn

import peftctl
from peftctl.engine.attach import adapters_of, live, methods, takes, trained
from peftctl.errors import AdapterError
from peftctl.methods.reft import Edit
from peftctl.tasks import sft
from peftctl.tasks.sft import SFT

REFT = peftctl.METHODS["reft"]


def reft(shape: str = "llama", **fields) -> nn.Module:
    """A model with random edits."""
    model = peftctl.attach(build(shape), REFT(**{"r": 4, "first": 2, "last": 3, **fields}))
    stir(model)
    return model


def rows(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (length,), generator=generator) for length in lengths]


def padded(texts: list[Tensor], side: str) -> dict[str, Tensor]:
    """Rows in one batch, with the positions that models with absolute ones need."""
    width = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        at = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        ids[row, at], mask[row, at] = text, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def gram_schmidt(A: Tensor) -> Tensor:
    """Orthonormal rows [r, d] from the rows of A [r, d], one after the other."""
    found: list[Tensor] = []
    for row in A:
        for other in found:
            row = row - (row @ other) * other
        found.append(row / row.norm())
    return torch.stack(found)


def by_hooks(model: nn.Module, at: list[dict[int, str]]) -> nn.Module:
    """The plain model with eq. 2 at chosen positions: a mapping of position -> end for each row."""
    plain = build("llama")
    for site, adapter in adapters_of(model, "default").items():
        if not site:
            continue

        def edit(module, args, h, edits=adapter.edits):
            rows = [list(row) for row in h]
            for row, chosen in enumerate(at):
                for position, end in chosen.items():
                    part = edits[end] if end in edits else edits["both"]
                    R, x = gram_schmidt(part.rotation), h[row, position]
                    rows[row][position] = x + R.T @ (part.source.weight @ x + part.source.bias - R @ x)
            return torch.stack([torch.stack(row) for row in rows])

        plain.get_submodule(site).register_forward_hook(edit)
    return plain


POSITIONS = [
    # first, last, length -> first, last
    ((2, 3, 9), ([0, 1], [6, 7, 8])),
    ((2, 3, 5), ([0, 1], [2, 3, 4])),
    ((2, 3, 4), ([0, 1], [2, 3])),
    ((7, 7, 5), ([0, 1, 2], [3, 4])),
    ((3, 0, 9), ([0, 1, 2], [])),
    ((3, 0, 2), ([0, 1], [])),
    ((0, 2, 9), ([], [7, 8])),
    ((1, 1, 1), ([0], [])),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("numbers", "expected"), POSITIONS)
def test_the_equation_at_the_ends_of_the_prompt(numbers, expected, tied):
    first, last, length = numbers
    model = reft(first=first, last=last, tie_weights=tied)
    at = dict.fromkeys(expected[0], "first") | dict.fromkeys(expected[1], "last")
    [ids] = rows(length)
    reference = by_hooks(model, [at])
    ours, theirs = model(input_ids=ids[None]).logits, reference(input_ids=ids[None]).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, build("llama")(input_ids=ids[None]).logits, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_position(side):
    model = reft(tie_weights=False)
    texts = rows(9, 4, 6)
    batch = padded(texts, side)
    starts = [9 - len(text) if side == "left" else 0 for text in texts]
    at = [
        {start + i: "first" for i in (0, 1)} | {start + len(text) - i: "last" for i in (1, 2, 3) if len(text) - i > 1}
        for start, text in zip(starts, texts, strict=True)
    ]
    with torch.no_grad():
        together, reference = model(**batch).logits, by_hooks(model, at)(**batch).logits
        for row, text in enumerate(texts):
            own = slice(starts[row], starts[row] + len(text))
            torch.testing.assert_close(together[row, own], reference[row, own], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(together[row, own], model(input_ids=text[None]).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["llama", "gpt2", "mixtral"])
def test_cached_generation_edits_the_prompt_and_nothing_else(shape):
    model = reft(shape, tie_weights=False)
    texts = rows(7, 4)
    batch = padded(texts, "left")
    batch.pop("position_ids")  # `generate` makes them
    given = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)[:, 7:]
    for text, answer in zip(texts, given, strict=True):
        ids, prompt = text, len(text)
        for token in answer:  # without a cache, the prompt told
            mask = (torch.arange(len(ids)) < prompt)[None]
            with torch.no_grad():
                following = model(input_ids=ids[None], prompt_mask=mask, use_cache=False).logits[0, -1]
            assert int(following.argmax()) == int(token)
            ids = torch.cat([ids, token[None]])


def test_an_encoder_is_what_reads_the_prompt():
    model = reft("t5")
    assert set(adapters_of(model, "default")) == {"encoder", "encoder.block.0", "encoder.block.1"}
    given = inputs(model)
    asked = {key: given[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = model.encoder(**asked)
        by_hand = model(encoder_outputs=states, decoder_input_ids=given["decoder_input_ids"]).logits
        out = model.generate(**asked, max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(by_hand, logits(model))
    start = model(**asked, decoder_input_ids=torch.zeros(2, 1, dtype=torch.long)).logits[:, 0]
    torch.testing.assert_close(out.scores[0], start)
    assert not torch.allclose(by_hand, logits(build("t5")), atol=1e-3)


def test_the_prompt_of_a_training_row_ends_where_its_labels_begin():
    labels = torch.tensor(
        [
            [-100, -100, -100, 5, 6, -100],  # a question and an answer
            [-100, 7, 8, -100, 9, -100],  # two answers
            [5, 6, 7, 8, 9, 2],  # plain text: nothing predicts its first token
            [-100, -100, -100, -100, -100, -100],
        ]
    )
    expected = [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert sft.prompt_mask(labels).int().tolist() == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_edits_what_generation_edits(side):
    """The probability of an answer in the loss is that of generating it, token by token after the prompt alone."""
    model = reft(tie_weights=False)
    prompts, answers = rows(6, 4), rows(3, 2, seed=1)
    texts = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
    batch = padded(texts, side)
    batch.pop("position_ids")
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        end = labels.shape[1] if side == "left" else len(text)
        labels[row, end - len(answer) : end] = answer
    with torch.no_grad():
        loss = SFT().loss(model, {**batch, "labels": labels})
        expected = torch.zeros(())
        for prompt, answer in zip(prompts, answers, strict=True):
            out = model(input_ids=prompt[None], use_cache=True)
            for token in answer:
                expected -= out.logits[0, -1].log_softmax(0)[token]
                out = model(input_ids=token[None, None], past_key_values=out.past_key_values, use_cache=True)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_the_prompt_is_told_to_those_alone_that_ask():
    model = build("llama")
    assert not takes(model, "prompt_mask")
    peftctl.attach(model, peftctl.METHODS["lora"]())
    assert not takes(model, "prompt_mask")
    peftctl.attach(model, REFT(), "edits")
    assert takes(model, "prompt_mask")
    assert takes(SimpleNamespace(module=model), "prompt_mask")  # as several processes wrap it
    with peftctl.bare(model):
        assert not takes(model, "prompt_mask")
        ids = rows(5)[0][None]
        mask = torch.zeros_like(ids)
        assert torch.equal(model(input_ids=ids, prompt_mask=mask).logits, build("llama")(input_ids=ids).logits)


def test_every_active_adapter_is_told():
    model = build("llama")
    for seed, name in enumerate(("a", "b")):
        peftctl.attach(model, REFT(r=4, first=1, last=1), name)
        stir(model, seed)
    peftctl.activate(model, ["a", "b"])
    ids = rows(8)[0][None]
    nowhere = torch.zeros_like(ids)
    assert torch.equal(model(input_ids=ids, prompt_mask=nowhere).logits, build("llama")(input_ids=ids).logits)
    assert not torch.allclose(model(input_ids=ids).logits, build("llama")(input_ids=ids).logits, atol=1e-3)


def test_rows_of_a_rotation_stay_orthonormal():
    model = reft(r=6)
    edits = [m for m in model.modules() if isinstance(m, Edit)]
    update = torch.optim.AdamW(trained(model).values(), lr=0.1)
    for _ in range(20):
        model(**inputs(model)).logits.square().mean().backward()
        update.step()
        update.zero_grad()
    for edit in edits:
        R = edit.orthonormal()
        torch.testing.assert_close(R @ R.T, torch.eye(6), rtol=0, atol=1e-5)
        torch.testing.assert_close(R, gram_schmidt(edit.rotation), rtol=0, atol=1e-4)


def test_gradients_are_those_of_the_equation():
    model = reft(tie_weights=False)
    [ids] = rows(6)
    at = {0: "first", 1: "first", 3: "last", 4: "last", 5: "last"}

    def gradients(one: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        one(input_ids=ids[None]).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in trained(model).items()}

    ours, theirs = gradients(model), gradients(by_hooks(model, [at]))
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-4)


def test_how_many_parameters_are_trained():
    def count(**fields) -> int:
        return sum(p.numel() for p in trained(reft(**fields)).values())

    one = 4 * 32 + 4 * 32 + 4  # R, W, b
    assert count() == 2 * one
    assert count(tie_weights=False) == 4 * one
    assert count(tie_weights=False, last=0) == 2 * one
    assert count(layers_to_transform=[1]) == one
    assert set(adapters_of(reft(target_modules=["layers.0"]), "default")) == {"", "model.layers.0"}


def test_a_random_start_is_not_the_base():
    torch.manual_seed(0)
    model = peftctl.attach(build("llama"), REFT(init_weights=False))
    assert not torch.allclose(logits(model), logits(build("llama")), atol=1e-3)


def test_dropout_is_for_training_alone():
    model = reft(dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_what_training_changes_is_all_that_a_checkpoint_holds():
    model, again = reft(), peftctl.attach(build("llama"), REFT(r=4, first=2, last=3))
    with torch.no_grad():
        for name, tensor in live(again).items():
            tensor.copy_(live(model)[name])
    assert torch.equal(logits(again), logits(model))


def test_the_folder_says_what_it_is(tmp_path):
    fields = {"r": 3, "first": 1, "last": 4, "tie_weights": False, "dropout": 0.1}
    peftctl.save(reft(**fields), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "REFT"
    assert {key: tuple(t.shape) for key, t in load_file(tmp_path / "adapter_model.safetensors").items()} == {
        f"base_model.model.model.layers.{layer}.edits.{end}.{leaf}": shape
        for layer in range(2)
        for end in ("first", "last")
        for leaf, shape in (("rotation", (3, 32)), ("source.weight", (3, 32)), ("source.bias", (3,)))
    }
    read = methods(peftctl.load(build("llama"), tmp_path))["default"]
    assert {name: getattr(read, name) for name in fields} == fields


def test_peft_says_that_it_does_not_know_it(tmp_path):
    peftctl.save(reft(), tmp_path)
    with pytest.raises((KeyError, ValueError), match="REFT"):
        peft.PeftModel.from_pretrained(build("llama"), tmp_path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"r": 3}, r"has shape \[4, 32\], the model wants \[3, 32\]"),
        ({"r": 64}, "r: 64 orthonormal rows do not fit into the width 32"),
        ({"first": 0, "last": 0}, "first: it is zero, and so is `last`"),
        ({"first": 1.5}, "first: expected a whole number"),
        ({"tie_weights": False}, r"edits\.first\.rotation` is missing"),
        ({"act_fn": "relu"}, "act_fn: `relu` is not supported"),
    ],
)
def test_a_config_that_is_wrong(keys, words, tmp_path):
    peftctl.save(reft(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | keys))
    with pytest.raises(AdapterError, match=words):
        peftctl.load(build("llama"), tmp_path)


def test_what_cannot_be():
    with pytest.raises(AdapterError, match="64 orthonormal rows do not fit into the width 32"):
        reft(r=64)
    with pytest.raises(AdapterError, match=r"`decoder\.block\.1` lies outside `encoder`"):
        reft("t5", target_modules=["decoder.block.1"])
    with pytest.raises(AdapterError, match="LlamaForCausalLM has no such block"):
        reft(layers_to_transform=[7])
    with pytest.raises(ValueError, match="`first` and `last` are both zero"):
        REFT(first=0, last=0)


def test_a_mask_that_does_not_say_what_is_padding():
    model, [ids] = reft(), rows(4)
    with pytest.raises(AdapterError, match=r"expected an attention mask \[rows, length\]; got one of shape"):
        model(input_ids=ids[None], attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(AdapterError, match=r"got one of shape \[2, 1, 1, 11\]; .* generate with the default cache"):
        model.generate(**inputs(model), max_new_tokens=3, cache_implementation="static", disable_compile=True)
    with pytest.raises(AdapterError, match="got a dict"):
        model(input_ids=ids[None], attention_mask={"full_attention": torch.ones(1, 1, 4, 4)})


def test_generation_without_the_cache():
    given = {**inputs(build("llama")), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with pytest.raises(AdapterError, match="without the cache the end of the prompt is not known"):
        reft().generate(**given, use_cache=False)
    model = reft(first=3, last=0)
    assert torch.equal(model.generate(**given, use_cache=False), model.generate(**given))


def test_a_part_of_the_model_called_on_its_own():
    model, [ids] = reft(), rows(4)
    with pytest.raises(AdapterError, match="a block was called from outside LlamaForCausalLM"):
        model.model(input_ids=ids[None])
