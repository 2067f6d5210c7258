"""Cuts, placement, legality, formulas and traces of pipelines: everything that needs no process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainwright.base.errors import ConfigError
from trainwright.comm.layout import SCHEDULES, PipelineLayout
from trainwright.comm.mesh import Axis
from trainwright.models import GPT2Config, LlamaConfig, build_model
from trainwright.parallel.pipeline import (
    Action,
    alias_parameters,
    balanced_cuts,
    bubble_share,
    idle_share,
    order_of_work,
    parts_of_rank,
    pipeline_problems,
    predicted_actions,
    rank_of_part,
    split_model,
    split_of,
    write_chrome_trace,
)
from trainwright.parallel.pipeline.balance import block_ranges
from trainwright.testing import tiny_gpt2_config, tiny_llama_config

VIRTUAL = {"gpipe": (1,), "1f1b": (1,), "interleaved": (2, 3), "interleaved_zb": (2, 3), "zbv": (2,), "dualpipev": (2,)}
UNITS = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}


def largest(costs: list[int], cuts: tuple[int, ...], embedding: int, head: int) -> int:
    edges = [0, *cuts, len(costs)]
    parts = [sum(costs[begin:end]) for begin, end in itertools.pairwise(edges)]
    parts[0] += embedding
    parts[-1] += head
    return max(parts)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 30), st.integers(0, 30))
def test_cuts_are_the_best_of_all(costs: list[int], parts: int, embedding: int, head: int) -> None:
    if parts > len(costs):
        with pytest.raises(ConfigError, match="cannot be cut"):
            balanced_cuts(costs, parts)
        return
    every = itertools.combinations(range(1, len(costs)), parts - 1)
    best = min(largest(costs, cuts, embedding, head) for cuts in every)
    found = balanced_cuts(costs, parts, embedding=embedding, head=head)
    assert largest(costs, found, embedding, head) == best


def test_equal_blocks_are_dealt_evenly_and_a_heavy_head_takes_fewer() -> None:
    assert balanced_cuts([1.0] * 10, 4) in [(3, 6, 8), (3, 5, 8), (2, 5, 8), (2, 5, 7), (2, 4, 7), (3, 5, 7)]
    assert balanced_cuts([1.0] * 8, 2, head=4.0) == (6,)
    assert balanced_cuts([1.0] * 8, 2, embedding=2.0) == (3,)


@pytest.mark.parametrize("cuts", [(0,), (8,), (3, 4), (), (-1,)])
def test_cuts_that_do_not_fit_are_refused(cuts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="cuts"):
        block_ranges(8, 2, cuts)


def test_every_part_is_on_one_rank_and_v_schedules_turn_at_the_last() -> None:
    for schedule, ranks in itertools.product(SCHEDULES, (2, 3, 4)):
        for virtual in VIRTUAL[schedule]:
            held = [part for rank in range(ranks) for part in parts_of_rank(schedule, ranks, virtual, rank)]
            assert sorted(held) == list(range(ranks * virtual))
    assert [parts_of_rank("zbv", 4, 2, rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert [parts_of_rank("interleaved", 4, 2, rank) for rank in range(4)] == [(0, 4), (1, 5), (2, 6), (3, 7)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_orders_place_parts_as_balance_says_and_compute_everything_once(schedule: str) -> None:
    for virtual, ranks in itertools.product(VIRTUAL[schedule], (2, 4)):
        orders = order_of_work(schedule, ranks, virtual, 8)
        for rank, order in orders.items():
            assert len(set(order)) == len(order)
            for part in parts_of_rank(schedule, ranks, virtual, rank):
                assert sorted(n for kind, p, n in order if kind == "F" and p == part) == list(range(8))
                assert sorted(n for kind, p, n in order if kind in "BI" and p == part) == list(range(8))
                assert sorted(n for kind, p, n in order if kind in "BW" and p == part) == list(range(8))
            assert {rank_of_part(schedule, ranks, part) for _, part, _ in order} == {rank}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_formula_of_the_idle_share_is_what_the_order_gives_on_paper(schedule: str) -> None:
    compared = 0
    for virtual, stages, micro_batches in itertools.product(VIRTUAL[schedule], (2, 3, 4, 8), range(1, 34)):
        if pipeline_problems(64, stages, schedule, micro_batches, virtual):
            continue
        shares = idle_share(predicted_actions(schedule, stages, micro_batches, virtual, seconds=UNITS))
        assert list(shares) == list(range(stages))
        formula = bubble_share(schedule, stages, micro_batches, virtual)
        assert list(shares.values()) == pytest.approx([formula] * stages, abs=1e-9), (virtual, stages, micro_batches)
        compared += 1
    assert compared > 30
    assert bubble_share(schedule, 1, 4) == 0.0


def test_zero_bubble_orders_wait_less_than_1f1b() -> None:
    plain = bubble_share("1f1b", 4, 8)
    assert plain == pytest.approx(3 / 11)
    assert bubble_share("interleaved", 4, 8, 2) == pytest.approx(3 / 19)
    for schedule in ("interleaved_zb", "zbv", "dualpipev"):
        assert bubble_share(schedule, 4, 8, 2) == pytest.approx(3 / 51)
        assert bubble_share(schedule, 4, 8, 2) < plain


def test_messages_and_unequal_parts_are_part_of_the_prediction() -> None:
    quick = predicted_actions("1f1b", 2, 4, seconds=UNITS)
    slow = predicted_actions("1f1b", 2, 4, seconds=UNITS, message=0.5)
    assert max(a.end for a in slow) > max(a.end for a in quick)
    lame = predicted_actions("1f1b", 2, 4, seconds=lambda kind, part: UNITS[kind] * (3 if part else 1))
    assert idle_share(lame)[0] > 0.5 > idle_share(lame)[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((4, 2, "interleaved", 7, 2), "3 equal rounds"),
        ((8, 4, "1f1b", 3, 1), "keeps 4 ranks busy"),
        ((8, 4, "dualpipev", 6, 2), "a micro-batch for each of its 8 parts"),
        ((8, 4, "zbv", 6, 1), "2 parts on each rank, not 1"),
        ((8, 4, "interleaved_zb", 8, 1), "at least 2 parts"),
        ((8, 4, "gpipe", 8, 2), "1 part on each rank"),
        ((3, 4, "gpipe", 8, 1), "3 blocks cannot be cut into 4 x 1"),
        ((8, 4, "pipedream", 8, 1), "none of gpipe"),
        ((8, 0, "1f1b", 8, 1), "at least 1"),
        ((8, 2, "gpipe", 0, 1), "at least 1 is needed"),
    ],
)
def test_every_reason_against_a_pipeline(arguments: tuple[int, int, str, int, int], words: str) -> None:
    problems = pipeline_problems(*arguments)
    assert any(words in problem for problem in problems), problems


def test_reasons_come_together_and_evaluation_needs_fewer() -> None:
    assert len(pipeline_problems(2, 4, "dualpipev", 3, 1)) == 3
    assert pipeline_problems(8, 4, "1f1b", 1, forward_only=True) == []
    assert pipeline_problems(8, 2, "1f1b", 8) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_legal_is_what_torch_runs(schedule: str) -> None:
    for virtual, stages, micro_batches in itertools.product(VIRTUAL[schedule], (2, 3, 4), range(1, 14)):
        if pipeline_problems(64, stages, schedule, micro_batches, virtual):
            with pytest.raises(ConfigError):
                order_of_work(schedule, stages, virtual, micro_batches)
        else:
            predicted_actions(schedule, stages, micro_batches, virtual, seconds=UNITS)  # ends: nobody waits for ever


def whole_and_parts(
    kind: str, schedule: str, ranks: int, virtual: int, layers: int = 8
) -> tuple[nn.Module, list[nn.Module]]:
    def build() -> nn.Module:
        if kind == "llama":
            return build_model(LlamaConfig(**tiny_llama_config(num_layers=layers)), device="meta")
        return build_model(GPT2Config(**tiny_gpt2_config(num_layers=layers)), device="meta")

    layout = PipelineLayout(ranks, schedule, virtual)
    return build(), [split_model(build(), Axis("pipeline", rank, ranks), layout) for rank in range(ranks)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_parts_on_meta_hold_every_parameter_once_under_its_name(kind: str, schedule: str) -> None:
    whole, parts = whole_and_parts(kind, schedule, 4, VIRTUAL[schedule][0])
    shapes = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    found: dict[str, tuple[int, ...]] = {}
    for part in parts:
        aliases = alias_parameters(part)
        for name, parameter in part.named_parameters():
            assert parameter.is_meta
            if name in aliases:
                assert tuple(parameter.shape) == shapes[aliases[name]]
            else:
                assert name not in found
                found[name] = tuple(parameter.shape)
    assert found == shapes


def test_a_tied_head_is_a_copy_on_the_last_rank_and_one_parameter_where_both_are_on_one() -> None:
    _, parts = whole_and_parts("gpt2", "1f1b", 2, 1)
    assert [alias_parameters(part) for part in parts] == [{}, {"lm_head.weight": "transformer.wte.weight"}]
    assert parts[0].lm_head is None
    assert parts[0].final_norm is None
    assert parts[1].embedding is None
    _, parts = whole_and_parts("gpt2", "zbv", 2, 2)
    assert [alias_parameters(part) for part in parts] == [{}, {}]
    assert parts[0].lm_head.weight is parts[0].embedding.weight
    assert [part.index for part in split_of(parts[0]).local] == [0, 3]


def test_blocks_keep_their_numbers_and_show_those_of_one_part_while_it_runs() -> None:
    _, parts = whole_and_parts("llama", "interleaved", 2, 2)
    stack = parts[1].blocks
    held = [name for name, _ in stack.named_children()]
    split = split_of(parts[1])
    assert [int(name) for name in held] == [n for part in split.local for n in part.blocks]
    with stack.only(split.local[1].blocks):
        assert [int(name) for name, _ in stack.named_children()] == list(split.local[1].blocks)
    assert [name for name, _ in stack.named_children()] == held


def test_explicit_cuts_and_costs() -> None:
    def build() -> nn.Module:
        return build_model(LlamaConfig(**tiny_llama_config(num_layers=6)), device="meta")

    axis = Axis("pipeline", 0, 2)
    assert split_of(split_model(build(), axis, PipelineLayout(2, cuts=(5,)))).local[0].blocks == (0, 1, 2, 3, 4)
    by_cost = split_model(build(), axis, PipelineLayout(2), costs=[9e9, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert split_of(by_cost).local[0].blocks == (0,)
    with pytest.raises(ConfigError, match="split already"):
        split_model(by_cost, axis, PipelineLayout(2))
    with pytest.raises(ConfigError, match="not split"):
        split_of(build())
    whole = build()
    assert split_model(whole, Axis.alone("pipeline"), PipelineLayout()) is whole
    assert alias_parameters(whole) == {}


def test_models_of_unknown_structure_are_refused_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    with pytest.raises(ConfigError, match="does not say what its embeddings are"):
        split_model(Odd(), Axis("pipeline", 0, 2), PipelineLayout(2))


def test_idle_share_and_trace_file(tmp_path: Path) -> None:
    actions = [
        Action("F", 0, 0, 10.0, 11.0, 0),
        Action("B", 0, 0, 13.0, 14.0, 0),
        Action("F", 1, 0, 11.0, 12.0, 1),
        Action("B", 1, 0, 12.0, 13.0, 1),
        Action("R", 1, -1, 13.0, 13.5, 1),
    ]
    assert idle_share(actions) == pytest.approx({0: 0.5, 1: 0.375})
    assert idle_share([]) == {}
    write_chrome_trace(actions, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    drawn = [(e["name"], e["pid"], e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert drawn[0] == ("F0", 0, 0, 0.0, 1e6)
    assert ("R", 1, 1, 3e6, 0.5e6) in drawn
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["pipeline rank 0", "pipeline rank 1"]


def test_meta_parts_have_no_storage() -> None:
    _, parts = whole_and_parts("llama", "1f1b", 2, 1)
    assert all(p.device == torch.device("meta") for part in parts for p in part.parameters())
