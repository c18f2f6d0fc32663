"""Sums of statistics against the libraries that compute the figures of whole corpora."""

from __future__ import annotations

import builtins
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftctl.errors import RunError
from peftctl.evaluation.metric import Seen
from peftctl.evaluation.metrics import METRICS
from peftctl.evaluation.metrics.entities import entities

LABELS = ["a", "b", "c", "d"]
WORDS = ["the", "cat", "sat", "on", "a", "mat", ",", "dog's", "Straße", "猫が", "12.5"]
texts = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


def figure(name: str, seen: Seen) -> float:
    metric = METRICS[name]
    return float(metric.figure(metric.statistics(seen).sum(axis=0)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts.filter(bool)), min_size=1, max_size=8))
def test_bleu_and_chrf_are_sacrebleus_corpus_scores(pairs: list[tuple[str, str]]):
    from sacrebleu.metrics import BLEU, CHRF

    said, answers = [one for one, _ in pairs], [one for _, one in pairs]
    seen = Seen(said=said, answers=answers)
    assert figure("bleu", seen) == BLEU().corpus_score(said, [answers]).score
    assert figure("chrf", seen) == CHRF().corpus_score(said, [answers]).score


def test_signatures_are_sacrebleus():
    from sacrebleu.metrics import BLEU, CHRF

    for name, one in (("bleu", BLEU()), ("chrf", CHRF())):
        one.corpus_score(["x y"], [["x z"]])
        signature = METRICS[name].signature
        assert signature is not None
        assert signature() == str(one.get_signature())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
@pytest.mark.filterwarnings("ignore")
def test_classification_is_scikit_learns(pairs: list[tuple[int, int]]):
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    truth, choice = zip(*pairs, strict=True)
    seen = Seen(labels=LABELS, truth=truth, choice=choice)
    assert figure("accuracy", seen) == pytest.approx(accuracy_score(truth, choice), abs=1e-12)
    assert figure("macro_f1", seen) == pytest.approx(f1_score(truth, choice, average="macro"), abs=1e-12)
    assert figure("matthews", seen) == pytest.approx(matthews_corrcoef(truth, choice), abs=1e-12)


TAGS = ["O", "B-x", "I-x", "B-y", "I-y"]


def in_brackets(tags: list[str]) -> set[tuple[int, int, str]]:
    """The entities of IOB tags, by a pattern over one character a word: a small letter goes on, a large one begins."""
    letters = "".join({"O": ".", "B-x": "X", "I-x": "x", "B-y": "Y", "I-y": "y"}[tag] for tag in tags)
    return {(*match.span(), match[0][0].lower()) for match in re.finditer("Xx*|Yy*|x+|y+", letters)}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.tuples(*[st.sampled_from(TAGS)] * 2), max_size=9), min_size=1, max_size=5))
def test_entities_are_those_of_scikit_learns_counts(rows: list[list[tuple[str, str]]]):
    from sklearn.metrics import precision_recall_fscore_support

    found, true = [[one for one, _ in row] for row in rows], [[other for _, other in row] for row in rows]
    spans = [{(n, *span) for n, row in enumerate(side) for span in in_brackets(row)} for side in (found, true)]
    every = sorted(spans[0] | spans[1])
    seen = Seen(found=found, tags=true)
    figures = [figure(name, seen) for name in ("entity_precision", "entity_recall", "entity_f1")]
    if not every:
        assert np.isnan(figures).all()
        return
    predicted, wanted = ([span in side for span in every] for side in spans)
    theirs = precision_recall_fscore_support(wanted, predicted, average="binary", zero_division=0)
    assert figures == pytest.approx(theirs[:3], abs=1e-12)


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("S-x O B-y E-y", {(0, 1, "x"), (2, 4, "y")}),
        ("B-x I-x E-x I-x", {(0, 3, "x"), (3, 4, "x")}),
        ("U-x B-x L-x", {(0, 1, "x"), (1, 3, "x")}),
        ("B-a-b I-a-b", {(0, 2, "a-b")}),
        ("NN VB-Z 3 X-", set()),
    ],
)
def test_marks_of_other_schemes(tags: str, wanted: set[tuple[int, int, str]]):
    assert entities(tags.split()) == wanted


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.lists(st.sampled_from(["the", "cat", "sat", "9x"]), max_size=9).map(" ".join)] * 2)))
def test_rouge_is_the_mean_of_rouge_scores_f(pairs: list[tuple[str, str]]):
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)  # with its own words: on English they are ours
    seen = Seen(said=[one for one, _ in pairs], answers=[one for _, one in pairs])
    for name in names if pairs else ():
        each = [scorer.score(answer, said)[name].fmeasure for said, answer in pairs]
        assert figure(name, seen) == pytest.approx(np.mean(each), abs=1e-12)


def test_rouge_reads_every_script():
    seen = Seen(said=["кот сидел"], answers=["Кот, сидел!"])
    assert figure("rouge1", seen) == 1


def test_exact_match_and_plain_text():
    seen = Seen(said=["a", "b", None], answers=["a", "c", None])
    assert figure("exact_match", seen) == 0.5
    assert METRICS["exact_match"].statistics(seen).tolist() == [[1, 1], [0, 1], [0, 0]]


def test_perplexity_has_room_in_a_float():
    seen = Seen(nats=np.array([5000.0]), tokens=np.array([2.0]), right=np.array([1.0]))
    assert np.isfinite(figure("perplexity", seen))
    assert figure("loss", seen) == 2500
    assert figure("token_accuracy", seen) == 0.5


def test_figures_of_many_sums_at_once():
    rng = np.random.default_rng(0)
    seen = Seen(
        **{
            key: rng.integers(1, 9, 20).astype(float)
            for key in ("nats", "tokens", "right", "rejected", "rejected_tokens", "errors")
        },
        labels=LABELS,
        truth=rng.integers(0, 4, 20).tolist(),
        choice=rng.integers(0, 4, 20).tolist(),
        **{key: [rng.choice(TAGS, 6).tolist() for _ in range(20)] for key in ("tags", "found")},
        said=[" ".join(rng.choice(WORDS, 6)) for _ in range(20)],
        answers=[" ".join(rng.choice(WORDS, 6)) for _ in range(20)],
    )
    for metric in METRICS.values():
        statistics = metric.statistics(seen)
        sums = np.stack([statistics[:10].sum(axis=0), statistics[10:].sum(axis=0), statistics.sum(axis=0)])
        assert metric.figure(sums).tolist() == [float(metric.figure(one)) for one in sums]


@pytest.mark.parametrize(("name", "package"), [("bleu", "sacrebleu"), ("rougeL", "rouge_score")])
def test_a_library_that_is_missing_is_named_with_its_command(name: str, package: str, monkeypatch: Any):
    importing = builtins.__import__

    def missing(asked: str, *more: Any, **named: Any) -> Any:
        if asked.startswith(package):
            raise ImportError(asked)
        return importing(asked, *more, **named)

    import importlib

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(RunError) as caught:
        METRICS[name].statistics(Seen(said=["a"], answers=["a"]))
    assert "pip install 'peftctl[metrics]'" in str(caught.value)
