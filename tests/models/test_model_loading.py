"""A base model is read whole and right, or refused in one line that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftctl.errors import ModelError
from peftctl.models.base import Model, fingerprint, load, load_tokenizer, resolve


def recipe(path: object, **fields: object) -> Model:
    return Model(**{"name_or_path": str(path), "dtype": "float32", "device": "cpu"} | fields)  # type: ignore[arg-type]


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: each for key, each in value.items() if each is not None}))


# what works


def test_loads_what_was_saved(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    base = load(recipe("llama"), root=llama.parent, say=said.append)
    assert torch.equal(tiny.logits(base.model), tiny.logits(tiny.build("llama")))
    assert not base.model.training
    assert (base.dtype, base.device.type, base.folder, base.name) == (torch.float32, "cpu", llama, str(llama))
    assert base.model.name_or_path == str(llama)
    assert base.tokenizer("w5 w6").input_ids == [5, 6]
    assert said == ["float32 on cpu"]
    assert capfd.readouterr() == ("", "")  # neither bars nor logs


def test_dtype_is_converted(llama: Path) -> None:
    base = load(recipe(llama, dtype="bfloat16"))
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}


def test_shards(llama: Path) -> None:
    shutil.rmtree(llama / "sharded", ignore_errors=True)
    (llama / "model.safetensors").unlink()
    tiny.build("llama").save_pretrained(llama, max_shard_size="20KB")
    assert len(list(llama.glob("model-*.safetensors"))) > 1
    base = load(recipe(llama))
    assert torch.equal(tiny.logits(base.model), tiny.logits(tiny.build("llama")))


def test_tied_embeddings_stay_tied(llama: Path) -> None:
    torch.manual_seed(1)
    tiny.llama(tied=True).save_pretrained(llama)
    model = load(recipe(llama)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_gpt2_and_eager_attention(tmp_path: Path, make_tokenizer: Callable[..., object]) -> None:
    tiny.build("gpt2").save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")  # type: ignore[attr-defined]
    base = load(recipe(tmp_path / "gpt2", attention="eager"))
    assert base.model.config._attn_implementation == "eager"
    assert torch.allclose(tiny.logits(base.model), tiny.logits(tiny.build("gpt2")), atol=1e-6)


def test_tensors_of_no_use_are_told(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    save_file(tensors | {"vision.weight": torch.zeros(2)}, llama / "model.safetensors", {"format": "pt"})
    said: list[str] = []
    load(recipe(llama), say=said.append)
    assert said[1:] == ["1 tensors in the files are no part of the model: `vision.weight`"]


def test_auto_picks_a_dtype_the_cpu_has_and_says_so(llama: Path) -> None:
    said: list[str] = []
    base = load(recipe(llama, dtype="auto"), say=said.append)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        assert base.dtype is (torch.bfloat16 if native else torch.float32)
    assert said == [f"{str(base.dtype).removeprefix('torch.')} on cpu"]


def test_importing_needs_no_transformers() -> None:
    code = (
        "import sys, peftctl.models.base; print([m for m in ('transformers', 'accelerate', 'bitsandbytes', 'gguf',"
        " 'huggingface_hub', 'safetensors', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# where it is


def test_an_existing_path_beats_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve("org/model", tmp_path) == tmp_path / "org" / "model"
    assert resolve("org/other", tmp_path) == "org/other"
    assert resolve("gpt2", tmp_path) == "gpt2"


@pytest.mark.parametrize(
    "name",
    ["./nothing", "/no/such/folder", "~/no-such", "a/b/c", "model.gguf", "weights/", "a..b", "", " ", "x\0y", "é"],
)
def test_what_is_neither_path_nor_hub_id(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such file or folder|is empty"):
        resolve(name, tmp_path)


def test_a_near_name_is_offered(llama: Path) -> None:
    with pytest.raises(ModelError) as caught:
        resolve("./lama", llama.parent)
    assert caught.value.problems[0].hint == "did you mean `llama`?"


def test_hub_out_of_reach() -> None:
    with pytest.raises(ModelError, match="nobody/nothing: no such path here, the hub cannot be reached"):
        load(recipe("nobody/nothing"))


@pytest.fixture
def cached(llama: Path, tmp_path: Path) -> str:
    """A hub id whose files are all in the hub's cache."""
    commit = "0123456789" * 4
    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(llama, repo / "snapshots" / commit)
    return "org/tiny"


def test_hub_id_from_the_cache(cached: str) -> None:
    base = load(recipe(cached))
    assert base.name == cached == base.model.name_or_path
    assert fingerprint(base.folder)["commit"] == "0123456789" * 4
    assert torch.equal(tiny.logits(base.model), tiny.logits(tiny.build("llama")))


