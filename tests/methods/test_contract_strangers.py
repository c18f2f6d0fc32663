"""What every method promises of folders that strangers wrote: loaded exactly, or refused with the file and the key."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.settings import SETTINGS, made
from safetensors.torch import load_file, save_file
from tiny import build, logits, stir

import peftctl
from peftctl.engine.attach import methods
from peftctl.errors import AdapterError

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
METHODS = list(SETTINGS)
GROWTH = 500_000
"""KiB that a bad folder may make the process grow by."""
VALUES: list[Any] = [10**9, -1, 1.5, "(a+)+$", None, True, ["x"], {"x": 1}]


def shape(method: str) -> str:
    return SETTINGS[method].zoo[0]


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    method = request.param
    model = peftctl.attach(build(shape(method)), made(method, shape(method)))
    stir(model)
    peftctl.save(model, tmp_path)
    return tmp_path


def each(metafunc: Any) -> Any:
    return pytest.mark.parametrize(("method", "folder"), [(m, m) for m in METHODS], indirect=["folder"], ids=METHODS)(
        metafunc
    )


def refused(method: str, folder: Path, *words: str) -> None:
    """Loading fails with a message that names the words, and leaves the model as it was."""
    model = build(shape(method))
    before = logits(model)
    with pytest.raises(AdapterError) as caught:
        peftctl.load(model, folder)
    text = "\n".join(problem.text for problem in caught.value.problems)
    for word in words:
        assert word in text
    assert not methods(model)
    assert torch.equal(logits(model), before)


@each
def test_tensors_that_do_not_fit_are_named(method: str, folder: Path):
    tensors = load_file(folder / FILE)
    last = max(tensors)
    wrong: dict[str, dict[str, torch.Tensor]] = {
        "missing": {key: t for key, t in tensors.items() if key != last},
        "shape": tensors | {last: torch.zeros(*tensors[last].shape, 2)},
        "finite": tensors | {last: torch.full_like(tensors[last], float("nan"))},
        "I64": tensors | {last: tensors[last].long()},
        "no.such.tensor": tensors | {"base_model.model.no.such.tensor": torch.zeros(2)},
        "lm_head.bias": tensors | {"base_model.model.lm_head.bias": torch.zeros(2)},
    }
    for word, content in wrong.items():
        save_file(content, folder / FILE)
        refused(method, folder, *([word] if word != "missing" else []), FILE if word != "missing" else "")


@each
def test_a_config_that_says_something_else_is_refused_or_changes_nothing(method: str, folder: Path):
    config = json.loads((folder / CONFIG).read_text())
    expected = logits(peftctl.load(build(shape(method)), folder))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build(shape(method))
    for key in config.keys() - {"peft_type"}:
        for value in VALUES:
            (folder / CONFIG).write_text(json.dumps(config | {key: value}))
            try:
                peftctl.load(model, folder)
            except AdapterError:
                assert not methods(model), (key, value)
            else:
                now = logits(model)
                assert now.shape == expected.shape, (key, value)
                assert torch.isfinite(now).all(), (key, value)
                model = build(shape(method))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH


@each
def test_a_config_of_nothing_but_its_type(method: str, folder: Path):
    kind = json.loads((folder / CONFIG).read_text())["peft_type"]
    (folder / CONFIG).write_text(json.dumps({"peft_type": kind}))
    model = build(shape(method))
    try:
        peftctl.load(model, folder)
    except AdapterError:
        assert not methods(model)


@each
def test_another_base_is_noticed_by_its_shapes(method: str, folder: Path):
    if SETTINGS[method].fits_any:
        pytest.skip("fits every base of its width")
    other = "gpt2" if shape(method) != "gpt2" else "bert"
    model = build(other)
    with pytest.raises(AdapterError):
        peftctl.load(model, folder)
    assert not methods(model)
