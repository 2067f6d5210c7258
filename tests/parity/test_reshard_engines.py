"""What real engines save under one layout loads into real engines of every other, bit by bit, and is exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import Setting, train
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainwright.checkpoint import load_checkpoint, save_checkpoint
from trainwright.comm import ALONE, Ranks
from trainwright.comm.boxes import cut, local_boxes
from trainwright.comm.layout import Layout, PipelineLayout
from trainwright.engine import Engine, readable_weights
from trainwright.testing import run_ranks

PIPELINE = PipelineLayout(stages=2, schedule="1f1b")
INTERLEAVED = PipelineLayout(stages=2, schedule="interleaved", virtual=2)

LAYOUTS: dict[str, Layout] = {
    "tensor 2, shard 2": Layout(4, zero=3, shard=2, tensor=2),
    "tensor 4": Layout(4, zero=0, shard=1, tensor=4),
    "shard 4": Layout(4, zero=2, shard=4),
    "2 replicas of shard 2": Layout(4, zero=1, shard=2),
    "pipeline 2, shard 2": Layout(4, zero=3, shard=2, pipeline=PIPELINE),
    "pipeline 2, tensor 2": Layout(4, zero=0, shard=1, tensor=2, pipeline=PIPELINE),
    "interleaved 2, data 2": Layout(4, zero=0, shard=1, pipeline=INTERLEAVED),
    "context 2, shard 2": Layout(4, zero=3, shard=2, context=2),
}
EXPERTS: dict[str, Layout] = {
    "expert 2, shard 4": Layout(4, zero=3, shard=4, expert=2),
    "expert 4": Layout(4, zero=0, shard=1, expert=4),
    "expert 2, tensor 2": Layout(4, zero=0, shard=1, expert=2, tensor=2),
    "pipeline 2, expert 2": Layout(4, zero=2, shard=2, expert=2, pipeline=PIPELINE),
}
ONE = Layout(1, zero=0, shard=1)


def layouts_for(family: str, ranks: Ranks) -> dict[str, tuple[Layout, Ranks]]:
    table = {"shard 4": LAYOUTS["shard 4"], **EXPERTS} if family == "moe" else LAYOUTS
    if family == "gpt2":  # the short test
        table = {name: layout for name, layout in table.items() if name not in ("tensor 4", "context 2, shard 2")}
    return {**{name: (layout, ranks) for name, layout in table.items()}, "one process": (ONE, ALONE)}


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict):
        for key, item in state.items():
            yield from leaves(item, f"{path}/{key}")
    else:
        yield path, state


def assert_same(state: Any, whole: Any, what: str) -> int:
    """Every tensor of `state` is this rank's part of the one in `whole`, and every value the same."""
    expected = dict(leaves(whole))
    count = 0
    for path, leaf in leaves(state):
        value = expected[path]
        if isinstance(leaf, DTensor):
            coordinate = leaf.device_mesh.get_coordinate()
            assert coordinate is not None
            assert leaf.shape == value.shape, f"{what}: {path}"
            value = cut(value, *local_boxes(leaf.shape, leaf.device_mesh.shape, coordinate, leaf.placements))
            leaf = leaf.to_local()
        same = torch.equal(leaf, value) if isinstance(leaf, Tensor) else leaf == value
        assert same or (isinstance(leaf, Tensor) and leaf.numel() == value.numel() == 0), f"{what}: {path}"
        count += 1
    return count


def exported(engine: Engine, whole: Any, what: str) -> None:
    with readable_weights(engine) as source:
        if source is not None:
            for name, shape in source.shapes.items():
                rows = source.read(name, 0, shape[0])
                assert torch.equal(rows, whole["model"][name]), f"{what}: {name}"
            assert set(source.shapes) <= set(whole["model"])
            assert len(whole["model"]) - len(source.shapes) in (0, 1)  # a tied head is there once


def from_every_layout(rank: int, world: int, folder: str, family: str) -> int:
    from trainwright.comm import start

    ranks = start(device="cpu")
    table = layouts_for(family, ranks)
    engines, wholes = {}, {}
    for number, (name, (layout, among)) in enumerate(table.items()):
        if among.world == 1 and rank:
            ranks.barrier()
        else:
            engines[name] = train(Setting(family, steps=2), layout, among).engine
            save_checkpoint(folder, number, engines[name].state_dict(), ranks=among)
            if among.world == 1:
                ranks.barrier()
        wholes[name], _ = load_checkpoint(Path(folder) / f"step-{number}")
        if name in engines:
            assert assert_same(engines[name].state_dict(), wholes[name], f"as saved by {name}") > 20
    names = {name: {path for path, _ in leaves(whole)} for name, whole in wholes.items()}
    for name, found in names.items():
        assert found == names["one process"], f"{name}: {sorted(found ^ names['one process'])[:4]}"
    loads = 0
    for number, (source, whole) in enumerate(wholes.items()):
        for name, engine in engines.items():
            among = table[name][1]
            state, _ = load_checkpoint(Path(folder) / f"step-{number}", like=engine.state_dict(), ranks=among)
            engine.load_state_dict(state)
            assert_same(engine.state_dict(), whole, f"{source} -> {name}")
            if number == len(wholes) - 1:
                exported(engine, whole, f"{source} -> {name}")
            loads += 1
        ranks.barrier()
    return loads


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow), "moe"])
def test_engines_of_every_layout_load_what_any_other_saved(tmp_path: Path, family: str) -> None:
    count = len(layouts_for(family, ALONE))
    loads = run_ranks(from_every_layout, 4, str(tmp_path), family, timeout=400)
    assert loads == [count * count] + [count * (count - 1)] * 3
