"""Adapters in architectures of transformers, on one process and on two ranks; other methods of peft."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_runs import TRANSFORMERS, Adapted
from test_lora_layouts import check, some
from torch import Tensor

from trainwright.base.errors import ConfigError, ModelError
from trainwright.config import AdapterSection, Recipe, load_recipe
from trainwright.inference.adapter_merging import merge_folder
from trainwright.memory import count_memory
from trainwright.models import HeadSpec, LlamaConfig, Pretrained, build_model, load_pretrained, save_pretrained
from trainwright.models.adapters import AdapterOptions, apply_adapter, load_adapter, save_adapter
from trainwright.models.adapters.peft_methods import apply_peft_method, merge_peft_method, save_peft_method
from trainwright.models.adapters.saving import source_of
from trainwright.models.hugging_face.config import HuggingFaceConfig
from trainwright.planner.memory import MemorySettings, predict_rank_memory
from trainwright.planner.model_facts import model_facts
from trainwright.planner.trained import training_of
from trainwright.testing import tiny_llama_config
from trainwright.trainer.adapters import merged_peft_model

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


def recipe_of(adapter: dict[str, Any]) -> Recipe:
    base = {"model": {"preset": "llama-1m"}, "data": {"source": "python-stdlib"}}
    return load_recipe({**base, "adapter": adapter}).recipe


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", ["dora", "qlora"])
def test_the_planner_counts_what_is_trained(kind: str, name: str) -> None:
    config = HuggingFaceConfig(ARCHITECTURES[kind])
    facts = model_facts(config, 12, recipe_of({"name": name, "rank": 4}))
    model = build_model(config, seed=1)
    report = apply_adapter(
        model, AdapterOptions(rank=4, name=name.removeprefix("q"), base="nf4" if name == "qlora" else "as_is")
    )
    assert facts.training is not None
    assert (facts.training.trained, facts.training.total) == (report.trained, report.total)
    memory = predict_rank_memory(facts, MemorySettings(1, 12, precision="fp32"))
    assert memory.parameters == count_memory(model).parameters
    assert memory.gradients == 4 * report.trained
    assert facts.training.flops < 0.85 * facts.flops_per_token


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
    planned = training_of(HuggingFaceConfig(TRANSFORMERS), 12, recipe_of({"name": "peft", "config": config}))
    assert (planned.trained, planned.total) == (report.trained, report.total)
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
        ({"peft_type": "POLY"}, "with every batch"),
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


@pytest.mark.parametrize("kind", ["deberta-v2", "distilbert", "albert", "t5"])
def test_what_lies_between_trunk_and_scores_is_trained(tmp_path: Path, kind: str) -> None:
    sizes: dict[str, dict[str, Any]] = {
        **ARCHITECTURES,
        "distilbert": {"model_type": "distilbert", "vocab_size": 97, "dim": 64, "hidden_dim": 96, "n_layers": 2},
        "albert": {"model_type": "albert", **SMALL, "embedding_size": 32},
    }
    sizes["distilbert"]["n_heads"] = 4
    base = HuggingFaceConfig(sizes[kind])
    save_pretrained(build_model(base, seed=1), tmp_path / "base")
    config = dataclasses.replace(base, head=HeadSpec("sequence", ("a", "b"), dropout=0.0))
    model = load_pretrained(tmp_path / "base", config=config, seed=1)
    begin = Pretrained(tmp_path / "base", config, seed=1).fresh
    report = apply_adapter(model, AdapterOptions(rank=4, targets=("q",)))
    assert begin <= set(report.extra), "nothing that starts at random stays so"
    disturb(model)
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    merge_folder(tmp_path / "adapter", tmp_path / "merged")
    ids = torch.randint(9, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 1  # the end token of T5, whose vector its class reads
    batch = {"input_ids": ids, "key_mask": torch.ones_like(ids, dtype=torch.bool)}
    again = load_pretrained(tmp_path / "merged")
    assert again.config.head == config.head
    with torch.no_grad():
        assert apart(again.scores(batch), model.scores(batch)) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "IA3"},
        {"peft_type": "RANDLORA", "target_modules": ["q_proj", "v_proj"]},
        {"peft_type": "OSF", "target_modules": ["q_proj", "v_proj"]},
        {"peft_type": "LN_TUNING"},
    ],
    ids=lambda config: config["peft_type"],
)
def test_the_model_of_a_run_is_what_was_trained(tmp_path: Path, config: dict[str, Any]) -> None:
    """Some methods draw at random what they keep, or make it of the base's weights."""
    model: Any = build_model(HuggingFaceConfig(TRANSFORMERS), seed=1).eval()
    apply_peft_method(model, config, seed=4)
    disturb(model)
    section = AdapterSection(name="peft", config=config)
    merged_peft_model(model.config, section, source_of(model), tmp_path, seed=4)
    ids = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))
    assert apart(load_pretrained(tmp_path)(ids), model(input_ids=ids).logits) < 1e-5


def test_on_two_ranks() -> None:
    check(
        2,
        [
            (Adapted("transformers", AdapterOptions(name="dora", rank=4)), some("zero-2", "zero-3", "tensor 2")),
            (Adapted("transformers", {"peft_type": "IA3"}), some("zero-0", "zero-1", "zero-3")),
        ],
    )
