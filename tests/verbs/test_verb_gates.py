"""Gates as a CI job meets them: exit code, files, and what they compare with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny_chat

import peftctl
from peftctl.errors import GateFailed, PeftctlError
from peftctl.verbs.asked import Asked
from peftctl.verbs.evaluate import evaluate
from peftctl.verbs.mortal import one_thread

CLI = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny_chat.chats(24, start=90))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, made: Callable[..., Any]) -> dict[str, Path]:
    """Runs of two seeds, and one that was hardly trained."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed, steps in (("one", 0, 25), ("two", 1, 25), ("worse", 0, 2)):
        wanted = made(seed=seed, trainer={"steps": steps, "save_every": 100})
        with one_thread():
            peftctl.train(wanted, output=folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def gated(runs: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of the runs, to be written to."""
    return {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in runs.items()}


def gates(**limits: Any) -> str:
    return f"eval.gates={json.dumps(limits)}"


def test_a_worse_model_fails_the_build_and_another_seed_does_not(
    gated: dict[str, Path], rows: Path, cli: CLI, tmp_path
):
    held = ["--data", rows, "--metrics", "loss,token_accuracy"]
    assert cli("eval", gated["one"], *held).code == 0
    limits = gates(
        loss={"max_ratio": 1.05, "against": str(gated["one"])},
        token_accuracy={"max_drop": 0.05, "against": str(gated["one"]), "min": 0.1},
    )
    files = ["--junit", tmp_path / "ci" / "gates.xml", "--markdown", tmp_path / "ci" / "summary.md"]
    same = cli("eval", gated["two"], *held, limits, *files)
    assert same.code == 0, same.err
    [suite] = ElementTree.parse(tmp_path / "ci" / "gates.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "0")

    worse = cli("eval", gated["worse"], *held, limits, *files)
    assert worse.code == 3
    assert worse.out == f"{gated['worse']}/eval.json\n"
    assert "error: gate `loss max_ratio 1.05 against" in worse.err
    [suite] = ElementTree.parse(tmp_path / "ci" / "gates.xml").getroot()
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert f"loss max_ratio 1.05 against {gated['one']}" in failed
    assert "failed" in (tmp_path / "ci" / "summary.md").read_text()
    record = json.loads((gated["worse"] / "eval.json").read_text())
    assert {one["status"] for one in record["gates"]} >= {"failed"}

    told = cli("eval", gated["worse"], *held, limits, "--json")
    assert told.code == 3
    assert json.loads(told.out)["gates"] == record["gates"]


def test_the_base_is_what_gates_compare_with_by_default(gated: dict[str, Path], rows: Path):
    asked = Asked(data=(str(rows),), metrics=("loss",))
    record = evaluate(str(gated["one"]), asked=asked, overrides=[gates(loss={"max_ratio": 0.9})])
    [gate] = record["gates"]
    assert (gate["against"], gate["status"]) == ("base", "passed")
    assert gate["estimate"] == record["compared"]["loss"]["ratio"]["estimate"]
    low, high = record["intervals"]["adapter"]["loss"]
    assert low < record["figures"]["adapter"]["loss"] < high
    with pytest.raises(GateFailed) as caught:
        evaluate(str(gated["one"]), asked=asked, overrides=[gates(loss={"max": 0.01})])
    assert caught.value.exit_code == 3
    assert caught.value.result["gates"][0]["status"] == "failed"


@pytest.mark.parametrize("size", [1, 24])
def test_neither_batches_nor_the_order_of_rows_change_a_verdict(
    gated: dict[str, Path], rows: Path, tmp_path: Path, size: int
):
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    limits = gates(loss={"max_ratio": 0.9}, exact_match={"min": 0.0}, accuracy={"max_drop": 0.2})
    labels = f"eval.labels={json.dumps(tiny_chat.LABELS)}"
    found = [
        evaluate(
            str(gated["one"]), asked=Asked(data=(str(path),)), overrides=[labels, limits, f"eval.batch_size={batch}"]
        )
        for path, batch in ((rows, 8), (turned, size))
    ]
    first, second = ([(one["status"], one["estimate"], *one["interval"]) for one in run["gates"]] for run in found)
    for one, other in zip(first, second, strict=True):
        assert one[0] == other[0]
        assert one[1:] == pytest.approx(other[1:], rel=1e-5)


def test_what_cannot_be_compared_says_what_to_run(gated: dict[str, Path], rows: Path, tmp_path: Path):
    limits = gates(loss={"max_ratio": 1.05, "against": str(gated["one"])})

    def complaint(**asked: Any) -> tuple[str, str]:
        with pytest.raises(PeftctlError) as caught:
            evaluate(str(gated["two"]), asked=Asked(**{"data": (str(rows),), **asked}), overrides=[limits])
        [(text, hint)] = caught.value.problems
        return text.removeprefix(f"eval.gates.loss: {gated['one']}: "), str(hint)

    text, hint = complaint()
    assert text == "was never evaluated"
    assert f"`peftctl eval {gated['one']} --data {rows} --metrics " in hint
    evaluate(str(gated["one"]), asked=Asked(data=(str(rows),), metrics=("token_accuracy",)))
    assert complaint()[0] == "`loss` was not measured there"
    evaluate(str(gated["one"]), asked=Asked(data=(str(rows),), metrics=("loss",), max_rows=9))
    text, hint = complaint(max_rows=8)
    assert text == "was evaluated on other rows"
    assert "--max-rows 8" in hint
    evaluate(str(gated["one"]), adapter=str(gated["worse"] / "adapter"), asked=Asked(data=(str(rows),)))
    assert complaint()[0] == "another adapter than its own was evaluated there last"
    evaluate(str(gated["one"]), asked=Asked(data=(str(rows),)))
    evaluate(str(gated["two"]), asked=Asked(data=(str(rows),)), overrides=[limits])


def test_eval_sets_by_name(made: Callable[..., Any], rows: Path, data: Path, tmp_path: Path, cli: CLI):
    wanted = made(trainer={"steps": 2}, eval={"gates": {"hard/loss": {"max": 100}}, "metrics": ["loss"]})
    wanted["dataset"]["eval"] = {"held_out": str(data / "held-out.jsonl"), "hard": [str(rows)]}
    run = tmp_path / "run"
    peftctl.train(wanted, output=run)
    [told] = [event for event in tiny_chat.journal(run) if event["event"] == "eval"]
    assert list(told["losses"]) == ["held_out", "hard"]
    assert told["loss"] == told["losses"]["held_out"]
    record = evaluate(str(run))
    for name, loss in told["losses"].items():
        assert record["figures"]["adapter"][f"{name}/loss"] == pytest.approx(loss, rel=1e-5)
    assert [gate["gate"] for gate in record["gates"]] == ["hard/loss max 100"]
    assert list(record["data"]) == ["held_out", "hard"]

    alone = cli("eval", run, "--set", "held_out", "--json")
    assert set(json.loads(alone.out)["figures"]["adapter"]) == {"held_out/rows", "held_out/loss"}
    assert "eval.gates.hard/loss: not judged" in alone.err
    wrong = cli("eval", run, "--set", "har")
    assert (wrong.code, wrong.out) == (1, "")
    assert "did you mean `hard`?" in wrong.err


def test_options_instead_of_the_recipe(gated: dict[str, Path], rows: Path, data: Path, cli: CLI):
    held = data / "held-out.jsonl"
    words = [
        "--data",
        f"a={rows}",
        "--data",
        f"b={held}",
        "--metrics",
        "accuracy,confusion",
        "--labels",
        "no,yes,maybe",
    ]
    record = json.loads(cli("eval", gated["one"], *words, "--max-rows", "6", "eval.samples=2", "--json").out)
    assert set(record["figures"]["base"]) == {"a/rows", "a/accuracy", "b/rows", "b/accuracy"}
    assert record["figures"]["base"]["a/rows"] == 6
    table = record["confusion"]["a"]["adapter"]
    assert table["labels"] == ["no", "yes", "maybe"]
    assert sum(map(sum, table["counts"])) == 6
    right = sum(table["counts"][i][i] for i in range(3))
    assert record["figures"]["adapter"]["a/accuracy"] == right / 6
    assert [set(one) for one in record["samples"]["b"]] == [{"place", "question", "answer", "base", "adapter"}] * 2
    for words, said in (
        (["--metrics", "los"], "did you mean `loss`?"),
        (["--data", rows, "--data", f"b={held}"], "some of the rows have a name"),
        (["--labels", "yes"], "one label leaves nothing to choose"),
    ):
        result = cli("eval", gated["one"], *words)
        assert result.code == 1
        assert said in result.err


def test_a_base_alone_is_not_judged(recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: CLI):
    monkeypatch.chdir(tmp_path)
    result = cli("eval", recipe_file(eval={"gates": {"loss": {"max": 0.01}}}))
    assert result.code == 0
    assert "none is judged" in result.err


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"hrd/loss": {"max": 1}}, "no evaluation rows have that name"),
        ({"loss": {"maxi": 1}}, "unknown key"),
        ({"loss": {}}, "a gate without a limit"),
    ],
)
def test_gates_that_the_recipe_refuses(block: Any, message: str, recipe_file: Any, cli: CLI):
    result = cli("validate", recipe_file(eval={"gates": block}))
    assert result.code == 1
    assert message in result.err
    assert "eval.gates" in result.err


def test_other_metrics_leave_the_gates_of_a_recipe_alone(gated: dict[str, Path], rows: Path, cli: CLI):
    limits = gates(loss={"max": 0.001})
    assert cli("eval", gated["one"], "--data", rows, "--metrics", "loss", limits).code == 3
    other = cli("eval", gated["one"], "--data", rows, "--metrics", "token_accuracy", limits)
    assert (other.code, json.loads((gated["one"] / "eval.json").read_text())["gates"]) == (0, [])


def test_a_gate_that_is_missed_within_noise_warns(gated: dict[str, Path], rows: Path, cli: CLI):
    measured = ["--data", rows, "--metrics", "token_accuracy", "--max-rows", "8"]
    cli("eval", gated["worse"], *measured)
    record = json.loads((gated["worse"] / "eval.json").read_text())
    figure = record["figures"]["adapter"]["token_accuracy"]
    high = record["intervals"]["adapter"]["token_accuracy"][1]
    assert figure < high
    missed = cli("eval", gated["worse"], *measured, gates(token_accuracy={"min": (figure + high) / 2}))
    assert missed.code == 0
    assert "warning: gate `token_accuracy min" in missed.err
    assert "is missed, within noise" in missed.err
    assert "hint: more evaluation rows would tell" in missed.err
