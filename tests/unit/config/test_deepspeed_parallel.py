"""Where a DeepSpeed or Megatron user says over how many ranks a model is divided, and what becomes of it."""

from __future__ import annotations

from typing import Any

import pytest

from trainwright.base.errors import ConfigError
from trainwright.config import EngineConfig, load_engine_config, load_recipe


def load(world: int = 8, **keys: Any) -> tuple[EngineConfig, dict[str, str]]:
    loaded = load_engine_config({"train_micro_batch_size_per_gpu": 2, **keys}, world=world)
    return loaded.config, {note.key: str(note).removeprefix(f"{note.key}: ") for note in loaded.notes}


def refused(world: int = 8, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(world, **keys)
    return caught.value.message


@pytest.mark.parametrize(
    "section", [{"autotp_size": 4}, {"tp": {"tp_size": 4}}, {"tensor_parallel": {"tp_size": 4}}], ids=str
)
def test_tensor_parallel_under_each_of_its_names(section: dict[str, Any]) -> None:
    config, _ = load(tensor_parallel=section)
    assert config.parallel.tensor == 4
    assert config.batch.global_ == 2 * 2  # micro-batch x ranks with rows of their own


def test_sizes_that_say_the_same_are_one_and_others_are_refused() -> None:
    config, said = load(tensor_parallel={"autotp_size": 2, "tp": {"tp_size": 2}, "tp_overlap_comm": True})
    assert (config.parallel.tensor, config.parallel.async_tensor) == (2, True)
    assert said["tensor_parallel.autotp_size"] == said["tensor_parallel.tp.tp_size"] == "mapped to parallel.tensor: 2"
    message = refused(tensor_parallel={"autotp_size": 2, "tp": {"tp_size": 4}})
    assert "tensor_parallel.tp.tp_size: tensor_parallel.autotp_size says 2; expected one size for both." in message


def test_plans_and_groups_of_deepspeed_are_answered() -> None:
    _, said = load(tensor_parallel={"autotp_size": 2, "preset_model": "llama", "dtype": "bf16", "tp": {"mpu": None}})
    assert "the family's plan" in said["tensor_parallel.preset_model"]
    assert said["tensor_parallel.dtype"].startswith("no effect: activations travel")


def test_ulysses_keeps_its_way_of_dividing_sequences() -> None:
    config, said = load(sequence_parallel_size=4, data_parallel_size=2)
    assert (config.parallel.context, config.parallel.ulysses) == (4, 4)
    assert config.batch.global_ == 4
    assert said["sequence_parallel_size"] == "mapped to parallel.context: 4"
    assert said["data_parallel_size"].startswith("no effect: it follows")
    assert "seen 8, expected the 8 ranks / 4 to the same rows, 2" in refused(
        sequence_parallel_size=4, data_parallel_size=8
    )


def test_pipelines() -> None:
    config, said = load(
        pipeline={"stages": 4, "partition": "parameters", "activation_checkpoint_interval": 1, "pipe_partitioned": True}
    )
    assert (config.parallel.pipeline.stages, config.parallel.pipeline.schedule) == (4, "1f1b")
    assert config.memory.recompute == "full"
    assert config.batch.global_ == 4
    assert said["pipeline.partition"].startswith("no effect: blocks are balanced by cost")
    assert said["pipeline.pipe_partitioned"].startswith("no effect: under tensor parallelism")
    open_, notes = load(pipeline={"stages": "auto", "activation_checkpoint_interval": 2})
    assert open_.parallel.pipeline.stages == 1
    assert notes["pipeline.activation_checkpoint_interval"].startswith("no effect: it is for a pipeline")
    assert load(pipeline={"stages": 2, "activation_checkpoint_interval": 0})[0].memory.recompute == "auto"


@pytest.mark.parametrize(
    "keys",
    [
        {"expert_parallel": {"enabled": True, "autoep_size": 4, "preset_model": "mixtral"}},
        {"moe": {"enabled": True, "ep_size": 4, "moe_param_group": True}},
        {"ep_size": 4},
        {"expert_parallel_size": 4},
    ],
    ids=str,
)
def test_expert_parallel_under_each_of_its_names(keys: dict[str, Any]) -> None:
    config, _ = load(**keys)
    assert config.parallel.expert == 4
    assert config.batch.global_ == 16  # expert ranks have rows of their own


def test_experts_that_are_off() -> None:
    config, said = load(expert_parallel={"enabled": False, "autoep_size": 4})
    assert config.parallel.expert == 1
    assert said["expert_parallel.autoep_size"] == "no effect: expert_parallel.enabled is false"
    assert "ep_size: expert_parallel.autoep_size says 2" in refused(
        expert_parallel={"enabled": True, "autoep_size": 2}, ep_size=4
    )
    assert "auxiliary_weight" in refused(expert_parallel={"enabled": True, "load_balance_coeff": 0.01})


def test_all_of_them_together_and_hybrid_shards_of_what_is_left() -> None:
    keys = {
        "tensor_parallel": {"autotp_size": 2},
        "sequence_parallel_size": 2,
        "pipeline": {"stages": 2},
        "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2},
    }
    config, _ = load(16, **keys)
    parallel = config.parallel
    assert (parallel.tensor, parallel.context, parallel.pipeline.stages, parallel.shard) == (2, 2, 2, 2)
    assert config.batch.global_ == 2 * 2
    keys["zero_optimization"] = {"stage": 3, "zero_hpz_partition_size": 8}
    assert "seen 8, expected a divisor of the 4 ranks that hold the same part of the model" in refused(16, **keys)


def test_sizes_that_do_not_divide_the_ranks_are_refused_by_their_own_key() -> None:
    message = refused(6, tensor_parallel={"autotp_size": 4})
    assert "tensor_parallel.autotp_size: tensor 4 x sequence 1 x stages 1 does not divide the number of ranks, 6" in (
        message
    )


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("tensor_model_parallel_size", "parallel.tensor"),
        ("pipeline_model_parallel_size", "parallel.pipeline.stages"),
        ("context_parallel_size", "parallel.context"),
        ("expert_model_parallel_size", "parallel.expert"),
        ("sequence_parallel", "parallel.tensor"),
        ("virtual_pipeline_model_parallel_size", "parallel.pipeline.virtual"),
    ],
)
def test_names_of_megatron_in_a_recipe_lead_to_ours(key: str, ours: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe({"model": {"preset": "llama-5m"}, "data": {"source": "a.txt"}, "parallel": {key: 2}})
    assert f"parallel.{key}: " in caught.value.message
    assert ours in caught.value.message
