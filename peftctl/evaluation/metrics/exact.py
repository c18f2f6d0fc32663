"""Whether the generated answer is the right one and nothing else, apart from white space around it."""

from peftctl.evaluation.metric import Metric, ratio, written

exact_match = Metric(
    name="exact_match",
    about="share of rows whose generated answer is the right one and nothing else",
    needs="text",
    better="higher",
    statistics=lambda seen: written(seen, lambda said, answer: (said == answer, 1), 2),
    figure=ratio,
    share=True,
    percent=True,
)
