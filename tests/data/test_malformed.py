"""Whatever is wrong with a file of rows has its place and stops the run; skipped, it costs no other row.

For comparison, `datasets` 5.2 of some of these: a row `x,a,0` under `text,label` gives the text `a`, a row that lacks a
field a null, `"a" b` the text `a b`, `007` the number 7, `NA` a null; none of its errors names the line of the file.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from peftctl.data.dataset import Dataset, Source
from peftctl.data.file import MAX_BYTES
from peftctl.data.prepare import prepare
from peftctl.errors import DataError


class Case(NamedTuple):
    """A file, where its mistake is, what is said of it, and how many rows are good when the bad one is skipped."""

    file: str
    content: bytes | Callable[[], bytes]
    place: str
    what: str
    good: int | None = None
    """None where the file as a whole cannot be used, and skipping rows does not help."""


def jsonl(line: bytes) -> bytes:
    return b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n'


def table(lines: bytes, header: bytes = b"text,label") -> bytes:
    return header + b"\na,0\n" + lines + b'\n"b\nc",1\n'


def parquet(**columns: Any) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file, row_group_size=2000)
    return file.getvalue()


def not_utf8_parquet() -> bytes:
    import pyarrow as pa

    raw = pa.array([b"ok", b"caf\xe9", b"ok"])
    return parquet(text=pa.Array.from_buffers(pa.string(), 3, raw.buffers()))


def double_parquet() -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), file)
    return file.getvalue()


def damaged_parquet() -> bytes:
    data = parquet(text=[f"row {i}" for i in range(10_000)])
    middle = len(data) // 2
    return data[:middle] + b"\xff" * 200 + data[middle + 200 :]


ROWS = jsonl(b'{"text": "c"}') * 1000
PACKED = gzip.compress(ROWS)
LONG = b"a" * (MAX_BYTES + 1)
LINES = (b"a" * 2**16 + b"\n") * (MAX_BYTES // 2**16)

# fmt: off
CASES = {
    # JSON Lines
    "cut off": Case("r.jsonl", jsonl(b'{"text": "a'), "r.jsonl:3:10", "not JSON: unterminated string", 2),
    "single quotes": Case("r.jsonl", jsonl(b"{'text': 'a'}"), "r.jsonl:3:2", "a key in double quotes", 2),
    "trailing comma": Case("r.jsonl", jsonl(b'{"text": "a",}'), "r.jsonl:3:14", "a key in double quotes", 2),
    "two objects": Case("r.jsonl", jsonl(b'{"text": "a"}{"text": "b"}'), "r.jsonl:3:14", "more text after", 2),
    "list": Case("r.jsonl", jsonl(b'[{"text": "a"}]'), "r.jsonl:3", "expected an object; got a list", 2),
    "double key": Case("r.jsonl", jsonl(b'{"text": "a", "text": "b"}'), "r.jsonl:3", "`text` stands twice", 2),
    "nan": Case("r.jsonl", jsonl(b'{"text": "a", "p": NaN}'), "r.jsonl:3", "`NaN` is not JSON", 2),
    "surrogate": Case("r.jsonl", jsonl(b'{"text": "\\ud83d"}'), "r.jsonl:3", "a lone surrogate", 2),
    "latin-1": Case("r.jsonl", jsonl(b'{"text": "\xe9"}'), "r.jsonl:3:11", "not UTF-8 (byte 0xe9)", 2),
    "control": Case("r.jsonl", jsonl(b'{"text": "a\x00"}'), "r.jsonl:3:12", "control character", 2),
    "deep": Case("r.jsonl", jsonl(b'{"a": ' + b"[" * 99 + b"]" * 99 + b"}"), "r.jsonl:3", "deeper than 64", 2),
    "long line": Case("r.jsonl", jsonl(LONG), "r.jsonl:3", "longer than 16 MB", 2),
    "wrong type": Case("r.jsonl", jsonl(b'{"text": 7}'), "r.jsonl:3", "text: expected a text; got a number", 2),
    "missing key": Case("r.jsonl", jsonl(b'{"txt": "a"}'), "r.jsonl:3", "`text` is missing", 2),
    "utf-16": Case("r.jsonl", '{"text": "a"}\n'.encode("utf-16"), "r.jsonl", "not UTF-8 but UTF-16"),
    "empty": Case("r.jsonl", b"", "r.jsonl", "no rows in the file"),
    # JSON
    "open list": Case("r.json", b'[{"text": "a"},\n{"text": "b"}', "r.json:2", "the list has no end"),
    "no comma": Case("r.json", b'[{"text": "a"}\n{"text": "b"}]', "r.json:2", "expected `,` or `]`, got `{`"),
    "no list": Case("r.json", b'\n{"text": "a"}', "r.json:2", "expected a list of objects"),
    "no object": Case("r.json", b'[{"text": "a"},\n\n7, {"text": "b"}]', "r.json:3", "got a number", 2),
    "json latin-1": Case("r.json", b'[{"text": "a"},\n{"text": "\xe9"}]', "r.json:2:11", "not UTF-8 (byte 0xe9)"),
    # CSV
    "more fields": Case("r.csv", table(b"a, and b,0"), "r.csv:3", "3 fields; the header has 2", 2),
    "fewer fields": Case("r.csv", table(b"a"), "r.csv:3", "1 field; the header has 2", 2),
    "lines": Case("r.csv", table(b'"a\n\nb",c,d'), "r.csv:3", "3 fields over 3 lines; the header has 2", 2),
    "stray quote": Case("r.csv", table(b'5" pipe,0'), "r.csv:3", "a quote inside an unquoted field", 2),
    "space before a quote": Case("r.csv", table(b'a, "0"'), "r.csv:3", "a quote inside an unquoted field", 2),
    "text after a quote": Case("r.csv", table(b'"a" b,0'), "r.csv:3", "text after a closing quote", 2),
    "open at the end": Case("r.csv", b'text,label\na,0\nb,1\n"c,0\n', "r.csv:4", "a quoted field is never closed", 2),
    "open quote": Case("r.csv", table(b'"a,0\nd,0'), "r.csv:3", "text after a closing quote in line 5"),
    "open for ever": Case("r.csv", b'text,label\n"a,0\nb,1\nc,0\n', "r.csv:2", "a quoted field is never closed"),
    "open after a mistake": Case("r.csv", table(b'"a" b,"c\nd,0'), "r.csv:3", "text after a closing quote"),
    "carriage return": Case("r.csv", table(b"a\rb,0"), "r.csv:3", "a carriage return outside of quotes", 2),
    "csv latin-1": Case("r.csv", table(b'"a\ncaf\xe9",0'), "r.csv:4:4", "not UTF-8 (byte 0xe9)", 2),
    "nul": Case("r.csv", table(b"a\0,0"), "r.csv:3:2", "a NUL character", 2),
    "empty text": Case("r.csv", table(b",0"), "r.csv:3", "text: is empty", 2),
    "long row": Case("r.csv", table(LONG + b",0"), "r.csv:3", "a row of more than 16 MB"),
    "no end": Case("r.csv", table(b'"' + LINES), "r.csv:3", "a row of more than 16 MB"),
    "no name": Case("r.csv", b"text,\na,0\n", "r.csv:1", "column 2 has no name"),
    "double name": Case("r.csv", b"text,text\na,0\n", "r.csv:1", "two columns are named `text`"),
    "space in a name": Case("r.csv", b"text, label\na,0\n", "r.csv:1", "column 2 has space around its name: ` label`"),
    "semicolons": Case("r.csv", b"text;label\na;0\n", "r.csv:1", "one column, with a semicolon in its name"),
    "tabs": Case("r.csv", b"text\tlabel\na\t0\n", "r.csv:1", "one column, with a tab in its name"),
    "old mac": Case("r.csv", b"text,label\ra,0\rb,1\r", "r.csv:1", "a carriage return outside of quotes"),
    "csv utf-16": Case("r.csv", "text,label\n".encode("utf-16-le"), "r.csv", "not UTF-8 but UTF-16"),
    "header alone": Case("r.csv", b"text,label\n", "r.csv", "no rows in the file"),
    # TSV
    "commas": Case("r.tsv", b"text,label\na,0\n", "r.tsv:1", "one column, with a comma in its name"),
    "tsv fields": Case("r.tsv", b"text\tlabel\na\tb\t0\nb\t1\n", "r.tsv:2", "3 fields; the header has 2", 1),
    # text
    "text latin-1": Case("r.txt", b"a\n\nb\n  caf\xe9\n\nc\n", "r.txt:4:6", "not UTF-8 (byte 0xe9)", 2),
    "binary": Case("r.txt", b"a\n\nb\0\nb\n\nc\n", "r.txt:3:2", "a NUL character", 2),
    "long paragraph": Case("r.txt", b"a\n\n" + LINES, "r.txt:3", "is longer than 16 MB", 1),
    "blank": Case("r.txt", b" \n\n", "r.txt", "no rows in the file"),
    # Parquet
    "parquet text": Case("r.parquet", not_utf8_parquet, "r.parquet:row 2", "not UTF-8 (byte 0xe9)", 2),
    "parquet null": Case("r.parquet", lambda: parquet(text=["a", None]), "r.parquet:row 2", "`text` is missing", 1),
    "parquet footer": Case("r.parquet", lambda: parquet(text=["a"])[:-9], "r.parquet", "not a Parquet file"),
    "parquet page": Case("r.parquet", damaged_parquet, "r.parquet", "not a Parquet file after row "),
    "parquet name": Case("r.parquet", double_parquet, "r.parquet", "two columns are named `text`"),
    "no parquet": Case("r.parquet", ROWS, "r.parquet", "not a Parquet file"),
    # gzip
    "packed": Case("r.jsonl.gz", gzip.compress(jsonl(b"x")), "r.jsonl.gz:3:1", "not JSON", 2),
    "packed csv": Case("r.csv.gz", gzip.compress(table(b"a")), "r.csv.gz:3", "1 field; the header has 2", 2),
    "cut gzip": Case("r.jsonl.gz", PACKED[:-20], "r.jsonl.gz", "damaged, or not a gzip file"),
    "gzip checksum": Case("r.jsonl.gz", PACKED[:-8] + bytes(8), "r.jsonl.gz", "damaged, or not a gzip file"),
    "gzip tail": Case("r.jsonl.gz", PACKED + b"more", "r.jsonl.gz", "damaged, or not a gzip file"),
    "no gzip": Case("r.txt.gz", ROWS, "r.txt.gz", "damaged, or not a gzip file"),
    "gzip bomb": Case("r.jsonl.gz", lambda: gzip.compress(jsonl(bytes(64 * 2**20)), 1), "r.jsonl.gz:3", "16 MB", 2),
}
# fmt: on


@pytest.mark.parametrize("kind", CASES)
def test_a_malformed_file(tmp_path: Path, tokenizer_of: Callable[[str], Any], kind: str) -> None:
    file, content, place, what, good = CASES[kind]
    (tmp_path / file).write_bytes(content() if callable(content) else content)
    source = Source(path=file, format="text", sample_by="paragraph" if ".txt" in file else "document")
    dataset = Dataset(train=source, max_skipped=1)
    with pytest.raises(DataError) as caught:
        prepare(source, dataset, tokenizer_of("chatml"), tmp_path)
    (problem,) = caught.value.problems
    assert problem.text.startswith(f"{place}: ")
    assert what in problem.text

    dataset = Dataset(train=source, on_bad_row="skip", max_skipped=1)
    if good is None:
        with pytest.raises(DataError, match=r"^r\."):
            prepare(source, dataset, tokenizer_of("chatml"), tmp_path)
    else:
        counts = prepare(source, dataset, tokenizer_of("chatml"), tmp_path).ledger
        assert (counts.read, counts.kept, counts.skipped) == (good + 1, good, 1)
