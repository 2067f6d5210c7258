"""Model folders again in another type or in smaller files: same numbers, everything else copied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainwright.base.errors import ModelError
from trainwright.models import LlamaConfig, build_model, load_pretrained, save_pretrained
from trainwright.models.rewriting import rewrite_folder
from trainwright.testing import tiny_llama_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pretrained(build_model(LlamaConfig(**tiny_llama_config()), seed=1), tmp_path / "model")
    (tmp_path / "model" / "任务.json").write_text('{"labels": ["好", "坏"]}', encoding="utf-8")
    (tmp_path / "model" / "more").mkdir()
    (tmp_path / "model" / "more" / "file.txt").write_text("x", encoding="utf-8")
    return tmp_path / "model"


def test_another_type_in_several_files(folder: Path, tmp_path: Path) -> None:
    out = rewrite_folder(folder, tmp_path / "out", dtype=torch.bfloat16, max_shard_bytes=100_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    assert (out / "model.safetensors.index.json").is_file()
    before = load_file(folder / "model.safetensors")
    after = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items())
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["torch_dtype"] == "bfloat16"
    assert (out / "任务.json").read_text(encoding="utf-8") == '{"labels": ["好", "坏"]}'
    assert (out / "more" / "file.txt").read_text(encoding="utf-8") == "x"
    ids = torch.tensor([[1, 2, 3]])
    wide = load_pretrained(out, dtype=torch.float32)(ids)
    torch.testing.assert_close(wide, load_pretrained(folder)(ids), rtol=0.1, atol=0.05)


def test_files_are_joined_again(folder: Path, tmp_path: Path) -> None:
    small = rewrite_folder(folder, tmp_path / "small", max_shard_bytes=50_000)
    whole = rewrite_folder(small, tmp_path / "whole")
    assert [path.name for path in whole.glob("model*")] == ["model.safetensors"]
    assert (whole / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_scalars_integers_and_empty_tensors_stay(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(2.0),
        "count": torch.tensor([3]),
        "none": torch.zeros(0, 4),
        "w": torch.ones(2, 3),
    }
    (tmp_path / "m").mkdir()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "unheard of"}', encoding="utf-8")
    after = load_file(rewrite_folder(tmp_path / "m", tmp_path / "o", dtype=torch.float16) / "model.safetensors")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in after.items()} == {
        "scalar": (torch.float16, ()),
        "count": (torch.int64, (1,)),
        "none": (torch.float16, (0, 4)),
        "w": (torch.float16, (2, 3)),
    }


def test_numbers_that_fp16_cannot_hold_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_file({"w": torch.tensor([1e6])}, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"w has numbers up to 1e\+06, too large for float16"):
        rewrite_folder(tmp_path / "m", tmp_path / "o", dtype=torch.float16)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="an adapter alone"):
        rewrite_folder(tmp_path, tmp_path / "out")
