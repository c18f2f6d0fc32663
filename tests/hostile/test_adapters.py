"""Adapters of strangers: what they say is compared with what they hold, and nothing of the base is ever replaced."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.folders import CONFIG, WEIGHTS, B, configure, made, rewrite, tensors
from hostile.attack import Attack
from hostile.test_base_folders import EVIL

LAYER = "base_model.model.model.layers.0."


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("adapter") / "good", target_modules=["q_proj", "v_proj"])


@pytest.fixture
def folder(attack: Attack, good: Path) -> Path:
    """A copy of a good adapter, to be spoilt."""
    shutil.copytree(good, attack.work / "adapter")
    configure(attack.work / "adapter", base_model_name_or_path=str(attack.base))
    return attack.work / "adapter"


def test_a_good_one_is_taken(folder: Path, attack: Attack):
    attack.harmless("adapters", "inspect", "adapter")
    attack.harmless("generate", "adapter", "hi", "--max-new-tokens", "1")


def adding(**values: torch.Tensor | None) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, **values)


def saying(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: configure(folder, **changes)


def writing(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def header(entries: Any, rest: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + rest


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


A = B + "lora_A.weight"
TWICE = b'{"%s": %s, "%s": %s}' % (
    *(A.encode(), json.dumps(entry([4, 32], 0, 512)).encode()),
    *(A.encode(), json.dumps(entry([4, 32], 512, 1024)).encode()),
)


def renamed(folder: Path) -> None:
    rewrite(folder, **dict.fromkeys(tensors(folder)), **{f"x.{k}": t for k, t in tensors(folder).items()})


def half(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def not_finite(folder: Path) -> None:
    rewrite(folder, **{A: torch.full((4, 32), float("nan"))})


def with_text(text: str) -> Callable[[Path], None]:
    """The configuration with `text` before its end."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        key = text.partition('"')[2].partition('"')[0]
        config.pop(key, None)
        (folder / CONFIG).write_text(json.dumps(config)[:-1] + f", {text}}}")

    return spoil


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(EVIL)


def a_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / WEIGHTS, "w") as file:
        file.writestr("archive/data.pkl", EVIL)


