"""`.csv` and `.tsv` files read strictly: every row has the fields of the header, and every field is a text.

UTF-8, a header in the first row, `,` or a tab between fields. A field that holds the delimiter, a quote or a line break
stands in quotes, its own quotes doubled (RFC 4180); `007`, `NA`, `null` and the empty text stay what they are. A row's
place is the line it starts at; blank lines are no rows.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator

from peftctl.config.quote import quoted
from peftctl.data.file import MAX_BYTES, File, Row, not_utf8
from peftctl.errors import DataError, Problem

_NAMES = {",": "comma", "\t": "tab", ";": "semicolon", "|": "`|`"}
_SUFFIX_HINTS = {",": "name the file `.csv`", "\t": "name the file `.tsv`"}
_QUOTED = r'"[^"]*+(?:""[^"]*+)*+"'
_CLEAN = re.compile(rf'(?:{_QUOTED}|[^",\r\n]*+)(?:,(?:{_QUOTED}|[^",\r\n]*+))*+[\r\n]*')
"""Rows in which quotes stand where RFC 4180 wants them."""


def records(file: File, delimiter: str) -> Iterator[Row | Problem]:
    """The rows of a file, and in their places the mistakes of single rows.

    Raises DataError when the header cannot be used, and where a mistake makes it unknown where rows begin.
    """
    header: list[str] | None = None
    for place, fields, lines in _split(file, delimiter):
        if isinstance(fields, Problem):
            if header is None:
                raise DataError.of([fields])
            yield fields
        elif header is None:
            header = _header(fields, place, delimiter)
        elif len(fields) == len(header):
            yield Row(place, dict(zip(header, fields, strict=True)))
        else:
            over, hint = "", None
            if lines > 1:
                over, hint = f" over {lines} lines", "is a quote missing?"
            elif len(fields) > len(header):
                hint = f"a field with a {_NAMES[delimiter]} in it stands in quotes"
            found = f"{len(fields)} field{'s' * (len(fields) != 1)}{over}"
            yield Problem(f"{place}: {found}; the header has {len(header)}", hint)


def _header(fields: list[str], place: str, delimiter: str) -> list[str]:
    other = next((mark for mark in _NAMES if mark != delimiter and mark in fields[0]), None)
    if len(fields) == 1 and other is not None:
        text = f"{place}: one column, with a {_NAMES[other]} in its name: {quoted(fields[0])}"
        raise DataError(text, _SUFFIX_HINTS.get(other, f"fields are separated by a {_NAMES[delimiter]}"))
    problems: list[Problem] = []
    before: set[str] = set()
    for number, name in enumerate(fields, start=1):
        if not name.strip():
            problems.append(Problem(f"{place}: column {number} has no name", "the first row names the columns"))
        elif name != name.strip():
            problems.append(Problem(f"{place}: column {number} has space around its name: {quoted(name)}"))
        elif name in before:
            problems.append(Problem(f"{place}: two columns are named {quoted(name)}"))
        before.add(name)
    if problems:
        raise DataError.of(problems)
    return fields


def _split(file: File, delimiter: str) -> Iterator[tuple[str, list[str] | Problem, int]]:
    """Place, fields (or what is wrong) and number of lines of each row that is not blank."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_BYTES))  # for the whole process; it is 128 KiB at first
    lines = _Lines(file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.row.clear()
        lines.wrong = None
        try:
            fields = next(reader, None)
        except csv.Error as error:
            problem = _explained(str(error), lines)
            if len(lines.row) > 1 or not (lines.ended or _ends(lines.row[0], delimiter)):
                hint = "is a quote missing, or one too many? Where the rows after it begin cannot be told"
                raise DataError(problem.text, hint) from None
            yield lines.place, problem, 1
            continue
        if fields is None:
            return
        if lines.wrong is not None:
            yield lines.place, lines.wrong, len(lines.row)
        # In a tab-separated file, a quote inside an unquoted field is a character to everybody.
        elif delimiter == "," and any('"' in field for field in fields) and not _CLEAN.fullmatch("".join(lines.row)):
            hint = "quotes go around the whole field, without space outside of them, and are doubled inside"
            yield lines.place, Problem(f"{lines.place}: a quote inside an unquoted field", hint), len(lines.row)
        elif fields:
            yield lines.place, fields, len(lines.row)


def _explained(error: str, lines: _Lines) -> Problem:
    last = f" in line {lines.number}" if len(lines.row) > 1 else ""
    if "new-line" in error:
        return Problem(f"{lines.place}: a carriage return outside of quotes", "lines end with `\\n` or `\\r\\n`")
    if lines.ended:
        return Problem(f"{lines.place}: a quoted field is never closed")
    return Problem(f"{lines.place}: text after a closing quote{last}", "inside a quoted field, quotes are doubled")


def _ends(line: str, delimiter: str) -> bool:
    """Whether a row that is refused ends with its line: no field of it goes on in the next one."""
    reader = csv.reader([line.replace("\r", " "), ""], delimiter=delimiter)
    next(reader)
    return reader.line_num == 1


class _Lines:
    """What `csv.reader` reads from; it takes as many lines as a row has, and they are kept until the next row."""

    def __init__(self, file: File) -> None:
        self.row: list[str] = []
        self.wrong: Problem | None = None
        """What is wrong with a line of the row, whatever it means."""
        self.number = 0
        self.ended = False
        self.place = f"{file.name}:1"
        self._file, self._lines, self._bytes = file, file.lines(), 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines, (self.number, b""))
        if line == b"":
            self.ended = True
            raise StopIteration
        here = f"{self._file.name}:{self.number}"
        if not self.row:
            self.place, self._bytes = here, 0
        self._bytes += len(line or b"")
        if line is None or self._bytes > MAX_BYTES:
            raise DataError(f"{self.place}: a row of more than {MAX_BYTES // 2**20} MB", "is a quote never closed?")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            self.wrong = self.wrong or not_utf8(here, error)
            text = line.decode(errors="surrogateescape")
        if "\0" in text:
            self.wrong = self.wrong or Problem(f"{here}:{text.index(chr(0)) + 1}: a NUL character")
        self.row.append(text)
        return text