def test_tokenizer_of_a_hub_id_needs_no_weights(cached: str, tmp_path: Path) -> None:
    for path in (tmp_path / "hub").rglob("*.safetensors"):
        path.unlink()
    assert len(load_tokenizer(recipe(cached))) == tiny.VOCAB
    with pytest.raises(ModelError, match=r"org/tiny: .* its cache holds no complete copy"):
        load(recipe(cached))


def test_revision_of_a_path(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"model.revision: `main` is of the hub"):
        load(recipe(llama, revision="main"))


# what is wrong with it


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def index_of(folder: Path, files: object) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def drop(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


WRONG: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no `config.json`", "save_pretrained"),
    "an adapter": (
        lambda f: ((f / "config.json").unlink(), adapter(f)),
        "no `config.json`",
        "it holds an adapter: name its base here",
    ),
    "a gguf": (
        lambda f: ((f / "config.json").unlink(), (f / "a.gguf").touch()),
        "no `config.json`",
        "llama/a.gguf",
    ),
    "an adapter too": (adapter, "holds an adapter beside the model", "adapter_config.json"),
    "not json": (lambda f: (f / "config.json").write_text('{"a": 1,\n nope}'), "config.json:2:2: not JSON", ""),
    "not utf-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "config.json: not JSON", ""),
    "nested": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: not JSON", ""),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "expected an object; got a list", ""),
    "no type": (lambda f: edit(f / "config.json", model_type=None), "no `model_type`", ""),
    "unknown type": (
        lambda f: edit(f / "config.json", model_type="lama"),
        "`model_type: lama` is unknown",
        "did you mean `llama`?",
    ),
    "own code": (
        lambda f: edit(f / "config.json", model_type="zzz", auto_map={"AutoConfig": "x.Y"}),
        "`model_type: zzz` is unknown",
        "code of its own, which is never run",
    ),
    "kernel": (
        lambda f: edit(f / "config.json", _attn_implementation_internal="evil/kernel"),
        "`_attn_implementation_internal: evil/kernel` would load foreign code",
        "remove",
    ),
    "kernel inside": (
        lambda f: edit(f / "config.json", text_config={"attn_implementation": {"a": "evil/kernel"}}),
        "`attn_implementation: evil/kernel` would load foreign code",
        "remove",
    ),
    "other weights": (
        lambda f: edit(f / "config.json", transformers_weights="../other.safetensors"),
        "would load foreign code or files",
        "remove",
    ),
    "quantised": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq"}),
        "already quantised (`gptq`)",
        "quantization: nf4",
    ),
    "nonsense": (lambda f: edit(f / "config.json", hidden_size="wide"), "llama", ""),
    "indivisible": (lambda f: edit(f / "config.json", num_attention_heads=7), "llama", ""),
    "bottomless": (
        lambda f: edit(f / "config.json", num_hidden_layers=9_000),
        "9000 layers, but only 21 tensors",
        "",
    ),
    "other width": (
        lambda f: edit(f / "config.json", intermediate_size=80),
        "6 tensors have another shape than `config.json` says: `model.layers.0.mlp.down_proj.weight` is [32, 48],",
        "different models",
    ),
    "huge vocabulary": (
        lambda f: edit(f / "config.json", vocab_size=10**9),
        "`vocab_size: 1000000000`, but no tensor",
        "",
    ),
    "far wider": (
        lambda f: edit(f / "config.json", intermediate_size=10**9),
        "parameters, but only",
        "different models",
    ),
    "masked": (
        lambda f: edit(f / "config.json", architectures=["LlamaForSequenceClassification"]),
        "`LlamaForSequenceClassification` is no causal language model",
        "choose one such as",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights in this folder", "interrupted"),
    "pickles": (only_pickles, "its weights are pickles (`pytorch_model.bin`)", "convert to safetensors"),
    "truncated": (lambda f: truncate(f / "model.safetensors"), "model.safetensors: damaged or truncated", "again"),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), "model.safetensors: damaged or truncated", "again"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 500), "damaged or truncated", "again"),
    "pickle inside": (lambda f: torch.save({"a": torch.ones(2)}, f / "model.safetensors"), "damaged", "again"),
    "missing shard": (
        lambda f: index_of(f, {"a": "model-1.safetensors", "b": "model-2.safetensors"}),
        "`model-1.safetensors` is missing",
        "",
    ),
    "escaping shard": (lambda f: index_of(f, {"a": "../x.safetensors"}), "is not the name of a safetensors file", ""),
    "pickled shard": (lambda f: index_of(f, {"a": "x.bin"}), "is not the name of a safetensors file", ""),
    "empty index": (lambda f: index_of(f, {}), "`weight_map` is missing or empty", ""),
    "odd index": (lambda f: index_of(f, [1]), "`weight_map` is missing or empty", ""),
    "headless": (drop("lm_head.weight"), "1 tensors of the model are not in its files: `lm_head.weight`", "head"),
    "holed": (drop("model.layers.1.mlp.up_proj.weight"), "`model.layers.1.mlp.up_proj.weight`", "different models"),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("token*")],
        "no tokenizer in this folder",
        "copy it from the original model",
    ),
    "tokenizer of code": (
        lambda f: (
            [path.unlink() for path in f.glob("token*")]
            + [(f / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')]
        ),
        "`ByT5Tokenizer` without `tokenizer.json` does not tell which characters a token covers",
        "else take another model",
    ),
    "bad tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "its tokenizer cannot be read", ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str, llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, text, hint = WRONG[name]
    change(llama)
    with pytest.raises(ModelError) as caught:
        load(recipe("llama"), root=llama.parent)
    problem = caught.value.problems[0]
    assert problem.text.startswith("llama")
    assert text in problem.text
    assert hint in (problem.hint or "")
    assert "\n" not in problem.text
    assert capfd.readouterr() == ("", "")


def test_every_missing_shard_is_named(llama: Path) -> None:
    index_of(llama, {"a": "x.safetensors", "b": "y.safetensors", "c": "x.safetensors"})
    with pytest.raises(ModelError) as caught:
        load(recipe(llama))
    assert ["`x" in text or "`y" in text for text, _ in caught.value.problems] == [True, True]


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_encoders_are_refused(kind: str, tmp_path: Path) -> None:
    tiny.build(kind).save_pretrained(tmp_path / kind)
    with pytest.raises(ModelError, match="is no causal language model"):
        load(recipe(tmp_path / kind))


def test_encoders_and_vision_without_architectures_are_refused(llama: Path) -> None:
    for kind in ("bert", "vit"):
        edit(llama / "config.json", model_type=kind, architectures=None)
        with pytest.raises(ModelError, match=f"`{kind}` is no causal language model"):
            load(recipe(llama))


def test_a_file_that_is_no_model(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"neither a folder nor a \.gguf file"):
        load(recipe(llama / "model.safetensors"))


def test_a_larger_tokenizer_than_the_model(llama: Path, make_tokenizer: Callable[..., object]) -> None:
    larger = make_tokenizer(additional_special_tokens=["<one>", "<more>"])
    larger.save_pretrained(llama)  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="its tokenizer has 98 tokens, its embedding 96 rows"):
        load(recipe(llama))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(device: str, llama: Path) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is one")
    with pytest.raises(ModelError, match=r"model.device: ") as caught:
        load(recipe(llama, device=device))
    assert "device: auto" in (caught.value.problems[0].hint or "")


def test_flash_attention_needs_a_gpu(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"model.attention: `flash_attention_2` needs a CUDA GPU"):
        load(recipe(llama, attention="flash_attention_2"))


# the tokenizer


def test_padding_falls_back_to_the_end_token_and_says_so(llama: Path, make_tokenizer: Callable[..., object]) -> None:
    make_tokenizer(pad_token=None).save_pretrained(llama)  # type: ignore[attr-defined]
    said: list[str] = []
    tokenizer = load_tokenizer(recipe("llama"), llama.parent, said.append)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert said == ["no pad token: padding with `<eos>`"]


def test_a_tokenizer_that_cannot_end(llama: Path, make_tokenizer: Callable[..., object]) -> None:
    make_tokenizer(eos_token=None).save_pretrained(llama)  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="no end token"):
        load_tokenizer(recipe(llama))


# the fingerprint


def change_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_fingerprint_tells_siblings_apart(llama: Path, tmp_path: Path) -> None:
    first = fingerprint(llama)
    shutil.copytree(llama, tmp_path / "copy")
    edit(tmp_path / "copy" / "config.json", transformers_version="4.0.0")
    assert fingerprint(tmp_path / "copy") == first == json.loads(json.dumps(first))
    change_weights(tmp_path / "copy" / "model.safetensors", lambda tensors: [t.add_(0.01) for t in tensors.values()])
    other = fingerprint(tmp_path / "copy")
    assert other["weights"] != first["weights"]
    assert (other["config"], other["bytes"]) == (first["config"], first["bytes"])
    edit(tmp_path / "copy" / "config.json", rope_theta=7.0)
    assert fingerprint(tmp_path / "copy")["config"] != first["config"]
