from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_run import OPTIMIZERS, Run, flip

from peftctl.errors import NonFiniteError, RunError, StorageError
from peftctl.training import checkpoint, snapshot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_is_bit_for_bit_never_stopped(tmp_path: Path, optimizer: str, dtype: torch.dtype) -> None:
    whole = Run(tmp_path / "whole", optimizer, dtype=dtype)
    whole.train(3)
    whole.save()
    at_the_stop = whole.digest()
    whole.train(3)

    resumed = Run(tmp_path / "whole", optimizer, dtype=dtype, seed=1)
    resumed.train(1)  # leaves moments, generators and schedule somewhere else
    assert resumed.resume().state == {"epoch": 0, "best": -math.inf, "cursor": (1, 3)}
    assert resumed.digest() == at_the_stop
    resumed.train(3)
    assert resumed.digest() == whole.digest()


def test_without_the_random_generators_it_would_differ(tmp_path: Path) -> None:
    whole = Run(tmp_path)
    whole.train(2)
    whole.save()
    whole.train(1)
    resumed = Run(tmp_path, seed=1)
    found, _ = checkpoint.latest(tmp_path)
    assert found is not None
    checkpoint.restore(found, resumed.trainable, resumed.optimizer, resumed.names, resumed.scheduler)
    resumed.train(1)
    assert resumed.digest() != whole.digest()


def test_nothing_on_the_disk_needs_pickle(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(1)
    path = run.save()
    assert [file.name for file in sorted(path.rglob("*"))] == [
        "adapter",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
        "trainable.safetensors",
    ]
    assert path == tmp_path / "step-000001"
    moments = load_file(path / "optimizer.safetensors")
    assert moments["0.weight/exp_avg"].equal(run.optimizer.state[run.model[0].weight]["exp_avg"])
    assert json.loads((path / "state.json").read_text())["optimizer"]["groups"][0]["names"] == ["0.weight", "0.bias"]


def test_every_rank_has_its_generators(tmp_path: Path) -> None:
    run = Run(tmp_path)
    states = []
    for rank in range(2):
        torch.manual_seed(rank)
        states.append(snapshot.rng_state())
    run.train(1)
    checkpoint.save(
        tmp_path,
        1,
        trainable=run.trainable,
        optimizer=run.optimizer,
        names=run.names,
        scheduler=None,
        state={},
        write_adapter=run.write_adapter,
        rng=states,
    )
    found = checkpoint.load(tmp_path / "step-000001")
    for rank in range(2):
        assert found.restore_rng(rank)
        assert torch.get_rng_state().equal(states[rank]["torch"])
    assert not found.restore_rng(2)


def test_a_model_that_differs_is_refused_with_all_its_names_and_untouched(tmp_path: Path) -> None:
    saved = Run(tmp_path)
    saved.train(1)
    saved.save()
    other = Run(tmp_path, "sgd", seed=1)
    trainable = other.trainable
    trainable["0.weight"] = trainable["0.weight"].double()
    trainable["3.bias"] = torch.zeros(5)
    trainable["new.weight"] = trainable.pop("3.weight")
    names = {parameter: {"3.weight": "new.weight"}.get(name, name) for parameter, name in other.names.items()}
    before = other.digest()
    found, _ = checkpoint.latest(tmp_path)
    assert found is not None
    with pytest.raises(RunError) as caught:
        checkpoint.restore(found, trainable, other.optimizer, names, other.scheduler)
    assert [problem.text.removeprefix(f"{found.path}: ") for problem in caught.value.problems] == [
        "`new.weight` is missing in the checkpoint",
        "`3.weight` is in the checkpoint only",
        "`0.weight` is [32, 64] float64; the checkpoint holds [32, 64] float32",
        "`3.bias` is [5] float32; the checkpoint holds [64] float32",
        "optimizer `SGD`: the checkpoint holds a `AdamW`",
        "optimizer group 1: `new.weight` is missing in the checkpoint",
        "optimizer group 1: `3.weight` is in the checkpoint only",
    ]
    assert other.digest() == before
    with pytest.raises(RunError):
        checkpoint.restore_weights(found.path, trainable)


def test_best_weights_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(1)
    best = {name: value.clone() for name, value in run.trainable.items()}
    path = run.save()
    run.train(2)
    moment = run.optimizer.state[run.model[0].weight]["exp_avg"].clone()
    checkpoint.restore_weights(path, run.trainable)
    assert all(value.equal(best[name]) for name, value in run.trainable.items())
    assert run.optimizer.state[run.model[0].weight]["exp_avg"].equal(moment)
    flip(path / "trainable.safetensors", -1)
    with pytest.raises(StorageError):
        checkpoint.restore_weights(path, run.trainable)


def test_what_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(1)
    run.save()
    run.step = 2
    run.model[0].weight.data[0, 0] = math.nan
    run.model[3].bias.data[0] = math.inf
    with pytest.raises(NonFiniteError, match="not finite after step 2") as caught:
        run.save()
    assert [problem.text.split(":")[0] for problem in caught.value.problems] == ["0.weight", "3.bias"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_what_changed_since_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.train(1)
    found = checkpoint.load(run.save())
    device = torch.device("cpu")
    assert found.changed_since(device) == []
    found.surroundings.update(torch="2.9.0", processes="2")
    torch.set_num_threads(2)
    assert found.changed_since(device) == [
        "processes: 2 then, 1 now",
        "threads: 1 then, 2 now",
        f"torch: 2.9.0 then, {torch.__version__} now",
    ]
    assert any(line.startswith("device: cpu (") for line in found.changed_since(torch.device("mps")))
