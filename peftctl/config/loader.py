"""YAML text to plain data, with the place of everything in it.

A recipe may come from a stranger: its depth, its number of values and what its aliases stand for are bounded, tags are
refused, and nothing is built but mappings, lists and scalars.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.reader import ReaderError

from peftctl.config.place import Keys, Mistake, Origin, Place, Spot
from peftctl.config.quote import dotted, quoted
from peftctl.config.scalar import finite, forbidden, plain

LARGEST = 256 * 1024
"""Bytes from which on a text is refused."""

TOO_LARGE = f"{LARGEST // 1024} KB or larger"

DEEPEST = 16
"""Levels of nesting."""

TOO_DEEP = f"nested deeper than {DEEPEST} levels"

MOST_VALUES = 5000
"""Keys and values in a text."""

MOST_ALIASED = 64
"""Values that the aliases of a text stand for, all together."""


class Refused(Exception):
    """The text cannot be read any further."""

    def __init__(self, mistake: Mistake) -> None:
        super().__init__(mistake)
        self.mistake = mistake


@dataclass
class Loaded:
    """A text's value, the spots of all that is in it, and every mistake that did not stop the reading."""

    empty: bool = True
    data: Any = None
    spots: dict[Keys, Spot] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)


def load(text: str, origin: Origin) -> Loaded:
    """Read one YAML document. Mistakes are collected; one that makes the rest unreadable is the last."""
    loaded = Loaded()
    if len(text.encode("utf-8", "replace")) >= LARGEST:
        loaded.mistakes.append(Mistake(origin.whole(), TOO_LARGE))
        return loaded
    try:
        events: Any = yaml.SafeLoader(text)
    except ReaderError as error:
        loaded.mistakes.append(_not_allowed(int(error.character), origin.offset(text, int(error.position))))
        return loaded
    try:
        _Reading(events, origin, loaded).document()
    except Refused as refused:
        loaded.mistakes.append(refused.mistake)
    except yaml.MarkedYAMLError as error:
        loaded.mistakes.append(_not_yaml(error, origin))
    except (ValueError, OverflowError):  # PyYAML hands an escape such as "\UFFFFFFFF" to chr() as it is
        place = origin.at(events.line + 1, events.column + 1)
        loaded.mistakes.append(Mistake(place, "not YAML: an escape or a number out of range"))
    return loaded


def _not_yaml(error: yaml.MarkedYAMLError, origin: Origin) -> Mistake:
    mark = error.problem_mark or error.context_mark
    place = origin.at(mark.line + 1, mark.column + 1) if mark else origin.whole()
    problem = error.problem or error.context or "cannot be read"
    hint = None
    if "\\t" in problem:
        hint = "indent with spaces"
    elif "cannot start any token" in problem:
        hint = "put the value in quotes"
    elif mark and error.context_mark and error.context_mark.line < mark.line:
        start = origin.at(error.context_mark.line + 1, error.context_mark.column + 1)
        hint = f"{error.context} that starts at {start.text}"
    return Mistake(place, f"not YAML: {problem}", hint)


def _not_allowed(character: int, place: Place) -> Mistake:
    return Mistake(place, f"the character U+{character:04X} is not allowed")


