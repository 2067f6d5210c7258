"""Boxes are those of torch for every mesh and placement, and every element of a tensor is written once."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint.plan import plan_writes
from trainwright.comm.boxes import local_boxes, narrow


def coordinates(mesh: tuple[int, ...]) -> Any:
    return itertools.product(*(range(n) for n in mesh))


@given(
    st.lists(st.integers(0, 11), min_size=1, max_size=3).map(tuple),
    st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_shapes_and_offsets_are_those_of_torch(
    shape: tuple[int, ...], mesh: tuple[int, ...], data: st.DataObject
) -> None:
    choice = st.one_of(st.just(Replicate()), st.integers(0, len(shape) - 1).map(Shard))
    placements = [data.draw(choice) for _ in mesh]
    for coordinate in coordinates(mesh):
        local, boxes = local_boxes(shape, mesh, coordinate, placements)
        expected, offset = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), placements)
        assert local == expected
        assert len(boxes) == (1 if math.prod(local) else 0)
        if boxes:
            assert (boxes[0].offset, boxes[0].shape) == (offset, local)
            assert not any(boxes[0].at)


@pytest.mark.parametrize("rows", range(0, 19))
@pytest.mark.parametrize("mesh", [(2, 2), (2, 3), (3, 2)])
def test_fsdp_over_tensor_parallel_rows_tile_the_tensor(rows: int, mesh: tuple[int, int]) -> None:
    """FSDP2 cuts the rows that tensor parallelism left to a rank."""
    whole = torch.arange(rows * 2).view(rows, 2)
    placements = [_StridedShard(0, split_factor=mesh[1]), Shard(0)]
    seen = torch.zeros(rows, 2, dtype=torch.int64)
    for coordinate in coordinates(mesh):
        mine = chunk(chunk(whole, mesh[1], coordinate[1]), mesh[0], coordinate[0])
        if rows % math.prod(mesh) == 0:
            # What torch's own rule gives, which cuts for the first mesh dimension first: right for even sizes.
            torchs = whole
            for size, index, placement in zip(mesh, coordinate, placements, strict=True):
                torchs = placement._split_tensor(torchs, size, with_padding=False, contiguous=True)[0][index]
            assert torch.equal(torchs, mine)
        local, boxes = local_boxes((rows, 2), mesh, coordinate, placements)
        assert tuple(mine.shape) == local
        for box in boxes:
            assert torch.equal(narrow(mine, box.at, box.shape), narrow(whole, box.offset, box.shape))
            narrow(seen, box.offset, box.shape).add_(1)
    assert (seen == 1).all()


def chunk(tensor: torch.Tensor, parts: int, index: int) -> torch.Tensor:
    found = tensor.chunk(parts)
    return found[index] if index < len(found) else tensor[:0]


def layout(path: str, boxes: list[Any], shape: list[int], dtype: str = "float32", same: str | None = "") -> list[Any]:
    return [path, dtype, shape, [list(box) for box in boxes], path if same == "" else same]


def test_replicas_are_written_once_and_balanced() -> None:
    whole = [[[0, 0], [10, 4]]]
    layouts = [[layout(f"p{i}", whole, [10, 4]) for i in range(7)] for _ in range(3)]
    names, parts, size = plan_writes(layouts)
    assert names == {}
    assert sorted(len(part) for part in parts) == [2, 2, 3]
    assert sorted(path for part in parts for path, _ in part) == [f"p{i}" for i in range(7)]
    assert size > 7 * 160


def test_replicas_go_to_the_rank_that_has_least_of_its_own() -> None:
    half = [[[[0, 0], [5, 4]]], [[[5, 0], [5, 4]]], []]
    layouts = [
        [layout("sharded", half[rank], [10, 4]), layout("plain", [[[0], [3]]], [3]), layout("none", [], [0, 4])]
        for rank in range(3)
    ]
    assert plan_writes(layouts)[1] == [[("sharded", 0), ("none", -1)], [("sharded", 0)], [("plain", 0)]]


def test_hybrid_groups_share_the_work() -> None:
    half = [[[[0], [512]]], [[[512], [512]]]]
    layouts = [[layout(f"p{i}", half[rank % 2], [1024]) for i in range(4)] for rank in range(4)]
    parts = plan_writes(layouts)[1]
    assert [len(part) for part in parts] == [2, 2, 2, 2]


def test_what_shares_memory_is_what_all_ranks_that_can_tell_say() -> None:
    rows = [[[[0], [2]]], [[[2], [2]]], []]
    told = ["a", "a", None]
    layouts = [
        [layout("a", rows[rank], [4], same="a" if rows[rank] else None), layout("b", rows[rank], [4], same=told[rank])]
        for rank in range(3)
    ]
    assert plan_writes(layouts)[0] == {"b": "a"}
    layouts[1][1] = layout("b", rows[1], [4])  # rank 1 holds two different tensors: both are stored
    names, parts, _ = plan_writes(layouts)
    assert names == {}
    assert parts == [[("a", 0), ("b", 0)], [("a", 0), ("b", 0)], []]


@pytest.mark.parametrize(
    ("one", "two", "reason"),
    [
        ([[[0], [2]]], [[[3], [1]]], "do not make up the whole"),
        ([[[0], [4]]], [[[2], [2]]], "do not make up the whole"),
        ([], [], "do not make up the whole"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(one: Any, two: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"tensor 'a'.*{reason}"):
        plan_writes([[layout("a", one, [4])], [layout("a", two, [4])]])


def test_another_shape_on_another_rank_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"rank 0 has float32 \[4\], rank 1 has float32 \[5\]"):
        plan_writes([[layout("a", [[[0], [4]]], [4])], [layout("a", [[[0], [5]]], [5])]])
