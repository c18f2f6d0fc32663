"""BLEU (Papineni et al. 2002) and chrF (Popovic 2015) of generated answers, by sacrebleu with its defaults.

sacrebleu sums statistics of sentences itself; those methods are the ones that its own metrics are built from.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from peftctl.evaluation.metric import Array, Metric, Seen, library, written


def scorer(kind: str) -> Any:
    """sacrebleu's metric of that name."""
    return getattr(library("sacrebleu.metrics", "sacrebleu"), kind)()


def signature(kind: str) -> Callable[[], str]:
    """sacrebleu's line about version and settings, which scores must share to be compared."""

    def read() -> str:
        one = scorer(kind)
        one.corpus_score(["a"], [["a"]])  # it counts references only then
        return str(one.get_signature())

    return read


def counts(kind: str, number: int) -> Callable[[Seen], Array]:
    """The `number` statistics that sacrebleu takes of each sentence."""

    def read(seen: Seen) -> Array:
        one = scorer(kind)
        return written(seen, lambda said, answer: one._extract_corpus_statistics([said], [[answer]])[0], number)

    return read


def corpus(kind: str) -> Callable[[Array], Array]:
    """The score of a corpus from the sums of its sentences."""

    def read(sums: Array) -> Array:
        one = scorer(kind)
        rows: Iterable[list[int]] = np.rint(sums).astype(int).reshape(-1, sums.shape[-1]).tolist()
        scores = [one._compute_score_from_stats(row).score if any(row) else np.nan for row in rows]
        return np.array(scores, dtype=np.float64).reshape(sums.shape[:-1])

    return read


bleu = Metric(
    name="bleu",
    about="BLEU of the generated answers, 0 to 100 (sacrebleu)",
    needs="text",
    better="higher",
    statistics=counts("BLEU", 10),
    figure=corpus("BLEU"),
    signature=signature("BLEU"),
)

chrf = Metric(
    name="chrf",
    about="chrF2 of the generated answers, 0 to 100 (sacrebleu)",
    needs="text",
    better="higher",
    statistics=counts("CHRF", 18),
    figure=corpus("CHRF"),
    signature=signature("CHRF"),
)
