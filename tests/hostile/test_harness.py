"""The harness can fail: everything that it watches for is done once, and seen."""

from __future__ import annotations

import pytest
from hostile.attack import Attack

SEEN = {
    "write_outside": "open",
    "link_outside": "open",
    "run_pickle": "pickle.find_class",
    "connect": "socket.",
    "import_stranger": "compile",
    "import_by_name": "import",
    "write_by_native_code": "changed",
    "popen": "subprocess.Popen",
    "swallow": "os.system",
    "tell_the_token": "the token",
    "keep_the_token": "the token",
}


@pytest.mark.parametrize("payload", SEEN)
def test_the_canary_sings(payload: str, attack: Attack):
    seen = attack.run(payload=payload, writes=["."])
    assert any(line.startswith(SEEN[payload]) for line in seen.sang), seen
    with pytest.raises(AssertionError):
        attack.harmless(payload=payload, writes=["."])


@pytest.mark.parametrize("payload", ["forever", "swell", "traceback", "die"])
def test_what_ends_badly_is_seen(payload: str, attack: Attack):
    with pytest.raises(AssertionError):
        attack.refused(payload=payload, seconds=1, telling="")


def test_memory_is_seen(attack: Attack):
    seen = attack.run(payload="swell_a_little")
    assert seen.grown > 350
    with pytest.raises(AssertionError):
        attack.harmless(payload="swell_a_little")


def test_another_complaint_is_seen(attack: Attack):
    attack.recipe(seed="x")
    with pytest.raises(AssertionError):
        attack.refused("validate", "recipe.yaml", telling="something else")


@pytest.mark.slow
def test_what_sleeps_is_ended(attack: Attack):
    assert "hung" in attack.run(payload="sleep", seconds=1).sang


def test_what_is_good_is_let_through(attack: Attack):
    attack.recipe(trainer={"steps": 1, "fast": "off"})  # the fast path starts a compiler of ours
    assert "recipe.yaml: ok" in attack.harmless("validate", "recipe.yaml").out
    attack.harmless("data", "recipe.yaml")
    attack.harmless("train", "recipe.yaml", writes=["run"], within=20, swelling=600)
    assert (attack.work / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert attack.harmless("generate", "run", "hi", "--max-new-tokens", "2").out
