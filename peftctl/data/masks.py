"""Which messages are trained, and which tokens a turn is."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

from peftctl.data.dataset import TrainOn
from peftctl.data.fitting import Span
from peftctl.data.formats import Chat
from peftctl.data.spelling import Tokens
from peftctl.data.turns import Turn


class Stops(NamedTuple):
    """What the tokens of a tokenizer and a chat template mean for the end of a turn."""

    special: frozenset[int]
    """Ids that can end a turn."""

    bos: int | None
    eos: int | None

    usual: Callable[[], frozenset[int]]
    """The ids that end plain answers with this template."""


def trained_messages(chat: Chat, train_on: TrainOn) -> tuple[list[int], list[int]]:
    """The messages that are trained turn by turn, and those that stay out where everything else is trained.

    With `train_on: all` the first are the answers, whose stop tokens have to be among what is trained.
    """
    flags = chat.flags or (True,) * len(chat.messages)
    roles = ("assistant",) if isinstance(train_on, str) else train_on
    first = 0 if train_on == "all" else chat.first
    turns = [i for i, message in enumerate(chat.messages) if i >= first and message["role"] in roles]
    turns = turns[-1:] if train_on == "last" else turns
    spared = [i for i, flag in enumerate(flags) if not flag] if train_on == "all" else []
    return [i for i in turns if flags[i]], spared


def span_of(turn: Turn, tokens: Tokens, stops: Stops) -> tuple[Span, int | None]:
    """The tokens `[start, end)` of a turn, through the one that closes it, and the id of that; None when none does.

    A turn of another role than the assistant's that nothing closes is what is said in it.
    """
    ids, begins, ends = tokens
    first = bisect_right(ends, turn.start)
    # A token that joins the end of the header to the beginning of the answer is the header's.
    first += first < len(ids) and begins[first] < turn.start
    header = ids[bisect_right(ends, turn.header) : first]
    if turn.role != "assistant":  # of its header only the end is known
        header = [next((id for id in reversed(ids[:first]) if id in stops.special), -1)]
    opening = {stops.bos, *header} - {stops.eos}
    closing = list(_closing(turn, tokens, stops.special, opening))
    if not closing:
        return (first, bisect_left(begins, turn.said_end)), None
    stop = closing[0]
    if turn.calls and len(closing) > 1:
        # Behind a call may stand tokens that close the call, not the turn.
        stop = next((at for at in closing if ids[at] in stops.usual()), stop)
    elif stops.eos in (run := [ids[at] for at, nth in zip(closing, count(stop), strict=False) if at == nth]):
        stop += run.index(stops.eos)  # Some close the answer first, then the turn.
    return (first, stop + 1), ids[stop]


def _closing(turn: Turn, tokens: Tokens, special: frozenset[int], opening: set[int | None]) -> Iterator[int]:
    """The special tokens after what is said and before what opens another turn."""
    for at in range(bisect_left(tokens.begins, turn.said_end), len(tokens.ids)):
        if tokens.ids[at] in special:
            if tokens.ends[at] > turn.limit or tokens.ids[at] in opening:
                return
            yield at


def without(span: Span, spared: Sequence[Span]) -> list[Span]:
    """What is left of a span without others, which lie in it, in order."""
    edges = [span[0], *(edge for part in spared for edge in part), span[1]]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
