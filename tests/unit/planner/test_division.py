"""What one rank holds: parameters, passes in flight and bytes by every degree, against sums and torch's own orders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from trainwright.comm.layout import SCHEDULES, Layout, PipelineLayout
from trainwright.models import build_model, preset
from trainwright.models import replace as other_config
from trainwright.models.moe.config import MoEConfig
from trainwright.parallel.pipeline.orders import order_of_work
from trainwright.parallel.pipeline.rules import pipeline_problems
from trainwright.planner.division import Division, rank_part
from trainwright.planner.facts import ModelFacts
from trainwright.planner.in_flight import parts_in_flight
from trainwright.planner.memory import MemorySettings, predict_rank_memory
from trainwright.planner.model_facts import model_facts
from trainwright.planner.wire import wire_bytes

LLAMA = model_facts(preset("llama-8b"), 8192)
TIED = model_facts(preset("gpt2"), 1024)
MOE_CONFIG = MoEConfig(
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
)
MOE = model_facts(MOE_CONFIG, 128)
PLAIN = MemorySettings(micro_rows=1, sequence_length=8192, micro_batches=16)


def test_the_shape_is_read_off_the_model() -> None:
    shape = LLAMA.shape
    assert shape is not None
    assert (shape.heads, shape.kv_heads, shape.head_width, shape.mlp_width) == (32, 8, 128, 14336)
    assert shape.block == 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert (shape.block_kv, shape.block_whole) == (2 * 4096 * 1024, 2 * 4096)
    assert shape.embedding == shape.head == 128256 * 4096
    assert (shape.tied, shape.experts) == (False, 0)
    tied = TIED.shape
    assert tied is not None
    assert (tied.tied, tied.positions, tied.block_kv) == (True, 1024 * 768, 0)
    assert tied.block_whole == 4 * 768 + 2 * 768  # two norms with weight and bias, the biases of two row linears
    moe = MOE.shape
    assert moe is not None
    assert (moe.experts, moe.experts_per_token, moe.mlp_width) == (8, 2, 32)
    assert moe.block_experts == 8 * 3 * 32 * 64
    assert moe.block_whole == 2 * 64 + 8 * 64  # norms and the router


def stages_of(model: ModelFacts, division: Division) -> Iterator[float]:
    for stage in range(division.stages):
        yield rank_part(model, division, stage).parameters


@pytest.mark.parametrize("model", [LLAMA, TIED, MOE], ids=["llama", "gpt2", "moe"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_stages_together_hold_the_model(model: ModelFacts, schedule: str) -> None:
    virtual = 1 if schedule in ("gpipe", "1f1b") else 2
    division = Division(stages=2, schedule=schedule, virtual=virtual)
    held = sum(stages_of(model, division))
    assert model.shape is not None
    # Both ends of a tied matrix are held, unless one rank has both ends.
    twice = model.shape.embedding if model.shape.tied and schedule not in ("zbv", "dualpipev") else 0
    final_norm = model.width * (2 if model is TIED else 1)
    assert held == model.parameters + twice - final_norm


def test_tensor_ranks_divide_matrices_and_hold_norms_whole() -> None:
    shape = LLAMA.shape
    assert shape is not None
    whole = 32 * shape.block_whole
    for degree in (2, 4, 8):
        part = rank_part(LLAMA, Division(tensor=degree))
        matrices = 32 * (shape.block - shape.block_whole) + shape.embedding + shape.head
        assert part.parameters == whole + matrices / degree
    # 16 ranks for 8 key-value heads: each holds their projections whole.
    part = rank_part(LLAMA, Division(tensor=16))
    keys = 32 * shape.block_kv
    assert part.parameters == whole + keys + (matrices - keys) / 16


def test_experts_are_divided_by_their_own_degree() -> None:
    whole, halved = rank_part(MOE, Division()), rank_part(MOE, Division(expert=2))
    assert whole.parameters == MOE.parameters
    assert halved.experts == whole.experts / 2
    assert halved.dense == whole.dense - 64  # the final norm is counted with no part
    both = rank_part(MOE, Division(expert=2, tensor=2))
    assert both.experts == whole.experts / 4


def test_stages_are_counted_on_a_real_model() -> None:
    config = other_config(preset("llama-34m"), num_layers=6)
    model, facts = build_model(config, device="meta"), model_facts(config, 1024)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    first = rank_part(facts, Division(stages=2, cuts=(2,)), 0)
    last = rank_part(facts, Division(stages=2, cuts=(2,)), 1)
    assert first.parameters == sum(blocks[:2]) + model.embedding.weight.numel()
    assert last.parameters == sum(blocks[2:]) + model.head_weight.numel()
    assert (first.layers, last.layers) == (2, 4)


def in_flight(order: list[tuple[str, int, int]]) -> int:
    """Forward passes whose weights' gradients are not there yet, at most."""
    held = most = 0
    for kind, _, _ in order:
        held += {"F": 1, "B": -1, "W": -1, "I": 0}[kind]
        most = max(most, held)
    return most


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_passes_in_flight_are_those_of_the_order_that_runs(schedule: str, stages: int) -> None:
    checked = 0
    for virtual in (2, 3) if schedule.startswith("interleaved") else (1,) if schedule in ("gpipe", "1f1b") else (2,):
        for micro_batches in (stages, 2 * stages, 3 * stages, 5 * stages):
            if pipeline_problems(64, stages, schedule, micro_batches, virtual):
                continue
            for rank, order in order_of_work(schedule, stages, virtual, micro_batches).items():
                counted = in_flight(order)
                predicted = parts_in_flight(schedule, stages, virtual, micro_batches, rank)
                if schedule == "zbv" and micro_batches < 2 * stages - 1:
                    assert counted <= predicted
                else:
                    assert counted == predicted, (virtual, micro_batches, rank)
                checked += 1
    assert checked >= 3 * stages


