"""A pipeline of diffusers as a base model: its network is what adapters attach to, its other parts stay as they are.

Every part is of a class that `model_index.json` names and `pipelines.py` knows, read from safetensors in the folder.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from peftctl.errors import ModelError, Problem
from peftctl.models.base import Base, Model
from peftctl.models.device import choose_device, choose_dtype
from peftctl.models.folder import PIPELINE, check_weights, read_config, read_json, weight_files
from peftctl.models.pipelines import FLOW, KINDS, Kind
from peftctl.models.quiet import Say, quiet, reason
from peftctl.models.source import local, resolve

SCHEDULER = "scheduler"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What a network may predict, where it is not one of flow matching: the noise, the velocity, the picture."""


def load_pipeline(model: Model, *, root: Path, say: Say) -> Base:
    """The pipeline that `model` names: `model` of the result is its network, `pipeline` the whole of it.

    The VAE is in float32 and, like the text encoders, on the CPU until it is needed (`lent`). Raises ModelError for
    pipelines that are not known here, parts that are missing or of other classes, and settings that they have not.
    """
    place = model.name_or_path
    refuse_settings(model)
    device = choose_device(model.device)
    dtype = choose_dtype(model.dtype, device, say)
    folder = local(place, model.revision, root=root, say=say)
    kind, classes = contents(folder, place)
    parts = {name: part(folder / name, cls, f"{place}/{name}", dtype, say) for name, cls in classes.items()}
    pipeline = assembled(kind, parts)
    network = parts[kind.network].to(device)
    if network.config.in_channels != parts["vae"].config.latent_channels:
        text = f"{place}: its network reads {network.config.in_channels} channels, its VAE makes "
        raise ModelError(
            f"{text}{parts['vae'].config.latent_channels}", "pipelines that fill pictures in are not trained"
        )
    name = str(resolve(place, root))
    network.name_or_path = name
    return Base(network, words(parts["tokenizer"], kind), dtype, device, folder, name, pipeline=pipeline)


def load_words(model: Model, *, root: Path, say: Say) -> Any:
    """The tokenizer of a pipeline's first text encoder, without the weights of a hub id. Raises ModelError."""
    place = model.name_or_path
    folder = local(place, model.revision, root=root, weights=False, say=say)
    kind, classes = contents(folder, place)
    return words(part(folder / "tokenizer", classes["tokenizer"], f"{place}/tokenizer", torch.float32, say), kind)


def words(tokenizer: Any, kind: Kind) -> Any:
    """The tokenizer, which knows how many tokens are read."""
    tokenizer.model_max_length = min(kind.tokens, tokenizer.model_max_length)
    return tokenizer


def refuse_settings(model: Model) -> None:
    """Raise ModelError for what language models have and pipelines have not."""
    wrong = []
    if model.quantization != "none":
        text = f"model.quantization: `{model.quantization}`: the network of a pipeline is not quantised"
        wrong.append(Problem(text, "leave it out; `dtype: bfloat16` halves its memory"))
    if model.attention not in ("auto", "sdpa"):
        text = f"model.attention: `{model.attention}` is for language models; diffusers computes it by `sdpa`"
        wrong.append(Problem(text, "leave it out"))
    if wrong:
        raise ModelError.of(wrong)


def library() -> Any:
    """The package diffusers. Raises ModelError with the command that installs it."""
    try:
        import diffusers
    except ImportError:
        hint = "install it: `pip install 'peftctl[diffusion]'`"
        raise ModelError("pictures are drawn by `diffusers`, which is not installed", hint) from None
    return diffusers


def kind_in(folder: Path, place: str) -> tuple[Kind, dict[str, Any]]:
    """What `model_index.json` says that the folder holds, and the file itself. Raises ModelError."""
    if not (folder / PIPELINE).is_file():
        hint = "name a folder that a pipeline's `save_pretrained` wrote, or a hub id such as "
        hint += "`stable-diffusion-v1-5/stable-diffusion-v1-5`"
        raise ModelError(f"{place}: no pipeline of diffusers here: `{PIPELINE}` is missing", hint)
    index = read_json(folder / PIPELINE, place)
    named = index.get("_class_name")
    if not isinstance(named, str) or named not in KINDS:
        raise ModelError(f"{place}: a `{named}` is not trained here", f"those that are: {', '.join(KINDS)}")
    return KINDS[named], index


