"""From the `parallel` section to a layout: what is given stands, what is open is 1 unless memory says no."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trainwright.base.errors import ConfigError, MemoryLimitError
from trainwright.comm.layout import Layout, PipelineLayout
from trainwright.config import ParallelSection, load_recipe
from trainwright.models import preset
from trainwright.planner import DataFacts, MachineFacts, ModelFacts, Plan, resolve
from trainwright.planner.layout import Degrees, choose_layout, degree_candidates
from trainwright.planner.model_facts import model_facts

GIB = 1 << 30
MODEL = model_facts(preset("llama-34m"), 1024)
LARGE = model_facts(preset("llama-8b"), 8192)
DATA = DataFacts(train_rows=20_000, validation_rows=0, sequence_length=1024, trained_per_row=1024.0, vocab_size=8192)


def section(**values: Any) -> ParallelSection:
    return ParallelSection.model_validate(values)


def machine(ranks: int, memory: int = 80 * GIB, **changes: Any) -> MachineFacts:
    facts = MachineFacts(
        kind="cuda",
        name="test GPU",
        cores=8,
        memory_bytes=memory,
        bf16=True,
        compiler=None,
        peak={"fp32": 1e13, "bf16": 1e14},
        ranks=ranks,
        host_bytes=1024 * GIB,
    )
    return replace(facts, **changes)


def plan_of(ranks: int, model: ModelFacts = MODEL, size: int = 80 * GIB, data: DataFacts = DATA, **keys: Any) -> Plan:
    train = {"steps": 10, **keys.pop("train", {})}
    hosts = keys.pop("ranks_on_host", None)
    recipe = {
        "model": {"preset": "llama-34m"},
        "data": {"source": "python-stdlib", "sequence_length": data.sequence_length},
        "train": train,
        **keys,
    }
    loaded = load_recipe(recipe)
    plan = resolve(loaded.recipe, machine(ranks, size, ranks_on_host=hosts), data, model)
    resolved = loaded.resolve(plan.updates())  # the decisions are values that the schema takes
    again = resolve(resolved.recipe, machine(ranks, size, ranks_on_host=hosts), data, model)
    assert again.layout == plan.layout
    return plan


def decided(plan: Plan) -> dict[str, Any]:
    return {decision.key: decision.value for decision in plan.decisions}


def test_a_given_layout_stands() -> None:
    parallel = {"zero": 1, "tensor": 2, "context": 2, "pipeline": {"stages": 2, "schedule": "interleaved"}}
    plan = plan_of(16, parallel=parallel, train={"batch_tokens": 32 * 1024, "micro_batch": 2})
    assert plan.layout == Layout(16, 1, 4, tensor=2, context=2, ulysses=2, pipeline=PipelineLayout(2, "interleaved", 2))
    assert (plan.layout.rows, plan.rank_rows, plan.accumulation) == (2, 16, 8)
    keys = decided(plan)
    assert keys["parallel.ulysses"] == 2
    assert keys["parallel.pipeline.virtual"] == 2
    assert "parallel.tensor" not in keys


def test_a_batch_divides_among_ranks_with_rows_of_their_own() -> None:
    plan = plan_of(8, parallel={"tensor": 2, "pipeline": 2})
    assert plan.layout.rows == 2
    assert plan.batch_rows % 2 == 0
    assert plan.rank_rows == plan.batch_rows // 2
    with pytest.raises(ConfigError, match=r"2 ranks with rows of their own \(8 processes\) cannot share equally"):
        plan_of(8, parallel={"tensor": 2, "pipeline": 2}, train={"batch_tokens": 5 * 1024})


def test_a_pipeline_gets_micro_batches_to_work_on() -> None:
    plan = plan_of(4, parallel={"pipeline": 4}, train={"batch_tokens": 32 * 1024})
    assert plan.accumulation == 16  # four for each stage
    few = plan_of(4, parallel={"pipeline": 4}, train={"batch_tokens": 4 * 1024})
    assert few.accumulation == 4
    dual = plan_of(4, parallel={"pipeline": {"stages": 4, "schedule": "dualpipev"}}, train={"batch_tokens": 64 * 1024})
    assert dual.accumulation >= 8
    runs = plan_of(2, parallel={"pipeline": {"stages": 2, "micro_batches": 3}}, train={"batch_tokens": 24 * 1024})
    assert runs.accumulation % 3 == 0
    with pytest.raises(ConfigError, match="1f1b keeps 4 ranks busy"):
        plan_of(4, parallel={"pipeline": 4}, train={"batch_tokens": 4 * 1024, "micro_batch": 2})


def test_an_open_degree_is_1_where_that_fits() -> None:
    open_ = {"tensor": "auto", "context": "auto", "expert": "auto", "pipeline": {"stages": "auto", "schedule": "zbv"}}
    plan = plan_of(8, parallel=open_)
    assert not plan.layout.divides_model
    keys = decided(plan)
    assert keys["parallel.tensor"] == keys["parallel.context"] == keys["parallel.expert"] == 1
    assert keys["parallel.pipeline"] == {"stages": 1}
    assert all(decision.reason for decision in plan.decisions)


def test_keys_that_lose_their_effect_go_with_the_degree() -> None:
    plan = plan_of(8, parallel={"tensor": "auto", "async_tensor": True, "context": "auto", "ulysses": 2})
    keys = decided(plan)
    assert (keys["parallel.async_tensor"], keys["parallel.ulysses"]) == (None, None)


def large(ranks: int, memory: int, **parallel: Any) -> Plan:
    data = replace(DATA, sequence_length=8192, trained_per_row=8192.0)
    train = {"batch_tokens": 64 * 8192, "micro_batch": 1}
    return plan_of(ranks, LARGE, memory, data, parallel=parallel, train=train, memory={"recompute": "full"})


def test_the_smallest_degree_that_fits_is_taken_tensor_first() -> None:
    # Stage 0 and 4 ranks: 8B parameters x 18 bytes do not fit 80 GiB on one rank, nor halved with the transfers.
    plan = large(4, 80 * GIB, zero=0, tensor="auto", pipeline="auto")
    assert (plan.layout.tensor, plan.layout.pipeline.stages) == (2, 1)
    assert decided(plan)["parallel.tensor"] == 2
    reasons = {decision.key: decision.reason for decision in plan.decisions}
    assert reasons["parallel.tensor"] == "the smallest degree whose predicted memory fits"
    smaller = large(4, 48 * GIB, zero=0, tensor="auto", pipeline="auto")
    assert (smaller.layout.tensor, smaller.layout.pipeline.stages) == (4, 1)


def test_tensor_stays_inside_a_host() -> None:
    plan = plan_of(
        8,
        LARGE,
        48 * GIB,
        replace(DATA, sequence_length=8192, trained_per_row=8192.0),
        parallel={"zero": 0, "tensor": "auto", "pipeline": "auto"},
        train={"batch_tokens": 64 * 8192, "micro_batch": 1},
        memory={"recompute": "full"},
        ranks_on_host=2,
    )
    assert plan.layout.tensor == 2
    assert plan.layout.pipeline.stages >= 2


def test_zero_is_tried_before_the_model_is_divided() -> None:
    plan = large(8, 40 * GIB, tensor="auto")
    assert (plan.layout.tensor, plan.layout.zero) == (1, 3)


def test_candidates_come_in_order_and_only_where_they_divide() -> None:
    assert degree_candidates(section(tensor=2, pipeline=3), 12) == [Degrees(2, 1, 1, 3)]
    found = degree_candidates(section(tensor="auto", context="auto"), 8, model=MODEL, ranks_on_host=4)
    assert found[:3] == [Degrees(), Degrees(tensor=2), Degrees(context=2)]
    assert max(one.tensor for one in found) == 4
    assert all(8 % one.same_rows == 0 for one in found)
    stages = degree_candidates(section(pipeline="auto"), 64, model=MODEL)
    assert max(one.stages for one in stages) == 8  # as many as blocks
    assert degree_candidates(section(expert="auto"), 8, model=MODEL) == [Degrees()]


def test_an_illegal_layout_is_refused_with_every_reason_and_its_neighbours() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(4, parallel={"tensor": 4, "context": 2, "zero": 1}, train={"batch_tokens": 8 * 1024})
    assert "parallel.context 2 does not divide" in caught.value.message
    assert "the nearest that can: " in str(caught.value.hint)
    with pytest.raises(ConfigError) as caught:
        choose_layout(section(tensor=3, pipeline=2, zero=1), 6, accumulation=1, model=MODEL)
    assert "does not divide the 8 units of self_attn.q_proj" in caught.value.message


def test_more_parts_than_blocks_are_one_reason_among_the_others() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(48, parallel={"tensor": 3, "pipeline": 16}, train={"batch_tokens": 32 * 1024})
    for reason in (
        f"{MODEL.layers} blocks cannot be cut into 16 x 1 = 16 parts",
        "does not divide the 8 units of self_",
    ):
        assert reason in caught.value.message
    assert "the nearest that can: " in str(caught.value.hint)


def test_shards_of_a_rank_that_has_no_partner_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.shard 2 does not divide the 1 data-parallel ranks"):
        choose_layout(section(tensor=2, shard=2), 2, accumulation=1)
    alone = choose_layout(section(tensor=2), 2, accumulation=1)
    assert (alone.layout.zero, alone.layout.shard) == (0, 1)
    assert alone.decisions[0].reason == "no two ranks hold the same part of the model"


def test_what_does_not_fit_is_refused_with_degrees_that_do() -> None:
    with pytest.raises(MemoryLimitError) as caught:
        large(8, 40 * GIB, zero=0)
    hint = str(caught.value.hint)
    assert "the nearest that fits: parallel." in hint
    with pytest.raises(MemoryLimitError) as caught:
        plan_of(
            8,
            LARGE,
            12 * GIB,
            replace(DATA, sequence_length=8192, trained_per_row=8192.0),
            parallel={"zero": 3},
            train={"batch_tokens": 64 * 8192, "micro_batch": 1},
            memory={"recompute": "full", "optimizer_state": "host"},
        )
    assert "parallel.tensor=" in str(caught.value.hint) or "parallel.pipeline.stages=" in str(caught.value.hint)


def test_the_plan_tells_what_is_sent() -> None:
    plan = plan_of(8, parallel={"tensor": 2, "pipeline": 2, "zero": 1}, train={"batch_tokens": 32 * 1024})
    assert set(plan.prediction.wire) == {"state", "tensor", "pipeline"}
    text = plan.describe()
    assert "sends" in text
    assert "per step from each rank" in text
    assert "matrices over 2 ranks" in text


def test_a_pipeline_that_waits_is_predicted_slower() -> None:
    batch = {"batch_tokens": 4 * 1024, "micro_batch": 1}
    rate = {
        schedule: plan_of(
            4, parallel={"pipeline": {"stages": 4, "schedule": schedule}}, train=batch
        ).prediction.tokens_per_second
        for schedule in ("1f1b", "interleaved")
    }
    assert rate["1f1b"] < rate["interleaved"] < plan_of(4, train=batch).prediction.tokens_per_second


def test_mlps_compute_in_pieces_only_where_whole_sequences_do_not_fit() -> None:
    data = replace(DATA, sequence_length=65536, trained_per_row=65536.0)
    keys: dict[str, Any] = {"train": {"batch_tokens": 65536, "micro_batch": 1}, "parallel": {"zero": 0}}
    fits = plan_of(1, MODEL, 80 * GIB, data, **keys)
    assert decided(fits)["memory.mlp_chunks"] == 1
    needed = fits.prediction.memory["total"]
    tight = plan_of(1, MODEL, needed - GIB // 2, data, **keys)
    assert decided(tight)["memory.mlp_chunks"] > 1
    assert tight.prediction.memory["total"] <= needed - GIB // 2
    given = plan_of(1, MODEL, 80 * GIB, data, memory={"mlp_chunks": 4}, **keys)
    assert given.prediction.memory["activations"] < fits.prediction.memory["activations"]
