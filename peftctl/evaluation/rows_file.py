"""The statistics of every row in one compressed file, for runs that are compared with this one later.

Numbers and texts only: nothing in the file is ever run.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from peftctl.errors import StorageError
from peftctl.evaluation.metrics import METRICS
from peftctl.evaluation.sheet import Sheet

NAME = "eval-rows.npz"


def packed(sheets: Mapping[str, Sheet]) -> bytes:
    """The file's content: the digests of the rows and their statistics by eval set, model and metric."""
    arrays = {}
    for name, sheet in sheets.items():
        arrays[json.dumps([name])] = np.array(sheet.rows, dtype="S32")
        for model, found in sheet.statistics.items():
            arrays |= {json.dumps([name, model, metric]): values for metric, values in found.items()}
    buffer = io.BytesIO()
    names = {f"array-{number}": values for number, values in enumerate(arrays.values())}
    np.savez_compressed(buffer, names=np.array(list(arrays)), **names)  # type: ignore[arg-type]
    return buffer.getvalue()


def read(path: Path) -> dict[str, Sheet]:
    """The sheets in a file. Raises StorageError for a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [json.loads(str(name)) for name in file["names"]]
            arrays = {tuple(name): file[f"array-{number}"] for number, name in enumerate(names)}
        sheets = {key[0]: Sheet(rows=[row.decode() for row in rows]) for key, rows in arrays.items() if len(key) == 1}
        for key, values in arrays.items():
            if len(key) == 3 and key[2] in METRICS:
                set_name, model, metric = key
                if values.ndim != 2 or len(values) != len(sheets[set_name].rows):
                    raise ValueError(f"`{metric}` has another number of rows")
                sheets[set_name].statistics.setdefault(model, {})[metric] = values.astype(np.float64)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise StorageError(f"{path}: damaged: {error}", "evaluate that run again") from None
    return sheets