def contents(folder: Path, place: str) -> tuple[Kind, dict[str, str]]:
    """The kind of pipeline in `folder`, and the class of every part that it needs. Raises ModelError with all wrong."""
    kind, index = kind_in(folder, place)
    wrong, found = [], {}
    known = {**kind.parts, SCHEDULER: (FLOW,) if kind.flow else schedulers()}
    for name, classes in known.items():
        said = index.get(name)
        cls = said[1] if isinstance(said, list) and len(said) == 2 else None
        if cls is None and kind.flow and name.endswith("_3"):  # SD 3 is usual without its largest encoder
            continue
        if cls not in classes:
            text = f"{place}/{PIPELINE}: `{name}` is {f'a `{cls}`' if cls else 'missing'}"
            wrong.append(Problem(text, f"expected {' or '.join(f'`{one}`' for one in classes[:4])}"))
        else:
            found[name] = cls
    if wrong:
        raise ModelError.of(wrong)
    return kind, found


def schedulers() -> tuple[str, ...]:
    """The schedulers by which noise is added as in DDPM."""
    library()
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    return tuple(name for name in KarrasDiffusionSchedulers.__members__ if not name.startswith("EDM"))


def assembled(kind: Kind, parts: dict[str, Any]) -> Any:
    """The pipeline of these parts; what it may have beside them it has not."""
    with quiet(), quiet_diffusers():
        cls = getattr(library(), kind.pipeline)
        wanted = inspect.signature(cls.__init__).parameters
        left: dict[str, Any] = dict.fromkeys((*kind.optional, "text_encoder_3", "tokenizer_3"))
        left |= {"requires_safety_checker": False, **parts}
        pipeline = cls(**{name: value for name, value in left.items() if name in wanted})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def part(folder: Path, cls: str, place: str, dtype: torch.dtype, say: Say) -> Any:
    """One part of a pipeline, read from its folder. Raises ModelError when it is incomplete or damaged."""
    import transformers

    owner = transformers if hasattr(transformers, cls) else library()
    if not folder.is_dir():
        raise ModelError(f"{place}: missing", "was the download interrupted?")
    options: dict[str, Any] = {"local_files_only": True}
    loaded = not cls.endswith(("Scheduler", "Tokenizer", "TokenizerFast"))
    if loaded:
        read_config(folder, place)
        check_weights(weight_files(folder, place), place)
        key = "dtype" if owner is transformers else "torch_dtype"
        wanted = torch.float32 if cls == "AutoencoderKL" else dtype  # SDXL's overflows in float16
        options |= {"use_safetensors": True, "output_loading_info": True, key: wanted}
    try:
        with quiet(), quiet_diffusers():
            found = getattr(owner, cls).from_pretrained(folder, **options)
    except Exception as error:  # foreign files and a foreign library: whatever it raises, the part is what is wrong
        raise ModelError(f"{place}: cannot be loaded: {reason(error)}") from error
    if not loaded:
        return found
    network, report = found
    for key, what in (("missing_keys", "are not in its files"), ("mismatched_keys", "have another shape there")):
        if names := sorted(map(str, report[key])):
            hint = "do configuration and weights belong to different models?"
            raise ModelError(f"{place}: {len(names)} tensors of it {what}: `{names[0]}`", hint)
    return network.requires_grad_(False).eval()


def training_schedule(pipeline: Any) -> Any:
    """The scheduler by which noise is added in training, with the settings of the pipeline's own. Raises ModelError."""
    diffusers = library()
    config = pipeline.scheduler.config
    if type(pipeline.scheduler).__name__ == FLOW:
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    with quiet_diffusers():
        scheduler = diffusers.DDPMScheduler.from_config(config)
    if scheduler.config.prediction_type not in PREDICTIONS:
        text = f"scheduler_config.json: prediction_type: `{scheduler.config.prediction_type}` is not trained here"
        raise ModelError(text, f"expected one of {', '.join(PREDICTIONS)}")
    return scheduler


@contextmanager
def lent(parts: Sequence[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """Frozen parts of a pipeline on `device` while they work there, on the CPU afterwards."""
    try:
        for one in parts:
            one.to(device)
        yield
    finally:
        for one in parts:
            one.to("cpu")


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """diffusers logs errors only inside, as do packages that it loads, and speaks of no changes that are to come."""
    own, others = library().utils.logging, logging.getLogger("bitsandbytes")
    verbosity, level = own.get_verbosity(), others.level
    own.set_verbosity_error()
    others.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        own.set_verbosity(verbosity)
        others.setLevel(level)
