"""(IA)3: its own arithmetic, where it sits by itself, and folders that cross to HF PEFT and back."""

from __future__ import annotations

import peft
import pytest
import torch
from methods.oracle import TASKS, peft_reads_ours, we_read_peft, written_back
from tiny import build, logits, stir
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import GPTNeoXConfig as NeoXConfig

import peftctl
from peftctl.engine.attach import adapters_of, trained
from peftctl.errors import AdapterError
from peftctl.methods.ia3 import RescaledInput

IA3 = peftctl.METHODS["ia3"]
AUTO = {
    "llama": {"k_proj": "out", "v_proj": "out", "down_proj": "in"},
    "gpt2": {"attn.c_attn": "out", "mlp.c_proj": "in"},
    "t5": {"k": "out", "v": "out", "wo": "in"},
    "bert": {"self.key": "out", "self.value": "out", "output.dense": "in"},
    "mixtral": {"k_proj": "out", "v_proj": "out"},
    "vit": {"k_proj": "out", "v_proj": "out", "fc2": "in"},
}
OURS = {"bert": {"modules_to_save": ["classifier"]}}
THEIRS = {
    "llama": {},  # as PEFT chooses by itself
    "gpt2": {},
    "t5": {},
    "mixtral": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
    "bert": {
        "target_modules": r".*(key|value|\d+\.output\.dense)",
        "feedforward_modules": r".*\d+\.output\.dense",
        "modules_to_save": ["classifier"],
    },
}


def sides(model: torch.nn.Module) -> dict[str, str]:
    """Host -> the side of it that is multiplied."""
    found = adapters_of(model, "default").items()
    return {site: "in" if isinstance(adapter, RescaledInput) else "out" for site, adapter in found}


@pytest.mark.parametrize("name", AUTO)
def test_keys_values_and_feed_forward_are_found_in_every_architecture(name):
    model = build(name)
    blocks = "01" if name != "t5" else "0123"  # encoder and decoder, each with two
    found = sides(peftctl.attach(model, IA3()))
    assert not any("attention.output" in site for site in found)  # BERT's, which ends as its feed-forward does
    per_ending = {
        ending: [side for site, side in found.items() if site.endswith("." + ending)] for ending in AUTO[name]
    }
    times = {ending: 3 * len(blocks) // 2 if name == "t5" and ending in "kv" else len(blocks) for ending in AUTO[name]}
    assert per_ending == {ending: [side] * times[ending] for ending, side in AUTO[name].items()}
    assert len(found) == sum(times.values())


def test_fused_queries_keys_and_values_are_found_where_they_are():
    config = NeoXConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = sides(peftctl.attach(model, IA3()))
    layer = "gpt_neox.layers.0"
    assert found == {f"{layer}.attention.query_key_value": "out", f"{layer}.mlp.dense_4h_to_h": "in"}


def test_a_published_model_trains_as_many_numbers_as_its_widths_say():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    counted = sum(p.numel() for p in trained(peftctl.attach(model, IA3())).values())
    assert counted == 32 * (4096 + 4096 + 11008) == 614_400  # keys, values, inner width of the feed-forward


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_equation(name):
    model = peftctl.attach(build(name), IA3())
    stir(model)
    for site, side in sides(model).items():
        host, adapter = model.get_submodule(site), adapters_of(model, "default")[site]
        weight = host.weight.T if name == "gpt2" else host.weight
        bias = host.bias if host.bias is not None else torch.zeros(len(weight))
        factors = adapter.ia3_l.flatten()
        x = torch.randn(2, 3, weight.shape[1])
        for row, y in zip(x.flatten(0, 1), host(x).flatten(0, 1), strict=True):
            slow = weight @ (factors * row) + bias if side == "in" else factors * (weight @ row + bias)
            torch.testing.assert_close(y, slow, rtol=1e-5, atol=1e-5)


def test_a_small_change_is_not_lost_in_half_precision():
    model = peftctl.attach(build("llama").bfloat16(), IA3(target_modules=["v_proj"]))
    host = model.model.layers[0].self_attn.v_proj
    x = torch.randn(64, 32).bfloat16()
    before = host(x)
    with torch.no_grad():
        host.adapters["default"].ia3_l.fill_(1.003)  # in bfloat16 this is 1
    assert before.dtype == host(x).dtype == torch.bfloat16
    assert 1.001 < float(host(x).abs().double().sum() / before.abs().double().sum()) < 1.005


def test_feedforward_modules_say_which_side():
    targets = ["q_proj", "o_proj", "down_proj"]
    named = sides(peftctl.attach(build("llama"), IA3(target_modules=targets, feedforward_modules=["o_proj"])))
    assert {site for site, side in named.items() if side == "in"} == {s for s in named if s.endswith("o_proj")}
    pattern = r".*layers\.1.*down_proj"
    matched = sides(peftctl.attach(build("llama"), IA3(target_modules=targets, feedforward_modules=pattern)))
    assert [site for site, side in matched.items() if side == "in"] == ["model.layers.1.mlp.down_proj"]
    by_itself = sides(peftctl.attach(build("llama"), IA3(target_modules=targets)))
    assert {site for site, side in by_itself.items() if side == "in"} == {s for s in named if s.endswith("down_proj")}
    assert set(sides(peftctl.attach(build("llama"), IA3(feedforward_modules=[]))).values()) == {"out"}
    one = sides(peftctl.attach(build("llama"), IA3(layers_to_transform=1)))
    assert all(site.startswith("model.layers.1.") for site in one)
    assert len(one) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feedforward_modules": ["o_proj"]}, "method.feedforward_modules: `o_proj` matches no target module"),
        ({"feedforward_modules": "down"}, "method.feedforward_modules: `down` matches no target module"),
        ({"target_modules": ["embed_tokens"]}, "`model.embed_tokens` is a Embedding, no linear"),
    ],
)
def test_what_cannot_be_rescaled_is_told(fields, message):
    with pytest.raises(AdapterError, match=message):
        peftctl.attach(build("llama"), IA3(**fields))


