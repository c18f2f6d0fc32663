from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from toy_run import Run, flip, steps_in

from peftctl.errors import StorageError
from peftctl.training import checkpoint, manifest


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 9 and 10."""
    folder = tmp_path_factory.mktemp("two")
    run = Run(folder)
    run.train(9)
    run.save()
    run.train(1)
    run.save()
    return folder


@pytest.fixture
def copy(two: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two, tmp_path / "copy"))


FILES = [
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "manifest.json",
    "optimizer.safetensors",
    "rng.safetensors",
    "state.json",
    "trainable.safetensors",
]


def falls_back(folder: Path, why: str) -> None:
    found, skipped = checkpoint.latest(folder)
    assert found is not None
    assert found.step == 9
    ((path, reason),) = skipped
    assert path.name == "step-000010"
    assert why in reason


@pytest.mark.parametrize("name", FILES)
def test_damage_is_seen_said_and_an_older_one_taken(copy: Path, name: str) -> None:
    file = copy / "step-000010" / name
    whole = file.read_bytes()
    label = "`manifest.json`" if name == "manifest.json" else f"`{name}`"
    for damaged in (whole[:-2], b"", b"\0" * len(whole), whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        falls_back(copy, label)
    file.unlink()
    falls_back(copy, f"{label} is missing")


def test_any_flipped_bit_is_seen(copy: Path) -> None:
    draw = random.Random(0)
    folder = copy / "step-000010"
    for name in FILES:
        whole = (folder / name).read_bytes()
        spots = range(8 * len(whole)) if len(whole) < 10 else draw.sample(range(8 * len(whole)), 60)
        for spot in spots:
            flip(folder / name, *divmod(spot, 8))
            with pytest.raises(StorageError):
                checkpoint.load(folder)
            (folder / name).write_bytes(whole)
    assert checkpoint.load(folder).step == 10


def test_files_of_another_checkpoint_do_not_pass(copy: Path) -> None:
    for name in ("optimizer.safetensors", "rng.safetensors", "state.json", "trainable.safetensors"):
        whole = (copy / "step-000010" / name).read_bytes()
        shutil.copy(copy / "step-000009" / name, copy / "step-000010" / name)
        falls_back(copy, f"`{name}`")
        (copy / "step-000010" / name).write_bytes(whole)


def test_a_file_too_many_is_seen(copy: Path) -> None:
    (copy / "step-000010" / "adapter" / "pytorch_model.bin").write_bytes(b"x")
    falls_back(copy, "`adapter/pytorch_model.bin` does not belong to it")


def test_a_renamed_checkpoint_is_not_taken_for_another_step(copy: Path) -> None:
    (copy / "step-000009").rename(copy / "step-000011")
    found, skipped = checkpoint.latest(copy)
    assert found is not None
    assert found.step == 10
    assert [reason for _, reason in skipped] == ["holds step 9"]


def test_another_format_is_refused_in_words(copy: Path) -> None:
    folder = copy / "step-000010"
    record = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(record | {"format": 2}))
    falls_back(copy, "format 2; this version reads 1")
    for text in ('{"format": 2}', '{"format": 1}', "[]", "[" * 100_000):
        (folder / "state.json").write_text(text)
        (folder / "manifest.json").unlink()
        manifest.seal(folder, {})
        falls_back(copy, "format 2; this version reads 1" if "2" in text else "`state.json` is not what")


def test_the_newest_is_by_number_and_junk_is_no_checkpoint(copy: Path) -> None:
    for name in ("step-000010.bak", "step-12", "best", "step-"):
        (copy / name).mkdir()
    (copy / "step-000009").touch()
    (copy / "step-000012").write_text("not a folder")
    (copy / "step-1000000").mkdir()
    found, skipped = checkpoint.latest(copy)
    assert found is not None
    assert found.step == 10
    assert [path.name for path, _ in skipped] == ["step-1000000", "step-000012"]
    assert skipped[0][1] == "`manifest.json` is missing: it was never finished"


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) == (None, [])
    assert checkpoint.latest(tmp_path / "none") == (None, [])
    (tmp_path / "step-000001").mkdir()
    found, skipped = checkpoint.latest(tmp_path)
    assert found is None
    assert len(skipped) == 1


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(1, None, [4, 5]), (2, 1, [1, 4, 5]), (3, 4, [3, 4, 5]), (9, None, [1, 2, 3, 4, 5])]
)
def test_prune_keeps_the_newest_two_at_least_and_the_best(
    tmp_path: Path, keep: int, best: int | None, left: list[int]
) -> None:
    run = Run(tmp_path)
    for _ in range(5):
        run.train(1)
        run.save()
    gone = checkpoint.prune(tmp_path, keep, best)
    assert steps_in(tmp_path) == left
    assert sorted(path.name for path in gone) == [f"step-{step:06d}" for step in range(1, 6) if step not in left]


def test_prune_counts_only_what_verifies(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(4):
        run.train(1)
        path = run.save()
    flip(path / "optimizer.safetensors", -1)
    checkpoint.prune(tmp_path, 1)
    assert steps_in(tmp_path) == [2, 3, 4]


def test_the_same_step_again_replaces_it(copy: Path) -> None:
    run = Run(copy, seed=1)
    flip(copy / "step-000010" / "state.json", 5)
    run.resume()
    run.train(1)
    run.save()
    assert checkpoint.load(copy / "step-000010").step == 10
    assert steps_in(copy) == [9, 10]


def test_a_pinned_one_stays(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(5):
        run.train(1)
        run.save()
    (tmp_path / "step-000002.pin").touch()
    checkpoint.prune(tmp_path, 2)
    (tmp_path / "step-000002.pin").unlink()
    assert steps_in(tmp_path) == [2, 4, 5]
    found, skipped = checkpoint.latest(tmp_path)
    assert (found and found.step, skipped) == (5, [])


@pytest.mark.parametrize("value", [{"$": "tensor", "name": "gone"}, {"$": "pickle"}])
def test_parts_that_do_not_belong_together_change_nothing(copy: Path, value: dict[str, str]) -> None:
    folder = copy / "step-000010"
    record = json.loads((folder / "state.json").read_text())
    first = next(iter(record["optimizer"]["state"].values()))
    first["exp_avg"] = value
    (folder / "state.json").write_text(json.dumps(record))
    (folder / "manifest.json").unlink()
    manifest.seal(folder, {})
    run = Run(copy, seed=1)
    before = run.digest()
    with pytest.raises(StorageError, match=r"asks for what `optimizer\.safetensors` does not hold"):
        run.resume()
    assert run.digest() == before
