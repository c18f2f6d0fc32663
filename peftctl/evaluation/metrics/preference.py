"""Whether a model finds the better of two answers more probable, and by how much."""

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
