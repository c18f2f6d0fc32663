"""Words with tags: transformers' own loss and steps, first tokens of words, runs from a recipe to a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_chat
import torch
from tokenizers import Tokenizer, decoders
from tokenizers import models as backends
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

import peftctl
from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoded
from peftctl.data.formats import Labelled, Tagged
from peftctl.engine.attach import attach
from peftctl.engine.disk import save
from peftctl.errors import DataError, GateFailed, RecipeError
from peftctl.methods import METHODS
from peftctl.models import base as models
from peftctl.tasks.token_classification import TokenClassification, parted
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.export import export
from peftctl.verbs.generate import generate
from peftctl.verbs.merge import merge
from peftctl.verbs.mortal import one_thread

LABELS = ["B-PER", "I-PER", "O"]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
PIECES = ["ada", "love", "##lace", "sle", "##eps", "we", "met", "bob", "here", "and", ".", "##s"]
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertModel(BertConfig(vocab_size=96, **SIZES, **IDS), add_pooling_layer=False),
    "roberta": lambda: RobertaModel(RobertaConfig(vocab_size=96, **SIZES, **IDS), add_pooling_layer=False),
    "llama": lambda: LlamaModel(LlamaConfig(vocab_size=96, num_key_value_heads=2, **SIZES, **IDS)),
}
SENTENCES = [
    ("Ada Lovelace sleeps .", "B-PER I-PER O O"),
    ("we met Bob here", "O O B-PER O"),
    ("Bob and Ada met", "B-PER O B-PER O"),
    ("here sleeps Ada Lovelace", "O O B-PER I-PER"),
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Pieces of words as BERT has them."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *PIECES])}
    backend = Tokenizer(backends.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", pair=None, special_tokens=ends)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", **names)


def rows(number: int = 4) -> list[dict[str, Any]]:
    return [{"tokens": text.split(), "tags": tags.split()} for text, tags in (SENTENCES * number)[:number]]


def encoded(
    rows: list[dict[str, Any]], words: Any = None, labels: list[str] = LABELS, **settings: Any
) -> list[Encoded]:
    encoder = TokenClassification(labels=labels).encoder(
        Dataset(train="rows.jsonl", **settings), words or tokenizer(), None
    )
    made = [encoder.encode(Tagged(f"rows.jsonl:{n}", row["tokens"], row["tags"])) for n, row in enumerate(rows, 1)]
    return [piece for pieces in made for piece in pieces]


def aligned(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch as transformers' guide to token classification makes it."""
    batch = tokenizer()(
        [row["tokens"] for row in rows],
        is_split_into_words=True,
        padding=True,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    labels = torch.full_like(batch["input_ids"], -100)
    for number, row in enumerate(rows):
        seen = None
        for place, word in enumerate(batch.word_ids(number)):
            if word is not None and word != seen:
                labels[number, place] = LABELS.index(row["tags"][word])
            seen = word
    return {**batch, "labels": labels}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, build in KINDS.items():
        torch.manual_seed(0)
        made[kind] = tmp_path_factory.mktemp(kind) / kind
        build().save_pretrained(made[kind])
        tokenizer().save_pretrained(made[kind])
    return made


def loaded(folder: Path) -> models.Base:
    torch.manual_seed(0)
    model = models.Model(name_or_path=str(folder), dtype="float32", device="cpu")
    return models.load(model, TokenClassification(labels=LABELS).head)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_and_loss_are_those_of_transformers(kind: str, folders: dict[str, Path]):
    task, model = TokenClassification(labels=LABELS), loaded(folders[kind]).model
    batch, theirs = task.collate(encoded(rows()), 0), aligned(rows())
    assert {name: batch[name].tolist() for name in theirs} == {name: each.tolist() for name, each in theirs.items()}
    words = sum(len(row["tokens"]) for row in rows())
    assert sum(map(task.weight, encoded(rows()))) == words
    torch.testing.assert_close(task.loss(model, batch) / words, model(**theirs).loss, rtol=1e-5, atol=1e-5)
    alone = sum(task.loss(model, task.collate([row], 0)) for row in encoded(rows()))
    torch.testing.assert_close(task.loss(model, batch), alone, rtol=1e-4, atol=1e-5)
    assert task.loss(model, task.collate([], 0)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_peft(kind: str, folders: dict[str, Path], tmp_path: Path):
    task, base = TokenClassification(labels=LABELS), loaded(folders[kind])
    attach(base.model, task.trains(METHODS["lora"](r=4, alpha=8), base))
    save(base.model, tmp_path / "start")
    plain = AutoModelForTokenClassification.from_pretrained(folders[kind], **task.head.options())
    other = peft.PeftModel.from_pretrained(plain, str(tmp_path / "start"), is_trainable=True)
    both, words = {}, sum(len(row["tokens"]) for row in rows())
    for name, model in (("ours", base.model), ("peft", other)):
        model.eval()  # no dropout
        update = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(5):
            ours = name == "ours"
            loss = task.loss(model, task.collate(encoded(rows()), 0)) / words if ours else model(**aligned(rows())).loss
            loss.backward()
            update.step()
            update.zero_grad()
            losses.append(loss.item())
        both[name] = losses
    assert both["ours"] == pytest.approx(both["peft"], abs=1e-4)
    assert both["ours"][-1] < both["ours"][0]


def test_words_of_tokens_that_hold_the_space_before_them():
    letters = sorted(ByteLevel.alphabet())
    backend = Tokenizer(backends.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, trim_offsets=False)
    words = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="!", eos_token="!")
    (row,) = encoded([{"tokens": ["ab", "é", "c"], "tags": ["O", "O", "B-PER"]}], words)
    ids, firsts, tags = parted(row)
    # a word of its own begins behind its space where the space is a token, as all bytes are here
    assert [words.convert_ids_to_tokens(ids[place]) for place in firsts] == ["a", "Ã", "c"]
    assert tags.tolist() == [2, 2, 0]


def test_special_tokens_that_a_word_spells_are_ordinary():
    (row,) = encoded([{"tokens": ["ada", "[SEP]", "met"], "tags": ["O"] * 3}])
    ids, firsts, _ = parted(row)
    assert ids.tolist().count(2) == 1
    assert [ids[place] for place in firsts] == [4, 3, 10]


def test_long_and_foreign_rows():
    long = [{"tokens": ["ada", "lovelace", "sleeps"], "tags": ["O", "O", "O"]}]
    (cut,) = encoded(long, max_length=5)
    text, firsts, tags = parted(cut)
    assert (text.tolist(), firsts.tolist(), len(tags)) == ([1, 4, 5, 6, 2], [1, 2], 2)
    assert (cut.truncated, cut.cut) == (True, 2)
    unknown = [{"tokens": ["ada", "zzz"], "tags": ["O", "O"]}]
    assert parted(encoded(unknown, max_length=3)[0])[0].tolist() == [1, 4, 2]  # an unknown word closes no text
    assert encoded(long, max_length=5, on_long="drop") == []
    with pytest.raises(DataError, match=r"rows\.jsonl:1: 7 tokens, more than `max_length` 5"):
        encoded(long, max_length=5, on_long="error")
    with pytest.raises(DataError, match="no word is left in 2 tokens"):
        encoded(long, max_length=2)
    with pytest.raises(DataError, match="are not split"):
        encoded(long, on_long="split")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the label `B-LOC` is none of the task's; labels: `B-PER`"):
        encoded([{"tokens": ["ada"], "tags": ["B-LOC"]}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: tokens\[1\]: the tokenizer makes no token of its own of"):
        encoded([{"tokens": ["ada", "\u200b", "met"], "tags": ["O"] * 3}])


def test_rows_that_it_takes_and_numbers_of_labels():
    task = TokenClassification(labels=LABELS)
    assert task.accept(Tagged("f:1", ["a", "b"], [0, "O"])) == Tagged("f:1", ["a", "b"], ["B-PER", "O"])
    assert task.accept(Tagged("f:1", ["a"], [3])) == Tagged("f:1", ["a"], [3])  # told as none of the labels
    with pytest.raises(DataError, match="f:1: `token_classification` trains words with their tags"):
        task.accept(Labelled("f:1", "a", "b"))
    numbered = TokenClassification().knowing(lambda: [Tagged("f:1", ["a", "b"], [10, 9])], lambda line: None)
    assert list(numbered.head.labels) == ["9", "10"]
    assert numbered.accept(Tagged("f:1", ["a"], [9])) == Tagged("f:1", ["a"], [9])


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    tiny_chat.write_rows(tmp_path / "train.jsonl", rows(16))
    tiny_chat.write_rows(tmp_path / "held-out.jsonl", rows(7))

    def made(kind: str, method: dict[str, Any], **blocks: Any) -> Any:
        trainer = {
            "task": "token_classification",
            "steps": 30,
            "batch_size": 8,
            "save_every": 10,
            "learning_rate": 2e-2,
            **blocks.pop("trainer", {}),
        }
        files = tmp_path / "train.jsonl", tmp_path / "held-out.jsonl"
        return {**tiny_chat.recipe(folders[kind], *files, trainer=trainer, **blocks), "method": method}

    return made


RUNS = [
    ("bert", {"type": "lora", "r": 8}),
    ("bert", {"type": "prompt", "num_virtual_tokens": 4}),
    ("bert", {"type": "bottleneck"}),
    ("roberta", {"type": "ia3"}),
    ("llama", {"type": "lora", "r": 8}),
    ("llama", {"type": "prefix", "num_virtual_tokens": 4}),
    ("llama", {"type": "p_tuning", "num_virtual_tokens": 4}),
]


@pytest.mark.parametrize(("kind", "method"), RUNS, ids=[f"{kind}-{method['type']}" for kind, method in RUNS])
def test_it_learns_and_reads_back(recipe: Callable[..., Any], kind: str, method: dict[str, Any]):
    run = peftctl.train(recipe(kind, method))["path"]
    record = evaluate(run)
    base, tuned = record["figures"]["base"], record["figures"]["adapter"]
    assert set(tuned) == {"rows", "token_accuracy", "entity_f1", "loss"}
    assert tuned["loss"] < base["loss"] / 2
    assert tuned["entity_f1"] > base["entity_f1"]


def test_from_a_recipe_to_a_merged_model(recipe: Callable[..., Any], tmp_path: Path, folders: dict[str, Path]):
    lora = {"type": "lora", "r": 8}
    run = Path(peftctl.train(recipe("bert", lora, eval={"gates": {"entity_f1": {"min": 0.9}}}))["path"])
    assert evaluate(str(run))["gates"][0]["status"] == "passed"
    with pytest.raises(GateFailed):
        evaluate(str(run), overrides=["eval.gates={entity_recall: {min: 2.0}}"])
    asked, said = "Here sleeps Ada Lovelace", "Here\tO\nsleeps\tO\nAda\tB-PER\nLovelace\tI-PER"
    assert generate(str(run), asked) == said
    shutil.copytree(run / "adapter", tmp_path / "alone")
    assert generate(str(tmp_path / "alone"), asked) == said
    plain = AutoModelForTokenClassification.from_pretrained(folders["bert"], num_labels=3)
    read = peft.PeftModel.from_pretrained(plain, str(run / "adapter")).eval()
    merge(str(run), tmp_path / "merged")
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    batch = {name: tensor for name, tensor in aligned(rows()).items() if name != "labels"}
    torch.testing.assert_close(merged(**batch).logits, read(**batch).logits, rtol=1e-4, atol=1e-4)
    assert list(merged.config.id2label.values()) == LABELS
    export(str(run), tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"


def test_tags_that_mark_no_entities_have_no_entity_figure_and_that_is_said(recipe: Callable[..., Any], tmp_path: Path):
    made = recipe("bert", {"type": "lora"}, trainer={"steps": 1})
    for name in ("train", "held-out"):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(file.read_text().replace("B-PER", "noun").replace("I-PER", "name"))
    heard: list[dict[str, Any]] = []
    record = evaluate(peftctl.train(made)["path"], listen=heard.append)
    assert record["figures"]["adapter"]["entity_f1"] is None
    warned = [event["text"] for event in heard if event["event"] == "warning"]
    assert warned == [
        "`entity_f1` has no figure: no tag marks an entity, as `B-PER` begins one and `I-PER` goes on with it"
    ]


def test_a_run_that_goes_on_ends_the_same(recipe: Callable[..., Any], tmp_path: Path):
    made = recipe("bert", {"type": "lora", "r": 4, "dropout": 0.1})
    with one_thread():
        run = Path(peftctl.train(made)["path"])
        whole = (run / "adapter" / "adapter_model.safetensors").read_bytes()
        shutil.rmtree(run / "adapter")
        shutil.rmtree(run / "checkpoints" / "step-000030")
        peftctl.train(made, resume=True)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def test_what_cannot_be(recipe: Callable[..., Any], tmp_path: Path):
    lora = {"type": "lora"}
    with pytest.raises(RecipeError, match="accuracy is not measured of `token_classification`"):
        peftctl.train(recipe("bert", lora, eval={"metrics": ["accuracy"]}))
    with pytest.raises(RecipeError, match="entity_f1 is not measured of `sft`"):
        peftctl.train(recipe("llama", lora, trainer={"task": "sft"}, eval={"metrics": ["entity_f1"]}))
    with pytest.raises(DataError, match=r"train\.jsonl:1: `classification` trains texts with their labels"):
        peftctl.train(recipe("bert", lora, trainer={"task": "classification"}))
    with pytest.raises(DataError, match=r"train\.jsonl:1: supervised fine-tuning has no use for words with tags"):
        peftctl.train(recipe("llama", lora, trainer={"task": "sft"}))
