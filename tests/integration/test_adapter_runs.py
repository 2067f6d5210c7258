"""Runs with adapters from recipe to files: the model, its adapters, checkpoints on the way, resuming, merging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trainwright.base.faults import FAULTS_VARIABLE, InjectedFault
from trainwright.inference.adapter_merging import load_adapted
from trainwright.inference.checkpoints import load_checkpointed_model
from trainwright.models import load_pretrained
from trainwright.models.adapters import SavedAdapter
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
def test_a_run_that_broke_off_goes_on_as_if_it_had_not(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    adapter = {"name": name, "rank": 4, "dropout": 0.1}
    Trainer(recipe(tmp_path, "whole", adapter=adapter)).fit()
    broken = recipe(tmp_path, "broken", adapter=adapter)
    monkeypatch.setenv(FAULTS_VARIABLE, "data.next:raise@step=4")
    with pytest.raises(InjectedFault):
        Trainer(broken).fit()
    monkeypatch.delenv(FAULTS_VARIABLE)
    Trainer(broken, resume=str(tmp_path / "runs" / "broken")).fit()
    ids = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
    whole, resumed = (load_pretrained(tmp_path / "runs" / run / "model")(ids) for run in ("whole", "broken"))
    assert torch.equal(whole, resumed)
