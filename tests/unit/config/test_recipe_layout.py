"""`parallel` beyond ZeRO: tensor, context, expert and pipeline degrees, their short forms, and the batch they share."""

from __future__ import annotations

import pytest

from trainwright.base.errors import ConfigError
from trainwright.config import EngineConfig, Recipe, load_engine_config, load_recipe, load_recipe_text, resolve_batch
from trainwright.config.pipeline_section import SCHEDULES, PipelineSection, parts_per_rank

BASE = {"model": {"preset": "llama-5m"}, "data": {"source": "a.txt"}}


def recipe(*overrides: str) -> Recipe:
    return load_recipe(BASE, overrides).recipe


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe(*overrides)
    return caught.value.message


def test_nothing_is_divided_unless_it_is_asked_for() -> None:
    parallel = recipe().parallel
    assert (parallel.tensor, parallel.context, parallel.expert, parallel.pipeline.stages) == (1, 1, 1, 1)
    assert parallel.pipeline.parts == 1
    assert (parallel.model_ranks, parallel.row_ranks(6)) == (1, 6)
    assert recipe().memory.mlp_chunks == "auto"


def test_a_number_of_stages_stands_for_the_section() -> None:
    short, long = recipe("parallel.pipeline=4"), recipe("parallel.pipeline={stages: 4}")
    assert short == long
    assert short.parallel.pipeline.schedule == "1f1b"
    assert recipe("parallel.pipeline=auto").parallel.pipeline.stages == "auto"
    text = "model: {preset: llama-5m}\ndata: {source: a.txt}\nparallel: {pipeline: 2, zero: 1}\n"
    loaded = load_recipe_text(text, ["parallel.pipeline.schedule=gpipe"], name="r.yaml")
    assert (loaded.recipe.parallel.pipeline.stages, loaded.recipe.parallel.pipeline.schedule) == (2, "gpipe")
    assert str(loaded.provenance["parallel.pipeline.stages"]) == "r.yaml:3"
    assert str(loaded.provenance["parallel.pipeline.schedule"]) == "override parallel.pipeline.schedule=gpipe"
    assert load_recipe_text(loaded.to_yaml()).recipe == loaded.recipe


def test_a_rule_that_settles_the_stages_keeps_the_rest() -> None:
    loaded = load_recipe(BASE, ["parallel.pipeline={stages: auto, schedule: zbv}"])
    settled = loaded.resolve({"parallel.pipeline": (2, "does not fit on one"), "parallel.tensor": (2, "as above")})
    pipeline = settled.recipe.parallel.pipeline
    assert (pipeline.stages, pipeline.schedule, pipeline.parts) == (2, "zbv", 4)
    assert settled.provenance["parallel.pipeline.stages"].reason == "does not fit on one"


