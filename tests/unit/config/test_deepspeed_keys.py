"""Every key of DeepSpeed's tables is met in a configuration: one answer each, typos refused, the page complete."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import ConfigError
from trainwright.config import LoadedEngineConfig, load_engine_config
from trainwright.config.deepspeed import DEEPSPEED
from trainwright.config.deepspeed.docs_page import update_page
from trainwright.config.deepspeed.tables import Block, Entry, Leaf, NoEffect, NotBuilt, Variants, entries
from trainwright.config.fields import Listed, Truth, Words

BASE: dict[str, Any] = {"train_batch_size": 8}


def all_keys() -> dict[str, Leaf]:
    """Path -> entry of every key, those of each optimizer and schedule as `optimizer[Adam].params.lr`."""
    found = {path: entry for path, entry, _ in entries(DEEPSPEED)}
    for section in ("optimizer", "scheduler"):
        variants = DEEPSPEED[section]
        assert isinstance(variants, Variants)
        for name, choice in variants.choices.items():
            found |= {path: entry for path, entry, _ in entries(choice.keys, f"{section}[{name}].params.")}
    return found


KEYS = all_keys()


def sample(entry: Leaf) -> Any:
    """A value that the key accepts: its default where it has one, so that features stay off."""
    if isinstance(entry, NotBuilt):
        return entry.off[0]
    if entry.default is not None:
        return entry.default
    for kind, value in ((Truth, False), (Listed, ["x"])):
        if isinstance(entry.accepts, kind):
            return value
    if isinstance(entry.accepts, Words):
        return entry.accepts.words[0]
    try:
        return entry.accepts.validate(1)
    except Exception:
        return "x"


def place(path: str, value: Any) -> tuple[str, dict[str, Any]]:
    """(the key as notes call it, a configuration that holds it, with what else the section needs)."""
    config: dict[str, Any] = dict(BASE)
    path = path.replace("<name>", "any name")
    if variant := re.match(r"(\w+)\[(\w+)\]\.params\.", path):
        section, kind = variant.groups()
        key = path[variant.end() :]
        params = dict(REQUIRED.get(kind, {}))
        params[key] = value
        config[section] = {"type": kind, "params": params}
        return f"{section}.params.{key}", config
    *sections, last = path.split(".")
    node = config
    for part in sections:
        node = node.setdefault(part, {})
    node[last] = value
    return path, config


REQUIRED: dict[str, dict[str, Any]] = {
    "Muon": {"lr": 0.02},
    "WarmupDecayLR": {"total_num_steps": 5000},
    "WarmupCosineLR": {"total_num_steps": 5000},
    "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_momentum": False},
}
AT_A_LOSS = {
    "optimizer[Muon].params.muon_lr": "for matrices and",  # one of two learning rates alone makes them differ
    "optimizer[Muon].params.adam_lr": "for matrices and",
    "scheduler[OneCycle].params.cycle_momentum": "cycling momentum is not built yet",  # DeepSpeed's default
    "data_parallel_size": "expected the number of ranks",
    "data_types.param_dtype": "seen 'bf16' beside fp32",
}


def in_a_refused_section(path: str) -> bool:
    """Whether the key is in a section that is refused when it is there, unless it is switched off."""
    inside = {path: block for path, _, block in entries(DEEPSPEED)}.get(path)
    if inside is None or not inside.feature:
        return False
    switch = inside.keys.get(inside.switch)
    return not inside.switch or (isinstance(switch, NoEffect) and switch.default is True)


@pytest.mark.parametrize("path", list(AT_A_LOSS))
def test_keys_that_no_value_alone_suits(path: str) -> None:
    value = {"data_parallel_size": 3, "data_types.param_dtype": "bf16"}.get(path, True if "momentum" in path else 0.5)
    _, config = place(path, value)
    with pytest.raises(ConfigError) as error:
        load_engine_config(config, world=2)
    assert AT_A_LOSS[path] in str(error.value)


def answers(loaded: LoadedEngineConfig, key: str) -> int:
    return sum(note.key == key for note in loaded.notes)


@pytest.mark.parametrize("path", [path for path in KEYS if path not in AT_A_LOSS and not in_a_refused_section(path)])
def test_every_key_has_one_answer(path: str) -> None:
    key, config = place(path, 8 if path in BASE else sample(KEYS[path]))
    loaded = load_engine_config(config, world=2)
    assert loaded.source == "deepspeed"
    assert answers(loaded, key) == 1
    assert all(note.text for note in loaded.notes)


@pytest.mark.parametrize("path", [path for path, entry in KEYS.items() if isinstance(entry, NotBuilt)])
def test_what_is_not_built_is_refused(path: str) -> None:
    entry = KEYS[path]
    assert isinstance(entry, NotBuilt)
    values = [True, False, 2, 0.25, "sum", "fp32", [1, 2]]
    value = next(value for value in values if value not in entry.off and accepts(entry, value))
    key, config = place(path, value)
    if path.partition(".")[0] in ("fp16", "bf16", "bfloat16"):
        config[path.partition(".")[0]]["enabled"] = True
    with pytest.raises(ConfigError) as error:
        load_engine_config(config, world=2)
    assert re.search(rf"{re.escape(key)}: seen .* is not built yet", str(error.value))


def accepts(entry: Leaf, value: Any) -> bool:
    try:
        entry.accepts.validate(value)
    except Exception:
        return False
    return True


def blocks(keys: dict[str, Entry] | Any, path: str = "") -> Iterator[tuple[str, Block]]:
    for key, entry in keys.items():
        if isinstance(entry, Block):
            yield f"{path}{key}", entry
            yield from blocks(entry.keys, f"{path}{key}.")


REFUSED = [(path, block) for path, block in blocks(DEEPSPEED) if block.feature]


@pytest.mark.parametrize(("path", "block"), REFUSED, ids=[path for path, _ in REFUSED])
def test_a_feature_that_is_not_built_is_refused_when_it_is_on(path: str, block: Block) -> None:
    inside = {block.switch: True} if block.switch else {next(iter(block.keys)): 1}
    _, config = place(path, {**inside, "no_such_key": 1})
    outer, _, _ = path.rpartition(".")
    while outer:  # sections around it that have a switch of their own
        node, keys = config, DEEPSPEED
        for part in outer.split("."):
            node = node[part]
            section = keys[part]
            assert isinstance(section, Block)
            keys = dict(section.keys)
        if "enabled" in keys:
            node["enabled"] = True
        outer = outer.rpartition(".")[0]
    with pytest.raises(ConfigError) as error:
        load_engine_config(config, world=2)
    assert f"{path}: {block.feature} is not built yet" in str(error.value)
    assert f"{path}.no_such_key: unknown key" in str(error.value)


@pytest.mark.parametrize("path", list(KEYS))
def test_a_typo_is_refused_wherever_it_is(path: str) -> None:
    head, dot, last = path.rpartition(".")
    wrong = f"{last[:2]}_{last[2:]}x"
    key, config = place(f"{head}{dot}{wrong}", 1)
    if key.partition(".")[0] not in BASE:
        config.setdefault("train_batch_size", 8)
    with pytest.raises(ConfigError) as error:
        load_engine_config(config, world=2)
    assert f"{key}: unknown key." in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("train_batchsize", "train_batch_size"),
        ("grandient_accumulation_steps", "gradient_accumulation_steps"),
        ("zero_optimisation.stage", "zero_optimization"),
        ("zero_optimization.stag", "stage"),
        ("zero_optimization.overlap_com", "overlap_comm"),
        ("zero_optimization.offload_optimizer.devise", "device"),
        ("zero_optimization.offload_param.pinmemory", "pin_memory"),
        ("zero_optimization.stage3_prefetch_buckets_size", "stage3_prefetch_bucket_size"),
        ("bf16.enable", "enabled"),
        ("fp16.initial_scale", "initial_scale_power"),
        ("optimizer.parms", "params"),
        ("optimizer[AdamW].params.weigth_decay", "weight_decay"),
        ("scheduler[WarmupLR].params.warmup_steps", "warmup_num_steps"),
        ("stage", "zero_optimization.stage"),
        ("reduce_bucket_size", "zero_optimization.reduce_bucket_size"),
        ("loss_scale", "fp16.loss_scale"),
        ("data_efficiency.data_sampling.curriculum_learning.curriculum_metric", "curriculum_metrics"),
        ("compression_training.sparse_pruning.different_groups.a.parms", "params"),
        ("compression_training.sparse_pruning.shared_parameters.dense_ration", "dense_ratio"),
    ],
)
def test_what_was_probably_meant_is_said(wrong: str, meant: str) -> None:
    _, config = place(wrong, {} if wrong.endswith(("parms", "metric")) else 1)
    with pytest.raises(ConfigError) as error:
        load_engine_config(config, world=2)
    assert f"Did you mean {meant!r}?" in str(error.value)


@pytest.mark.parametrize(
    ("section", "kind", "meant"), [("optimizer", "AdmaW", "AdamW"), ("scheduler", "WarmUpLr", None)]
)
def test_types_are_named_whatever_their_case(section: str, kind: str, meant: str | None) -> None:
    config = {**BASE, section: {"type": kind, "params": {}}}
    if meant is None:
        assert load_engine_config(config, world=1).config.optim is not None
        return
    with pytest.raises(ConfigError, match=f"Did you mean '{meant}'"):
        load_engine_config(config, world=1)


def test_the_page_names_every_key_and_is_made_from_the_tables() -> None:
    path = Path(__file__).resolve().parents[3] / "docs" / "deepspeed.md"
    page = path.read_text(encoding="utf-8")
    assert update_page(page) == page, "run: python -m trainwright.config.deepspeed.docs_page docs/deepspeed.md"
    for key in KEYS:
        shown = key.rpartition("].params.")[2] if "[" in key else key
        assert f"`{shown}`" in page


def test_values_of_the_wrong_kind_are_refused_with_what_is_accepted() -> None:
    config = {
        "train_batch_size": "many",
        "zero_optimization": {"stage": 4, "offload_optimizer": {"device": "gpu"}, "reduce_bucket_size": 0.5},
        "bf16": {"enabled": "yes"},
        "fp16": True,
        "optimizer": {"type": "Adam", "params": {"betas": [0.9]}},
        "gradient_clipping": -1,
    }
    with pytest.raises(ConfigError) as error:
        load_engine_config(config, world=2)
    for line in (
        "train_batch_size: seen 'many', expected a whole number >= 1",
        "zero_optimization.stage: seen 4, expected one of 0, 1, 2, 3",
        "zero_optimization.offload_optimizer.device: seen 'gpu', expected one of none, cpu, nvme",
        "zero_optimization.reduce_bucket_size: seen 0.5, expected a whole number >= 0",
        "bf16.enabled: seen 'yes', expected true or false",
        "fp16: seen true, expected a section",
        "optimizer.params.betas: seen [0.9], expected a list of 2 values",
        "gradient_clipping: seen -1, expected a number >= 0",
    ):
        assert line in str(error.value)
