"""Runs with adapters from recipe to files: the model, its adapters, checkpoints on the way, resuming, merging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trainwright.base.errors import CheckpointError
from trainwright.base.faults import FAULTS_VARIABLE, InjectedFault
from trainwright.checkpoint import CheckpointReader
from trainwright.inference.adapter_merging import load_adapted
from trainwright.inference.checkpoints import load_checkpointed_model
from trainwright.inference.export_checkpoint import export_checkpoint
from trainwright.models import load_pretrained
from trainwright.models.adapters import SavedAdapter
from trainwright.testing import run_ranks
from trainwright.trainer import Trainer

TEXT = "the quick brown fox jumps over the lazy dog. " * 200
MODEL = {
    "family": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


def recipe(folder: Path, name: str, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "model": {"config": MODEL},
        "data": {"source": str(folder / "text.txt"), "sequence_length": 32, "tokenizer": {"train": "char"}},
        "train": {"steps": 6, "batch_tokens": 128, "eval_every": "6 steps"},
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "precision": "fp32",
        "checkpoint": {"every": "3 steps"},
        "run": {"name": name, "dir": str(folder / "runs")},
        **changes,
    }
    values["data"]["cache"] = str(folder / "cache")
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{"name": "dora", "rank": 4}, {"name": "qlora", "rank": 4}])
def test_a_run_writes_adapters_and_a_merged_model(
    tmp_path: Path, adapter: dict[str, Any], trainwright: Callable[..., Any]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    done = trainwright("train", str(recipe(tmp_path, "base")), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    base = tmp_path / "runs" / "base" / "model"
    data = {"source": str(tmp_path / "text.txt"), "sequence_length": 32}
    path = recipe(tmp_path, "tuned", model={"path": str(base)}, adapter=adapter, data=data)
    done = trainwright("train", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "beside 14 linears" in done.stdout + done.stderr
    run = tmp_path / "runs" / "tuned"
    assert SavedAdapter(run / "adapter").base == str(base)
    ids = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
    tuned, merged = load_adapted(run / "adapter"), load_pretrained(run / "model")
    assert float((tuned(ids) - merged(ids)).abs().max()) < 1e-5
    assert float((tuned(ids) - load_pretrained(base)(ids)).abs().max()) > 1e-2, "something was learned"
    # The last checkpoint is the same model; export and generation read it without the recipe.
    kept = load_checkpointed_model(run / "checkpoints" / "step-6")
    assert float((kept(ids) - merged(ids)).abs().max()) < 1e-5
    done = trainwright("export", str(run), str(tmp_path / "exported"), "--step", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    early = load_pretrained(tmp_path / "exported")
    assert float((early(ids) - load_checkpointed_model(run / "checkpoints" / "step-3")(ids)).abs().max()) < 1e-5
    done = trainwright("merge", str(run), str(tmp_path / "merged"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "merging changes logits by at most" in done.stdout
    assert float((load_pretrained(tmp_path / "merged")(ids) - merged(ids)).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["dora", "qlora"])
@pytest.mark.parametrize("trained_base", [True, False])
def test_a_run_that_broke_off_goes_on_as_if_it_had_not(
    tmp_path: Path, name: str, trained_base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"adapter": {"name": name, "rank": 4, "dropout": 0.1}}
    if trained_base:
        changes |= {"model": {"path": str(base_model(tmp_path))}, "data": data_of(tmp_path)}
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    Trainer(recipe(tmp_path, "whole", **changes)).fit()
    broken = recipe(tmp_path, "broken", **changes)
    monkeypatch.setenv(FAULTS_VARIABLE, "data.next:raise@step=4")
    with pytest.raises(InjectedFault):
        Trainer(broken).fit()
    monkeypatch.delenv(FAULTS_VARIABLE)
    Trainer(broken, resume=str(tmp_path / "runs" / "broken")).fit()
    ids = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
    whole, resumed = (load_pretrained(tmp_path / "runs" / run / "model")(ids) for run in ("whole", "broken"))
    assert torch.equal(whole, resumed)


def resume_on_ranks(rank: int, world: int, path: str, run: str) -> None:
    Trainer(path, resume=run).fit()


@pytest.mark.parametrize(
    ("model", "adapter", "parallel"),
    [
        ({}, {"name": "qlora"}, {"zero": 3}),
        # A tied matrix is trained, and each stage has a copy of it.
        ({"tie_embeddings": True}, {"name": "lora", "train": ["embed_tokens"]}, {"pipeline": {"stages": 2}}),
        # Nothing of the first stage is trained.
        ({}, {"name": "lora", "targets": [r"layers\.1\."]}, {"pipeline": {"stages": 2}}),
    ],
)
def test_two_ranks_go_on_from_one_with_the_base_in_place(
    tmp_path: Path,
    model: dict[str, Any],
    adapter: dict[str, Any],
    parallel: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = {"steps": 6, "batch_tokens": 128, "eval_every": "3 steps", "micro_batch": 2}
    changes = {"model": {"path": str(base_model(tmp_path, **model))}, "data": data_of(tmp_path), "train": train}
    changes |= {"adapter": {**adapter, "rank": 4}, "checkpoint": {"every": "3 steps", "keep_best": True}}
    Trainer(recipe(tmp_path, "whole", **changes)).fit()
    broken = recipe(tmp_path, "broken", **changes)
    monkeypatch.setenv(FAULTS_VARIABLE, "data.next:raise@step=4")
    with pytest.raises(InjectedFault):
        Trainer(broken).fit()
    monkeypatch.delenv(FAULTS_VARIABLE)
    again = recipe(tmp_path, "broken", **changes, parallel=parallel)
    run_ranks(resume_on_ranks, 2, str(again), str(tmp_path / "runs" / "broken"), timeout=300)
    with torch.no_grad():
        ids = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
        whole, resumed = (load_pretrained(tmp_path / "runs" / run / "model")(ids) for run in ("whole", "broken"))
    assert torch.allclose(whole, resumed, atol=1e-4)


def base_model(folder: Path, **model: Any) -> Path:
    """A small model that was trained, with its tokenizer."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    Trainer(recipe(folder, "base", model={"config": {**MODEL, **model}})).fit()
    return folder / "runs" / "base" / "model"


