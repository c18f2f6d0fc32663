"""Which of the labels a model finds most probable."""

import numpy as np

from peftctl.evaluation.metric import Array, Metric, Seen, ratio


def hits(seen: Seen) -> Array:
    """(right, 1) of each row."""
    right = np.equal(seen.choice, seen.truth).astype(np.float64)
    return np.stack([right, np.ones_like(right)], axis=1)


def margins(seen: Seen) -> Array:
    """For L labels, [n, 3 L]: whether the label is both true and chosen, is true, is chosen. The sums are the diagonal
    of the confusion table, its rows and its columns: all that F1 and Matthews need of it."""
    unit = np.eye(len(seen.labels))
    true, chosen = unit[np.asarray(seen.truth, dtype=int)], unit[np.asarray(seen.choice, dtype=int)]
    return np.concatenate([true * chosen, true, chosen], axis=1)


def f1(sums: Array) -> Array:
    """Mean over the labels that occur, among answers or choices, of 2 both / (true + chosen)."""
    both, true, chosen = np.split(sums, 3, axis=-1)
    occurs = true + chosen > 0
    each = np.divide(2 * both, true + chosen, out=np.zeros_like(both), where=occurs)
    with np.errstate(invalid="ignore"):
        return np.asarray(each.sum(axis=-1) / occurs.sum(axis=-1))


def correlation(sums: Array) -> Array:
    """Matthews' coefficient for any number of labels (Gorodkin 2004, eq. 8); 0 where only one label occurs."""
    both, true, chosen = np.split(sums, 3, axis=-1)
    rows = true.sum(axis=-1)
    covariance = both.sum(axis=-1) * rows - (true * chosen).sum(axis=-1)
    scale = np.sqrt((rows**2 - (true**2).sum(axis=-1)) * (rows**2 - (chosen**2).sum(axis=-1)))
    return np.asarray(np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0))


accuracy = Metric(
    name="accuracy",
    about="share of rows whose most probable label is the answer",
    needs="labels",
    better="higher",
    statistics=hits,
    figure=ratio,
    share=True,
    percent=True,
)

macro_f1 = Metric(
    name="macro_f1",
    about="F1 of each label, averaged over the labels",
    needs="labels",
    better="higher",
    statistics=margins,
    figure=f1,
    percent=True,
)

matthews = Metric(
    name="matthews",
    about="correlation of choices and answers, from -1 to 1; 0 is chance",
    needs="labels",
    better="higher",
    statistics=margins,
    figure=correlation,
)
