"""Hugging Face folders: what is refused, and that a save is whole or not at all."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainwright.base.errors import ModelError
from trainwright.models import Decoder, build_model, load_pretrained, preset, save_pretrained
from trainwright.models.hub import download


@pytest.fixture
def model() -> Decoder:
    return build_model(preset("llama-1m", vocab_size=64), seed=2).eval()


@pytest.fixture
def folder(model: Decoder, tmp_path: Path) -> Path:
    return save_pretrained(model, tmp_path / "模型")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    values: dict[str, Any] = {**load_file(path), **changes}
    save_file({name: value for name, value in values.items() if value is not None}, path)


def test_round_trip_is_exact(model: Decoder, folder: Path) -> None:
    again = load_pretrained(folder)
    assert again.config == model.config
    for (name, ours), (_, theirs) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert again.lm_head.weight is again.embedding.weight
    assert "lm_head.weight" not in load_file(folder / "model.safetensors"), "tied weights are stored once"
    assert not again.training


def test_dtype_of_save_and_load(model: Decoder, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert load_pretrained(tmp_path).embedding.weight.dtype == torch.bfloat16
    assert load_pretrained(tmp_path, dtype=torch.float32).embedding.weight.dtype == torch.float32


def test_other_tensors_can_be_saved(model: Decoder, tmp_path: Path) -> None:
    averages = {name: torch.full_like(value, 0.5) for name, value in model.named_parameters()}
    save_pretrained(model, tmp_path, tensors=averages)
    assert all(bool((value == 0.5).all()) for value in load_pretrained(tmp_path).parameters())
    del averages["model.norm.weight"]
    with pytest.raises(ModelError, match=r"cannot save model\.norm\.weight: got nothing"):
        save_pretrained(model, tmp_path, tensors=averages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nebula"}, "unknown architecture: model_type='nebula'"),
        ({"model_type": None}, "unknown architecture: model_type=None"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "brings its own Python code"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"hidden_size": "big"}, "hidden_size='big'; expected an integer"),
        ({"num_hidden_layers": None}, "config.json has no 'num_hidden_layers'"),
        ({"dtype": "int8"}, "dtype='int8' is not supported"),
    ],
)
def test_unsupported_configs_are_refused_by_name(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        load_pretrained(folder)


def test_tensors_that_do_not_fit_are_all_named(folder: Path) -> None:
    edit_weights(
        folder,
        **{
            "model.norm.weight": None,
            "model.layers.0.mlp.up_proj.weight": torch.zeros(3, 4),
            "model.layers.0.surprise.weight": torch.zeros(2),
        },
    )
    with pytest.raises(ModelError) as caught:
        load_pretrained(folder)
    message = caught.value.message
    assert "1 missing: model.norm.weight" in message
    assert "1 unexpected: model.layers.0.surprise.weight" in message
    assert "model.layers.0.mlp.up_proj.weight is [3, 4], expected [344, 128]" in message


def test_tied_head_that_differs_is_refused(folder: Path) -> None:
    edit_weights(folder, **{"lm_head.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"]})
    load_pretrained(folder)  # an equal copy is fine
    edit_weights(folder, **{"lm_head.weight": torch.ones(64, 128)})
    with pytest.raises(ModelError, match=r"ties the output head .* but lm_head\.weight differs"):
        load_pretrained(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    edit_weights(folder, **{"model.norm.weight": torch.ones(128, dtype=torch.int8)})
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' is torch\.int8"):
        load_pretrained(folder)


class Bomb:
    """Pickled, it would touch a file when opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickle_is_refused_and_never_opened(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "touched")))
    with pytest.raises(ModelError, match=r"pickle \(pytorch_model\.bin\)"):
        load_pretrained(folder)
    # a pickle under the right name is no safetensors file either
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        load_pretrained(folder)
    assert not (tmp_path / "touched").exists()


def test_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{not json", encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        load_pretrained(folder)
    with pytest.raises(ModelError, match="no model folder at"):
        load_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json in"):
        load_pretrained(tmp_path / "empty")


def test_index_cannot_point_outside(model: Decoder, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "m", max_shard_bytes=100_000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    values = json.loads(index.read_text(encoding="utf-8"))
    first = next(iter(values["weight_map"]))
    original = values["weight_map"][first]
    values["weight_map"][first] = "../other.safetensors"
    index.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ModelError, match=r"points to '\.\./other\.safetensors'"):
        load_pretrained(tmp_path / "m")
    values["weight_map"][first] = original
    index.write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / "m" / original).unlink()
    with pytest.raises(ModelError, match="names files that are not there"):
        load_pretrained(tmp_path / "m")


def test_failed_save_leaves_the_old_folder(model: Decoder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setenv("TRAINWRIGHT_FAULTS", "model.before_commit:enospc")
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(build_model(model.config, seed=9), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_again_removes_the_old_shards(model: Decoder, tmp_path: Path) -> None:
    (tmp_path / "model-notes.txt").write_text("mine", encoding="utf-8")
    save_pretrained(model, tmp_path, max_shard_bytes=100_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    save_pretrained(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-notes.txt",
        "model.safetensors",
    ]


def test_generation_config_is_written(model: Decoder, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path, generation={"eos_token_id": 5, "temperature": 0.7, "do_sample": True})
    values = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert values["eos_token_id"] == 5
    assert values["temperature"] == 0.7


def test_hub_without_network_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="cannot reach the Hugging Face hub for 'nobody/nothing'"):
        download("nobody/nothing")
    with pytest.raises(ModelError, match="is not a hub name"):
        download("not a name!")
