"""Real DeepSpeed configurations become the engine configurations that run the same, and the notes say what happened."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import ConfigError
from trainwright.base.units import Duration
from trainwright.config import EngineConfig, LoadedEngineConfig, Note, load_engine_config

OPTIMIZER = {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 500}}
ZERO_2 = {
    "stage": 2,
    "offload_optimizer": {"device": "cpu", "pin_memory": True},
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
    "contiguous_gradients": True,
}
HF_ZERO_2 = {
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 500,
        "initial_scale_power": 12,
        "hysteresis": 3,
        "min_loss_scale": 2,
    },
    "optimizer": OPTIMIZER,
    "scheduler": WARMUP,
    "zero_optimization": ZERO_2,
    "steps_per_print": 2000,
    "train_batch_size": 64,
    "gradient_accumulation_steps": 4,
    "wall_clock_breakdown": False,
}
HF_ZERO_3 = {
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": True},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 2.5e-5, "warmup_max_lr": 1e-4, "warmup_num_steps": 100, "total_num_steps": 1000},
    },
    "optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 4},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1, "single_submit": False, "overlap_events": True},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 2,
}


def load(config: Any, world: int = 4) -> LoadedEngineConfig:
    return load_engine_config(config, world=world)


def loaded(world: int = 4, **sections: Any) -> EngineConfig:
    return load({"train_batch_size": 8, **sections}, world).config


def problems(world: int = 4, **sections: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load({"train_batch_size": 8, **sections}, world)
    return str(error.value)


def notes(result: LoadedEngineConfig) -> dict[str, str]:
    return {note.key: str(note).removeprefix(f"{note.key}: ") for note in result.notes}


def test_hugging_faces_stage_2_with_fp16_and_offload() -> None:
    assert load(HF_ZERO_2).config == EngineConfig.model_validate(
        {
            "batch": {"global": 64, "micro": 4, "accumulation": 4},
            "optim": {
                "name": "adamw",
                "lr": 3e-5,
                "betas": [0.8, 0.999],
                "eps": 1e-8,
                "weight_decay": 3e-7,
                "rules": [{"pattern": ".", "weight_decay": 3e-7}],
                "clip_norm": 1.0,
                "schedule": {"name": "warmup_decay", "warmup": "500 steps", "warmup_shape": "log", "warmup_start": 0.0},
            },
            "precision": {"name": "fp16", "initial_scale": 4096.0, "window": 500, "hysteresis": 3, "min_scale": 2.0},
            "parallel": {"zero": 2},
            "memory": {"optimizer_state": "host"},
        }
    )


def test_hugging_faces_stage_3_with_nvme_and_auto() -> None:
    result = load(HF_ZERO_3)
    assert result.config == EngineConfig.model_validate(
        {
            "batch": {"global": 8, "micro": 2, "accumulation": 1},
            "optim": {
                "name": "adamw",
                "lr": 1e-4,
                "betas": [0.9, 0.999],
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "schedule": {
                    "name": "warmup_decay",
                    "warmup": "100 steps",
                    "warmup_start": 0.25,
                    "min_ratio": 0.25,
                    "decay": "linear",
                },
            },
            "total_steps": 1000,
            "precision": "bf16",
            "parallel": {"zero": 3},
            "memory": {"optimizer_state": "nvme", "nvme_path": "/local_nvme", "parameters": "host"},
        }
    )
    said = notes(result)
    assert said["zero_optimization.stage"] == "mapped to parallel.zero: 3"
    assert said["zero_optimization.offload_optimizer.nvme_path"] == "mapped to memory.nvme_path: '/local_nvme'"
    assert said["zero_optimization.reduce_bucket_size"].endswith("DeepSpeed takes its default: 5e+08")
    assert said["fp16.enabled"].startswith('no effect: "auto" is for Hugging Face')
    assert said["optimizer.params.betas"].startswith('no effect: "auto"')
    assert said["aio.block_size"].startswith("no effect: files of optimizer state are memory-mapped")
    assert result.source == "deepspeed"
    assert "mapped to memory.parameters: 'host'" in result.explain()


def test_every_note_is_about_a_key_that_was_given_or_a_default() -> None:
    for config in (HF_ZERO_2, HF_ZERO_3):
        keys = [note.key for note in load(config).notes]
        assert len(keys) == len(set(keys))
        for note in load(config).notes:
            node: Any = config
            for part in note.key.split("."):
                node = node.get(part, "absent") if isinstance(node, dict) else "absent"
            assert (node == "absent") == (note.fate == "default"), note


def test_deepspeeds_own_defaults_come_with_its_configuration() -> None:
    result = load({"train_batch_size": 8})
    config = result.config
    assert (config.precision.name, config.parallel.zero, config.memory.optimizer_state) == ("fp32", 0, "device")
    assert config.optim is not None
    assert (config.optim.name, config.optim.lr, config.optim.clip_norm) == ("client", None, 1.0)
    assert (config.optim.schedule.name, config.optim.schedule.warmup) == ("constant", 0.0)
    assert Note("gradient_clipping", "default", "DeepSpeed's default became optim.clip_norm: 1.0; 0 does not clip") in (
        result.notes
    )
    adam = loaded(optimizer={"type": "Adam"}).optim
    assert adam is not None
    assert (adam.name, adam.lr, adam.betas, adam.weight_decay) == ("adamw", 1e-3, (0.9, 0.999), 0.0)
    assert (adam.eps, adam.rules) == (1e-8, ())
    assert loaded(gradient_clipping=0).optim.clip_norm is None
    assert loaded(gradient_clipping=0.3).optim.clip_norm == 0.3


@pytest.mark.parametrize(
    "text_of", [json.dumps, lambda config: base64.urlsafe_b64encode(json.dumps(config).encode()).decode()]
)
def test_a_file_or_base64(text_of: Any, tmp_path: Path) -> None:
    text = text_of(HF_ZERO_2)
    if text.startswith("{"):
        path = tmp_path / "ds_config.json"
        path.write_text(text, encoding="utf-8")
        text = str(path)
    assert load(text).config == load(HF_ZERO_2).config


def test_hjson_and_yaml(tmp_path: Path) -> None:
    pytest.importorskip("hjson")
    path = tmp_path / "ds_config.hjson"
    path.write_text(
        "{\n  # why\n  train_batch_size: 8\n  zero_optimization: {\n    stage: 1\n  }\n  bf16: {enabled: true}\n}\n",
        encoding="utf-8",
    )
    yaml = tmp_path / "ds_config.yaml"
    yaml.write_text("train_batch_size: 8\nzero_optimization: {stage: 1}\nbf16: {enabled: true}\n", encoding="utf-8")
    assert load(path).config == load(yaml).config == loaded(zero_optimization={"stage": 1}, bf16={"enabled": True})
    yaml.write_text("train_batch_size: 8\nzero_optimization:\n  stge: 1\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"ds_config.yaml:3 *zero_optimization.stge: unknown key. Did you mean 'stage'"
    ):
        load(yaml)


def test_the_batch_triple_has_deepspeeds_names() -> None:
    config = {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}
    with pytest.raises(
        ConfigError, match=r"train_batch_size 10 is not a multiple of train_micro_batch_size_per_gpu 4 x 2"
    ):
        load(config, world=2)
    with pytest.raises(ConfigError, match="neither train_batch_size nor train_micro_batch_size_per_gpu is given"):
        load({"gradient_accumulation_steps": 4, "zero_optimization": {"stage": 1}})


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "fp16"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "bf16"),
        ({"torch_autocast": {"enabled": True}}, "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "torch.float16"}}, "fp16"),
        ({"bf16": {"enabled": True}, "data_types": {"param_dtype": "bfloat16", "grad_accum_dtype": "fp32"}}, "bf16"),
    ],
)
def test_formats_of_numbers(sections: dict[str, Any], name: str) -> None:
    assert loaded(**sections).precision.name == name


def test_more_about_numbers() -> None:
    fixed = load({"train_batch_size": 8, "fp16": {"enabled": True, "loss_scale": 128, "hysteresis": 4}})
    assert fixed.config.precision.loss_scale == 128.0
    assert notes(fixed)["fp16.hysteresis"] == "no effect: fp16.loss_scale is 128 all along"
    assert loaded(bf16={"enabled": True}).on_nan == "skip"
    assert loaded(bf16={"enabled": True, "check_grad_overflow": False}).on_nan == "ignore"
    assert loaded(communication_data_type="fp32").comm.wire == "fp32"
    assert "bf16.enabled: seen true beside fp16.enabled" in problems(fp16={"enabled": True}, bf16={"enabled": True})
    message = problems(fp16={"enabled": True, "min_loss_scale": 1e9})
    assert "fp16.min_loss_scale: (precision.min_scale) seen 1e9" in message.replace("1000000000.0", "1e9")


def test_sharding_in_groups() -> None:
    for key in ("zero_hpz_partition_size", "mics_shard_size"):
        assert loaded(zero_optimization={"stage": 3, key: 2}).parallel.shard == 2
        assert loaded(zero_optimization={"stage": 2, key: 2}).parallel.shard == "auto"
        assert f"{key}: seen 3, expected a divisor of the number of ranks, 4" in problems(
            zero_optimization={"stage": 3, key: 3}
        )
    both = {"stage": 3, "zero_hpz_partition_size": 2, "mics_shard_size": 4}
    assert "another size" in problems(zero_optimization=both)
    assert loaded(zero_optimization={"stage": 3, "mics_shard_size": -1}).parallel.shard == "auto"


def test_offloading_in_old_and_new_forms() -> None:
    old = loaded(zero_optimization={"stage": 3, "cpu_offload": True, "cpu_offload_params": True})
    assert (old.memory.optimizer_state, old.memory.parameters) == ("host", "host")
    low = load({"train_batch_size": 8, "zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}})
    assert low.config.memory.parameters == "device"
    assert "at stage 3 only" in notes(low)["zero_optimization.offload_param.device"]
    zero = loaded(zero_optimization={"stage": 0, "offload_optimizer": {"device": "cpu"}})
    assert zero.memory.optimizer_state == "device"
    assert loaded(activation_checkpointing={"cpu_checkpointing": True}).memory.offload_activations
    nvme = {"stage": 2, "offload_optimizer": {"device": "nvme"}}
    assert "offload_optimizer.nvme_path: missing; expected a folder" in problems(zero_optimization=nvme)
    nowhere = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}
    assert "parameters on NVMe are not built yet" in problems(zero_optimization=nowhere)
    ratio = {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}
    assert "Twin-Flow (a part of the optimizer state offloaded) is not built yet" in problems(zero_optimization=ratio)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"type": "Adam", "params": {"adam_w_mode": False}}, {"name": "adamw", "weight_decay": 0.0}),
        ({"type": "AdamW", "params": {"torch_adam": True}}, {"name": "adamw", "weight_decay": 0.01}),
        ({"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}, {"name": "sgd", "lr": 0.1, "momentum": 0.9}),
        ({"type": "SGD"}, {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0}),
        ({"type": "Lion", "params": {"weight_decay": 1}}, {"name": "lion", "betas": (0.9, 0.999), "weight_decay": 1.0}),
        ({"type": "Adafactor"}, {"name": "adafactor", "lr": 0.01, "beta2_decay": -0.8, "update_clip": 1.0}),
        (
            {"type": "Muon", "params": {"lr": 0.01, "momentum": 0.9}},
            {"name": "muon", "lr": 0.01, "momentum": 0.9, "lr_adjust": "original", "eps": 1e-10, "nesterov": True},
        ),
        ({"type": "Muon", "params": {"muon_lr": 0.01, "adam_lr": 0.01}}, {"lr": 0.01, "betas": (0.9, 0.95)}),
    ],
)
def test_optimizers(optimizer: dict[str, Any], expected: dict[str, Any]) -> None:
    section = loaded(optimizer=optimizer).optim
    assert {key: getattr(section, key) for key in expected} == expected
    assert section is not None
    if section.weight_decay:
        assert [(rule.pattern, rule.weight_decay) for rule in section.rules] == [(".", section.weight_decay)]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}, "(L2) is not built yet"),
        ({"type": "AdamW", "params": {"amsgrad": True}}, "AMSGrad is not built yet"),
        ({"type": "AdamW", "params": {"max_grad_norm": 1.0}}, "Use gradient_clipping"),
        (
            {"type": "AdamW", "params": {"lr": 0}},
            "optimizer.params.lr: (optim.lr) seen 0.0, expected auto or a number above",
        ),
        ({"type": "Muon", "params": {"muon_lr": 0.02}}, "0.02 for matrices and 0.0003 for the rest"),
        ({"type": "OneBitAdam", "params": {"lr": 1e-3, "freeze_step": 100}}, "1-bit Adam is not built yet"),
        ({"type": "Lamb"}, "LAMB is not built yet"),
        ({"type": "RMSprop"}, "torch's RMSprop is not built yet. Give it to initialize(optimizer=...)"),
        ({"type": "Adamw2"}, "Did you mean 'AdamW'?"),
    ],
)
def test_optimizers_that_would_be_others_are_refused(optimizer: dict[str, Any], message: str) -> None:
    assert message in problems(optimizer=optimizer)


def schedule(kind: str, params: dict[str, Any], **sections: Any) -> dict[str, Any]:
    optim = loaded(scheduler={"type": kind, "params": params}, **sections).optim
    assert optim is not None
    return {"lr": optim.lr, **dict(optim.schedule)}


def test_schedules() -> None:
    adam = {"optimizer": {"type": "AdamW", "params": {"lr": 2e-4}}}
    found = schedule("WarmupLR", {"warmup_num_steps": 10, "warmup_min_lr": 1e-4, "warmup_type": "linear"}, **adam)
    assert (found["lr"], found["warmup_start"], found["warmup_shape"], found["decay"]) == (2e-4, 0.5, "linear", "none")
    assert found["warmup"] == Duration(10, "steps")
    found = schedule("WarmupCosineLR", {"total_num_steps": 50, "warmup_num_steps": 5, "warmup_min_ratio": 0.1}, **adam)
    assert (found["lr"], found["warmup_start"], found["min_ratio"], found["decay"]) == (2e-4, 0.1, 1e-4, "cosine")
    found = schedule("WarmupDecayLR", {"total_num_steps": 50})
    assert (found["lr"], found["warmup"], found["decay"]) == (0.001, Duration(1000, "steps"), "linear")
    cycle = {
        "cycle_min_lr": 1e-4,
        "cycle_max_lr": 1e-3,
        "cycle_first_step_size": 100,
        "cycle_first_stair_count": 5,
        "decay_lr_rate": 0.5,
        "decay_step_size": 10,
        "cycle_momentum": False,
    }
    found = schedule("OneCycle", cycle, **adam)
    assert (found["name"], found["lr"], found["start"]) == ("one_cycle_decay", 1e-3, 0.1)
    assert (found["warmup"], found["fall_steps"]) == (Duration(100, "steps"), None)
    assert (found["rise_stairs"], found["fall_stairs"]) == (5, 5)
    assert (found["decay_rate"], found["decay_steps"]) == (0.5, 10)
    test = {"lr_range_test_min_lr": 1e-5, "lr_range_test_step_size": 50, "lr_range_test_staircase": True}
    found = schedule("LRRangeTest", test, **adam)
    assert (found["lr"], found["step_size"], found["step_rate"], found["staircase"]) == (1e-5, 50, 1.0, True)
    assert schedule("WarmupLR", {})["lr"] is None


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("WarmupDecayLR", {}, "total_num_steps: missing; expected the number of optimizer steps"),
        ("WarmupLR", {"warmup_min_lr": 1e-5}, "seen 1e-05 without scheduler.params.warmup_max_lr"),
        ("WarmupLR", {"warmup_min_lr": 1, "warmup_max_lr": 0.5}, "expected at most scheduler.params.warmup_max_lr"),
        ("WarmupLR", {"warmup_num_steps": 0}, "warmup_num_steps: seen 0, expected a whole number >= 1"),
        ("WarmupLR", {"warmup_type": "sqrt"}, "expected one of log, linear"),
        ("OneCycle", {"cycle_momentum": False}, "cycle_min_lr: missing"),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 1}, "seen true (DeepSpeed's default): cycling momentum"),
        ("CosineAnnealingLR", {"T_max": 3}, "Give it to initialize(lr_scheduler=...)"),
    ],
)
def test_schedules_that_cannot_be_meant(kind: str, params: dict[str, Any], message: str) -> None:
    assert message in problems(scheduler={"type": kind, "params": params})


def test_momentum_is_not_cycled_where_there_is_none() -> None:
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 1}
    sgd = {"optimizer": {"type": "SGD"}}
    assert schedule("OneCycle", params, **sgd)["name"] == "one_cycle_decay"


def test_sections_that_are_off_say_so() -> None:
    result = load(
        {
            "train_batch_size": 8,
            "data_efficiency": {"enabled": False, "data_routing": {"enabled": True, "random_ltd": {"enabled": True}}},
            "elasticity": {"enabled": False, "max_train_batch_size": 100},
            "tensor_parallel": {"autotp_size": 1, "tp": {"tp_size": 1}},
            "pipeline": {"stages": "auto"},
            "tensorboard": {"enabled": True, "output_path": "out"},
            "zero_optimization": None,
        }
    )
    said = notes(result)
    assert said["data_efficiency.data_routing.random_ltd.enabled"] == "no effect: data_efficiency.enabled is false"
    assert said["elasticity.max_train_batch_size"] == "no effect: elasticity.enabled is false"
    assert said["tensor_parallel.tp.tp_size"] == "no effect: 1 divides nothing"
    assert said["tensorboard.enabled"].startswith("no effect: the engine prints and logs nothing")
    assert said["zero_optimization"] == "no effect: nothing is in it"


def test_all_problems_come_at_once() -> None:
    message = problems(
        zero_optimization={"stag": 2, "zero_quantized_weights": True},
        graph_harvesting=True,
        optimizer={"type": "OneBitLamb"},
        train_micro_batch_size_per_gpu=3,
    )
    assert message.startswith("5 problems in config")
    assert "train_batch_size 8 is not a multiple" in message
