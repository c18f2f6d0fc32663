"""A base model's tokenizer, as it is: nothing is set silently."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftctl.errors import ModelError
from peftctl.models.quiet import Say, quiet, reason, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        raise ModelError(f"{place}: no tokenizer in this folder (`tokenizer.json`)", "copy it from the original model")
    from transformers import AutoTokenizer

    try:
        with quiet():
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
