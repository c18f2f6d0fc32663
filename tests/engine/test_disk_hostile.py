"""Adapter folders from strangers: whatever they hold, a quick refusal that says why, and a model as it was."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.folders import CONFIG, WEIGHTS, B, configure, made, refusal, rewrite, tensors
from safetensors.torch import save_file
from tiny import build, logits

import peftctl


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build("llama")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "adapter", target_modules=["q_proj", "v_proj"])


def refused(model: torch.nn.Module, folder: Path, within: float = 2.0) -> list[str]:
    """The problems with which `folder` is refused, in less than `within` seconds of work."""
    with refusal(model) as problems:
        started = time.process_time()
        try:
            peftctl.load(model, folder)
        finally:
            seconds = time.process_time() - started
    assert seconds < within
    return problems


NUMBERS = {
    "r": [10**8, 10**400, "4", -1, 0, 4.5, None, True, [4], 5],
    "lora_alpha": ["8", 1e30, -1, None, False, {"a": 1}],
    "lora_dropout": [1.5, -0.1, "0", 10**400],
    "use_rslora": ["yes", 1, 0.0],
    "bias": ["some", None, [], 3],
    "modules_to_save": ["lm_head", [1], {"lm_head": 1}, ["lm_hed"], ["lm_head"], ["score", "lm_hed"]],
    "rank_pattern": [[1], "a", {"q_proj": 0}, {"q_proj": "4"}, {"q_proj": None}, {"q_proj": 9}, {"(": 4}, {"[": 4}],
    "alpha_pattern": [{"q_proj": 1e30}, {"q_proj": True}, {"*": 4}, {"a)(b": 4}, {"(?P<x>a)": 4}, {"q{2,1}": 4}],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"],
    "use_dora": [True],
    "layer_replication": [[[0, 1], [0, 2]]],
    "target_parameters": [["mlp.experts.gate_up_proj"]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [1]}],
    "lora_bias": [True],
    "alora_invocation_tokens": [[5]],
    "key_of_next_year": [7],
    "peft_type": ["NONSENSE", None, "lora", 3, ["LORA"], "LOHA", "\x1b[2J"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NUMBERS.items() for value in values])
def test_a_wrong_value_is_named_by_its_key(key, value, folder, model):
    configure(folder, **{key: value})
    problems = refused(model, folder)
    told = {
        "['lm_head']": "`base_model.model.lm_head.weight` is missing",
        "{'q_proj': 9}": "has rank 4, the config says 9",
        "[1, 2]": "trainable_tokens_delta` is missing",
        "{'embed_tokens': [1]}": "trainable_tokens_delta` is missing",
    }
    expected = "lora_magnitude_vector` is missing" if key == "use_dora" else told.get(str(value), key)
    assert all(expected in text for text in problems)
    assert all(len(text) < 600 and text.isprintable() for text in problems)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
@pytest.mark.parametrize("key", ["r", "lora_alpha", "lora_dropout"])
def test_what_json_should_not_hold(key, number, folder, model):
    config = json.loads((folder / CONFIG).read_text())
    del config[key]
    (folder / CONFIG).write_text(json.dumps(config)[:-1] + f', "{key}": {number}}}')
    assert str(folder / CONFIG) in refused(model, folder)[0]


def test_all_wrong_keys_are_told_at_once(folder, model):
    configure(folder, r="x", lora_alpha="y", lora_dropout=2, bias="z", lora_bias=True, init_lora_weights="pissa")
    problems = refused(model, folder)
    for key in ("r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights"):
        assert sum(f"{CONFIG}: {key}: " in text for text in problems) == 1
    assert any("lora_bias: `True` is not supported" in text for text in problems)


CATASTROPHES = {
    "repeated group": "(a+)+$",
    "of any": r"(.*)*x",
    "optional atoms": "a?" * 60 + "a" * 60,
    "alternatives": "(a|a)" * 50,
    "nested": "((.|.)(.|.))(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)(.|.)x",
    "many stars": ".*" * 30 + "x",
    "counted group": "(.{1,30}){1,30}x",
    "comment between": "(?x:(a+)#\n+)x",
    "escaped escape": r"(\\+\\+)+x",
    "look ahead": "(?=(.*.*.*.*.*.*)x)y",
    "back reference": r"(.*)\1\1\1\1x",
    "possessive": ".*+" * 30,
    "long": "a" * 100_000,
}


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("name", CATASTROPHES)
def test_a_pattern_that_would_run_for_ever_is_not_run(name, key, folder, model):
    configure(folder, **{key: {CATASTROPHES[name]: 4}})
    assert f"{CONFIG}: {key}: the pattern" in refused(model, folder, within=1)[0]


def test_the_longest_names_and_patterns_allowed_together_stay_quick(folder, model):
    sites = {f"base_model.model.{'a.' * 200}{number}.lora_A.weight": torch.zeros(4, 1) for number in range(300)}
    rewrite(folder, **sites)
    configure(folder, alpha_pattern={".*a.*a.*x": 3, **{f"a.*{n}": 3 for n in range(3000)}})
    assert "too complex" in refused(model, folder, within=5.0)[0]


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern"])
def test_where_it_sits_is_never_read_from_a_pattern(key, folder):
    expected = logits(peftctl.load(build("llama"), folder))
    configure(folder, **{key: "(.*)*(.*)*(.*)*x"})
    started = time.process_time()
    assert torch.equal(logits(peftctl.load(build("llama"), folder)), expected)
    assert time.process_time() - started < 2


def test_a_rank_without_numbers_allocates_nothing(folder, model):
    for rank in (10**6, 10**8):
        configure(folder, r=rank)
        rewrite(folder, **{key: torch.zeros(rank, 0) for key in tensors(folder) if "lora_A" in key})
        rewrite(folder, **{key: torch.zeros(0, rank) for key in tensors(folder) if "lora_B" in key})
        assert len(refused(model, folder)) >= 1


@pytest.mark.parametrize("shape", [(), (4,), (4, 32, 1), (0, 32)])
def test_tensors_of_another_form(shape, folder, model):
    rewrite(folder, **{B + "lora_A.weight": torch.zeros(shape)})
    problems = refused(model, folder)
    assert any("self_attn.q_proj" in text for text in problems)


def test_twenty_thousand_tensors_of_nothing(folder, model):
    sites = {f"base_model.model.{number}.lora_A.weight": torch.zeros(4, 1) for number in range(20_000)}
    rewrite(folder, **sites)
    assert len(refused(model, folder, within=8)) == 20_000


def test_a_file_without_adapter(folder, model):
    save_file({"base_model.model.lm_head.weight": torch.zeros(96, 32)}, folder / WEIGHTS)
    assert "holds no LoRA" in refused(model, folder)[0]
    save_file({}, folder / WEIGHTS)
    assert "holds no LoRA" in refused(model, folder)[0]


def test_tensor_names_cannot_write_to_the_terminal(folder, model):
    rewrite(folder, **{B + "\x1b[2Jlora_A.weight": torch.zeros(4, 1), "x" * 5000: torch.zeros(1)})
    problems = refused(model, folder)
    assert len(problems) == 2
    assert all(text.isprintable() and len(text) < 600 for text in problems)


BROKEN: dict[str, Any] = {
    "empty": b"",
    "not json": b"r: 4",
    "a list": b"[]",
    "half": b'{"peft_type": "LORA", "r": ',
    "twice": b'{"peft_type": "LORA", "r": 4, "r": 8}',
    "twice deeper": b'{"peft_type": "LORA", "alpha_pattern": {"a": 4, "a": 8}}',
    "deep": b'{"r": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "large": b'{"r": "' + b"x" * (2 << 20) + b'"}',
    "no text": b"\xff\xfe\xfa\x00\x01",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_config(how, folder, model):
    (folder / CONFIG).write_bytes(BROKEN[how])
    problems = refused(model, folder)
    assert str(folder / CONFIG) in problems[0]
    assert len(problems[0]) < 600


def bomb(header: Any, size: int | None = None, rest: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + rest


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {B + "lora_A.weight": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


SPOILT = {
    "empty": b"",
    "garbage": b"\x80\x04\x95" + b"garbage" * 50,
    "header beyond the file": bomb({}, size=10**6),
    "header of exabytes": bomb({}, size=2**63),
    "header that is no json": bomb(b"[" * 1000),
    "data beyond the file": bomb(entry([4, 32], 0, 512)),
    "shape of petabytes": bomb(entry([10**8, 10**8], 0, 512), rest=b"\0" * 512),
    "shape that overflows": bomb(entry([2**32, 2**32, 2**32], 0, 0)),
    "negative shape": bomb(entry([-4, 32], 0, 512), rest=b"\0" * 512),
    "offsets the wrong way": bomb(entry([4, 32], 512, 0), rest=b"\0" * 512),
    "unknown type": bomb(entry([4, 32], 0, 512, "F33"), rest=b"\0" * 512),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_tensor_file(how, folder, model):
    (folder / WEIGHTS).write_bytes(SPOILT[how])
    assert f"{folder / WEIGHTS}: not a safetensors file, or a damaged one" in refused(model, folder)[0]


def test_a_truncated_tensor_file(folder, model):
    whole = (folder / WEIGHTS).read_bytes()
    for length in (7, 100, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:length])
        assert "damaged" in refused(model, folder)[0]


def test_pickles_are_never_opened(folder, model):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "`adapter_model.bin` is a pickle, which is never read" in refused(model, folder)[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nowhere", "no such adapter folder"),
        ("file", "no such adapter folder"),
        ("empty", f"no adapter here: `{CONFIG}` is missing"),
        ("x" * 5000, "cannot be read: File name too long"),
    ],
)
def test_a_folder_that_is_none(name, text, tmp_path, model):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert text in refused(model, tmp_path / name)[0]


def test_links_are_followed(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert torch.equal(
        logits(peftctl.load(build("llama"), tmp_path / "link")), logits(peftctl.load(build("llama"), folder))
    )
