"""Memory of a process on a CPU."""

import os
import subprocess
import sys

import pytest
import torch

from peftctl.models.allocator import SHAPES

GROWTH = """
import torch
from peftctl.models.allocator import keep_memory
from peftctl.training.memory import most_resident

keep_memory()
weight = torch.ones(256, 256, dtype=torch.bfloat16)

def multiply(lengths):
    for length in lengths:
        torch.ones(length, 256, dtype=torch.bfloat16) @ weight

multiply(range(2, 150))
before = most_resident()
multiply(range(150, 700))
print((most_resident() - before) >> 20)
"""


def growth(**environment):
    """MiB that a process grows by when it multiplies matrices of 550 lengths, in one thread."""
    given = {name: value for name, value in os.environ.items() if name not in SHAPES}
    done = subprocess.run(
        [sys.executable, "-c", GROWTH],
        env={**given, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no products of bfloat16 by oneDNN here")
def test_rows_of_ever_new_lengths_do_not_fill_the_memory():
    assert growth() < 80
    assert growth(**dict.fromkeys(SHAPES, "1024")) > 160  # what torch does by itself; the environment has its say
