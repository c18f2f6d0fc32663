"""A .gguf file as a base model: converted once into a folder of bfloat16 safetensors, cached by content.

transformers reads GGUF, but cannot quantise what it reads that way, and takes a quarter of a minute for the smallest
of models; every later use takes the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftctl.config.home import cache_home
from peftctl.errors import ModelError, StorageError
from peftctl.models.gguf_header import Header, read_header
from peftctl.models.quiet import Say, quiet, reason, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HINT = "see to free space, or set PEFTCTL_HOME to a folder that can be written"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def convert(path: Path, say: Say = silent) -> Path:
    """The folder of a .gguf file: weights in bfloat16, tokenizer with its chat template, generation config.

    It is written beside its final place and renamed, so it is whole wherever it is; of several processes that convert
    the same file at once, one does, and the others wait for it.

    Raises:
        ModelError: not GGUF, damaged, truncated, or of an architecture or type that transformers does not read.
        StorageError: the cache folder cannot be written.
    """
    from filelock import FileLock

    header = read_header(path)  # before all of it is read: it may be a device, or a hole of terabytes
    folder = _folder(path)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                say(f"converting `{path.name}` to safetensors, once: {folder}")
                _write(path, header, folder)
    except OSError as error:
        raise StorageError(f"{error.filename or folder}: {(error.strerror or reason(error)).lower()}", _HINT) from error
    return folder


def converted(path: Path) -> Path | None:
    """The folder of a .gguf file where it was converted before, without converting it. Raises ModelError."""
    read_header(path)
    folder = _folder(path)
    return folder if folder.is_dir() else None


def _folder(path: Path) -> Path:
    try:
        found = path.stat()
        return cache_home() / "gguf" / _digest(path, found.st_size, found.st_mtime_ns)[:16]
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    """Of the content, read once by a process as long as `size` and time of the last change stay: it may be large."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, header: Header, folder: Path) -> None:
    for stale in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed; nobody else is at it now
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary, quiet():
        model, tokenizer = _read(path, header, Path(temporary))
        whole = Path(temporary) / "model"
        try:
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
        except Exception as error:  # a full disk is an error of its own in each of the libraries that write
            raise StorageError(f"{folder}: cannot be written: {reason(error)}", _HINT) from error
        for file in whole.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        os.rename(whole, folder)


@contextmanager
def _no_bar() -> Iterator[None]:
    """transformers' GGUF reader draws a bar that its own settings do not reach."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = bar


def _read(path: Path, header: Header, empty: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model and tokenizer; `empty` is the folder they are read from, so that nothing beside the file has a say."""
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": os.path.abspath(path), "local_files_only": True}
    try:
        tokenizer = _tokenizer(header, empty, options)
        # early releases always unpack the weights; later ones need to be told
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with _no_bar():
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                empty, dtype=torch.bfloat16, output_loading_info=True, **options
            )
    except Exception as error:  # a foreign file: whatever the library raises, the file is what is wrong
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ModelError(f"{path}: cannot be converted: {reason(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{path}: {len(missing)} tensors are missing, `{missing[0]}` among them")
    # some releases keep the title of the file as a path
    vars(model.config).pop("_model_name_or_path", None)
    # where an answer begins and ends is the file's word too
    for name in ("bos", "eos", "pad"):
        setattr(model.generation_config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    return model, tokenizer


def _tokenizer(header: Header, empty: Path, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The library's reading of vocabulary and merges; everything else is taken from the file itself.

    Releases of transformers before 5.20 take one special token for another, and all add tokens of their own to some
    vocabularies, which the model has no embedding for.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    metadata = header.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError("it holds no vocabulary")
    # not AutoTokenizer, which early releases let guess a class by the architecture
    described = json.loads(PreTrainedTokenizerFast.from_pretrained(empty, **options).backend_tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < len(tokens)]
    said: dict[str, Any] = {}
    for name, key in _SPECIAL.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        said[name] = None if number is None else tokens[number]
    kind = metadata.get("tokenizer.ggml.model")
    # sentencepiece vocabularies begin with a token unless told not to; gemma4 files say it for llama.cpp's sake, whose
    # chat template writes it already
    said["add_bos_token"] = kind != "gemma4" and bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"))
    said["add_eos_token"] = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    if isinstance(length := metadata.get(f"{header.architecture}.context_length"), int):
        said["model_max_length"] = length
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **said,
    )
    if len(tokenizer) != len(tokens):
        raise ValueError(f"its vocabulary of {len(tokens)} tokens is read as one of {len(tokenizer)}")
    return tokenizer
