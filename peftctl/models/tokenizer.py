"""A base model's tokenizer, as it is: nothing is set silently."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftctl.config.bounds import no_panic
from peftctl.errors import ModelError
from peftctl.models.folder import CONFIG, TOO_LARGE, read_json, vet
from peftctl.models.quiet import Say, quiet, reason, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 10_000
"""Characters of a regular expression; those of real tokenizers have a few hundred."""

_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")


def read_tokenizer(folder: Path, place: str, say: Say = silent, *, writes: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model folder; without a pad token it pads with its end token, and says so.

    Padding is masked by position, never by id, so that an end token used as padding is still trained.

    Args:
        writes: whether the model writes texts, which need a token to end with.

    Raises:
        ModelError: no tokenizer here, an unreadable one, or one without an end token.
    """
    # without any of these transformers makes an empty vocabulary up
    if not any(path.is_file() for pattern in _FILES for path in folder.glob(pattern)):
        settings = folder / "tokenizer_config.json"
        if settings.is_file() and (kind := read_json(settings, place).get("tokenizer_class")):  # ByT5, CANINE
            text = f"{place}: `{kind}` without `tokenizer.json` does not tell which characters a token covers"
            raise ModelError(text, "copy that file from the original model if it has one; else take another model")
        raise ModelError(f"{place}: no tokenizer in this folder (`tokenizer.json`)", "copy it from the original model")
    for path in sorted({path for pattern in (*_FILES, "*token*.json", "merges.txt") for path in folder.glob(pattern)}):
        if path.is_file() and path.stat().st_size > TOO_LARGE:
            raise ModelError(f"{place}/{path.name}: larger than {TOO_LARGE >> 20} MiB")
    if (folder / CONFIG).is_file():  # transformers looks into it, too
        vet(read_json(folder / CONFIG, place), f"{place}/{CONFIG}")
    if (folder / "tokenizer.json").is_file():
        refuse_endless(read_json(folder / "tokenizer.json", place), f"{place}/tokenizer.json")
    from transformers import AutoTokenizer

    try:
        with quiet(), no_panic():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # a foreign file: whatever the library raises, the file is what is wrong
        raise ModelError(f"{place}: its tokenizer cannot be read: {reason(error)}") from error
    if tokenizer.eos_token_id is None and writes:
        raise ModelError(
            f"{place}: its tokenizer has no end token, so an answer could not be taught to stop",
            "set `eos_token` in `tokenizer_config.json`",
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
        say(f"no pad token: padding with `{tokenizer.eos_token}`")
    return tokenizer


def refuse_endless(described: dict[str, Any], place: str) -> None:
    """Raise ModelError for a tokenizer.json with a regular expression that may look for ever for where to cut a text.

    Those are the ones that repeat a group that repeats something; no tokenizer needs one.
    """
    todo: list[Any] = [described.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            pattern = value.get("Regex")
            if isinstance(pattern, str) and (len(pattern) > LONGEST or repeats_repeats(pattern)):
                text = f"{place}: the regular expression `{pattern[:60]}` may never end"
                raise ModelError(text, "take the tokenizer of the original model")
            todo += value.values()
        elif isinstance(value, list):
            todo += value


def repeats_repeats(pattern: str) -> bool:
    """Whether a group of `pattern` that is repeated without end holds something that is repeated, or alternatives."""
    opened: list[bool] = []
    inside = False  # whether the group at hand can match in several ways
    last = False  # whether the group that ended just now can
    for token in re.finditer(r"\\.|\[(?:\\.|[^\]\\])*\]|[*+]|\{\d*,\d*\}|[()|]|.", pattern, re.DOTALL):
        text = token[0]
        if text == "(":
            opened.append(inside)
            inside = False
        elif text == ")":
            last, inside = inside, (opened.pop() if opened else False) or inside
            continue
        elif text in "*+" or (text[0] == "{" and len(text) > 1):
            if last:
                return True
            inside = True
        elif text == "|":
            inside = True
        last = False
    return False


def read_processor(folder: Path, place: str) -> Any:
    """What makes pixels of pictures for the model in a local folder.

    Raises ModelError where there is none, an unreadable one, or one that makes more of a picture than its pixels.
    """
    from transformers import AutoImageProcessor

    try:
        with quiet():
            processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # a foreign file: whatever the library raises, the file is what is wrong
        text = f"{place}: its image processor cannot be read: {reason(error)}"
        raise ModelError(text, "copy `preprocessor_config.json` from the original model") from error
    makes = set(processor.model_input_names) - {"pixel_mask"}
    if makes != {"pixel_values"}:
        names = ", ".join(f"`{name}`" for name in sorted(makes))
        text = f"{place}: its image processor makes {names} of a picture, and only `pixel_values` is known here"
        raise ModelError(text, "take a model such as `Salesforce/blip-image-captioning-base`")
    return processor
