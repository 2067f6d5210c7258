"""The memory model: the ZeRO paper's numbers, this engine's own by hand, and what is offered where nothing fits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from trainwright.base.errors import MemoryLimitError
from trainwright.planner import ModelFacts
from trainwright.planner.cost import predict_memory
from trainwright.planner.memory import (
    MemorySettings,
    RankMemory,
    StateWidths,
    predict_rank_memory,
    state_widths,
    zero_states,
)
from trainwright.planner.memory_fit import (
    MemoryLimits,
    alternatives,
    memory_limits,
    refuse_before_allocating,
    shortfalls,
)

GIB = 1 << 30
PSI = 7_500_000_000
PAPER = StateWidths(held=0, whole=2, gradient=2, optimizer=12, kept_copy=2)  # arXiv 1910.02054, section 3.1
LLAMA_8B = ModelFacts(parameters=8_030_000_000, flops_per_token=5e10, layers=32, width=4096, vocab_size=128_256)
SMALL = ModelFacts(parameters=34_000_000, flops_per_token=2e8, layers=8, width=512, vocab_size=8192)
PLAIN = MemorySettings(micro_rows=8, sequence_length=2048)


@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_figure_1_of_the_zero_paper(zero: int, gigabytes: float) -> None:
    states = zero_states(PSI, PAPER, zero=zero, shard=64, whole_gradients=zero < 2)
    assert round(states.total / 1e9, 1) == gigabytes


@pytest.mark.parametrize(
    ("zero", "several", "accumulate", "expected"),
    [
        # parameters, gathered, gradients, optimizer in bytes per parameter, at 4 ranks in bf16 with AdamW
        (0, False, "local", (4, 2, 4, 8)),
        (1, False, "local", (1, 2, 1, 2)),
        (1, True, "local", (1, 2, 4, 2)),
        (2, True, "local", (1, 2, 4, 2)),
        (2, True, "sharded", (1, 2, 2, 2)),
        (2, False, "sharded", (1, 2, 1, 2)),
    ],
)
def test_states_of_the_real_types_by_hand(
    zero: int, several: bool, accumulate: str, expected: tuple[float, ...]
) -> None:
    settings = replace(PLAIN, zero=zero, shard=4, micro_batches=2 if several else 1, accumulate=accumulate)
    memory = predict_rank_memory(SMALL, settings)
    found = (memory.parameters, memory.gathered, memory.gradients, memory.optimizer)
    assert found == tuple(bytes_each * SMALL.parameters for bytes_each in expected)


def test_stage_3_gathers_two_blocks_and_what_is_outside_them() -> None:
    block = 3_000_000
    settings = replace(PLAIN, zero=3, shard=4, gather="micro_batch", block_parameters=block)
    memory = predict_rank_memory(SMALL, settings)
    assert memory.parameters == SMALL.parameters
    assert memory.gathered == 2 * (2 * block + SMALL.parameters - 8 * block)
    assert predict_rank_memory(SMALL, replace(settings, gather="step")).gathered == 2 * SMALL.parameters


def test_precisions_and_updates() -> None:
    assert state_widths("fp32", "adamw") == StateWidths(4, 0, 4, 8)
    assert state_widths("bf16_pure", "adamw") == StateWidths(2, 0, 2, 12)
    assert state_widths("bf16_pure", "adamw", update="kahan").optimizer == 10
    assert state_widths("bf16_pure", "lion", update="stochastic").optimizer == 4
    assert state_widths("fp16", "sgd", sharded=True) == StateWidths(4, 2, 4, 4)


@pytest.mark.parametrize(
    ("precision", "optimizer", "each"),
    [("fp32", "adamw", (4, 4, 8)), ("bf16", "adamw", (6, 4, 8)), ("bf16_pure", "lion", (2, 2, 8))],
)
def test_one_process_is_predicted_as_before(precision: str, optimizer: str, each: tuple[int, int, int]) -> None:
    memory = predict_memory(SMALL, optimizer=optimizer, precision=precision, micro_rows=4, sequence_length=512)
    assert (memory.parameters, memory.gradients, memory.optimizer) == tuple(SMALL.parameters * n for n in each)
    assert memory.activations == 4 * 512 * 56 * 8 * 512 * (2 if precision == "fp32" else 1)


def test_shards_of_one_rank_divide_nothing() -> None:
    assert predict_rank_memory(SMALL, replace(PLAIN, zero=3, shard=1)) == predict_rank_memory(SMALL, PLAIN)


def test_recomputing_and_offloading() -> None:
    unit = 8 * 2048 * 4096
    held = {
        str(kind): predict_rank_memory(LLAMA_8B, replace(PLAIN, recompute=kind)).activations
        for kind in ("none", "selective", 4, "full")
    }
    assert held["none"] == unit * 56 * 32
    # Autocast leaves the inputs of blocks in fp32; sharded, they have the type that parameters are gathered in.
    assert held["full"] == unit * (4 * 32 + 52)
    assert held["4"] == unit * (56 * 24 + 4 * 8 + 52)
    sharded = replace(PLAIN, recompute="full", zero=1, shard=2)
    assert predict_rank_memory(LLAMA_8B, sharded).activations == unit * (2 * 32 + 54)
    assert held["full"] < held["selective"] < held["none"]
    eager = predict_rank_memory(LLAMA_8B, replace(PLAIN, compiled=False)).activations
    assert eager == unit * 94 * 32
    away = predict_rank_memory(LLAMA_8B, replace(PLAIN, recompute="full", offload_activations=True))
    assert away.activations == unit * (2 * 4 + 52)
    assert away.host == unit * 4 * 32
    same = predict_rank_memory(LLAMA_8B, replace(PLAIN, offload_activations=True, host_is_device=True))
    assert same.activations == held["none"]


def test_what_moves_is_somewhere_else() -> None:
    plain = predict_rank_memory(LLAMA_8B, PLAIN)
    host = predict_rank_memory(LLAMA_8B, replace(PLAIN, optimizer_state="host"))
    assert (host.optimizer, host.host) == (0, plain.optimizer)
    disk = predict_rank_memory(LLAMA_8B, replace(PLAIN, optimizer_state="nvme"))
    assert (disk.optimizer, disk.disk) == (0, plain.optimizer)
    assert disk.host < 0.01 * plain.optimizer
    parameters = predict_rank_memory(LLAMA_8B, replace(PLAIN, parameters="host", zero=3, shard=8))
    assert parameters.parameters == parameters.gradients == parameters.optimizer == 0
    assert parameters.host == 2 * LLAMA_8B.parameters  # (4 + 4 + 8) / 8 ranks
    cpu = predict_rank_memory(LLAMA_8B, replace(PLAIN, optimizer_state="host", host_is_device=True))
    assert (cpu.optimizer, cpu.host) == (plain.optimizer, 0)


def limits(**changes: Any) -> MemoryLimits:
    return replace(MemoryLimits("H100", host=200 * GIB, device=80 * GIB, runtime=0), **changes)


def test_what_fits_passes() -> None:
    refuse_before_allocating(predict_rank_memory(SMALL, PLAIN), limits())


def test_the_sum_and_the_nearest_that_fits_are_named() -> None:
    settings = replace(PLAIN, micro_rows=4, micro_batches=8)
    memory = predict_rank_memory(LLAMA_8B, settings)
    offered = list(alternatives(LLAMA_8B, settings, world=8))
    with pytest.raises(MemoryLimitError) as caught:
        refuse_before_allocating(memory, limits(), offered)
    message, hint = caught.value.message, str(caught.value.hint)
    for kind in ("parameters", "gathered", "gradients", "optimizer", "activations"):
        assert kind in message
    assert "80 GiB" in message
    chosen = next(one for one in offered if not shortfalls(one.memory, limits()))
    assert str(chosen) in hint
    assert "parallel.zero=" in hint
    # No cheaper one fits, and the chosen one really does.
    assert all(shortfalls(one.memory, limits()) for one in offered if one.cost < chosen.cost - 1e-9)
    assert chosen.memory.device <= 80 * GIB


def test_alternatives_come_cheapest_first_and_train_the_same_batch() -> None:
    settings = replace(PLAIN, micro_rows=6, micro_batches=2)
    offered = list(alternatives(LLAMA_8B, settings, world=4, nvme=True))
    assert [round(one.cost, 4) for one in offered] == sorted(round(one.cost, 4) for one in offered)
    assert len({one.changes for one in offered}) == len(offered)
    for one in offered:
        changed = dict(one.changes)
        assert 6 % int(changed.get("train.micro_batch", 6)) == 0
        assert changed.get("parallel.accumulate") != "sharded" or int(changed.get("parallel.zero", 0)) >= 2


def test_a_small_shortage_costs_only_the_micro_batch() -> None:
    settings = replace(PLAIN, micro_rows=8)
    needed = predict_rank_memory(SMALL, settings)
    tight = limits(device=needed.device - 1)
    with pytest.raises(MemoryLimitError, match="activations") as caught:
        refuse_before_allocating(needed, tight, alternatives(SMALL, settings))
    assert "train.micro_batch=4 (" in str(caught.value.hint)


def test_nothing_fits() -> None:
    settings = replace(PLAIN, micro_rows=1)
    with pytest.raises(MemoryLimitError) as caught:
        refuse_before_allocating(
            predict_rank_memory(LLAMA_8B, settings), limits(device=GIB), alternatives(LLAMA_8B, settings)
        )
    assert "no setting of this run fits" in str(caught.value.hint)


def test_ranks_of_one_host_share_its_memory() -> None:
    memory = predict_rank_memory(SMALL, replace(PLAIN, micro_rows=1, host_is_device=True))
    one = memory.device + memory.host
    cpu = MemoryLimits("CPU", host=3 * one, runtime=0)
    refuse_before_allocating(memory, replace(cpu, ranks_on_host=3))
    with pytest.raises(MemoryLimitError, match="each of the 4 ranks"):
        refuse_before_allocating(memory, replace(cpu, ranks_on_host=4))
    with pytest.raises(MemoryLimitError, match="this host"):
        refuse_before_allocating(memory, replace(cpu, ranks_on_host=3, runtime=1))


def test_offloading_is_checked_against_the_host_and_the_disk() -> None:
    memory = RankMemory(1, 0, 1, 0, 1, 0, host=50 * GIB, disk=40 * GIB)
    assert shortfalls(memory, limits(ranks_on_host=4, disk=160 * GIB)) == []
    assert [place for place, _, _ in shortfalls(memory, limits(ranks_on_host=5, disk=160 * GIB))] == [
        "this host",
        "the disk",
    ]
    assert [place for place, _, _ in shortfalls(memory, limits(disk=None))] == ["the disk"]


def test_limits_of_this_machine() -> None:
    here = memory_limits("cpu", ranks_on_host=2)
    assert here.device is None
    assert 0 < here.host < math.inf
    assert here.ranks_on_host == 2