def activations(**degrees: object) -> int:
    return predict_rank_memory(LLAMA, replace(PLAIN, division=Division(**degrees), stage=0)).activations  # type: ignore[arg-type]


def test_activations_fall_with_tensor_and_context_and_follow_the_schedule() -> None:
    plain = activations()
    assert plain == 8192 * 4096 * 56 * 32
    entering = 8192 * 4096 * 4 * 32  # tensor ranks gather the inputs of attention and MLP, and keep them
    for degree in (2, 4, 8):
        assert activations(context=degree) == plain / degree
        assert activations(tensor=degree) == (plain - entering) / degree + entering
    assert activations(tensor=2, context=4) == activations(tensor=2) / 4
    even = (8, 16, 24)
    assert activations(stages=4, schedule="1f1b", cuts=even) == plain  # 4 passes of a quarter of the blocks
    assert activations(stages=4, schedule="gpipe", cuts=even) == 4 * plain  # 16 passes
    last = replace(PLAIN, division=Division(stages=4, cuts=even), stage=3)
    assert predict_rank_memory(LLAMA, last).activations == plain / 4
    halves = tuple(range(4, 32, 4))
    # Interleaved: 1 + (p - 1) / (p v) times 1F1B's.
    assert activations(stages=4, schedule="interleaved", virtual=2, cuts=halves) == plain * (1 + 3 / 8)
    assert activations(stages=4, schedule="zbv", virtual=2, cuts=halves) == plain


def test_mlps_in_pieces_keep_their_inputs() -> None:
    unit = 8192 * 4096
    inside = 8 * 14336 / 4096
    chunked = predict_rank_memory(LLAMA, replace(PLAIN, mlp_chunks=4)).activations
    assert chunked == round(unit * (32 * (56 - inside) + inside / 4))
    assert predict_rank_memory(MOE, replace(PLAIN, mlp_chunks=4)) == predict_rank_memory(MOE, PLAIN)


def test_the_stage_that_needs_most_is_the_prediction() -> None:
    settings = replace(PLAIN, division=Division(stages=4))
    stages = [predict_rank_memory(LLAMA, replace(settings, stage=stage)) for stage in range(4)]
    assert predict_rank_memory(LLAMA, settings) == max(stages, key=lambda memory: memory.device)
    # Little to keep, and most blocks in the last stage: it needs most.
    heavy = replace(settings, sequence_length=16, division=Division(stages=4, cuts=(4, 8, 12)))
    assert predict_rank_memory(LLAMA, heavy) == predict_rank_memory(LLAMA, replace(heavy, stage=3))


