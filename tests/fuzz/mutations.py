"""Valid inputs spoilt with a seed: bits and bytes of any file, values of structured ones, numbers of binary ones.

A case is the files of a folder in memory. Every mutant is a function of the corpus and the random generator alone.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from fuzz.nasty import INTEGERS, SPLINTERS, TEXTS

Case = dict[str, bytes]
"""Files by their names."""

WORD = re.compile(rb"[A-Za-z_]{2,}|\d+(?:\.\d+)?")


class Mutator:
    """Cases made from valid ones. `rewrites` are mutations of one target's own, tried as often as the others."""

    def __init__(self, corpus: Sequence[Case], rewrites: Sequence[Callable[[Random, Case], None]] = ()) -> None:
        self.corpus, self.rewrites = corpus, rewrites

    def case(self, random: Random) -> Case:
        """One of the corpus with one to four things changed."""
        case = dict(random.choice(self.corpus))
        for _ in range(random.choice((1, 1, 1, 2, 2, 4))):
            if self.rewrites and random.random() < 0.6:
                random.choice(self.rewrites)(random, case)
                continue
            if not case:
                break
            name = random.choice(sorted(case))
            if name.endswith(".json") and random.random() < 0.7:
                case[name] = json_values(random, case[name])
            else:
                case[name] = splintered(random, case[name], random.choice(self.corpus).get(name, b""))
        return case


def splintered(random: Random, data: bytes, other: bytes = b"") -> bytes:
    """Bytes with one thing flipped, cut, repeated, swapped, put in or written over, or joined with `other`."""
    at = random.randrange(len(data) + 1)
    to = min(len(data), at + random.choice((1, 1, 2, 4, 8, 16, 64, 1024)))
    match random.randrange(11):
        case 0 | 1 if at < len(data):
            return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + random.choice(SPLINTERS) + data[at:]
        case 4:
            return data[:at] + data[to:]
        case 5:
            return data[:at] + data[at:to] * random.choice((2, 3, 50)) + data[to:]
        case 6:
            number = random.choice(INTEGERS) + random.choice((-1, 0, 0, 1))
            form, bits = random.choice((("<B", 8), ("<H", 16), ("<I", 32), ("<Q", 64), (">I", 32), (">Q", 64)))
            put = struct.pack(form, number % 2**bits)
            return data[:at] + put + data[at + len(put) :]
        case 7:
            return data[:at] + random.randbytes(to - at) + data[to:]
        case 8:
            return data[:at] + other[random.randrange(len(other) + 1) :]
        case 9:
            return replaced_word(random, data)
        case _:
            lines = data.split(b"\n")
            i, j = random.randrange(len(lines)), random.randrange(len(lines))
            if random.random() < 0.5:
                lines[i], lines[j] = lines[j], lines[i]
            else:
                lines.insert(j, lines[i])
            return b"\n".join(lines)


def replaced_word(random: Random, data: bytes) -> bytes:
    """A word or number of a text replaced by another of the text, or by something nasty."""
    words = list(WORD.finditer(data, 0, 1 << 16))
    if not words:
        return data
    word = random.choice(words)
    if random.random() < 0.4:
        put = random.choice(words)[0]
    elif random.random() < 0.5:
        put = str(random.choice(INTEGERS) * random.choice((1, 1, -1))).encode()
    else:
        put = random.choice(TEXTS).encode("utf-8", "surrogatepass")
    return data[: word.start()] + put + data[word.end() :]


def json_values(random: Random, data: bytes) -> bytes:
    """A JSON text with one of its values changed, or a key given twice."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return splintered(random, data)
    try:
        text = json.dumps(changed(random, value), ensure_ascii=random.random() < 0.5)
    except (ValueError, RecursionError):
        return splintered(random, data)
    if random.random() < 0.1 and '": ' in text:
        pairs = [text.rfind('"', 0, at.start()) for at in re.finditer('": ', text)]
        start = random.choice(pairs)
        text = text[:start] + text[start : text.find('": ', start)] + '": 1, ' + text[start:]
    return text.encode("utf-8", "surrogatepass")


def changed(random: Random, value: Any) -> Any:
    """A nested value with one place of it changed, in place where that is possible."""
    places = list(walked(value))
    if not places:
        return strange(random, value)
    holder, key = random.choice(places)
    if isinstance(holder, dict) and random.random() < 0.25:
        other = random.choice(places)[1] if random.random() < 0.5 else random.choice(TEXTS)
        holder[str(other)] = holder[key] if random.random() < 0.5 else holder.pop(key)
    elif random.random() < 0.15:
        del holder[key]
    elif random.random() < 0.15:
        there, elsewhere = random.choice(places)
        holder[key], there[elsewhere] = there[elsewhere], holder[key]
    else:
        holder[key] = strange(random, holder[key])
    return value


def walked(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Holder and key of everything that is held."""
    if depth < 40 and isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from walked(item, depth + 1)


def strange(random: Random, value: Any) -> Any:
    """Something else in the place of `value`: near it, of another type, too large, too deep."""
    match random.randrange(9):
        case 0:
            return random.choice(INTEGERS) * random.choice((1, -1))
        case 1:
            return random.choice((0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf"), 1e30, 4.0, 10**400))
        case 2:
            return random.choice(TEXTS)
        case 3:
            return random.choice((None, True, False, [], {}, "", 0))
        case 4:
            return [value] if random.random() < 0.5 else {str(value)[:50]: value}
        case 5:
            return nested(random, random.choice((5, 20, 70, 900)))
        case 6 if isinstance(value, list):
            return value * random.choice((2, 50))
        case 7 if isinstance(value, dict):
            return {**value, random.choice(TEXTS): random.choice(TEXTS), "more": 1}
        case 6 | 7 if isinstance(value, str) and value:
            at = random.randrange(len(value))
            return value[:at] + random.choice(TEXTS) + value[at + random.randrange(2) :]
        case 6 | 7 if isinstance(value, int | float):
            return random.choice((value + 1, value - 1, -value, value * 2, str(value)[:400]))
        case _:
            return random.choice(TEXTS)


def nested(random: Random, depth: int) -> Any:
    """Lists and mappings in each other."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if random.random() < 0.5 else {"a": value}
    return value


def safetensors_header(random: Random, case: Case, name: str) -> None:
    """The header of a safetensors file changed as JSON, its length mended most of the time."""
    data = case[name]
    size = int.from_bytes(data[:8], "little")
    if not 0 < size <= len(data):
        case[name] = splintered(random, data)
        return
    text = json_values(random, data[8 : 8 + size]) if random.random() < 0.8 else splintered(random, data[8 : 8 + size])
    length = len(text) if random.random() < 0.9 else random.choice(INTEGERS)
    case[name] = struct.pack("<Q", length) + text + data[8 + size :]


def with_number(random: Random, data: bytes, spans: Sequence[tuple[int, str]]) -> bytes:
    """A binary file with an interesting number in one of the places where its format has one."""
    at, form = random.choice(spans)
    bits = struct.calcsize(form) * 8
    (value,) = struct.unpack_from(form, data.ljust(at + bits // 8, b"\0"), at)
    number = random.choice((random.choice(INTEGERS), value + 1, value - 1, value * 2, len(data), len(data) - at))
    return data[:at] + struct.pack(form, number % 2**bits) + data[at + bits // 8 :]