def test_every_layout_key_survives_yaml() -> None:
    full = {
        **BASE,
        "parallel": {
            "zero": 1,
            "shard": 2,
            "tensor": 2,
            "async_tensor": False,
            "context": 4,
            "ulysses": 2,
            "expert": 2,
            "pipeline": {"stages": 2, "schedule": "interleaved", "virtual": 3, "cuts": [1, 3, 5, 7, 9]},
        },
        "memory": {"mlp_chunks": 4},
    }
    loaded = load_recipe(full)
    assert loaded.recipe.parallel.pipeline.cuts == (1, 3, 5, 7, 9)
    assert loaded.recipe.parallel.model_ranks == 16
    assert loaded.recipe.parallel.row_ranks(32) == 2
    assert load_recipe_text(loaded.to_yaml()).recipe == loaded.recipe
    assert load_recipe(loaded.recipe).recipe == loaded.recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tensor=0"], "parallel.tensor: seen 0, expected auto or a whole number >= 1"),
        (["parallel.tensro=2"], "parallel.tensro: unknown key. Did you mean 'tensor'?"),
        (["parallel.async_tensor=true"], "parallel.async_tensor: no such key here: parallel.tensor is 1"),
        (["parallel.ulysses=2"], "parallel.ulysses: no such key here: parallel.context is 1"),
        (["parallel.context=4", "parallel.ulysses=3"], "expected a divisor of parallel.context, which is 4"),
        (["parallel.pipeline=two"], "parallel.pipeline: seen 'two', expected a section"),
        (["parallel.pipeline=0"], "parallel.pipeline.stages: seen 0, expected auto or a whole number >= 1"),
        (["parallel.pipeline.schedule=gpipe"], "parallel.pipeline.schedule: no such key here: parallel.pipeline"),
        (["parallel.pipeline={stages: 2, schedule: 1f1bb}"], "Did you mean '1f1b'?"),
        (["parallel.pipeline={stages: 2, virtual: 2}"], "schedule 1f1b has 1 part on each rank"),
        (["parallel.pipeline={stages: 2, schedule: zbv, virtual: 3}"], "schedule zbv has 2 parts on each rank"),
        (["parallel.pipeline={stages: 2, schedule: interleaved, virtual: 1}"], "virtual: seen 1, expected at least 2"),
        (["parallel.pipeline={stages: 3, cuts: [4, 2]}"], "numbers of blocks in rising order"),
        (["parallel.pipeline={stages: 3, cuts: [2]}"], "expected 2 numbers: 3 stages with 1 part(s) each"),
        (["parallel.pipeline={stages: 2, schedule: zbv, cuts: [2]}"], "3 numbers: 2 stages with 2 part(s) each"),
        (["parallel.pipeline={stages: auto, cuts: [2]}"], "cuts belong to a number of stages"),
        (["parallel.pipeline.stage=2"], "parallel.pipeline.stage: unknown key. Did you mean 'stages'?"),
        (["memory.mlp_chunks=0"], "memory.mlp_chunks: seen 0, expected auto or a whole number >= 1"),
        (["parallel=tensor"], "expected auto or a section"),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides: list[str], message: str) -> None:
    assert message in refused(*overrides)


def test_each_schedule_has_its_number_of_parts() -> None:
    parts = {schedule: parts_per_rank(schedule, "auto") for schedule in SCHEDULES}
    assert parts == {"gpipe": 1, "1f1b": 1, "interleaved": 2, "interleaved_zb": 2, "zbv": 2, "dualpipev": 2}
    assert parts_per_rank("interleaved", 4) == 4
    for schedule in SCHEDULES:
        assert PipelineSection.model_validate({"stages": 3, "schedule": schedule}).parts == 3 * parts[schedule]


def test_a_batch_counts_ranks_that_have_rows_of_their_own() -> None:
    config = {"batch": {"micro": 3, "accumulation": 2}, "parallel": {"tensor": 2, "pipeline": 2}}
    batch = load_engine_config(config, world=8).config.batch
    assert (batch.global_, batch.micro, batch.accumulation) == (12, 3, 2)
    config = {"batch": {"global": 8}, "parallel": {"context": 4}}
    batch = load_engine_config(config, world=8).config.batch
    assert (batch.global_, batch.micro, batch.accumulation) == (8, 4, 1)
    with pytest.raises(ConfigError, match=r"2 ranks with rows of their own \(4 ranks, 2 to the same rows\)"):
        load_engine_config({"batch": {"global": 5}, "parallel": {"tensor": 2}}, world=4)
    assert resolve_batch(None, 2, None, 2, all_ranks=8).global_ == 4


@pytest.mark.parametrize("batch", [{}, {"micro": 1}])
def test_ranks_that_cannot_form_the_layout_are_refused(batch: dict[str, int]) -> None:
    parallel = {"tensor": 2, "context": 2, "pipeline": {"stages": 3}}
    with pytest.raises(ConfigError) as caught:
        load_engine_config({"batch": batch, "parallel": parallel}, world=16)
    expected = "tensor 2 x context 2 x pipeline.stages 3 needs a multiple of 12 processes, and there are 16"
    assert expected in caught.value.message
    assert "start 12 or 24 processes" in caught.value.message


def test_an_engine_needs_numbers() -> None:
    for key in ("tensor", "context", "expert", "pipeline"):
        with pytest.raises(ConfigError, match="a number: only a recipe has what auto is chosen by"):
            load_engine_config({"parallel": {key: "auto"}}, world=4)
    assert EngineConfig.model_validate({"parallel": {"tensor": 2}}).parallel.ulysses == "auto"