def test_state_falls_with_every_degree_and_zero_on_top() -> None:
    plain = predict_rank_memory(LLAMA, PLAIN)
    for division in (Division(tensor=4), Division(stages=4)):
        memory = predict_rank_memory(LLAMA, replace(PLAIN, division=division))
        assert memory.optimizer < 0.45 * plain.optimizer
        sharded = predict_rank_memory(LLAMA, replace(PLAIN, division=division, zero=3, shard=2, gather="micro_batch"))
        assert sharded.optimizer == pytest.approx(memory.optimizer / 2)
    context = predict_rank_memory(LLAMA, replace(PLAIN, division=Division(context=4)))
    assert context.optimizer == plain.optimizer


def test_experts_share_their_state_with_fewer_ranks() -> None:
    settings = replace(PLAIN, sequence_length=128)
    dense = rank_part(MOE, Division()).dense
    experts = rank_part(MOE, Division()).experts
    unsharded = predict_rank_memory(MOE, replace(settings, division=Division(expert=4)))
    assert unsharded.optimizer == 8 * (dense - 64 + experts / 4)
    sharded = predict_rank_memory(MOE, replace(settings, division=Division(expert=4), zero=2, shard=4))
    # Four ranks hold different experts: none of them is there twice, and all else is divided by four.
    assert sharded.optimizer == 8 * ((dense - 64) / 4 + experts / 4)


def wired(layout: Layout, model: ModelFacts = LLAMA, **changes: object) -> dict[str, int]:
    settings = replace(PLAIN, micro_batches=4, **changes).under(layout)  # type: ignore[arg-type]
    return wire_bytes(model, settings, layout)


HIDDEN = 8192 * 4096 * 2  # bytes of the activations of one row in bf16


def test_bytes_on_the_wire_are_the_textbook_volumes() -> None:
    psi = LLAMA.parameters
    assert wired(Layout(1, 0, 1)) == {}
    assert wired(Layout(4, 0, 1)) == {"state": round(2 * 2 * psi * 3 / 4)}
    assert wired(Layout(4, 1, 4)) == {"state": round((2 + 2) * psi * 3 / 4)}
    three = Layout(4, 3, 4, "sharded", "micro_batch")
    assert wired(three) == {"state": round(4 * (2 * 2 + 2) * psi * 3 / 4)}
    wide = wire_bytes(LLAMA, replace(PLAIN, precision="fp32").under(Layout(4, 1, 4)), Layout(4, 1, 4), wire="bf16")
    assert wide == {"state": round((4 + 2) * psi * 3 / 4)}
    # Four all-reduces' worth for a block and micro-batch, in halves of (n - 1) / n.
    assert wired(Layout(4, 0, 1, tensor=4)) == {"tensor": round(4 * 32 * 8 * HIDDEN * 3 / 4)}
    assert wired(Layout(4, 0, 1, tensor=4), recompute="full")["tensor"] == round(1.5 * 4 * 32 * 8 * HIDDEN * 3 / 4)


def test_context_sends_keys_round_a_ring_or_heads_to_each_other() -> None:
    kv = 8192 / 4 * 8 * 128 * 2  # bytes of this rank's keys
    ring = wired(Layout(4, 0, 1, context=4))
    # Keys and values in bf16 there and back, their gradients in fp32.
    assert ring["context"] == round(4 * 32 * 8 * kv * 3)
    heads = wired(Layout(4, 0, 1, context=4, ulysses=4))
    q = 8192 / 4 * 32 * 128 * 2
    assert heads["context"] == round(4 * 32 * 2 * (2 * q + 2 * kv) * 3 / 4)
    both = wired(Layout(4, 0, 1, context=4, ulysses=2))
    assert both["context"] == round(4 * 32 * (2 * (2 * q + 2 * kv) / 2 + 8 * kv))


def test_pipeline_and_experts_send_hidden_states() -> None:
    pipe = wired(Layout(4, 0, 1, pipeline=PipelineLayout(4)))
    assert pipe == {"pipeline": 2 * 4 * HIDDEN}
    both = wired(Layout(8, 0, 1, tensor=2, pipeline=PipelineLayout(4)))
    assert both["pipeline"] == 4 * HIDDEN
    moe = wired(Layout(2, 0, 1, expert=2), MOE, sequence_length=128)
    assert moe["expert"] == 4 * 4 * 4 * (128 * 64 * 2) * 2 // 2  # 4 micro-batches, 4 blocks, 4 exchanges, 2 experts
