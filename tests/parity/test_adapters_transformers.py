"""Adapters in architectures of transformers, on one process and on two ranks; other methods of peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_runs import TRANSFORMERS, Adapted
from test_lora_layouts import check, some
from torch import Tensor

from trainwright.base.errors import ConfigError, ModelError
from trainwright.inference.adapter_merging import merge_folder
from trainwright.models import LlamaConfig, build_model, load_pretrained, save_pretrained
from trainwright.models.adapters import AdapterOptions, apply_adapter, load_adapter, save_adapter
from trainwright.models.adapters.peft_methods import apply_peft_method, merge_peft_method, save_peft_method
from trainwright.models.hugging_face.config import HuggingFaceConfig
from trainwright.testing import tiny_llama_config

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "phi": {"model_type": "phi", **SMALL},
    "gpt_neox": {"model_type": "gpt_neox", **SMALL},
    "deberta-v2": {"model_type": "deberta-v2", **SMALL},
    "t5": {
        "model_type": "t5",
        "vocab_size": 97,
        "d_model": 64,
        "d_ff": 128,
        "d_kv": 16,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
}


def disturb(model: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max().detach())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_files_of_transformers_models_open_in_peft_and_merge(tmp_path: Path, kind: str) -> None:
    model = build_model(HuggingFaceConfig(ARCHITECTURES[kind]), seed=1).eval()
    save_pretrained(model, tmp_path / "base")
    ids = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "t5" else {})}
    apply_adapter(model, AdapterOptions(rank=4, name="dora", base="nf4" if kind == "t5" else "as_is"))
    disturb(model)
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    expected = model(**inputs).logits
    if kind != "t5":  # in 4 bits here
        twin = getattr(transformers, model.config.model_class.__name__).from_pretrained(tmp_path / "base")
        twin = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").eval()
        assert apart(twin(**inputs).logits, expected) < 1e-5
    again = load_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter", base="nf4" if kind == "t5" else "as_is")
    assert torch.equal(again(**inputs).logits, expected)
    merge_folder(tmp_path / "adapter", tmp_path / "merged")
    assert apart(load_pretrained(tmp_path / "merged")(**inputs).logits, expected) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "IA3"},
        {"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj"]},
        {"peft_type": "OFT", "r": 0, "oft_block_size": 16, "target_modules": ["q_proj", "down_proj"]},
        {"peft_type": "LN_TUNING"},
    ],
    ids=lambda config: config["peft_type"],
)
def test_other_methods_of_peft_train_and_peft_opens_them(tmp_path: Path, config: dict[str, Any]) -> None:
    model: Any = build_model(HuggingFaceConfig(TRANSFORMERS), seed=1).eval()
    save_pretrained(model, tmp_path / "base")
    ids = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids).logits
    report = apply_peft_method(model, config)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert 0 < report.trained < 0.1 * report.total
    disturb(model)
    save_peft_method(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    twin = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").eval()
    expected = model(input_ids=ids).logits
    assert apart(twin(input_ids=ids).logits, expected) < 1e-5
    save_pretrained(merge_peft_method(model), tmp_path / "merged")
    assert apart(load_pretrained(tmp_path / "merged")(ids), expected) < 1e-5, "by the native family"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "LORA"}, "method of our own"),
        ({"peft_type": "PROMPT_TUNING"}, "not a part of the model"),
        ({"peft_type": "NONE_SUCH"}, "not one of"),
        ({"peft_type": "IA3", "rnak": 1}, "rnak"),
        ({"peft_type": "IA3", "target_modules": ["zz"], "feedforward_modules": []}, "zz"),
    ],
)
def test_what_does_not_fit_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        apply_peft_method(build_model(HuggingFaceConfig(TRANSFORMERS)), config)
    with pytest.raises(ModelError, match="native family"):
        apply_peft_method(build_model(LlamaConfig(**tiny_llama_config())), config)


def test_on_two_ranks() -> None:
    check(
        2,
        [
            (Adapted("transformers", AdapterOptions(name="dora", rank=4)), some("zero-2", "zero-3", "tensor 2")),
            (Adapted("transformers", {"peft_type": "IA3"}), some("zero-0", "zero-1", "zero-3")),
        ],
    )
