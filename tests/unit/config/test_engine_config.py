"""What initialize() takes: our own language, its rules, and the file it is read from."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import ConfigError
from trainwright.config import ClientOptim, EngineConfig, load_engine_config
from trainwright.config.batch import BATCH_KEYS


def problems(config: Any, world: int = 2) -> str:
    with pytest.raises(ConfigError) as error:
        load_engine_config(config, world=world)
    assert error.value.exit_code == 2
    return str(error.value)


def test_nothing_at_all_is_a_configuration() -> None:
    loaded = load_engine_config(None, world=4)
    config = loaded.config
    assert (loaded.source, loaded.notes) == ("trainwright", ())
    assert config == load_engine_config({}, world=4).config
    assert (config.batch.global_, config.batch.micro, config.batch.accumulation) == (None, None, 1)
    assert (config.optim, config.total_steps, config.seed, config.on_nan) == (None, None, 0, "skip")
    assert (config.precision.name, config.parallel.zero, config.memory.recompute) == ("auto", "auto", "auto")


def test_the_batch_is_filled_in_for_the_ranks() -> None:
    batch = load_engine_config({"batch": {"global": 32, "micro": 2}}, world=4).config.batch
    assert (batch.global_, batch.micro, batch.accumulation) == (32, 2, 4)
    alone = load_engine_config({"batch": {"accumulation": 3}}, world=4).config.batch
    assert (alone.global_, alone.micro, alone.accumulation) == (None, None, 3)
    assert BATCH_KEYS[0] in problems({"batch": {"global": 10, "micro": 4}})


def test_keys_that_are_words_of_python_are_written_without_the_underscore() -> None:
    config = EngineConfig.model_validate({"batch": {"global": 8}})
    assert config.batch.global_ == 8
    assert config.to_dict()["batch"] == {"global": 8}
    assert "batch.global: seen 'x', expected null or a whole number" in problems({"batch": {"global": "x"}})
    message = problems({"batch": {"globl": 8}})
    assert "batch.globl: unknown key. Did you mean 'global'?" in message


def test_an_optimizer_without_a_schedule_has_a_constant_rate() -> None:
    config = load_engine_config({"optim": {"name": "lion", "lr": 1e-4}}, world=1).config
    assert config.optim is not None
    assert (config.optim.name, config.optim.schedule.name, config.optim.schedule.warmup) == ("lion", "constant", 0.0)
    cosine = {"optim": {"lr": 1e-3, "schedule": {"name": "cosine", "warmup": "10 steps"}}, "total_steps": 100}
    assert load_engine_config(cosine, world=1).config.total_steps == 100


def test_an_optimizer_of_the_caller_has_clipping_and_a_schedule() -> None:
    optim = {"name": "client", "clip_norm": 0.5, "schedule": {"name": "inverse_sqrt", "warmup": "10 steps"}}
    section = load_engine_config({"optim": optim}, world=1).config.optim
    assert isinstance(section, ClientOptim)
    assert (section.lr, section.clip_norm, section.schedule.name) == (None, 0.5, "inverse_sqrt")
    assert "optim.betas: no such key here" in problems({"optim": {"name": "client", "betas": [0.9, 0.99]}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optim": {"name": "adamw"}}, "optim.lr: seen 'auto', expected a number: only a recipe"),
        ({"optim": {"lr": 1e-3, "schedule": "cosine"}}, "total_steps: seen null, expected a number of steps"),
        (
            {"optim": {"lr": 1e-3, "schedule": {"name": "warmup_decay", "warmup": "5 steps", "decay": "linear"}}},
            "total_steps",
        ),
        (
            {"optim": {"lr": 1e-3, "schedule": {"name": "constant", "warmup": 0.1}}},
            "or optim.schedule.warmup as a number",
        ),
        ({"optim": {"lr": 1e-3, "schedule": "inverse_sqrt"}}, "or optim.schedule.warmup as a number"),
        (
            {"optim": {"lr": 1e-3, "schedule": {"name": "constant", "warmup": "2M tokens"}}},
            "optim.schedule.warmup: seen '2M tokens', expected a number of steps or a fraction",
        ),
        (
            {"optim": {"lr": 1e-3}, "memory": {"release_gradients": True}},
            "memory.release_gradients: seen true, expected false, or optim.clip_norm null",
        ),
        ({"optim": {"name": "adam", "lr": 1}}, "Did you mean 'adamw'?"),
        ({"model": {"preset": "x"}}, "it belongs to a recipe"),
        ({"launch": {"processes": 2}}, "it belongs to a recipe; here the processes run already"),
        ({"zero": 1}, "Did you mean 'parallel.zero'?"),
        ({"batchs": {}}, "Did you mean 'batch'?"),
        ({"nonsense": 1}, "nonsense: unknown key"),
    ],
)
def test_what_cannot_be_meant_is_refused(config: dict[str, Any], message: str) -> None:
    assert message in problems(config)


def test_all_problems_come_at_once() -> None:
    message = problems({"batch": {"micor": 1}, "parallel": {"zero": 9}, "seeed": 3})
    assert message.startswith("3 problems in config")


def test_two_languages_in_one_configuration_are_refused() -> None:
    message = problems({"batch": {"micro": 2}, "fp16": {"enabled": True}, "zero_optimization": {"stage": 1}})
    assert "fp16: a key of DeepSpeed's" in message
    assert "zero_optimization: a key of DeepSpeed's" in message
    assert "the keys batch are Trainwright's: write all of it in one of the two languages" in message


OWN = {"batch": {"micro": 2}, "parallel": {"zero": 2}, "comm": {"wire": "bf16"}}


def test_every_way_to_write_it_down(tmp_path: Path) -> None:
    expected = load_engine_config(OWN, world=3).config
    yaml = tmp_path / "引擎.yaml"
    yaml.write_text("batch: {micro: 2}\nparallel:\n  zero: 2\ncomm: {wire: bf16}\n", encoding="utf-8")
    plain = tmp_path / "engine.json"
    plain.write_text(json.dumps(OWN), encoding="utf-8-sig")
    coded = base64.urlsafe_b64encode(json.dumps(OWN).encode()).decode()
    for config in (yaml, str(yaml), plain, str(plain), coded, expected, {**OWN}):
        assert load_engine_config(config, world=3).config == expected
    assert expected.batch.global_ == 6


def test_the_result_loads_to_itself() -> None:
    config = load_engine_config({**OWN, "optim": {"lr": 1e-3}, "precision": "fp16"}, world=3).config
    assert load_engine_config(config.to_dict(), world=3).config == config


def test_yaml_has_lines_and_refuses_keys_that_stand_twice(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("batch:\n  micro: 2\n  micro: 3\nparalel: auto\n", encoding="utf-8")
    message = problems(path)
    assert f"{path}:3  batch.micro: seen this key twice, first on line 2" in message
    assert f"{path}:4  paralel: unknown key. Did you mean 'parallel'?" in message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("missing/engine.yaml", "no configuration at missing/engine.yaml"),
        ("x" * 5000, "no configuration at"),
        (3, "seen a int for config"),
        (base64.urlsafe_b64encode(b'{"a": 1, "a": 2}').decode(), "seen twice in one section: a"),
    ],
)
def test_what_is_no_configuration(config: Any, message: str) -> None:
    assert message in problems(config)


def test_a_file_that_is_no_section(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text("[1]", encoding="utf-8")
    assert "seen a list, expected sections and keys" in problems(path)
    path.write_bytes(b"\xff\xfe{}")
    assert "is not UTF-8" in problems(path)
