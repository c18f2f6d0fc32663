"""Sources and targets: transformers' own loss on its own batches, and runs from a recipe to a merged model."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)

import peftctl
from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoded
from peftctl.data.formats import Chat, Pair, Preference, Text, Translated
from peftctl.errors import DataError, ModelError, RecipeError
from peftctl.evaluation.generation import continuations
from peftctl.tasks.seq2seq import Seq2Seq, shifted
from peftctl.tasks.task import read
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.generate import generate
from peftctl.verbs.merge import merge

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=96, **sizes, **IDS))


def mt5() -> nn.Module:
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return MT5ForConditionalGeneration(MT5Config(vocab_size=96, **sizes, **IDS))


def bart() -> nn.Module:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128}
    ends = {"decoder_start_token_id": 2, "forced_eos_token_id": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=96, **layers, **widths, **ends, **IDS))


def t5gemma() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    part = T5GemmaModuleConfig(vocab_size=96, num_key_value_heads=1, head_dim=16, **sizes, **IDS)
    return T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=part, decoder=part, vocab_size=96, **IDS))


def two_berts() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    one = BertConfig(vocab_size=96, **sizes, **IDS)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(one, BertConfig(vocab_size=96, **sizes, **IDS))
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 5, 0, 2
    return EncoderDecoderModel(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "t5": t5,
    "mt5": mt5,
    "bart": bart,
    "t5gemma": t5gemma,
    "two berts": two_berts,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.fixture(scope="module")
def t5_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-t5"
    torch.manual_seed(0)
    t5().save_pretrained(folder)
    tiny_chat.tokenizer().save_pretrained(folder)
    return folder


def pairs(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Words of a few letters, and the first of them in capitals."""
    drawn = random.Random(seed)
    words = ["".join(drawn.choices("abcd", k=drawn.randint(1, 6))) for _ in range(number)]
    return [{"source": word, "target": word[0].upper()} for word in words]


def encoded(rows: list[dict[str, str]], task: Seq2Seq | None = None, **settings: Any) -> list[Encoded]:
    encoder = (task or Seq2Seq()).encoder(Dataset(train="rows.jsonl", **settings), tiny_chat.tokenizer(), None)
    made = [encoder.encode(Translated(f"rows.jsonl:{n}", **row)) for n, row in enumerate(rows, 1)]
    return [piece for pieces in made for piece in pieces]


def test_the_loss_is_that_of_transformers_on_its_own_batch(model: Any):
    rows, tokenizer = pairs(7), tiny_chat.tokenizer()
    batch = Seq2Seq().collate(encoded(rows), 0)
    features = [
        {
            "input_ids": tokenizer(row["source"])["input_ids"],
            "labels": [*tokenizer(text_target=row["target"])["input_ids"], tokenizer.eos_token_id],
        }
        for row in rows
    ]
    theirs = DataCollatorForSeq2Seq(tokenizer, model=model, return_tensors="pt")(features)
    assert batch["input_ids"].tolist() == theirs["input_ids"].tolist()
    assert batch["labels"].tolist() == theirs["labels"].tolist()
    number = int((theirs["labels"] != -100).sum())
    torch.testing.assert_close(Seq2Seq().loss(model, batch), model(**theirs).loss * number, rtol=1e-5, atol=1e-5)


def test_rows_side_by_side_are_the_rows_alone(model: Any):
    rows = encoded(pairs(5))
    together = Seq2Seq().loss(model, Seq2Seq().collate(rows, 0))
    alone = sum(Seq2Seq().loss(model, Seq2Seq().collate([row], 0)) for row in rows)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_no_rows_train_nothing_and_reach_every_parameter(model: Any):
    loss = Seq2Seq().loss(model, Seq2Seq().collate([], 0))
    assert float(loss) == 0
    loss.backward()
    read = {name: one for name, one in model.named_parameters() if "pooler" not in name}  # only classifiers pool
    assert all(parameter.grad is not None for parameter in read.values())


def test_what_is_generated_is_what_each_row_alone_gets(model: Any):
    encoder = Seq2Seq().encoder(Dataset(train="rows.jsonl"), tiny_chat.tokenizer(), None)
    prompts = [encoder.prompt(Translated("", row["source"], "")) for row in pairs(4)]
    said = continuations(model, prompts, encoder, 8)
    for prompt, text in zip(prompts, said, strict=True):
        alone = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, num_beams=1)
        assert text == tiny_chat.tokenizer().decode(alone[0], skip_special_tokens=True)


def test_long_rows_are_cut_dropped_or_refused():
    long = [{"source": "abcdef", "target": "AB"}]
    [row] = encoded(long, max_length=4)
    assert (len(row), row.trained, row.truncated, row.cut) == (4 + 3, 3, True, 2)
    assert row.ids[:4].tolist() == tiny_chat.tokenizer()("abcd")["input_ids"]  # it puts nothing behind a text
    assert encoded(long, max_length=4, on_long="drop") == []
    with pytest.raises(DataError, match=r"rows\.jsonl:1: source of 6 and target of 3 tokens: too long"):
        encoded(long, max_length=4, on_long="error")
    with pytest.raises(DataError, match="are not split"):
        encoded(long, on_long="split")
    [row] = encoded(long, Seq2Seq(max_target_length=2))
    assert (row.trained, row.cut) == (2, 1)


def test_answers_are_to_the_source_that_is_trained():
    row = {"source": "abcdef", "target": "AB"}
    encoder = Seq2Seq().encoder(Dataset(train="rows.jsonl", max_length=4), tiny_chat.tokenizer(), None)
    [made] = encoded([row], max_length=4)
    assert encoder.prompt(Translated("f:1", **row)) == made.ids.tolist()[:4]


