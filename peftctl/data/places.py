"""Where the words of each message begin and end in the rendering of a conversation, found with marks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from peftctl.data.formats import Message
from peftctl.data.marks import before, behind, found, unused
from peftctl.errors import DataError

OTHER_TEMPLATE = "choose another `dataset.chat_template`"
Marked = Callable[[Message, str], Iterator[Message]]
"""Ways to put a mark into a message, the best first."""


class Render(Protocol):
    def __call__(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str: ...


class Places:
    """The places of one conversation's words in `text`, which is `render(messages)`."""

    def __init__(self, messages: Sequence[Message], text: str, render: Render, place: str) -> None:
        self.messages, self.text, self.render, self.place = messages, text, render, place
        self._known: dict[tuple[int, Marked], int | None] = {}

    def look(self, begins: Sequence[int], ends: Sequence[int]) -> None:
        """Finds the places of many messages with one rendering; where that fails, each is found when it is asked for.

        One rendering is as good a proof as one for each: every mark differs, and came out once.
        """
        wanted = [(index, way) for way, those in ((behind, ends), (before, begins)) for index in dict.fromkeys(those)]
        messages, marked = list(self.messages), []
        for (index, way), mark in zip(wanted, unused(len(wanted), self.text, self.place), strict=True):
            changed = next(way(messages[index], mark), None)
            if changed is not None:
                messages[index] = changed
                marked.append(((index, way), mark))
        if len(marked) > 1:
            at = self._found(messages, [mark for _, mark in marked])
            self._known |= dict(zip([key for key, _ in marked], at or [], strict=False))

    def begin(self, index: int) -> int:
        """Where what a message says begins, its leading space left out. Raises DataError when that is in doubt."""
        return self._sure(index, before)

    def end(self, index: int) -> int:
        """Where what a message says ends, its trailing space left out. Raises DataError when that is in doubt."""
        return self._sure(index, behind)

    def begin_or(self, index: int, otherwise: int) -> int:
        """The same as `begin`, or `otherwise` when that is in doubt."""
        at = self._alone(index, before)
        return otherwise if at is None else at

    def end_or(self, index: int, otherwise: int) -> int:
        """The same as `end`, or `otherwise` when that is in doubt."""
        at = self._alone(index, behind)
        return otherwise if at is None else at

    def plain(self, index: int) -> Iterator[tuple[str, int]]:
        """Renderings with a plain answer in the place of message `index`, and where it begins in each."""
        (mark,) = unused(1, self.text, self.place)
        answer, (head, tail) = {"role": "assistant", "content": mark}, self._around(index)
        for after in (tail, [{"role": "user", "content": "?"}], []):
            try:
                rendered = self.render([*head, answer, *after])
            except DataError:
                continue
            if rendered.count(mark) == 1:
                yield rendered.replace(mark, ""), rendered.index(mark)

    def _sure(self, index: int, way: Marked) -> int:
        at = self._alone(index, way)
        if at is None:
            said = "answer" if self.messages[index]["role"] == "assistant" else "message"
            said = "call of a tool" if self.messages[index].get("tool_calls") else said
            what = f"the chat template changes, repeats or leaves out this {said}, so what to train is in doubt"
            raise DataError(f"{self.place}: messages[{index}]: {what}", OTHER_TEMPLATE)
        return at

    def _alone(self, index: int, way: Marked) -> int | None:
        if (index, way) not in self._known:
            (mark,) = unused(1, self.text, self.place)
            head, tail = self._around(index)
            tried = (self._found([*head, changed, *tail], [mark]) for changed in way(self.messages[index], mark))
            self._known[index, way] = next((at[0] for at in tried if at is not None), None)
        return self._known[index, way]

    def _found(self, messages: Sequence[Message], marks: Sequence[str]) -> list[int] | None:
        try:
            return found(self.render(messages), self.text, marks)
        except DataError:  # a template may know the names of its tools, or the length of a call's id
            return None

    def _around(self, index: int) -> tuple[Sequence[Message], Sequence[Message]]:
        return self.messages[:index], self.messages[index + 1 :]
