"""`peftctl adapters`, from the words to the folder."""

from __future__ import annotations

import json

import peft
import pytest
import tiny
import torch

import peftctl as package


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Writes a LoRA of the tiny Llama into a folder of the working directory, called `name`."""
    monkeypatch.chdir(tmp_path)

    def made(name, seed=0, method="lora", base="base", **fields):
        model = tiny.build("llama")
        model.name_or_path = base
        defaults = {"r": 4, "alpha": 8} if method == "lora" else {}
        package.attach(model, package.METHODS[method](**defaults | fields))
        tiny.stir(model, seed)
        package.save(model, name)
        return name

    return made


def answer(folder):
    return tiny.logits(package.load(tiny.build("llama"), folder))


def test_no_command_shows_the_help_as_an_error(peftctl):
    session = peftctl("adapters")
    assert (session.code, session.out) == (2, "")
    assert session.err == peftctl("adapters", "--help").out


def test_inspect(peftctl, make):
    session = peftctl("adapters", "inspect", make("a", target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}))
    assert (session.code, session.err) == (0, "")
    lines = [line.split() for line in session.out.splitlines()]
    assert ["modules", "4:", "2", "q_proj,", "2", "v_proj"] in lines
    assert ["rank", "2", "to", "4,", "3.0", "on", "average"] in lines
    assert any(line[:3] == ["q_proj", "2", "4"] for line in lines)
    found = peftctl("adapters", "inspect", "a", "--json").json()
    assert (found["method"], len(found["updates"])) == ("lora", 4)


def test_inspect_takes_a_run_and_other_methods(peftctl, make):
    make("run/adapter", method="vera", r=8)
    session = peftctl("adapters", "inspect", "run")
    assert session.code == 0
    assert "vera (PEFT: VERA)" in session.out


def test_diff(peftctl, make):
    session = peftctl("adapters", "diff", make("a"), make("b", 1, alpha=16, target_modules=["q_proj"]))
    assert (session.code, session.err) == (0, "")
    assert ["alpha", "8,", "16"] in [line.split() for line in session.out.splitlines()]
    found = peftctl("adapters", "diff", "a", "b", "--json").json()
    assert [site["site"] for site in found["sites"]] == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties", "dare"])
def test_combine(peftctl, make, how):
    words = ["combine", make("a"), make("b", 1), "--weights", "0.7,0.3", "--how", how, "--output", "both"]
    session = peftctl("adapters", *words)
    assert (session.code, session.out) == (0, "both\n")
    assert "energy kept" in session.err
    theirs = peft.PeftModel.from_pretrained(tiny.build("llama"), "both").eval()
    torch.testing.assert_close(tiny.logits(theirs), answer("both"), rtol=1e-5, atol=1e-5)
    if how in ("linear", "cat"):
        model = package.load(package.load(tiny.build("llama"), "a", name="a"), "b", name="b")
        wanted = tiny.logits(package.activate(model, {"a": 0.7, "b": 0.3}))
        torch.testing.assert_close(answer("both"), wanted, rtol=1e-5, atol=1e-5)


def test_combine_tells_what_it_did(peftctl, make):
    found = peftctl("adapters", "combine", make("a"), make("b", 1), "--output", "both", "--json").json()
    assert (found["path"], found["how"], found["weights"], found["adapters"]) == (
        "both",
        "linear",
        [0.5, 0.5],
        ["a", "b"],
    )
    assert found["energy"] == pytest.approx(1.0)
    assert {site["rank"] for site in found["sites"]} == {8}


def test_resize_and_convert(peftctl, make):
    assert peftctl("adapters", "resize", make("a"), "--r", "8", "--output", "bigger").out == "bigger\n"
    torch.testing.assert_close(answer("bigger"), answer("a"), rtol=1e-6, atol=1e-6)
    tiny.build("llama").save_pretrained("base")
    make("v", method="vera", r=8)
    session = peftctl("adapters", "convert", "v", "--to", "lora", "--r", "8", "--output", "lora")
    assert (session.code, session.out) == (0, "lora\n")
    torch.testing.assert_close(answer("lora"), answer("v"), rtol=1e-4, atol=1e-5)
    named = peftctl(
        "adapters", "convert", "v", "--to", "lora", "--r", "2", "--base", "base", "--output", "l2", "--json"
    )
    assert 0 < named.json()["energy"] < 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--weights", "1,x"], 2, "error: `--weights`: `x` is not a number"),
        (["--weights", "1,nan"], 2, "error: `--weights`: `nan` is not a number"),
        (["--weights", "1"], 1, "error: weights: expected 2 numbers, one an adapter; got 1"),
        (["--weights", "0,0"], 1, "error: weights: all are zero"),
        (["--density", "0"], 1, "error: density: expected a number above 0, up to 1; got 0"),
        (["--r", "3"], 1, "error: r: `linear` has the rank that it needs"),
    ],
)
def test_words_that_cannot_be_combined(peftctl, make, words, code, message):
    session = peftctl("adapters", "combine", make("a"), make("b", 1), *words, "--output", "both")
    assert (session.code, session.out) == (code, "")
    assert message in session.err


def test_bases_are_compared(peftctl, make, tmp_path):
    words = ["adapters", "combine", make("a"), make("b", 1, base="other"), "--output"]
    session = peftctl(*words, "both")
    assert session.code == 0
    assert "warning: b: its base is `other`, that of a is `base`" in session.err
    for name, digest in (("a", "1"), ("b", "2")):
        (tmp_path / name / "peftctl.json").write_text(json.dumps({"base": {"weights": digest}}))
    session = peftctl(*words, "again")
    assert session.code == 1
    assert "error: b: trained on another base than a" in session.err
    assert not (tmp_path / "again").exists()


def test_what_is_there_stays(peftctl, make, tmp_path):
    make("a")
    session = peftctl("adapters", "resize", "a", "--r", "2", "--output", "a")
    assert session.code == 1
    assert "error: a: exists already" in session.err
    assert peftctl("adapters", "inspect", "nowhere").code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
