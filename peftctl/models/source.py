"""Where a base model comes from: an existing path, a hub id or a .gguf file, each turned into a local folder."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftctl.config.home import expanded
from peftctl.errors import ModelError, StorageError
from peftctl.models import folder as folders
from peftctl.models.quiet import Say, quiet, reason, silent

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json", ".yaml")
_SMALL = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
"""Everything of a hub repository but its weights: configuration, tokenizer, chat template."""


_ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "README.md"]


def resolve(name_or_path: str, root: Path = Path(".")) -> Path | str:
    """The absolute path of what exists, seen from `root`, else the hub id.

    Raises:
        ModelError: neither exists nor could be a hub id; the hint names what is near.
    """
    path = root / expanded(name_or_path)
    if name_or_path.strip() and os.path.exists(path):
        return Path(os.path.abspath(path))
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.lower().endswith(_FILES)
    if looks_local or not _HUB_ID.fullmatch(name_or_path) or "--" in name_or_path or ".." in name_or_path:
        what = "no such file or folder" if name_or_path.strip() else "`name_or_path` is empty"
        raise ModelError(f"{name_or_path or 'model.name_or_path'}: {what}", _near(path))
    return name_or_path


def _near(path: Path) -> str:
    try:
        names = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    except (OSError, ValueError):
        names = []
    hint = "name a folder, a .gguf file, or a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`"
    return f"did you mean `{names[0]}`?" if names else hint


def local(
    name_or_path: str, revision: str | None = None, *, root: Path = Path("."), weights: bool = True, say: Say = silent
) -> Path:
    """The folder that holds the model, after the download or the conversion where one is needed.

    Args:
        revision: branch, tag or commit of a hub id; a path has none.
        weights: False leaves the weights of a hub id where they are: enough for configuration and tokenizer.

    Raises:
        ModelError: nothing there, not a folder or .gguf file, a hub id that cannot be had.
        StorageError: the disk refuses what is downloaded or converted.
    """
    found = resolve(name_or_path, root)
    if isinstance(found, str):
        return fetch(found, revision, weights=weights, say=say)
    if revision is not None:
        raise ModelError(
            f"model.revision: `{revision}` is of the hub, but `{name_or_path}` is a path here", "remove `revision`"
        )
    if found.is_dir():
        return found
    if found.suffix.lower() == ".gguf":
        from peftctl.models.gguf import convert

        return convert(found, say)
    raise ModelError(f"{name_or_path}: neither a folder nor a .gguf file", f"name its folder: `{found.parent}`")


def fetch(repo: str, revision: str | None, *, weights: bool, say: Say = silent) -> Path:
    """A hub repository's folder in the hub's own cache: small files first, then the weights that its index names."""
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    place = repo if revision is None else f"{repo}@{revision}"
    with _hub_errors(repo, revision, place), quiet():
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_SMALL))
    if not weights:
        return folder
    absent = [name for name in folders.wanted_files(folder, place) if not (folder / name).exists()]
    for number, name in enumerate(absent, 1):
        say(f"downloading `{name}` of `{place}` ({number} of {len(absent)})")
        with _hub_errors(repo, revision, place):
            try:
                # the commit that the small files are of, though the branch may have moved since
                hf_hub_download(repo, name, revision=folder.name)
            except errors.LocalEntryNotFoundError:
                raise
            except errors.EntryNotFoundError:  # no safetensors in the repository
                raise ModelError(f"{place}: no safetensors weights on the hub", "convert to safetensors") from None
    return folder


def adapter(name_or_path: str, say: Say = silent) -> Path:
    """The folder of an adapter: the path itself, or for a hub id that repository's adapter in the hub's own cache.

    A path need not exist; who reads it says so. A text is a hub id when it has two parts and nothing of that name, not
    even its first part, is here. Raises ModelError and StorageError as `local` does.
    """
    path = expanded(name_or_path)
    parts = name_or_path.split("/")
    of_hub = len(parts) == 2 and _HUB_ID.fullmatch(name_or_path) and not name_or_path.lower().endswith(_FILES)
    if not of_hub or os.path.exists(path) or os.path.exists(path.parent):
        return path
    from huggingface_hub import snapshot_download

    say(f"looking for the adapter `{name_or_path}` on the hub")
    with _hub_errors(name_or_path, None, name_or_path), quiet():
        return Path(snapshot_download(name_or_path, allow_patterns=_ADAPTER))


@contextmanager
def _hub_errors(repo: str, revision: str | None, place: str) -> Iterator[None]:
    """Turn what the hub's client raises into what its user can do about it."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{place}: its owner gives access on request only",
            f"ask for it at https://huggingface.co/{repo}, then `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repo}: no revision `{revision}`", "name a branch, a tag or a commit of it") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{place}: no such path here, and no such model on the hub",
            "check the spelling; for a private model, `hf auth login`",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"{place}: no such path here, the hub cannot be reached, and its cache holds no complete copy",
            "check the connection and HF_HUB_OFFLINE, or name a folder",
        ) from error
    except errors.HfHubHTTPError as error:
        raise ModelError(f"{place}: the hub refuses: {reason(error)}", "try again later") from error
    except OSError as error:
        raise StorageError(f"{place}: its download fails: {reason(error)}", "see to free space and HF_HOME") from error
