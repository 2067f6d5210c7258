"""Adapters train under every layout as on one process: losses, norms, gradients and parameters, frozen ones bit by bit.

fp32, clipped, AdamW with eps 1e-3 as in test_layouts; B is not zero at the start. Relative differences below 1e-5.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_runs import Adapted, differences, train

from trainwright.base.errors import ConfigError
from trainwright.comm import start
from trainwright.comm.mesh import Layout, PipelineLayout
from trainwright.models.adapters import AdapterOptions
from trainwright.testing import run_ranks

TOLERANCE = 1e-5

ON_TWO = {
    "zero-0": Layout(2, 0, 1),
    "zero-1": Layout(2, 1, 2),
    "zero-2": Layout(2, 2, 2, accumulate="sharded"),
    "zero-3": Layout(2, 3, 2, gather="micro_batch"),
    "tensor 2": Layout(2, 0, 1, tensor=2),
    "pipeline 2": Layout(2, 0, 1, pipeline=PipelineLayout(2)),
    "pipeline 2, zero bubble": Layout(2, 0, 1, pipeline=PipelineLayout(2, "zbv", 2)),
    "context 2": Layout(2, 0, 1, context=2),
}
ON_FOUR = {
    "tensor 2 x zero-3": Layout(4, 3, 2, gather="micro_batch", tensor=2),
    "pipeline 2 x zero-2": Layout(4, 2, 2, pipeline=PipelineLayout(2), accumulate="sharded"),
    "pipeline 2 x zero-3": Layout(4, 3, 2, gather="micro_batch", pipeline=PipelineLayout(2)),
    "pipeline 2 x tensor 2": Layout(4, 0, 1, tensor=2, pipeline=PipelineLayout(2)),
}

LORA = AdapterOptions(rank=4)
DORA = AdapterOptions(name="dora", rank=4)
IN_4_BITS = AdapterOptions(name="rslora", rank=4, base="nf4")
LAST_BLOCK = AdapterOptions(rank=4, targets=(r"\.3\..*proj",))
FIRST_BLOCK = AdapterOptions(rank=4, targets=(r"\.0\..*proj",), train=("embed_tokens",))


def run_cells(rank: int, world: int, cells: list[tuple[Adapted, dict[str, Layout]]]) -> list[list[Any]]:
    """[setting, layout, differences by name] of every cell."""
    torch.set_num_threads(1)
    ranks = start()
    found: list[list[Any]] = []
    for setting, layouts in cells:
        reference = train(setting, Layout(1, 0, 1))
        for name, layout in layouts.items():
            run = train(setting, layout, ranks)
            found.append([f"{setting.family} {setting.options}", name, differences(run, reference)])
            run.engine.data_parallel.close()
    return found


def check(world: int, cells: list[tuple[Adapted, dict[str, Layout]]]) -> None:
    apart = []
    for rank, seen in enumerate(run_ranks(run_cells, world, cells, timeout=300)):
        assert len(seen) == sum(len(layouts) for _, layouts in cells)
        for setting, name, values in seen:
            apart += [
                f"{setting}, {name}, rank {rank}: {key} {value:.1e}"
                for key, value in values.items()
                if value > TOLERANCE
            ]
    assert not apart, "\n".join(apart)


def some(*names: str) -> dict[str, Layout]:
    return {name: (ON_TWO | ON_FOUR)[name] for name in names}


def test_methods_and_families_on_two_ranks() -> None:
    check(
        2,
        [
            (Adapted("llama", LORA), some("zero-0", "zero-2", "zero-3", "tensor 2", "context 2")),
            (Adapted("gpt2", DORA), some("zero-1", "tensor 2", "pipeline 2")),
            (Adapted("wide llama", IN_4_BITS), some("zero-1", "zero-3", "tensor 2", "pipeline 2")),
            (Adapted("one key head", DORA), some("tensor 2")),
            (Adapted("moe", LORA), {"expert 2": Layout(2, 0, 1, expert=2), **some("zero-3")}),
        ],
    )


def test_stages_whose_parameters_are_all_frozen_on_two_ranks() -> None:
    pipelines = some("pipeline 2", "pipeline 2, zero bubble")
    check(2, [(Adapted("llama", LAST_BLOCK), pipelines), (Adapted("llama", FIRST_BLOCK), pipelines)])


def test_recomputed_blocks_and_dropout_on_two_ranks() -> None:
    dropping = AdapterOptions(name="dora", rank=4, dropout=0.2)
    layouts = some("zero-3", "tensor 2", "pipeline 2")
    check(2, [(Adapted("llama", dropping, memory={"recompute": "full"}), layouts)])


@pytest.mark.slow
def test_compositions_on_four_ranks() -> None:
    check(
        4,
        [
            (Adapted("llama", LORA), ON_FOUR),
            (Adapted("llama", LAST_BLOCK), some("pipeline 2 x zero-2", "pipeline 2 x zero-3")),
            (Adapted("wide llama", IN_4_BITS), some("tensor 2 x zero-3")),
            (Adapted("llama", DORA, steps=20), some("tensor 2 x zero-3", "pipeline 2 x tensor 2")),
        ],
    )


def rounding(rank: int, world: int) -> list[list[Any]]:
    """Distance of the first gradients under bf16 to those of fp32 on one process, by layout; and how many gradients
    differ where the frozen weights are held in bf16 instead of being cast for every product."""
    torch.set_num_threads(1)
    ranks = start()
    exact = train(Adapted("llama", LORA, steps=1), Layout(1, 0, 1)).gradients

    def distance(run: Any) -> float:
        squares = sum(float((run.gradients[name] - exact[name]).square().sum()) for name in exact)
        return float((squares / sum(float(value.square().sum()) for value in exact.values())) ** 0.5)

    held = Adapted("llama", AdapterOptions(rank=4, base="bf16"), steps=1, precision="bf16")
    alone = train(held, Layout(1, 0, 1))
    cast = train(Adapted("llama", LORA, steps=1, precision="bf16"), Layout(1, 0, 1))
    differing = sum(not torch.equal(alone.gradients[name], cast.gradients[name]) for name in exact)
    found: list[list[Any]] = [["one process", distance(alone)], ["held in bf16", differing]]
    for name, layout in some("zero-0", "zero-3", "tensor 2").items():
        run = train(held, layout, ranks)
        found.append([name, distance(run)])
        run.engine.data_parallel.close()
    return found


def test_a_base_in_bf16_gives_the_gradients_of_bf16_products_under_every_layout() -> None:
    for seen in run_ranks(rounding, 2):
        distances = dict(seen)
        assert distances.pop("held in bf16") == 0
        alone = distances.pop("one process")
        assert 0 < alone < 0.03
        assert all(value < 1.5 * alone for value in distances.values()), distances


def refused(rank: int, world: int) -> list[str]:
    torch.set_num_threads(1)
    ranks = start()
    said = []
    cut = (Adapted("llama", IN_4_BITS), Layout(2, 0, 1, tensor=2))
    idle = (Adapted("llama", AdapterOptions(rank=4, targets=("q_proj",))), Layout(2, 0, 1, pipeline=PipelineLayout(2)))
    for setting, layout, frozen in ((*cut, False), (*idle, True)):
        try:
            train(setting, layout, ranks, frozen=frozen)
        except ConfigError as error:
            said.append(error.message)
    return said


def test_what_cannot_be_divided_or_trained_is_refused_on_all_ranks() -> None:
    for said in run_ranks(refused, 2):
        cut, idle = said
        assert "blocks of 64" in cut
        assert "every one is frozen" in idle
