"""`trainwright merge`: a plain folder, the change measured, and refused where rounding does not explain it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainwright.base.errors import ConfigError, ModelError
from trainwright.cli.main import main
from trainwright.data import train_tokenizer
from trainwright.inference.adapter_merging import load_adapted, merge_folder
from trainwright.models import (
    BertConfig,
    HeadSpec,
    LlamaConfig,
    attach_head,
    build_model,
    load_pretrained,
    save_pretrained,
)
from trainwright.models.adapters import AdapterOptions, apply_adapter, save_adapter
from trainwright.testing import tiny_llama_config


def ids() -> Tensor:
    return torch.randint(96, (3, 16), generator=torch.Generator().manual_seed(2))


def trained(folder: Path, *, dtype: torch.dtype = torch.float32, head: HeadSpec | None = None, **options: Any) -> Any:
    """A base in `folder`/base and adapters in `folder`/adapter that belong to it; gives the model with both."""
    model = build_model(LlamaConfig(**tiny_llama_config(vocab_size=96)), seed=1)
    save_pretrained(model, folder / "base", dtype=dtype)
    model = load_pretrained(folder / "base", dtype=torch.float32)
    if head is not None:
        attach_head(model, head)
    apply_adapter(model, AdapterOptions(rank=4, **options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_adapter(model, folder / "adapter", base=str(folder / "base"))
    return model.eval()


@pytest.mark.parametrize(
    "options", [{}, {"name": "dora"}, {"base": "nf4"}, {"name": "rslora", "alpha": 8.0, "train": ("embed",)}]
)
def test_a_folder_of_adapters_becomes_a_plain_one(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained(tmp_path, **options)
    assert torch.equal(load_adapted(tmp_path / "adapter")(ids()), model(ids()))
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert "merging changes logits by at most" in said
    assert "the loss from" in said
    merged = load_pretrained(tmp_path / "merged")
    assert float((merged(ids()) - model(ids())).abs().max()) < 1e-5
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) != 0
    assert "is in use" in capsys.readouterr().err


def test_a_base_that_was_not_trained_on_is_refused_and_can_be_accepted(tmp_path: Path) -> None:
    trained(tmp_path, base="nf4")
    with pytest.raises(ModelError, match="too much"):
        merge_folder(tmp_path / "adapter", tmp_path / "merged", into="original")
    assert not (tmp_path / "merged").exists()
    report = merge_folder(tmp_path / "adapter", tmp_path / "merged", into="original", tolerance=10.0)
    assert report.difference > report.largest * 1e-3
    assert report.before is not None
    assert report.after is not None
    assert report.before != report.after


def test_weights_in_bf16_are_rounded_and_the_rounding_is_measured(tmp_path: Path) -> None:
    trained(tmp_path, dtype=torch.bfloat16)
    report = merge_folder(tmp_path / "adapter", tmp_path / "merged")
    assert 1e-4 < report.difference < report.tolerance
    assert load_pretrained(tmp_path / "merged").lm_head.weight.dtype == torch.bfloat16
    exact = merge_folder(tmp_path / "adapter", tmp_path / "wide", dtype=torch.float32)
    assert exact.difference < 1e-5


def test_a_task_s_head_comes_along(tmp_path: Path) -> None:
    model = trained(tmp_path, head=HeadSpec("sequence", ("good", "bad"), dropout=0.0))
    report = merge_folder(tmp_path / "adapter", tmp_path / "merged", rows=list(ids()))
    assert report.rows == 3
    assert report.before is None
    batch = {"input_ids": ids()}
    assert float((load_pretrained(tmp_path / "merged").scores(batch) - model.scores(batch)).abs().max()) < 1e-5
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="is not there"):
        merge_folder(tmp_path / "adapter", tmp_path / "merged")
    merge_folder(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "moved")
    assert main(["merge", str(tmp_path / "moved"), str(tmp_path / "new")]) != 0
    assert "no run" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="in use"):
        merge_folder(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "moved")


@pytest.mark.parametrize("options", [{}, {"base": "nf4"}, {"base": "bf16", "name": "dora"}])
def test_another_base_is_refused(tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, **options)
    for name, changes in (("trained anew", {}), ("narrow", {"hidden_size": 32})):
        other = build_model(LlamaConfig(**tiny_llama_config(vocab_size=96, **changes)), seed=9)
        save_pretrained(other, tmp_path / name)
        named = ["merge", str(tmp_path / "adapter"), str(tmp_path / "new"), "--base", str(tmp_path / name)]
        assert main(named) == ModelError.exit_code
        said = capsys.readouterr().err
        assert ("beside other weights" if not changes else "is not the model that the adapters") in said
    save_pretrained(load_pretrained(tmp_path / "base"), tmp_path / "rounded", dtype=torch.bfloat16)
    merge_folder(tmp_path / "adapter", tmp_path / "new", base=tmp_path / "rounded", tolerance=1.0)
    for field in ({"model": 3}, {"generation": 3}, {"base": "int3"}, {"base_sample": []}):
        (tmp_path / "adapter" / "trainwright_model.json").write_text(json.dumps(field))
        with pytest.raises(ModelError, match="trainwright_model"):
            merge_folder(tmp_path / "adapter", tmp_path / "never")


def test_what_ends_a_text_comes_along(tmp_path: Path) -> None:
    model = trained(tmp_path)
    merge_folder(tmp_path / "adapter", tmp_path / "first")
    assert "eos_token_id" not in json.loads((tmp_path / "first" / "generation_config.json").read_text())
    base = tmp_path / "base" / "generation_config.json"
    base.write_text(json.dumps({"eos_token_id": [3, 5], "temperature": 0.5}))
    merge_folder(tmp_path / "adapter", tmp_path / "second")
    values = json.loads((tmp_path / "second" / "generation_config.json").read_text())
    assert (values["eos_token_id"], values["temperature"]) == ([3, 5], 0.5)
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"), generation={"eos_token_id": 7})
    merge_folder(tmp_path / "adapter", tmp_path / "third")
    values = json.loads((tmp_path / "third" / "generation_config.json").read_text())
    assert values["eos_token_id"] == 7, "what the adapters were trained to end with"


def test_the_base_is_held_as_it_was_while_it_was_trained_beside(tmp_path: Path) -> None:
    model = trained(tmp_path, base="bf16")
    report = merge_folder(tmp_path / "adapter", tmp_path / "merged")
    assert report.difference < 1e-5
    merged = load_pretrained(tmp_path / "merged")
    assert float((merged(ids()) - model(ids())).abs().max()) < 1e-5
    weight = load_pretrained(tmp_path / "base").model.layers[0].self_attn.q_proj.weight
    whole = load_adapted(tmp_path / "adapter", whole=True)
    assert torch.equal(whole.model.layers[0].self_attn.q_proj.weight, weight)


def test_adapters_of_an_encoder(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=96, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96, max_position_embeddings=20
    )
    model = build_model(config, seed=1).eval()
    save_pretrained(model, tmp_path / "base")
    apply_adapter(model, AdapterOptions(rank=4, train=("lm_head.dense",)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    rows = [torch.arange(50), torch.arange(3)]  # the first is longer than its positions
    report = merge_folder(tmp_path / "adapter", tmp_path / "merged", rows=rows)
    assert (report.before, report.after, report.rows) == (None, None, 2)
    assert report.largest == pytest.approx(float(model(rows[0][None, :20]).abs().max()), rel=0.5)
    assert "the loss" not in str(report)
    assert float((load_pretrained(tmp_path / "merged")(ids()) - model(ids())).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read"), (b"\xff\xfe\x00", "not UTF-8"), (b"\n\n", "no line of two tokens")]
)
def test_a_text_that_cannot_be_measured_on(
    tmp_path: Path, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path)
    texts = (f"{word} and {word}" for word in ("one", "two", "three", "中文"))
    train_tokenizer("bpe", 270, texts).save(tmp_path / "base")
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    named = ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--text", str(tmp_path / "text")]
    assert main(named) == ConfigError.exit_code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
