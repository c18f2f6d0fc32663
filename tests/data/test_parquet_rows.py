from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from peftctl.data import parquet_rows
from peftctl.data.file import File, Row
from peftctl.data.parquet_rows import records
from peftctl.errors import DataError


def test_values_are_pythons_and_nulls_are_keys_left_out(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    rows = [
        {"text": "007", "messages": [{"role": "user", "content": "a"}], "n": 1, "x": 0.5, "b": True},
        {"text": "", "messages": [call], "n": None, "x": None, "b": False},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = records(File(tmp_path / "a.parquet", "a.parquet"))
    assert first == Row("a.parquet:row 1", rows[0])
    del call["content"]
    assert second == Row("a.parquet:row 2", {"text": "", "messages": [call], "b": False})


def test_rows_are_numbered_over_batches_and_groups(tmp_path: Path) -> None:
    table = pa.table({"text": [str(i) for i in range(3000)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    found = list(records(File(tmp_path / "a.parquet", "a")))
    assert found == [Row(f"a:row {i + 1}", {"text": str(i)}) for i in range(3000)]


def test_large_rows_come_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "BATCH_BYTES", 2**20)
    table = pa.table({"text": [f"{i}" * 2**17 for i in range(10, 99)]})
    parquet.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    sizes = []

    def counted(batch: pa.RecordBatch) -> list[object]:
        sizes.append(batch.num_rows)
        return batch.to_pylist()

    monkeypatch.setattr(parquet_rows, "_rows", counted)
    assert sum(1 for _ in records(File(tmp_path / "a.parquet", "a"))) == 89
    assert 1 <= max(sizes) <= 4


def test_a_page_whose_checksum_is_wrong_is_damaged(tmp_path: Path) -> None:
    """Without its checksum, a flipped bit inside a text would be read as another text."""
    parquet.write_table(
        pa.table({"text": ["a long enough text"] * 3}),
        tmp_path / "a.parquet",
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data.replace(b"\0a long enough text", b"\0a long enough test"))
    with pytest.raises(DataError, match=r"^a: damaged, or not a Parquet file: .*CRC"):
        list(records(File(tmp_path / "a.parquet", "a")))


def test_the_digest_is_of_the_file(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a"] * 9}), tmp_path / "a.parquet")
    sha = hashlib.sha256()
    list(records(File(tmp_path / "a.parquet", "a", sha.update)))
    assert sha.digest() == hashlib.sha256((tmp_path / "a.parquet").read_bytes()).digest()


def test_no_flipped_bit_of_the_footer_loses_rows(tmp_path: Path) -> None:
    """Some make the file say that it has fewer rows, and a reader that believes it would drop the others."""
    parquet.write_table(pa.table({"text": list("abcdefgh")}), tmp_path / "a.parquet", row_group_size=4)
    data = (tmp_path / "a.parquet").read_bytes()
    footer = int.from_bytes(data[-8:-4], "little") + 8
    damaged = 0
    for at in range(len(data) - footer, len(data)):
        changed = bytearray(data)
        changed[at] ^= 8
        (tmp_path / "b.parquet").write_bytes(changed)
        rows = 0
        try:
            for _ in records(File(tmp_path / "b.parquet", "b")):
                rows += 1
        except DataError:
            damaged += 1
        else:
            assert rows == 8, at
    assert damaged > 9
