"""Checkpoints of many ranks become Hugging Face folders, bit for bit, in a fraction of the model's memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainwright.base.errors import CheckpointError
from trainwright.base.faults import FAULTS_VARIABLE
from trainwright.checkpoint import save_checkpoint
from trainwright.inference.export_checkpoint import export_checkpoint
from trainwright.models import build_model, load_pretrained, preset, save_pretrained
from trainwright.models.fields import config_fields
from trainwright.models.gpt2.config import GPT2Config
from trainwright.models.llama.config import LlamaConfig
from trainwright.testing import run_ranks, tiny_gpt2_config, tiny_llama_config

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**tiny_llama_config()),
    "llama-tied": LlamaConfig(**tiny_llama_config(tie_embeddings=True)),
    "llama-interleaved": LlamaConfig(**tiny_llama_config(rotary_layout="interleaved")),
    "gpt2": GPT2Config(**tiny_gpt2_config()),
    "gpt2-no-bias": GPT2Config(**tiny_gpt2_config(bias=False)),
}


def save_sharded(rank: int, world: int, folder: str) -> None:
    """Every configuration, its weights sharded over the ranks, as the engine keeps them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from trainwright.comm import start

    ranks = start(device="cpu")
    mesh = init_device_mesh("cpu", (world,))
    for name, config in CONFIGS.items():
        model = build_model(config, seed=3)
        weights = {key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in model.state_dict().items()}
        state = {"engine": {"model": weights}}
        save_checkpoint(Path(folder) / name, 7, state, {"model": config_fields(config)}, ranks=ranks)


def test_exports_of_sharded_checkpoints_are_those_of_the_model(tmp_path: Path) -> None:
    run_ranks(save_sharded, 3, str(tmp_path))
    for name, config in CONFIGS.items():
        model = build_model(config, seed=3)
        for size in (5_000_000_000, 100_000):
            ours, theirs = tmp_path / f"{name}-{size}", tmp_path / f"{name}-{size}-expected"
            export_checkpoint(tmp_path / name / "step-7", ours, max_shard_bytes=size)
            save_pretrained(model, theirs, max_shard_bytes=size)
            assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
            for path in ours.iterdir():
                assert path.read_bytes() == (theirs / path.name).read_bytes(), path
        loaded = load_pretrained(ours)
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value) or "interleaved" in name, key
        assert not list(tmp_path.glob(".*"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = CONFIGS["llama-tied"]
    model = build_model(config, seed=3, dtype=torch.bfloat16)
    averages = {name: torch.full_like(value, 0.3, dtype=torch.float32) for name, value in model.named_parameters()}
    state = {"engine": {"model": model.state_dict(), "ema": {"steps": 3, "averages": averages}}}
    return save_checkpoint(tmp_path / "saves", 1, state, {"model": config_fields(config)}).path


def test_averages_and_dtypes(checkpoint: Path, tmp_path: Path) -> None:
    plain = load_file(export_checkpoint(checkpoint, tmp_path / "plain") / "model.safetensors")
    assert {value.dtype for value in plain.values()} == {torch.bfloat16}
    wide = load_file(export_checkpoint(checkpoint, tmp_path / "wide", dtype=torch.float32) / "model.safetensors")
    assert {value.dtype for value in wide.values()} == {torch.float32}
    assert all(bool((value == torch.tensor(0.3)).all()) for value in wide.values())
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_what_lies_beside_the_weights_comes_with_them(checkpoint: Path, tmp_path: Path) -> None:
    folder = export_checkpoint(
        checkpoint, tmp_path / "out", generation={"eos_token_id": 5}, add=lambda f: (f / "词表.txt").write_text("a")
    )
    assert (folder / "词表.txt").read_text() == "a"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 5


def test_an_export_exists_completely_or_not_at_all(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setenv(FAULTS_VARIABLE, "model.before_commit:enospc")
        with pytest.raises(OSError, match="No space left"):
            export_checkpoint(checkpoint, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="in use"):
        export_checkpoint(checkpoint, tmp_path / "used")
    data = next(checkpoint.glob("data-*"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=data.name):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_without_the_model_is_refused(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    empty = save_checkpoint(tmp_path, 1, {"train": 1}, {"model": config_fields(config)})
    with pytest.raises(CheckpointError, match="holds no model"):
        export_checkpoint(empty.path, tmp_path / "out")
    state = {"engine": {"model": dict(list(build_model(config).state_dict().items())[1:])}}
    partial = save_checkpoint(tmp_path, 2, state, {"model": config_fields(config)})
    with pytest.raises(CheckpointError, match="is missing or not of shape"):
        export_checkpoint(partial.path, tmp_path / "out")


MEASURE = r"""
import re, sys
from trainwright.inference.export_checkpoint import export_checkpoint
from trainwright.models import build_model
# Not getrusage: its maximum is inherited from the process that started this one.
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
export_checkpoint(sys.argv[1], sys.argv[2])
before = peak()
export_checkpoint(sys.argv[3], sys.argv[4])
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_model(checkpoint: Path, tmp_path: Path) -> None:
    """A model of 420 MB: exporting it takes less than a quarter of that, whatever the number of its tensors."""
    config = preset("llama-34m", num_layers=30)
    model = build_model(config)
    size = sum(value.numel() * value.element_size() for value in model.parameters())
    large = save_checkpoint(
        tmp_path / "large", 1, {"engine": {"model": model.state_dict()}}, {"model": config_fields(config)}
    )
    del model
    arguments = [str(checkpoint), str(tmp_path / "a"), str(large.path), str(tmp_path / "b")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True, env=os.environ
    )
    grown = int(done.stdout)
    print(f"model {size / 1e6:.0f} MB, export grew the process by {grown / 1e6:.0f} MB")
    assert size > 400e6
    assert grown < size / 4