def pointing(name: str, to: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return spoil


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    # HF PEFT 0.21.2 loads these without a word, and the base is another one afterwards
    "another embedding": (adding(**{"base_model.model.model.embed_tokens.weight": torch.ones(96, 32)}), "embed_tokens"),
    "another head": (adding(**{"base_model.model.lm_head.weight": torch.zeros(96, 32)}), "lm_head"),
    "another layer": (adding(**{LAYER + "mlp.down_proj.weight": torch.zeros(32, 48)}), "down_proj.weight` is not part"),
    "another norm": (adding(**{LAYER + "input_layernorm.weight": torch.zeros(32)}), "is not part of this adapter"),
    "another base of its own layer": (adding(**{B + "base_layer.weight": torch.zeros(32, 32)}), "base_layer|q_proj"),
    "a buffer": (adding(**{"base_model.model.model.rotary_emb.inv_freq": torch.zeros(4)}), "is not part"),
    "a weight without its prefix": (adding(**{"lm_head.weight": torch.zeros(96, 32)}), "lm_head"),
    "a saved head": (
        saying(modules_to_save=["lm_head"]),
        "lm_head.*missing",
    ),
    "a tensor less": (adding(**{A: None}), "q_proj"),
    "other names": (renamed, "nothing for|no LoRA|rank|missing|is not part"),
    "numbers that are none": (not_finite, "is not finite"),
    "another shape": (adding(**{A: torch.zeros(4, 16)}), "has shape"),
    "nothing in a tensor": (adding(**{A: torch.zeros(0, 32)}), "q_proj"),
    "whole numbers": (adding(**{A: torch.zeros(4, 32, dtype=torch.int64)}), "no floating-point type"),
    "a name that moves the cursor": (adding(**{"x\x1b[2J\u202e": torch.zeros(1)}), "is not part"),
    "a name of a kilobyte": (adding(**{"x" * 5000: torch.zeros(1)}), "is not part"),
    # of an adapter_config.json of 1 kB HF PEFT allocates 6.4 GB
    "a rank without end": (saying(r=10**8), "adapter_config.json: r:"),
    "a rank of digits": (saying(r=10**400), "adapter_config.json: r:"),
    "a rank below nothing": (saying(r=-1), "adapter_config.json: r:"),
    "a rank for a name": (saying(rank_pattern={"q_proj": 10**8}), "rank_pattern"),
    "alpha of nothing": (with_text('"lora_alpha": NaN'), "`NaN` is not a number"),
    "alpha without end": (with_text('"lora_alpha": 1e999'), "lora_alpha"),
    "alpha of 1e30": (saying(lora_alpha=1e30), "lora_alpha"),
    "a key twice": (with_text('"r": 4, "r": 8'), "a key stands there twice"),
    "a pattern that never ends": (saying(rank_pattern={"(a+)+$": 4}), "too complex"),
    "patterns that never end": (saying(alpha_pattern={f"{'.*' * 7}{n}x": 1 for n in range(4000)}), "too complex"),
    "a million patterns": (saying(rank_pattern={f"x{n}": 4 for n in range(50_000)}), "at most 4096|larger than 1 MB"),
    "a config of megabytes": (writing(CONFIG, b'{"r": "' + b"x" * (2 << 20) + b'"}'), "larger than 1 MB"),
    "a config of brackets": (writing(CONFIG, b'{"r": ' + b"[" * 500_000), "not readable as JSON"),
    "a pickled config": (writing(CONFIG, EVIL), "not readable as JSON"),
    "a config without end": (pointing(CONFIG, "/dev/zero"), "adapter"),
    "a type of its own": (saying(peft_type="canary_module"), "is not supported"),
    "a start that rewrites the base": (saying(init_lora_weights="pissa"), "init_lora_weights"),
    "layers twice": (saying(layer_replication=[[0, 10**9]]), "layer_replication"),
    "experts": (saying(target_parameters=["mlp.experts.gate_up_proj"]), "target_parameters"),
    # headers: llama.cpp's and safetensors' own history
    "no header": (writing(WEIGHTS, b""), "damaged"),
    "a header of exabytes": (writing(WEIGHTS, header({}, size=2**63)), "damaged"),
    "a header beyond the file": (writing(WEIGHTS, header({}, size=10**6)), "damaged"),
    "a header of brackets": (writing(WEIGHTS, header(b'{"a":' + b"[" * 400_000)), "damaged"),
    "a header of 200 MB": (lambda folder: large(folder / WEIGHTS), "a header of 209,715,200 bytes"),
    "overlap": (writing(WEIGHTS, header({A: entry([128], 0, 512), "b": entry([128], 0, 512)}, b"\0" * 512)), "damaged"),
    "a hole": (writing(WEIGHTS, header({A: entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12)), "damaged"),
    "more than its tensors": (writing(WEIGHTS, header({A: entry([1], 0, 4)}, b"\0" * 12)), "damaged"),
    "a name twice": (writing(WEIGHTS, header(TWICE, b"\0" * 1024)), "damaged"),
    "a shape of petabytes": (writing(WEIGHTS, header({A: entry([10**8, 10**8], 0, 512)}, b"\0" * 512)), "damaged"),
    "a shape that overflows": (writing(WEIGHTS, header({A: entry([2**32, 2**32, 2**32], 0, 0)})), "damaged"),
    "half a file": (half, "damaged"),
    "many tensors of nothing": (
        writing(WEIGHTS, header({f"{n}.lora_A.weight": entry([0, 0], 0, 0) for n in range(200_000)})),
        "200,000 tensors|a header of",
    ),
    "twenty thousand mistakes": (
        writing(WEIGHTS, header({f"{n}.lora_A.weight": entry([0, 0], 0, 0) for n in range(20_000)})),
        "error: ... and 19800 more",
    ),
    # pickle under any name (nullifAI, February 2025; picklescan CVE-2025-1716, -1889, -10155)
    "only a pickle": (only_a_pickle, "is a pickle, which is never read"),
    "a pickle by another name": (writing(WEIGHTS, EVIL), "damaged"),
    "a zip by another name": (a_zip, "damaged"),
    "a 7z by another name": (writing(WEIGHTS, b"7z\xbc\xaf\x27\x1c" + b"\0" * 26 + EVIL), "damaged"),
    "a link to passwords": (pointing(WEIGHTS, "/etc/passwd"), "damaged"),
    "a link to nothing": (pointing(WEIGHTS, "nowhere"), "missing"),
    "an origin of brackets": (writing("peftctl.json", b'{"base": ' + b"[" * 200_000), "peftctl.json"),
    "an origin elsewhere": (writing("peftctl.json", b'{"base": {"config": "x", "weights": "y"}}'), "not the base"),
    "a base that is a folder of strangers": (saying(base_model_name_or_path="../outside"), "outside"),
    "a base by its escape": (saying(base_model_name_or_path="\x1b[2Jx/y"), "no such file"),
    "a base that is no text": (saying(base_model_name_or_path=["a"]), "expected a text"),
}


def large(path: Path) -> None:
    """A header of 200 MB, most of it a hole in the file."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200 << 20))
        file.truncate(8 + (200 << 20))


@pytest.mark.parametrize("name", SPOILT)
def test_an_adapter_is_refused(name: str, folder: Path, attack: Attack):
    spoil, telling = SPOILT[name]
    spoil(folder)
    attack.refused("generate", "adapter", "hi", "--max-new-tokens", "1", telling=telling, within=4.0)
    assert not (attack.work / "pwned").exists()


@pytest.mark.parametrize(
    "changes",
    [
        # HF PEFT issue 3085 and its kin: fields that name what to import, or where to look
        {"auto_mapping": {"base_model_class": "X", "parent_library": "canary_module"}},
        {"megatron_core": "canary_module", "megatron_config": None},
        {"revision": "evil"},
    ],
    ids=str,
)
def test_nothing_is_imported_by_name(changes: dict[str, Any], folder: Path, attack: Attack):
    configure(folder, **changes)
    attack.harmless("merge", "adapter", "--output", "merged", writes=["."], within=20, swelling=600)


def test_where_it_sits_is_no_pattern_to_run(folder: Path, attack: Attack):
    configure(folder, target_modules=r"(.*.*.*.*.*)*x", exclude_modules="(a+)+$")
    attack.harmless("generate", "adapter", "hi", "--max-new-tokens", "1")


@pytest.mark.parametrize("words", [["inspect"], ["resize", "--r", "2", "--output", "out"]], ids=str)
@pytest.mark.parametrize("name", ["a rank without end", "a pickle by another name", "half a file", "overlap"])
def test_the_algebra_refuses_too(words: list[str], name: str, folder: Path, attack: Attack):
    spoil, telling = SPOILT[name]
    spoil(folder)
    command, *rest = words
    attack.refused("adapters", command, "adapter", *rest, telling=telling, within=4.0)