def data_of(folder: Path) -> dict[str, Any]:
    return {"source": str(folder / "text.txt"), "sequence_length": 32}


@pytest.mark.parametrize(
    "adapter",
    [
        {"name": "lora", "rank": 4, "train": ["norm"]},
        {"name": "qlora", "rank": 4, "train": ["embed_tokens"]},
        {"name": "dora", "rank": 4, "base": "bf16"},
    ],
)
def test_checkpoints_name_the_base_of_adapters_instead_of_holding_it(tmp_path: Path, adapter: dict[str, Any]) -> None:
    base = base_model(tmp_path)
    train = {"steps": 6, "batch_tokens": 128, "eval_every": "3 steps", "ema": {"decay": 0.5}}
    changes = {"model": {"path": str(base)}, "data": data_of(tmp_path), "adapter": adapter, "train": train}
    Trainer(recipe(tmp_path, "tuned", **changes, checkpoint={"every": "3 steps", "keep_best": True})).fit()
    checkpoint = tmp_path / "runs" / "tuned" / "checkpoints" / "step-6"
    with CheckpointReader(checkpoint) as reader:
        held = reader.state_with({name: name for name in reader.manifest.tensors})["engine"]["model"]
    trained = ("lora_A", "lora_B", "magnitude", *(f"{name}.weight" for name in adapter.get("train", ())))
    assert len(held) >= 28  # A and B of 14 linears
    assert all(name.endswith(trained) or "norm" in name for name in held), list(held)
    # What is read of it is the model all the same, whole or a piece at a time.
    ids = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
    kept = load_checkpointed_model(checkpoint)
    exported = load_pretrained(export_checkpoint(checkpoint, tmp_path / "exported"))
    with torch.no_grad():
        assert torch.allclose(kept(ids), exported(ids), atol=1e-6)
        assert (kept(ids) - load_pretrained(base)(ids)).abs().max() > 1e-2, "something was learned"


MIXTURE = {
    "family": "moe",
    "architecture": "dots1",
    "qk_norm": True,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_size": 32,
    "shared_size": 32,
    "router_scores": "sigmoid",
    "bias_rate": 0.05,
}


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        ({"tie_embeddings": True}, {"name": "lora", "rank": 4, "train": ["lm_head"]}),
        (MIXTURE, {"name": "lora", "rank": 4}),  # its balance of experts moves, though no optimizer trains it
    ],
)
def test_what_moves_beside_adapters_is_in_checkpoints(
    tmp_path: Path, model: dict[str, Any], adapter: dict[str, Any]
) -> None:
    base = base_model(tmp_path, **model)
    Trainer(recipe(tmp_path, "tuned", model={"path": str(base)}, data=data_of(tmp_path), adapter=adapter)).fit()
    run = tmp_path / "runs" / "tuned"
    kept, final = load_checkpointed_model(run / "checkpoints" / "step-6"), load_pretrained(run / "model")
    ids = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(kept(ids), final(ids), atol=1e-6)
        if "train" in adapter:  # the folder of adapters holds it too
            assert torch.allclose(load_adapted(run / "adapter")(ids), final(ids), atol=1e-5)


def test_a_changed_or_lost_base_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_model(tmp_path)
    path = recipe(tmp_path, "tuned", model={"path": str(base)}, data=data_of(tmp_path), adapter="lora")
    monkeypatch.setenv(FAULTS_VARIABLE, "data.next:raise@step=4")
    with pytest.raises(InjectedFault):
        Trainer(path).fit()
    monkeypatch.delenv(FAULTS_VARIABLE)
    run = tmp_path / "runs" / "tuned"
    weights = base / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors in .* is not what the adapters were trained beside"):
        Trainer(path, resume=str(run)).fit()
    with pytest.raises(CheckpointError, match=r"is not what the adapters were trained beside"):
        load_checkpointed_model(run / "checkpoints" / "step-3")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="the model that the adapters stand beside is not at") as refused:
        export_checkpoint(run / "checkpoints" / "step-3", tmp_path / "exported")
    assert refused.value.hint is not None
    assert not (tmp_path / "exported").exists()
    (tmp_path / "elsewhere").rename(base)
    weights.write_bytes(before)
    assert Trainer(path, resume=str(run)).fit().steps == 6
