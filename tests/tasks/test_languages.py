"""Tokenizers with a token for each language: their own ids, transformers' own loss, answers in the right language."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_chat
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
)

import peftctl
from peftctl.data.dataset import Dataset
from peftctl.data.formats import Translated
from peftctl.errors import DataError
from peftctl.tasks.seq2seq import Seq2Seq
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.export import export
from peftctl.verbs.generate import generate
from peftctl.verbs.merge import merge

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
LETTERS = ["▁", *"abcdefgABCD"]
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDTHS = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": 2}


def mbart() -> Any:
    pieces = [(piece, -1.0) for piece in (*SPECIAL, *LETTERS, "en_XX", "de_DE", "ro_RO", "<mask>")]
    return MBartTokenizer(vocab=pieces, src_lang="en_XX")


def mbart50() -> Any:
    pieces = [(piece, -1.0) for piece in (*SPECIAL, *LETTERS, "en_XX", "de_DE", "ro_RO", "<mask>")]
    return MBart50Tokenizer(vocab=pieces, src_lang="en_XX")


def nllb() -> Any:
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *LETTERS])}
    return NllbTokenizer(vocab=vocabulary, merges=[], extra_special_tokens=["eng_Latn", "deu_Latn", "ron_Latn"])


KINDS = {
    "mbart": (mbart, "en_XX", "ro_RO"),
    "mbart50": (mbart50, "en_XX", "ro_RO"),
    "nllb": (nllb, "eng_Latn", "ron_Latn"),
}


def network(kind: str, tokens: int) -> Any:
    torch.manual_seed(0)
    if kind == "nllb":
        sizes = {**LAYERS, **WIDTHS, **IDS, "decoder_start_token_id": 2}
        model: Any = M2M100ForConditionalGeneration(M2M100Config(vocab_size=tokens, **sizes))
    else:
        model = MBartForConditionalGeneration(MBartConfig(vocab_size=tokens, **LAYERS, **WIDTHS, **IDS))
    tiny.stir(model)
    return model.eval()


def task(kind: str, **more: Any) -> Seq2Seq:
    _, source, target = KINDS[kind]
    return Seq2Seq(source_language=source, target_language=target, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_loss_are_those_of_transformers(kind: str):
    make, source, target = KINDS[kind]
    tokenizer = make()
    encoder = task(kind).encoder(Dataset(train="rows.jsonl"), tokenizer, None)
    texts = [("abc", "Ab"), ("a d", "D"), ("gg", "CC A")]
    rows = [encoder.encode(Translated("f:1", *pair))[0] for pair in texts]
    theirs = make()
    theirs.src_lang, theirs.tgt_lang = source, target
    own = [theirs(a, text_target=b) for a, b in texts]
    assert [row.ids.tolist() for row in rows] == [[*one["input_ids"], *one["labels"]] for one in own]
    model = network(kind, len(tokenizer))
    batch = task(kind).collate(rows, tokenizer.pad_token_id)
    padded = DataCollatorForSeq2Seq(theirs, model)(
        [{k: v for k, v in one.items() if k != "token_type_ids"} for one in own]
    )
    found = task(kind).sums(model, batch)["loss"] / sum(row.trained for row in rows)
    torch.testing.assert_close(found, model(**padded).loss)
    assert encoder.prompt(Translated("f:1", "abc", "")) == own[0]["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_keeps_what_the_tokenizer_puts_around_it(kind: str):
    make, _, _ = KINDS[kind]
    tokenizer = make()
    encoder = task(kind, max_target_length=4).encoder(Dataset(train="rows.jsonl", max_length=5), tokenizer, None)
    whole, cut = (encoder.encode(Translated("f:1", text, text))[0] for text in ("aa", "aaaaaaaa"))
    special = [id for id in whole.ids if id >= len(SPECIAL) + len(LETTERS) or id == tokenizer.eos_token_id]
    assert [id for id in cut.ids if id >= len(SPECIAL) + len(LETTERS) or id == tokenizer.eos_token_id] == special
    assert (len(cut), cut.trained) == (9, 4)


@pytest.mark.parametrize(
    ("make", "settings", "what", "hint"),
    [
        (nllb, {}, r"task\.source_language: missing; .* a token of its own", "one of its 3 codes, such as `eng_Latn`"),
        (mbart, {"source_language": "en_XX"}, r"task\.target_language: missing", "`en_XX`"),
        (
            nllb,
            {"source_language": "eng_Latn", "target_language": "ron_Lat"},
            "has no language `ron_Lat`",
            "such as `ron_Latn`",
        ),
        (tiny_chat.tokenizer, {"target_language": "ro"}, "has no tokens of languages", "leave it out"),
    ],
)
def test_languages_that_are_not_known(make: Any, settings: dict[str, str], what: str, hint: str):
    with pytest.raises(DataError, match=what) as caught:
        Seq2Seq(**settings).encoder(Dataset(train="rows.jsonl"), make(), None)
    assert hint in str(caught.value.problems[0].hint)


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_recipe_to_a_merged_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make, source, target = KINDS[kind]
    tokenizer = make()
    base = tmp_path / "base"
    network(kind, len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = [{"source": "abcd"[i % 4] + "efg"[i % 3], "target": "ABCD"[i % 4]} for i in range(48)]
    files = [tiny_chat.write_rows(tmp_path / name, part) for name, part in (("a.jsonl", rows), ("b.jsonl", rows[:12]))]
    languages = {"type": "seq2seq", "source_language": source, "target_language": target}
    settings = {"task": languages, "steps": 250, "batch_size": 16, "micro_batch_size": 16, "learning_rate": 5e-3}
    written = tiny_chat.recipe(
        base,
        *files,
        trainer={**settings, "save_every": 250},
        method={"r": 16, "alpha": 32, "dropout": 0.0},
        eval={"metrics": ["loss", "exact_match"]},
    )
    run = peftctl.train(written)["path"]
    figures = evaluate(run)["figures"]
    assert figures["adapter"]["loss"] < 0.7 * figures["base"]["loss"]
    assert figures["adapter"]["exact_match"] > 0.8
    said = generate(run, "be")
    assert said == "B"
    merge(run, tmp_path / "merged")
    plain, there = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged"), AutoTokenizer.from_pretrained(base)
    there.src_lang = source
    token = there.convert_tokens_to_ids(target)
    begun = {"decoder_start_token_id": token} if kind == "mbart" else {"forced_bos_token_id": token}
    ids = plain.generate(**there("be", return_tensors="pt", return_token_type_ids=False), **begun, max_new_tokens=6)
    assert there.decode(ids[0], skip_special_tokens=True) == said
    export(run, tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


def test_a_stand_in_knows_no_languages():
    assert task("nllb", prefix="a").imitated() == Seq2Seq(prefix="a")
