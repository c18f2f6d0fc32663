"""Whether a model finds better answers more probable than worse ones, and by how much."""

import numpy as np

from peftctl.evaluation.metric import Array, Metric, Seen, ratio


def wins(seen: Seen) -> Array:
    """(1 for the better answer, 1) of each row; a half where both are as probable."""
    lead = seen.rejected - seen.nats
    return np.stack([(np.sign(lead) + 1) / 2, np.ones_like(lead)], axis=1)


def leads(seen: Seen) -> Array:
    """(lead, 1) of each row."""
    lead = seen.rejected - seen.nats
    return np.stack([lead, np.ones_like(lead)], axis=1)


def judgements(seen: Seen) -> Array:
    """Minus log p and tokens of the good and of the bad answer of each row, zero where it has none."""
    return np.stack([seen.nats, seen.tokens, seen.rejected, seen.rejected_tokens], axis=1)


def apart(sums: Array) -> Array:
    """By how much good answers are more probable, per token."""
    return ratio(sums[..., 2:]) - ratio(sums[..., :2])


preference_accuracy = Metric(
    name="preference_accuracy",
    about="share of rows whose better answer is the more probable one",
    needs="pairs",
    better="higher",
    statistics=wins,
    figure=ratio,
    share=True,
    percent=True,
)

preference_margin = Metric(
    name="preference_margin",
    about="mean of log p(better answer) - log p(worse answer), in nats",
    needs="pairs",
    better="higher",
    statistics=leads,
    figure=ratio,
)

feedback_margin = Metric(
    name="feedback_margin",
    about="log p per token of good answers, minus that of bad ones, in nats",
    needs="feedback",
    better="higher",
    statistics=judgements,
    figure=apart,
)