def test_an_architecture_without_familiar_names_has_to_be_told():
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(4, 4)})
    with pytest.raises(AdapterError, match="`auto` knows no keys and values of ModuleDict") as caught:
        peftctl.attach(model, IA3())
    assert "target_modules" in str(caught.value.problems[0].hint)


@pytest.mark.parametrize("name", THEIRS)
def test_peft_reads_what_we_save(name, tmp_path):
    peft_reads_ours(name, "ia3", OURS.get(name, {}), tmp_path)


@pytest.mark.parametrize("name", THEIRS)
def test_we_read_what_peft_saves_and_write_it_back(name, tmp_path):
    config = peft.IA3Config(task_type=TASKS[name], **THEIRS[name])
    ours = we_read_peft(name, config, tmp_path / "theirs")
    written_back(ours, tmp_path / "theirs", tmp_path / "ours", frozenset({"feedforward_modules", "modules_to_save"}))


def test_a_vector_of_another_length_is_of_another_base(tmp_path):
    model = peftctl.attach(build("llama"), IA3())
    peftctl.save(model, tmp_path)
    with pytest.raises(AdapterError, match=r"is not part of this adapter|the model wants"):
        peftctl.load(build("gpt2"), tmp_path)


def test_merging_scales_rows_columns_and_biases():
    model = peftctl.attach(build("bert"), IA3())
    stir(model)
    expected, plain = logits(model), build("bert")
    layer = "bert.encoder.layer.0"
    key, out = (adapters_of(model, "default")[f"{layer}.{n}"].ia3_l for n in ("attention.self.key", "output.dense"))
    merged = peftctl.merge(model).get_submodule(layer)
    base = plain.get_submodule(layer)
    torch.testing.assert_close(merged.attention.self.key.weight, key.detach() * base.attention.self.key.weight)
    torch.testing.assert_close(merged.attention.self.key.bias, key.detach()[:, 0] * base.attention.self.key.bias)
    torch.testing.assert_close(merged.output.dense.weight, base.output.dense.weight * out.detach())
    assert torch.equal(merged.output.dense.bias, base.output.dense.bias)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
