"""One base, loaded as what a task asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from peftctl.errors import ModelError
from peftctl.models.base import Model, load
from peftctl.models.head import CAUSAL, HEADS, PICTURES, SEQ2SEQ, SEQUENCES, TOKENS

LABELS = ("bad", "good", "so so")


@pytest.fixture
def saved(tmp_path: Path, make_tokenizer):
    def save(name: str, part: bool = False) -> Model:
        """A model of the zoo; with `part` only the model inside, as an embedding model is saved."""
        model = tiny.build(name)
        (model.base_model if part else model).save_pretrained(tmp_path / name)
        special = {"eos_token": None, "bos_token": None} if name == "bert" else {}
        make_tokenizer(**special).save_pretrained(tmp_path / name)
        return Model(name_or_path=str(tmp_path / name), dtype="float32", device="cpu")

    return save


@pytest.mark.parametrize(
    ("name", "head", "new"),
    [
        ("llama", SEQUENCES, ("score",)),
        ("gpt2", SEQUENCES, ("score",)),
        ("t5", SEQUENCES, ("classification_head",)),
        ("llama", TOKENS, ("score",)),
    ],
)
def test_a_classifier_gets_a_head_for_its_labels(saved, name, head, new):
    torch.manual_seed(3)
    base = load(saved(name), head.with_labels(LABELS))
    assert base.new == new
    assert base.model.config.id2label == dict(enumerate(LABELS))
    assert base.model.config.num_labels == 3
    torch.manual_seed(3)
    again = load(saved(name), head.with_labels(LABELS))
    for key, tensor in base.model.state_dict().items():
        torch.testing.assert_close(tensor, again.model.state_dict()[key], rtol=0, atol=0)
    inside = tiny.build(name).base_model.state_dict()
    for key, tensor in base.model.base_model.state_dict().items():
        if ".pooler." not in f".{key}" and key in inside:
            torch.testing.assert_close(tensor, inside[key], rtol=0, atol=0)


def test_a_head_that_fits_is_kept(saved):
    base = load(saved("bert"), SEQUENCES.with_labels(LABELS))
    assert base.new == ()
    torch.testing.assert_close(base.model.classifier.weight, tiny.build("bert").classifier.weight, rtol=0, atol=0)


def test_a_head_for_other_labels_is_new(saved):
    said: list[str] = []
    base = load(saved("bert"), SEQUENCES.with_labels(("no", "yes")), say=said.append)
    assert base.new == ("classifier",)
    assert any(line.startswith("new, starting from random numbers: `classifier.bias`") for line in said)


def test_an_embedding_model_lacks_the_head_only(saved):
    assert load(saved("bert", part=True), SEQUENCES.with_labels(LABELS)).new == ("classifier",)


def test_a_decoder_classifies_at_its_last_real_token(saved):
    model, ids = load(saved("llama"), SEQUENCES.with_labels(LABELS)).model, torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[5, 6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, model(ids).logits)


def test_encoder_and_decoder(saved):
    assert type(load(saved("t5"), SEQ2SEQ).model).__name__ == "T5ForConditionalGeneration"


@pytest.mark.parametrize(
    ("name", "head", "what"),
    [
        ("llama", SEQ2SEQ, "no model with an encoder and a decoder; choose one such as `google/flan-t5-small`"),
        ("t5", CAUSAL, "no causal language model"),
        ("bert", CAUSAL, "no causal language model"),
        ("llama", PICTURES, "no model that writes about pictures"),
    ],
)
def test_other_kinds_are_refused(saved, name, head, what):
    with pytest.raises(ModelError, match=what):
        load(saved(name), head)


def test_a_tokenizer_without_end_can_classify_and_not_write(saved):
    assert load(saved("bert"), SEQUENCES.with_labels(LABELS)).tokenizer.eos_token is None


def test_heads_by_the_names_of_peft():
    import peft

    assert set(HEADS) <= set(peft.TaskType.__members__)
