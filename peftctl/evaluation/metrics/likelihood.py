"""How probable the right answers are, token by token."""

import numpy as np

from peftctl.evaluation.metric import Array, Metric, Seen, ratio

LARGEST = 700
"""The exponential of more has no room in a float."""


def nats(seen: Seen) -> Array:
    """(nats, tokens) of each row."""
    return np.stack([seen.nats, seen.tokens], axis=1)


loss = Metric(
    name="loss",
    about="mean cross-entropy of a trained token, in nats",
    needs="truth",
    better="lower",
    statistics=nats,
    figure=ratio,
)

perplexity = Metric(
    name="perplexity",
    about="exp(loss)",
    needs="truth",
    better="lower",
    statistics=nats,
    figure=lambda sums: np.exp(np.minimum(ratio(sums), LARGEST)),
)

token_accuracy = Metric(
    name="token_accuracy",
    about="share of trained tokens that the model puts first, given the right ones before",
    needs="truth",
    better="higher",
    statistics=lambda seen: np.stack([seen.right, seen.tokens], axis=1),
    figure=ratio,
    percent=True,
)
