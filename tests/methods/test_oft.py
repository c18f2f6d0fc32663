"""OFT's own arithmetic, and its folders against HF PEFT."""

from __future__ import annotations

import json
from contextlib import nullcontext

import peft
import pytest
import torch
from methods.oracle import TASKS, peft_reads_ours, we_read_peft, written_back
from tiny import build, logits, stir
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftctl
from peftctl.engine.attach import adapters_of, trained
from peftctl.errors import AdapterError
from peftctl.methods.oft import OFT, Rotation, neumann

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "mixtral": ["q_proj", "o_proj"],
    "t5": ["q", "v", "wo"],
    "bert": ["query", "intermediate.dense"],
}
VARIANTS = {
    "plain": ({"block_size": 8}, {"oft_block_size": 8}),
    "default": ({}, {}),
    "r": ({"r": 4}, {"r": 4, "oft_block_size": 0}),
    "exact": ({"block_size": 8, "use_cayley_neumann": False}, {"oft_block_size": 8, "use_cayley_neumann": False}),
    "shared": ({"block_size": 8, "block_share": True}, {"oft_block_size": 8, "block_share": True}),
    "coft": ({"block_size": 8, "coft": True, "eps": 0.5}, {"oft_block_size": 8, "coft": True, "eps": 0.5}),
    "uneven": ({"block_size": 20}, {"oft_block_size": 20}),
    "biases": ({"block_size": 8, "bias": "oft_only"}, {"oft_block_size": 8, "bias": "oft_only"}),
}
TERMS = {f"terms {n}": ({"num_cayley_neumann_terms": n}, {"num_cayley_neumann_terms": n}) for n in (2, 3, 4, 6, 9)}


def adapters(model: nn.Module) -> list[Rotation]:
    return [a for a in adapters_of(model, "default").values() if isinstance(a, Rotation)]


