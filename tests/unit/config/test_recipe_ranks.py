"""Precision, parallel, memory, comm and launch: short forms, exclusions, and words that keep their neighbours."""

from __future__ import annotations

from typing import Any

import pytest

from trainwright.base.errors import ConfigError
from trainwright.base.units import Duration
from trainwright.config import Recipe, RecomputeEvery, load_recipe, load_recipe_text

BASE: dict[str, Any] = {"model": {"preset": "llama-15m"}, "data": {"source": "a.txt"}}


def recipe(*overrides: str, **sections: Any) -> Recipe:
    return load_recipe({**BASE, **sections}, overrides).recipe


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe(BASE, overrides)
    return str(error.value)


def test_a_recipe_that_says_nothing_of_ranks_leaves_them_open() -> None:
    plain = recipe()
    assert plain.precision.name == "auto"
    assert (plain.parallel.zero, plain.parallel.shard, plain.parallel.prefetch) == ("auto", "auto", 1)
    assert (plain.memory.recompute, plain.memory.optimizer_state, plain.memory.parameters) == (
        "auto",
        "device",
        "device",
    )
    assert (plain.comm.backend, plain.comm.wire) == ("auto", "auto")
    assert (plain.comm.timeout, plain.comm.hang_after) == (Duration(1800, "seconds"), Duration(600, "seconds"))
    assert plain.launch.processes == "auto"


@pytest.mark.parametrize("name", ["auto", "fp32", "bf16", "fp16", "bf16_pure", "fp8"])
def test_precision_is_a_word_or_a_section(name: str) -> None:
    assert recipe(precision=name) == recipe(precision={"name": name}) == recipe(f"precision={name}")
    kept = recipe(precision={"name": name, "keep_fp32": [r"norm$", "层"]}).precision
    assert (kept.name, kept.keep_fp32) == (name, ("norm$", "层"))


def test_the_forms_of_precision_have_their_own_keys() -> None:
    fp16 = recipe(precision="fp16").precision
    assert (fp16.loss_scale, fp16.initial_scale, fp16.window) == ("dynamic", 65536.0, 1000)
    assert (fp16.hysteresis, fp16.min_scale) == (2, 1.0)
    assert recipe(precision={"name": "fp16", "loss_scale": 128}).precision.loss_scale == 128.0
    assert recipe(precision="bf16_pure").precision.update == "master"
    assert recipe(precision={"name": "bf16_pure", "update": "kahan"}).precision.update == "kahan"
    assert recipe(precision={"name": "fp8", "recipe": "rowwise"}).precision.recipe == "rowwise"


def test_an_override_below_a_word_writes_the_word_out() -> None:
    text = "model: {preset: llama-15m}\ndata: {source: a.txt}\nprecision: fp16\nparallel: auto\n"
    loaded = load_recipe_text(text, ["precision.window=7", "parallel.zero=3"], name="r.yaml")
    assert (loaded.recipe.precision.name, loaded.recipe.precision.window) == ("fp16", 7)
    assert loaded.recipe.parallel.zero == 3
    assert str(loaded.provenance["precision.name"]) == "r.yaml:3"
    assert str(loaded.provenance["precision.window"]) == "override precision.window=7"


def test_a_word_that_a_rule_chooses_leaves_the_other_keys_alone() -> None:
    loaded = load_recipe({**BASE, "precision": {"keep_fp32": ["norm"]}}).resolve({"precision": ("bf16", "fast here")})
    assert (loaded.recipe.precision.name, loaded.recipe.precision.keep_fp32) == ("bf16", ("norm",))
    assert loaded.provenance["precision.name"].reason == "fast here"
    assert loaded.provenance["precision.keep_fp32"].kind == "dict"
    assert load_recipe_text(loaded.to_yaml()).recipe == loaded.recipe


def test_every_section_survives_yaml() -> None:
    full = {
        **BASE,
        "precision": {"name": "fp16", "loss_scale": 64.0, "keep_fp32": ["norm"]},
        "parallel": {"zero": 3, "shard": 4, "accumulate": "sharded", "gather": "micro_batch", "prefetch": 0},
        "memory": {"recompute": {"every": 2}, "optimizer_state": "nvme", "nvme_path": "/盘/a", "parameters": "host"},
        "comm": {"backend": "gloo", "wire": "bf16", "timeout": "90 s", "hang_after": "30 s"},
        "launch": {"processes": 2},
    }
    loaded = load_recipe(full)
    assert loaded.recipe.memory.recompute == RecomputeEvery(every=2)
    assert load_recipe_text(loaded.to_yaml()).recipe == loaded.recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["precision=bf17"], "precision.name: seen 'bf17', expected one of auto, fp32, bf16"),
        (["precision=bf16", "precision.window=5"], "precision.window: no such key here: it belongs to name: fp16"),
        (["precision=fp32", "precision.update=kahan"], "it belongs to name: bf16_pure"),
        (["precision={name: fp16, loss_scale: 8, hysteresis: 3}"], "precision.hysteresis: no such key here"),
        (["precision={name: fp16, min_scale: 131072}"], "at most precision.initial_scale, which is 65536"),
        (["precision.keep_fp32=['(']"], "precision.keep_fp32: seen ['('], expected a list of values"),
        (["parallel=zero3"], "parallel: seen 'zero3', expected auto or a section"),
        (["parallel.zero=4"], "parallel.zero: seen 4, expected one of auto, 0, 1, 2, 3"),
        (["parallel.zero=true"], "parallel.zero: seen true"),
        (["parallel.zero=0", "parallel.shard=2"], "parallel.shard: no such key here: parallel.zero is 0"),
        (["parallel.zero=1", "parallel.accumulate=sharded"], "gradients are whole on each rank"),
        (["parallel.zero=2", "parallel.gather=micro_batch"], "parameters are gathered once for a step"),
        (["memory.recompute=half"], "memory.recompute: seen 'half', expected one of auto, none, full, selective"),
        (["memory.recompute={evry: 2}"], "memory.recompute.evry: unknown key. Did you mean 'every'?"),
        (["memory.optimizer_state=nvme"], "memory.nvme_path: seen null, expected a folder"),
        (["memory.nvme_path=/x"], "memory.nvme_path: no such key here: memory.optimizer_state is device"),
        (["memory.release_gradients=true"], "release_gradients false, or optim.clip_norm null"),
        (["comm.hang_after=2h"], "comm.hang_after: seen '2h', expected at most comm.timeout, which is 30 min"),
        (["comm.timeout=100 steps"], "comm.timeout: seen '100 steps', expected a time"),
        (["launch.processes=0"], "launch.processes: seen 0, expected auto or a whole number >= 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides: list[str], message: str) -> None:
    assert message in refused(*overrides)


def test_gradients_are_released_where_nothing_is_clipped() -> None:
    assert recipe("memory.release_gradients=true", "optim.clip_norm=null").memory.release_gradients