class _Reading:
    """One pass over PyYAML's events. Its own composers recurse without bound, the compiled one until it crashes."""

    def __init__(self, events: Any, origin: Origin, into: Loaded) -> None:
        self.events = events
        self.origin = origin
        self.into = into
        self.count = 0
        self.aliased = 0
        self.anchors: dict[str, tuple[Keys, Any]] = {}
        self.open: set[str] = set()

    def document(self) -> None:
        self.events.get_event()  # start of the stream
        if self.events.check_event(yaml.StreamEndEvent):
            return
        self.events.get_event()  # start of the document
        self.into.empty = False
        self.into.data = self.value((), self.place())
        self.events.get_event()  # end of the document
        if not self.events.check_event(yaml.StreamEndEvent):
            raise Refused(Mistake(self.place(), "a second document", "one file holds one"))

    def place(self) -> Place:
        """Where the next event starts."""
        mark = self.events.peek_event().start_mark
        return self.origin.at(mark.line + 1, mark.column + 1)

    def wrong(self, place: Place, path: Keys, text: str, hint: str | None = None) -> None:
        self.into.mistakes.append(Mistake(place, f"{dotted(path)}: {text}" if path else text, hint))

    def node(self, path: Keys) -> Any:
        """The event that starts the next key or value."""
        place, event = self.place(), self.events.get_event()
        self.count += 1
        if self.count > MOST_VALUES:
            raise Refused(Mistake(place, f"more than {MOST_VALUES} keys and values"))
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.wrong(place, path, f"tags such as {quoted(tag)} are not allowed")
        return event

    def value(self, path: Keys, key: Place) -> Any:
        """Read the value at `path`, whose key stands at `key`."""
        place = self.place()
        event = self.node(path)
        self.into.spots[path] = Spot(key, place)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(str(event.anchor), path, key, place)
        if isinstance(event, yaml.ScalarEvent):
            data = self.scalar(event, path, key, place)
        elif len(path) >= DEEPEST:
            raise Refused(Mistake(place, TOO_DEEP))
        else:
            self.open.add(event.anchor)
            data = self.mapping(path) if isinstance(event, yaml.MappingStartEvent) else self.sequence(path)
            self.open.discard(event.anchor)
        if event.anchor is not None:
            self.anchors[event.anchor] = (path, data)
        return data

    def scalar(self, event: yaml.ScalarEvent, path: Keys, key: Place, place: Place) -> Any:
        text, quotes = event.value, bool(event.style)
        self.into.spots[path] = Spot(key, place, text, quotes)
        self.check_text(text, place)
        if quotes:
            return text
        if not finite(text):
            self.wrong(place, path, f"{quoted(text)} is no finite number")
        return plain(text)

    def check_text(self, text: str, place: Place) -> None:
        bad = forbidden(text)
        if bad is not None:
            self.into.mistakes.append(_not_allowed(ord(bad), place))

    def sequence(self, path: Keys) -> list[Any]:
        items: list[Any] = []
        while not self.events.check_event(yaml.SequenceEndEvent):
            items.append(self.value((*path, len(items)), self.place()))
        self.events.get_event()
        return items

    def mapping(self, path: Keys) -> dict[str, Any]:
        items: dict[str, Any] = {}
        first: dict[str, Place] = {}
        while not self.events.check_event(yaml.MappingEndEvent):
            place = self.place()
            name = self.key(path, place)
            if name is None:
                self.skip(path)
                continue
            if name in items:
                self.wrong(place, (*path, name), "given twice", f"first at {first[name].text}")
            first.setdefault(name, place)
            items[name] = self.value((*path, name), place)
        self.events.get_event()
        return items

    def key(self, path: Keys, place: Place) -> str | None:
        """The next key, or None after saying why it is none."""
        event = self.node(path)
        if not isinstance(event, yaml.ScalarEvent):
            self.wrong(place, path, "a key that is no text")
            if not isinstance(event, yaml.AliasEvent):
                self.skip(path, level=1)
            return None
        text: str = event.value
        self.check_text(text, place)
        if not event.style and not (isinstance(plain(text), str) and finite(text)):
            self.wrong(place, path, f"the key {quoted(text)} is no text", f'write `"{text}"`' if text else None)
            return None
        return text

    def skip(self, path: Keys, level: int = 0) -> None:
        """Pass over the next value, or over the rest of one that is `level` starts deep."""
        while True:
            place = self.place()
            if self.events.check_event(yaml.SequenceEndEvent, yaml.MappingEndEvent):
                self.events.get_event()
                level -= 1
            elif isinstance(self.node(path), yaml.CollectionStartEvent):
                level += 1
                if len(path) + level > DEEPEST:  # the time that PyYAML takes grows with the square of the depth
                    raise Refused(Mistake(place, TOO_DEEP))
            if level == 0:
                return

    def alias(self, name: str, path: Keys, key: Place, place: Place) -> Any:
        """What `*name` stands for, as a copy with spots of its own."""
        if name in self.open:
            self.wrong(place, path, f"{quoted('*' + name)} refers to itself")
            return None
        if name not in self.anchors:
            self.wrong(place, path, f"{quoted('*' + name)} refers to nothing", f"mark a value before it with `&{name}`")
            return None
        root, data = self.anchors[name]
        below = {p[len(root) :]: spot for p, spot in self.into.spots.items() if p[: len(root)] == root}
        self.aliased += len(below)
        if self.aliased > MOST_ALIASED:
            raise Refused(Mistake(place, f"aliases stand for more than {MOST_ALIASED} values"))
        if len(path) + max(map(len, below)) > DEEPEST:
            raise Refused(Mistake(place, TOO_DEEP))
        self.into.spots.update({path + p: spot for p, spot in below.items()})
        self.into.spots[path] = self.into.spots[path]._replace(key=key)
        return deepcopy(data)
