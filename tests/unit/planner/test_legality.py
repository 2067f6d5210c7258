"""Layouts of a model and a batch: every reason against one at once, and neighbours that really are legal."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.base.errors import ConfigError
from trainwright.comm.layout import SCHEDULES, Layout, PipelineLayout, divisors
from trainwright.models import preset, replace
from trainwright.models.moe.config import MoEConfig
from trainwright.planner.facts import BatchFacts, ModelFacts
from trainwright.planner.legality import check_layout, layout_problems, nearest_legal
from trainwright.planner.model_facts import model_facts

GROUPED = model_facts(replace(preset("llama-34m"), num_kv_heads=2, max_position_embeddings=4096), 1024)
GPT2 = model_facts(replace(preset("gpt2-nano"), max_position_embeddings=1024, vocab_size=256), 1024)
MOE = model_facts(
    MoEConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        num_experts=8,
        experts_per_token=2,
        expert_size=32,
    ),
    1024,
)
MODELS = {"grouped": GROUPED, "gpt2": GPT2, "moe": MOE}
BATCH = BatchFacts(rows=48, micro_rows=1, sequence_length=1024)

DEGREES = st.sampled_from([0, 1, 1, 1, 2, 2, 3, 4, 8])


@st.composite
def drafts(draw: st.DrawFn) -> Layout:
    """Any layout that can be written down, most of them illegal."""
    pipeline = PipelineLayout(
        draw(st.sampled_from([1, 1, 2, 3, 4, 8])),
        draw(st.sampled_from(SCHEDULES)),
        draw(st.sampled_from([1, 1, 2, 3])),
        draw(st.sampled_from([None, None, None, (2,), (1, 2, 3)])),
    )
    return Layout.draft(
        draw(st.sampled_from([1, 2, 4, 6, 8, 12, 16])),
        draw(st.integers(0, 3)),
        draw(DEGREES),
        accumulate=draw(st.sampled_from(["local", "local", "sharded"])),
        gather=draw(st.sampled_from(["step", "step", "micro_batch"])),
        tensor=draw(DEGREES),
        context=draw(DEGREES),
        ulysses=draw(DEGREES),
        expert=draw(DEGREES),
        pipeline=pipeline,
    )


def made(draft: Layout) -> Layout:
    """The same layout through the constructor, which checks the ranks among themselves."""
    names = ("world", "zero", "shard", "accumulate", "gather", "tensor", "context", "ulysses", "expert", "pipeline")
    return Layout(**{name: getattr(draft, name) for name in names})


@settings(max_examples=400, deadline=None)
@given(drafts())
def test_a_draft_is_legal_exactly_when_the_layout_can_be_made(draft: Layout) -> None:
    problems = layout_problems(draft)
    if problems:
        with pytest.raises(ConfigError) as caught:
            made(draft)
        assert all(problem in caught.value.message for problem in problems)
    else:
        assert check_layout(draft) == made(draft)


@settings(max_examples=300, deadline=None)
@given(drafts(), st.sampled_from(sorted(MODELS)), st.sampled_from([BATCH, BatchFacts(16, 2, 1024), None]))
def test_checking_tells_every_reason_and_only_legal_neighbours(
    draft: Layout, name: str, batch: BatchFacts | None
) -> None:
    model = MODELS[name]
    problems = layout_problems(draft, model, batch)
    assert len(set(problems)) == len(problems)
    if not problems:
        assert check_layout(draft, model, batch) == made(draft)
        same = made(draft)
        if same.pipeline.stages == 1:  # a schedule of one stage is no schedule
            same = dataclasses.replace(same, pipeline=PipelineLayout())
        assert nearest_legal(draft, model, batch, limit=1) == [same]
        return
    with pytest.raises(ConfigError) as caught:
        check_layout(draft, model, batch)
    assert all(problem in caught.value.message for problem in problems)
    near = nearest_legal(draft, model, batch)
    assert len({*near}) == len(near) <= 3
    for layout in near:
        assert layout_problems(layout, model, batch) == []
        assert made(layout) == layout
        assert layout.world == draft.world
    if near:
        assert "the nearest that can" in str(caught.value.hint)


def independent(layout: Layout, model: ModelFacts, batch: BatchFacts) -> bool:
    """The rules written down once more, from the sizes alone."""
    shape = model.shape
    assert shape is not None
    data, rest = divmod(layout.world, layout.tensor * layout.pipeline.stages)
    if rest or data % layout.context or data % layout.shard or data % layout.expert or layout.context % layout.ulysses:
        return False
    if layout.zero > 0 and layout.shard > 1 and layout.shard % layout.expert:
        return False
    if shape.heads % layout.tensor or shape.mlp_width % layout.tensor:
        return False
    if shape.heads // layout.tensor % layout.ulysses or (layout.expert > 1 and not shape.experts):
        return False
    ring = layout.context // layout.ulysses
    pieces = layout.context if ring == 1 else 2 * layout.context
    rows = data // layout.context
    passes = batch.rows / (rows * batch.micro_rows)
    stages = layout.pipeline.stages
    return (
        batch.sequence_length % pieces == 0
        and (not shape.experts or shape.experts % layout.expert == 0)
        and passes == int(passes)
        and (stages == 1 or stages <= min(model.layers, passes))
    )


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_layout_of_eight_ranks_against_the_rules_written_twice(name: str) -> None:
    model, legal, refused = MODELS[name], 0, 0
    assert model.shape is not None
    for stages in divisors(8):
        for tensor in divisors(8):
            for context in divisors(8):
                for expert in divisors(8):
                    layout = Layout.draft(
                        8,
                        2,
                        max(1, 8 // (stages * tensor)),
                        tensor=tensor,
                        context=context,
                        ulysses=1,
                        expert=expert,
                        pipeline=PipelineLayout(stages),
                    )
                    expected = stages * tensor <= 8 and independent(layout, model, BATCH)
                    if name == "moe" and model.shape.config.intermediate_size % tensor:  # type: ignore[union-attr]
                        expected = False
                    assert (layout_problems(layout, model, BATCH) == []) == expected, layout
                    legal += expected
                    refused += not expected
    assert legal > 10
    assert refused > 10


def test_all_reasons_stand_in_one_message() -> None:
    draft = Layout.draft(8, 3, 8, tensor=3, context=2, expert=2, pipeline=PipelineLayout(9))
    with pytest.raises(ConfigError) as caught:
        check_layout(draft, GROUPED, BATCH)
    for reason in (
        "parallel.tensor 3 x parallel.pipeline.stages 9 does not divide the 8 processes",
        "parallel.tensor 3 does not divide the 8 units of self_attn.q_proj",
        "8 blocks cannot be cut into 9 x 1 = 9 parts",
        "parallel.expert is 2, but",
    ):
        assert reason in caught.value.message
    assert "parallel.pipeline.stages=" in str(caught.value.hint)


def test_the_nearest_keeps_what_can_stay() -> None:
    draft = Layout.draft(8, 3, 1, tensor=8, gather="micro_batch")
    near = nearest_legal(draft, model_facts(replace(preset("llama-34m"), num_heads=4, num_kv_heads=4), 1024), BATCH)
    assert (near[0].tensor, near[0].zero, near[0].gather) == (4, 3, "micro_batch")
    assert near[0].pipeline.stages == near[0].context == 1


def test_a_run_of_the_schedule_divides_the_micro_batches() -> None:
    layout = Layout(2, 0, 1, pipeline=PipelineLayout(2, "1f1b"))
    assert layout_problems(layout, GROUPED, BatchFacts(8, 1, 1024, run=4)) == []
    assert (
        "micro_batches 3 does not divide the 8 micro-batches"
        in layout_problems(layout, GROUPED, BatchFacts(8, 1, 1024, run=3))[0]
    )
    assert "1f1b keeps 2 ranks busy" in layout_problems(layout, GROUPED, BatchFacts(8, 1, 1024, run=1))[0]


def test_cuts_beyond_the_model_are_refused() -> None:
    layout = Layout(2, 0, 1, pipeline=PipelineLayout(2, "1f1b", 1, (9,)))
    assert layout_problems(layout, GROUPED) == ["parallel.pipeline.cuts [9] go beyond the 8 blocks"]


def test_tensor_ranks_divide_the_tokens_between_blocks() -> None:
    layout = Layout(4, 0, 1, tensor=2, context=2)
    assert layout_problems(layout, GROUPED, BatchFacts(2, 1, 1024)) == []
    odd = layout_problems(layout, GROUPED, BatchFacts(2, 1, 1026))
    assert "rows of 513 tokens on a context rank cannot be divided over parallel.tensor 2" in odd


def test_scale_is_no_obstacle() -> None:
    model = model_facts(preset("llama-70b"), 8192)
    draft = Layout.draft(16384, 3, 128, tensor=16, pipeline=PipelineLayout(12, "interleaved", 5))
    near = nearest_legal(draft, model, BatchFacts(2048, 1, 8192))
    assert len(near) == 3
    assert all(layout_problems(layout, model, BatchFacts(2048, 1, 8192)) == [] for layout in near)
