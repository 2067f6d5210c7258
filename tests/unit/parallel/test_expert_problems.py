"""Why experts cannot be divided, said before anything is."""

from __future__ import annotations

import pytest

from trainwright.base.errors import ConfigError, ModelError
from trainwright.comm.mesh import Axis
from trainwright.models import build_model, preset
from trainwright.parallel.expert import apply_expert, expert_modules, expert_problems, legal_expert_degrees

TWO = Axis("expert", 0, 2)


def test_every_reason_is_named() -> None:
    config = preset("moe-tiny", capacity_factor=1.5)
    assert expert_problems(config, 2, 4) == []
    problems = expert_problems(config, 8, 6, tensor=5, context=2)
    assert len(problems) == 4
    assert "4 experts" in problems[0]
    assert "6 data-parallel ranks" in problems[1]
    assert "width 96" in problems[2]
    assert "whole rows" in problems[3]
    assert expert_problems(config, 0, 4) == ["parallel.expert is 0, expected at least 1"]
    assert expert_problems(preset("llama-1m"), 1, 4) == []
    assert "llama is no model of the moe family" in expert_problems(preset("llama-1m"), 2, 4)[0]


def test_legal_degrees() -> None:
    assert legal_expert_degrees(preset("moe-60m"), 12) == [1, 2, 4]
    assert legal_expert_degrees(preset("gpt2"), 12) == [1]


def test_an_axis_of_one_rank_leaves_the_model_alone() -> None:
    model = build_model(preset("moe-tiny"), device="meta")
    before = dict(model.named_parameters())
    assert apply_expert(model, Axis.alone("expert")) is model
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert [name for name, _ in expert_modules(model)] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def test_models_without_known_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="llama is no model of the moe family"):
        apply_expert(build_model(preset("llama-1m"), device="meta"), TWO)
    with pytest.raises(ConfigError, match="does not divide the 4 experts"):
        apply_expert(build_model(preset("moe-tiny"), device="meta"), Axis("expert", 0, 3))
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    foreign = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    with pytest.raises(ModelError, match="MixtralForCausalLM is not a native model"):
        apply_expert(foreign, TWO)
    assert apply_expert(foreign, Axis.alone("expert"), tensor=Axis("tensor", 0, 2)) is foreign
