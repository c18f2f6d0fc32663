"""ROUGE (Lin 2004) of generated answers: the mean over rows of the F measure, by rouge-score, without stemming.

rouge-score's own words are runs of a-z and 0-9, which leaves nothing of most languages; ours are runs of letters and
digits of any script, the same on English text.
"""

import re
from collections.abc import Callable
from importlib.metadata import version

from peftctl.evaluation.metric import Array, Metric, Seen, library, ratio, written


class Words:
    """A tokenizer in the form that rouge-score takes."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-case runs of letters and digits."""
        return re.findall(r"[^\W_]+", text.lower())


def mean(kind: str) -> Callable[[Seen], Array]:
    """(F, 1) of each row."""

    def read(seen: Seen) -> Array:
        scorer = library("rouge_score.rouge_scorer", "rouge-score").RougeScorer([kind], tokenizer=Words())
        return written(seen, lambda said, answer: (scorer.score(answer, said)[kind].fmeasure, 1), 2)

    return read


def rouge(name: str, kind: str, about: str) -> Metric:
    """One of the family."""
    return Metric(
        name=name,
        about=f"mean F of {about} (rouge-score)",
        needs="text",
        better="higher",
        statistics=mean(kind),
        figure=ratio,
        percent=True,
        signature=lambda: f"rouge-score {version('rouge-score')}|words of any script|no stemming",
    )


rouge1 = rouge("rouge1", "rouge1", "shared words")
rouge2 = rouge("rouge2", "rouge2", "shared pairs of words")
rouge_l = rouge("rougeL", "rougeL", "the longest common subsequence of words")
