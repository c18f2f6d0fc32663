"""`.parquet` files, a few rows at a time: a place is `file.parquet:row N`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peftctl.config.quote import quoted, shown
from peftctl.data.file import File, Row
from peftctl.errors import DataError, Problem

BATCH_BYTES = 32 * 2**20
"""About how much is turned into Python objects at once, by the sizes that the file declares, in bytes."""

BATCH_ROWS = 1024


def records(file: File) -> Iterator[Row | Problem]:
    """The rows of a file, without what is null, and in their places those with a text that is no UTF-8.

    Raises DataError when the file is damaged, at whatever row that shows.
    """
    import pyarrow
    from pyarrow import parquet

    file.feed_digest()
    number = 0
    with file.open() as stream:
        try:
            # Without a buffer size, a whole column of a row group would be read at once.
            table = parquet.ParquetFile(stream, buffer_size=2**20, page_checksum_verification=True)
            _refuse_double(table.schema_arrow.names, file.name)
            for batch in table.iter_batches(_batch_size(table.metadata)):
                for value in _rows(batch):
                    number += 1
                    place = f"{file.name}:row {number}"
                    if isinstance(value, Exception):
                        yield Problem(f"{place}: {_first_line(value)}")
                    else:
                        yield Row(place, without_nulls(value))
            if number != table.metadata.num_rows:
                raise DataError(f"{file.name}: damaged: {number} rows, of {table.metadata.num_rows} that it declares")
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            after = f" after row {number}" if number else ""
            raise DataError(f"{file.name}: damaged, or not a Parquet file{after}: {_first_line(error)}") from None


def without_nulls(value: Any) -> Any:
    """`value` without the keys whose value is None, at any depth: a table cannot leave a key out, so it has nulls."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _refuse_double(names: list[str], file: str) -> None:
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise DataError.of([Problem(f"{file}: two columns are named {quoted(name)}") for name in double])


def _batch_size(metadata: Any) -> int:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
    return int(min(max(BATCH_BYTES / max(largest, 1), 1), BATCH_ROWS))


def _rows(batch: Any) -> list[Any]:
    """Each row as a dict, or the error that it is; only a batch with an error is gone through one by one."""
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except ValueError:
        return [_row(batch, i) for i in range(batch.num_rows)]


def _row(batch: Any, index: int) -> Any:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except ValueError as error:
        return error


def _first_line(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"a text that is not UTF-8 (byte 0x{error.object[error.start]:02x})"
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