def test_a_tokenizer_that_cannot_say_what_is_needed():
    with pytest.raises(DataError, match="is a slow one"):
        Seq2Seq().encoder(Dataset(train="rows.jsonl"), ByT5Tokenizer(), None)


def test_a_prefix_stands_before_every_source():
    [row], [bare] = (
        encoded([{"source": "ab", "target": "c"}], Seq2Seq(prefix="to c: ")),
        encoded([{"source": "to c: ab", "target": "c"}]),
    )
    assert row == bare


def test_rows_that_it_takes():
    task = Seq2Seq()
    wanted = Translated("f:1", "a", "b")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert [task.accept(row) for row in (wanted, Pair("f:1", "a", "b"), Chat("f:1", chat))] == [wanted] * 3
    with pytest.raises(DataError, match="f:1: a longer conversation is no source and target"):
        task.accept(Chat("f:1", [*chat, *chat]))
    for row in (Text("f:1", "a"), Preference("f:1", "a", "b", "c")):
        with pytest.raises(DataError, match="f:1: `seq2seq` trains one text from another"):
            task.accept(row)


@pytest.mark.parametrize("text", ["dpq", 3, {"beta": 1}, {"type": "seq2seq", "prefixes": "a"}])
def test_tasks_that_there_are_not(text: Any):
    with pytest.raises(ValueError, match=r"literal_error|missing|unknown key"):
        read(text)


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "alpha": 16},
    "ia3": {},
    "adalora": {"init_r": 8, "target_r": 4, "tinit": 2, "tfinal": 2},
    "bottleneck": {},
    "prefix": {"num_virtual_tokens": 4},
    "prompt": {"num_virtual_tokens": 4},
    "full": {},
}


@pytest.fixture
def recipe(t5_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.chdir(tmp_path)
    train, held_out = (tmp_path / name for name in ("train.jsonl", "held-out.jsonl"))
    tiny_chat.write_rows(train, pairs(64))
    tiny_chat.write_rows(held_out, pairs(16, seed=1))

    def made(**blocks: Any) -> dict[str, Any]:
        trainer = {"task": "seq2seq", "steps": 12, "batch_size": 16, "micro_batch_size": 8, "save_every": 4}
        return tiny_chat.recipe(
            t5_base, train, held_out, **{**blocks, "trainer": {**trainer, **blocks.get("trainer", {})}}
        )

    return made


@pytest.mark.parametrize("kind", METHODS)
def test_every_kind_of_method_learns(recipe: Callable[..., dict[str, Any]], kind: str):
    rate = 3e-3 if kind == "full" else 5e-2
    settings = recipe(method={"type": kind, **METHODS[kind]}, trainer={"learning_rate": rate})
    settings["method"] = {"type": kind, **METHODS[kind]}
    result = peftctl.train(settings)
    figures = evaluate(result["path"])["figures"]
    assert figures["adapter"]["loss"] < 0.98 * figures["base"]["loss"]


def test_from_a_recipe_to_a_merged_model(recipe: Callable[..., dict[str, Any]], tmp_path: Path):
    blocks = {"method": {"r": 16, "alpha": 32}, "trainer": {"steps": 300, "learning_rate": 2e-2, "save_every": 300}}
    run = peftctl.train(recipe(**blocks, eval={"metrics": ["loss", "exact_match", "chrf"], "samples": 2}))["path"]
    record = evaluate(run)
    base, tuned = record["figures"]["base"], record["figures"]["adapter"]
    assert base["exact_match"] == 0
    assert tuned["exact_match"] > 0.5
    assert tuned["chrf"] > base["chrf"]
    said = generate(run, "dab")
    assert said == generate(f"{run}/adapter", "dab")
    merge(run, tmp_path / "merged")
    plain, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = tiny_chat.tokenizer()
    ids = plain.generate(**tokenizer("dab", return_tensors="pt"), max_new_tokens=8)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == said


def test_labels_are_compared_as_targets(recipe: Callable[..., dict[str, Any]]):
    blocks = {"trainer": {"steps": 150, "learning_rate": 2e-2, "save_every": 150}, "method": {"r": 16, "alpha": 32}}
    run = peftctl.train(recipe(**blocks, eval={"metrics": ["loss"], "labels": ["A", "B", "C", "D"]}))["path"]
    figures = evaluate(run)["figures"]
    assert figures["adapter"]["accuracy"] > figures["base"]["accuracy"]


def test_other_models_and_metrics_are_refused(recipe: Callable[..., dict[str, Any]], tmp_path: Path):
    llama = tiny_chat.write_base(tmp_path / "llama")
    with pytest.raises(peftctl.PeftctlError, match="is no model with an encoder and a decoder"):
        peftctl.train(recipe(model={"name_or_path": str(llama)}))
    with pytest.raises(RecipeError, match="preference_margin is not measured of `seq2seq`"):
        peftctl.train(recipe(eval={"metrics": ["preference_margin"]}))
    with pytest.raises(RecipeError, match="rows of `seq2seq` do not lie end to end"):
        peftctl.train(recipe(trainer={"packing": "on"}))


def test_a_model_that_does_not_say_where_decoding_begins():
    network = two_berts()
    network.config.decoder_start_token_id = None
    with pytest.raises(ModelError, match=r"`config\.json` has no `decoder_start_token_id`") as caught:
        shifted(torch.ones(2, 3, dtype=torch.long), network)
    assert "bos_token_id" in str(caught.value)
