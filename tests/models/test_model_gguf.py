"""A .gguf file becomes a folder once, whole or not at all; what is no good file ends in an error, quickly."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from filelock import FileLock

from peftctl.config.home import cache_home
from peftctl.errors import ModelError, StorageError
from peftctl.models.architecture import architecture
from peftctl.models.base import Model, load, load_tokenizer
from peftctl.models.gguf import convert, converted
from peftctl.models.gguf_header import read_header

MakeGguf = Callable[..., Path]


def recipe(path: Path, **fields: object) -> Model:
    return Model(**{"name_or_path": str(path), "dtype": "float32", "device": "cpu"} | fields)  # type: ignore[arg-type]


def left_behind() -> list[Path]:
    return [entry for entry in (cache_home() / "gguf").iterdir() if entry.suffix != ".lock"]


# conversion


@pytest.mark.parametrize("tied", [False, True])
def test_becomes_the_model_it_was(tied: bool, make_gguf: MakeGguf, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    path = make_gguf(tied=tied)
    base = load(recipe(path), say=said.append)
    torch.manual_seed(0)
    right = tiny.llama(tied=tied).to(torch.bfloat16).float().eval()
    assert torch.allclose(tiny.logits(base.model), tiny.logits(right), atol=1e-5)
    assert base.model.config.tie_word_embeddings is tied
    assert (base.model.lm_head.weight is base.model.model.embed_tokens.weight) is tied
    assert (base.name, base.folder.parent) == (str(path), cache_home() / "gguf")
    assert said == ["float32 on cpu", f"converting `tiny.gguf` to safetensors, once: {base.folder}"]
    assert capfd.readouterr() == ("", "")
    again: list[str] = []
    assert convert(path, again.append) == base.folder
    assert again == []


def test_folder_is_plain_transformers(make_gguf: MakeGguf) -> None:
    folder = convert(make_gguf())
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "chat_template.jinja"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert not {"quantization_config", "_model_name_or_path"} & set(config)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 3)
    assert left_behind() == [folder]


@pytest.mark.parametrize("add_bos", [False, True])
def test_tokenizer_is_what_the_file_says(add_bos: bool, make_gguf: MakeGguf) -> None:
    tokenizer = load_tokenizer(recipe(make_gguf(add_bos=add_bos)))
    assert len(tokenizer) == tiny.VOCAB
    special = (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == ("<unk>", "<bos>", "<eos>", "<pad>")
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("abcde<eos>").input_ids)
    assert pieces == ["<bos>"] * add_bos + ["abc", "de", "<eos>"]
    assert tokenizer.decode(tokenizer("abc , d .").input_ids, skip_special_tokens=True) == "abc , d ."
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<bos>ab<eos>"
    assert tokenizer.model_max_length == 128


def test_sentencepiece_begins_with_a_token(make_gguf: MakeGguf) -> None:
    tokenizer = load_tokenizer(recipe(make_gguf(sentencepiece=True)))
    assert len(tokenizer) == tiny.VOCAB
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc d").input_ids) == ["<bos>", "\u2581abc", "\u2581d"]


def test_quantises(make_gguf: MakeGguf) -> None:
    model = load(recipe(make_gguf(), quantization="nf4")).model
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"


def test_what_lies_beside_the_file_has_no_say(make_gguf: MakeGguf) -> None:
    path = make_gguf()
    for name in ("adapter_config.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (path.parent / name).write_text('{"eos_token": "zzz", "base_model_name_or_path": "nobody/nothing"}')
    assert load(recipe(path)).tokenizer.eos_token == "<eos>"


def test_its_configuration_is_that_of_the_folder_once_there_is_one(make_gguf: MakeGguf) -> None:
    path = make_gguf()
    assert converted(path) is None
    before = architecture(str(path)).to_dict()
    folder = convert(path)
    assert converted(path) == folder
    after = architecture(str(path))
    assert Path(after.name_or_path) == folder
    same = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "model_type")
    assert {key: after.to_dict()[key] for key in same} == {key: before[key] for key in same}


def test_the_same_content_is_converted_once(make_gguf: MakeGguf) -> None:
    first, second, other = make_gguf("a.gguf"), make_gguf("b.gguf"), make_gguf("c.gguf", tied=True)
    assert convert(first) == convert(second) != convert(other)


def test_waits_for_who_converts_the_same(make_gguf: MakeGguf) -> None:
    path, other = make_gguf(), make_gguf("other.gguf")
    folder = cache_home() / "gguf" / hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    folder.parent.mkdir(parents=True)
    said: list[str] = []
    waiting = threading.Thread(target=convert, args=(other, said.append))
    with FileLock(folder.with_suffix(".lock")):
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        folder.mkdir()  # the other has finished
    waiting.join(30)
    assert not waiting.is_alive()
    assert said == []


def test_nothing_is_left_of_a_failure(make_gguf: MakeGguf) -> None:
    path = make_gguf(architecture="hyena")
    with pytest.raises(ModelError, match=r"tiny.gguf: cannot be converted: "):
        convert(path)
    assert left_behind() == []


def test_a_cache_that_cannot_be_written(make_gguf: MakeGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PEFTCTL_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"file.*not a directory") as caught:
        convert(make_gguf())
    assert "PEFTCTL_HOME" in (caught.value.problems[0].hint or "")


@pytest.mark.skipif(os.name != "posix", reason="limits the size of a file")
def test_a_full_disk(make_gguf: MakeGguf) -> None:
    import resource

    path = make_gguf()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot be written: .*File too large"):
            convert(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_behind() == []
    stale = cache_home() / "gguf" / f".{convert(path).name}-killed"
    shutil.rmtree(convert(path))
    stale.mkdir()
    assert left_behind() == [stale]
    folder = convert(path)
    assert left_behind() == [folder]
    assert folder.stat().st_mode == folder.parent.stat().st_mode  # as the umask has it, not for one user only


def test_cache_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("PEFTCTL_HOME", "~/cache")
    assert cache_home() == Path("/home/someone/cache")
    monkeypatch.delenv("PEFTCTL_HOME")
    assert cache_home() == Path("/home/someone/.cache/peftctl")


# the header


def test_header(make_gguf: MakeGguf) -> None:
    header = read_header(make_gguf())
    assert header.architecture == "llama"
    assert header.metadata["llama.embedding_length"] == 32
    assert header.metadata["tokenizer.ggml.tokens"][:3] == ["<unk>", "<bos>", "<eos>"]
    assert header.tensors["token_embd.weight"] == (32, tiny.VOCAB)
    assert len(header.tensors) == 21


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def made(*entries: bytes, tensors: bytes = b"", counts: tuple[int, int] | None = None, version: int = 3) -> bytes:
    tensor_count, entry_count = counts or (1 if tensors else 0, len(entries))
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, entry_count) + b"".join(entries) + tensors


LLAMA = string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE = {
    "empty": (b"", "not a GGUF file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "not a GGUF file"),
    "magic alone": (b"GGUF", "ends inside the version"),
    "old": (made(version=1), "version 1 is unknown"),
    "big-endian": (made(version=3 << 24), "it is big-endian"),
    "tensor bomb": (made(counts=(2**62, 0)), "the number of tensors"),
    "entry bomb": (made(counts=(0, 2**62)), "the number of metadata entries"),
    "key bomb": (made(struct.pack("<Q", 2**62), counts=(0, 1)), "the length of a key"),
    "array bomb": (made(entry(b"a", 9, struct.pack("<IQ", 4, 2**40))), "the length of a"),
    "array beyond the file": (made(entry(b"a", 9, struct.pack("<IQ", 4, 10**6))), "ends inside a"),
    "string array beyond the file": (made(entry(b"a", 9, struct.pack("<IQ", 8, 10**6))), "ends inside"),
    "nested arrays": (made(entry(b"a", 9, struct.pack("<IQ", 9, 1) * 1000)), "`a` is an array of type 9"),
    "unknown type": (made(entry(b"a", 77, b"")), "`a` has unknown type 77"),
    "not utf-8": (made(entry(b"\xff\xfe", 4, b"\0" * 4)), "utf-8"),
    "twice": (made(LLAMA, LLAMA), "occurs twice"),
    "no architecture": (made(), "`general.architecture` is missing"),
    "layers": (made(LLAMA, entry(b"llama.block_count", 4, struct.pack("<I", 10**9))), "block_count` is 1000000000"),
    "end token": (made(LLAMA, entry(b"tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 7))), "eos_token_id` is 7"),
    "dimensions": (made(LLAMA, tensors=tensor(b"x", (1,) * 9)), "the dimensions of x: 9"),
    "tensor type": (made(LLAMA, tensors=tensor(b"x", (1,), kind=999)), "unknown type 999"),
    "tensor beyond the file": (made(LLAMA, tensors=tensor(b"x", (2**31, 2**31))), "its tensors need"),
    "offset": (made(LLAMA, tensors=tensor(b"x", (1,), offset=2**63)), "its tensors need"),
    "same tensor": (made(LLAMA, tensors=tensor(b"x", (0,)) * 2, counts=(2, 1)), "tensor `x` occurs twice"),
    "alignment": (made(LLAMA, entry(b"general.alignment", 4, b"\0" * 4)), "`general.alignment` is 0"),
    "split": (made(LLAMA, entry(b"split.count", 2, struct.pack("<H", 3))), "one part of a split model"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_end_at_once(name: str, tmp_path: Path) -> None:
    content, text = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    read_header_once = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        load(recipe(path))
    assert str(path) in caught.value.problems[0].text
    assert text in caught.value.problems[0].text
    assert time.perf_counter() - read_header_once < 2


def test_truncated_anywhere(make_gguf: MakeGguf, tmp_path: Path) -> None:
    whole = make_gguf().read_bytes()
    path = tmp_path / "part.gguf"
    for size in [*range(0, 3000, 7), *range(3000, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError):
            read_header(path)


def test_any_damage_is_an_error_or_harmless(make_gguf: MakeGguf, tmp_path: Path) -> None:
    whole = make_gguf().read_bytes()
    path, chance, refused = tmp_path / "damaged.gguf", random.Random(0), 0
    for _ in range(1500):
        damaged = bytearray(whole[:8000])
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(4, 4500)] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
        path.write_bytes(damaged + whole[8000:])
        try:
            read_header(path)
        except ModelError:
            refused += 1
    assert refused > 300


# the one that people use


@pytest.mark.slow
def test_smollm2(smollm_gguf: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCTL_HOME", str(tmp_path_factory.getbasetemp() / "shared-home"))
    base = load(recipe(smollm_gguf, dtype="bfloat16"))
    tokenizer, model = base.tokenizer, base.model
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    digits = tokenizer("The year 12345").input_ids
    assert digits == [504, 713, 216, 33, 34, 35, 36, 37]

    def say(text: str) -> str:
        given = tokenizer(text, return_tensors="pt")
        out = model.generate(**given, max_new_tokens=16, do_sample=False)
        return str(tokenizer.decode(out[0, given.input_ids.shape[1] :]))

    assert say("The capital of France is").startswith(" Paris")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2+2?"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n")
    answer = say(chat)
    assert "4" in answer
    assert answer.endswith("<|im_end|>")
