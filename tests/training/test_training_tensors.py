from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftctl.training.tensors import pack, read_tensors, unpack, write_tensors


def test_values_that_are_no_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    value = {
        "nested": {"view": shared.t(), "again": shared, "none": None, "step": torch.tensor(3.0)},
        "list": [1, 2.5, "text", True, math.inf, (1, (2,))],
        7: {"$": "odd"},
        "empty": torch.zeros(0, 4, dtype=torch.float16),
        "bool": torch.tensor([True, False]),
    }
    tensors: dict[str, Tensor] = {}
    packed = json.loads(json.dumps(pack(value, tensors, "p"), allow_nan=False))
    write_tensors(tmp_path / "file", tensors)
    back = unpack(packed, read_tensors(tmp_path / "file"))
    assert list(back) == list(value)
    assert back["list"] == value["list"]
    assert back[7] == {"$": "odd"}
    assert back["nested"]["view"].equal(shared.t())
    assert back["nested"]["step"].shape == ()
    assert back["nested"]["none"] is None
    assert back["empty"].shape == (0, 4)
    assert back["empty"].dtype == torch.float16
    assert back["bool"].tolist() == [True, False]
    assert math.isnan(unpack(pack(math.nan, {}, "p"), {}))


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a/b/0: a `set`"):
        pack({"b": [{1}]}, {}, "a")
    with pytest.raises(TypeError, match=r"w: dtype `torch\.complex64`"):
        write_tensors(tmp_path / "file", {"w": torch.zeros(1, dtype=torch.complex64)})