def test_how_many_parameters_llama_7b_trains():
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig())  # its defaults are those of the first 7B model
    model = peftctl.attach(skeleton, OFT(target_modules=["q_proj", "v_proj"]))
    assert sum(p.numel() for p in trained(model).values()) == 32 * 2 * (4096 // 32) * (32 * 31 // 2)


@pytest.mark.parametrize("shared", [False, True])
def test_the_equation(shared):
    """Entry by entry: Q from the numbers above its diagonal, R by an inverse, one big block-diagonal matrix."""
    fields = {"block_size": 8, "block_share": shared, "use_cayley_neumann": False}
    model = peftctl.attach(build("llama"), OFT(target_modules=["q_proj", "down_proj"], **fields))
    stir(model)
    for site, adapter in adapters_of(model, "default").items():
        host = model.get_submodule(site)
        rotations = []
        for block in range(host.in_features // 8):
            numbers = iter(adapter.oft_R[0 if shared else block].tolist())
            Q = torch.zeros(8, 8, dtype=torch.float64)
            for i in range(8):
                for j in range(i + 1, 8):
                    Q[i, j] = next(numbers)
                    Q[j, i] = -Q[i, j]
            rotations.append((torch.eye(8) - Q) @ torch.inverse(torch.eye(8) + Q))
        R = torch.block_diag(*rotations)
        torch.testing.assert_close(R @ R.T, torch.eye(host.in_features, dtype=torch.float64))
        x = torch.randn(2, 3, host.in_features)
        expected = (x.double() @ R) @ host.weight.double().T
        torch.testing.assert_close(host(x), expected.float(), rtol=1e-5, atol=1e-5)
        turned = adapter.merged(host.weight.detach()).double()
        gram = host.weight.double() @ host.weight.double().T
        torch.testing.assert_close(turned @ turned.T, gram, rtol=1e-5, atol=1e-5)  # lengths and angles of rows


def test_more_terms_come_closer_to_the_inverse():
    entries = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.05
    Q = torch.zeros(3, 4, 4, dtype=torch.float64)
    i, j = torch.triu_indices(4, 4, 1)
    Q[:, i, j] = entries
    Q = Q - Q.mT
    eye = torch.eye(4, dtype=torch.float64)
    exact = (eye + Q) @ torch.inverse(eye - Q) - eye
    errors = [float((neumann(Q, terms) - exact).norm()) for terms in (2, 4, 5, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


def test_small_rotations_survive_half_precision():
    model = peftctl.attach(build("llama"), OFT(block_size=8, target_modules=["q_proj"])).bfloat16()
    adapter = adapters(model)[0].float()
    with torch.no_grad():
        adapter.oft_R.fill_(1e-4)
        x = torch.eye(32, dtype=torch.bfloat16)
        change = adapter.turned(x, adapter.change().bfloat16()).double() - x.double()
    above = torch.block_diag(*[torch.ones(8, 8).triu(1)] * 4).bool()
    torch.testing.assert_close(change[above], torch.full((112,), 2e-4).double(), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("inputs", "wanted", "size"), [(48, 32, 24), (48, 20, 16), (32, 32, 32), (7, 32, 7), (30, 8, 6)]
)
def test_a_block_size_that_does_not_divide_gives_way_to_the_nearest(inputs, wanted, size):
    assert OFT(block_size=wanted).size(inputs) == size
    with pytest.warns(UserWarning, match="Invalid") if inputs % wanted else nullcontext():
        theirs = peft.get_peft_model(
            nn.Sequential(nn.Linear(inputs, 4)), peft.OFTConfig(oft_block_size=wanted, target_modules=["0"])
        )
    assert theirs.base_model.model[0].oft_block_size["default"] == size


def test_coft_keeps_every_block_within_its_radius():
    method = OFT(block_size=8, coft=True, eps=0.3, target_modules=["q_proj"])
    model = peftctl.attach(build("llama"), method)
    stir(model)
    before, radius = logits(model), 0.3 / 4**0.5
    [first, *_] = adapters(model)
    assert (2**0.5 * first.oft_R.norm(dim=1) > radius).any()
    method.after_step(model, 0, 10)
    assert (2**0.5 * first.oft_R.norm(dim=1) <= radius * 1.0001).all()
    torch.testing.assert_close(logits(model), before)  # they were used shortened all along
    model(input_ids=torch.arange(3, 12)[None]).logits.square().mean().backward()
    radial = (first.oft_R.grad * first.oft_R).sum(1)
    assert (radial.abs() > 1e-8).all()  # gradients may lead off the sphere


def test_dropout_leaves_whole_blocks_unturned():
    model = peftctl.attach(build("llama"), OFT(block_size=8, dropout=0.5, target_modules=["q_proj"]))
    stir(model)
    adapter, x = adapters(model)[0], torch.randn(1, 32)
    turned = adapter.turned(x, adapter.change())
    model.train()
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        [given] = [adapter(lambda x: x, x)]
        same = torch.isclose(given, x).view(4, 8).all(1)
        assert torch.equal(given.view(4, 8)[same], x.view(4, 8)[same])
        torch.testing.assert_close(given.view(4, 8)[~same], turned.view(4, 8)[~same])
        seen.add(tuple(same.tolist()))
    assert len(seen) > 5


def test_block_size_and_number_of_blocks_exclude_each_other():
    with pytest.raises(ValueError, match="leave one out"):
        OFT(block_size=8, r=4)


def fields(name: str, variant: str) -> tuple[dict, dict]:
    ours, theirs = (VARIANTS | TERMS)[variant]
    common = {"target_modules": TARGETS[name]} | ({"modules_to_save": ["classifier"]} if name == "bert" else {})
    return common | ours, common | {"task_type": TASKS[name]} | theirs


CASES = [(name, variant) for name in TARGETS for variant in VARIANTS] + [("llama", variant) for variant in TERMS]


@pytest.mark.filterwarnings("ignore:Invalid")
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_peft_reads_ours(name, variant, tmp_path):
    peft_reads_ours(name, "oft", fields(name, variant)[0], tmp_path)


@pytest.mark.filterwarnings("ignore:Invalid")
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_we_read_peft(name, variant, tmp_path):
    ours = we_read_peft(name, peft.OFTConfig(**fields(name, variant)[1]), tmp_path / "theirs")
    guessed = frozenset({"modules_to_save"} if name == "bert" else ())  # PEFT adds names of heads
    written_back(ours, tmp_path / "theirs", tmp_path / "ours", guessed)


def test_peft_stands_around_no_conv1d(tmp_path):
    ours = peftctl.attach(build("gpt2"), OFT(block_size=8))
    stir(ours)
    peftctl.save(ours, tmp_path)
    with pytest.raises(TypeError, match="not supported"):
        peft.PeftModel.from_pretrained(build("gpt2"), tmp_path)
    assert torch.equal(logits(peftctl.load(build("gpt2"), tmp_path)), logits(ours))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"r": 4}, "exactly one"),
        ({"oft_block_size": 0}, "exactly one"),
        ({"oft_block_size": None}, "before 0.14"),
        ({"oft_block_size": 16}, "has shape"),
        ({"num_cayley_neumann_terms": 1}, "at least 2"),
        ({"eps": 0}, "above 0"),
    ],
)
def test_a_folder_that_contradicts_itself(change, told, tmp_path):
    peftctl.save(peftctl.attach(build("llama"), OFT(block_size=8)), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(
        json.dumps({key: value for key, value in config.items() if value is not None or key != "oft_block_size"})
    )
    with pytest.raises(AdapterError, match=told):
        peftctl.load(build("llama"), tmp_path)
