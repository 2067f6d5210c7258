"""Layouts as values, and the groups that ranks make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainwright.base.errors import ConfigError
from trainwright.comm import ALONE, start
from trainwright.comm.mesh import Axis, Layout, PipelineLayout, make_mesh
from trainwright.testing import run_ranks


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"tensor": 3}, "parallel.tensor 3 x parallel.pipeline.stages 1 does not divide the 8 processes"),
        ({"tensor": 0, "expert": 0}, "parallel.tensor is 0, expected at least 1; parallel.expert is 0"),
        ({"zero": 2, "shard": 3, "tensor": 2}, "parallel.shard 3 does not divide the 4 data-parallel ranks"),
        ({"context": 3}, "parallel.context 3 does not divide the 8 data-parallel ranks"),
        ({"context": 4, "ulysses": 3}, "parallel.ulysses 3 does not divide parallel.context 4"),
        ({"zero": 1, "shard": 2, "expert": 4}, "parallel.expert 4 does not divide parallel.shard 2"),
        ({"pipeline": PipelineLayout(2, "zbv")}, "zbv places two parts on each rank"),
        ({"pipeline": PipelineLayout(2, "interleaved")}, "interleaved needs several parts on each rank"),
        ({"pipeline": PipelineLayout(2, "1f1b", 2)}, "1f1b places one part on each rank"),
        ({"pipeline": PipelineLayout(2, cuts=(1, 2))}, "has 2 entries, expected 1 for 2 parts"),
        ({"pipeline": PipelineLayout(2, "hanoi")}, "expected one of gpipe, 1f1b"),
    ],
)
def test_a_layout_that_cannot_run_is_refused_with_its_reason(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Layout(8, **{"zero": 0, "shard": 1, **values})


def test_every_reason_is_given_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Layout(8, 0, 2, context=3, ulysses=2, expert=5)
    assert caught.value.message.count(";") == 3


def test_degrees_of_a_composed_layout() -> None:
    layout = Layout(16, 3, 2, gather="micro_batch", tensor=2, context=2, pipeline=PipelineLayout(2))
    assert (layout.data, layout.rows, layout.replicas) == (4, 2, 2)
    described = layout.describe()
    for part in ("pipeline of 2 stages (1f1b)", "matrices over 2 ranks", "ring of 2", "ZeRO-3", "2 replicas"):
        assert part in described


def test_one_process_is_a_mesh_of_single_ranks() -> None:
    mesh = make_mesh(Layout(1, 0, 1), ALONE)
    assert mesh.tensor == Axis.alone("tensor")
    assert mesh.data is ALONE
    assert mesh.rows == (0, 1)


def describe(rank: int, world: int) -> list[dict[str, Any]]:
    ranks = start()
    found = []
    for layout in (
        Layout(8, 2, 4),
        Layout(8, 3, 2, gather="micro_batch", tensor=2, pipeline=PipelineLayout(2)),
        Layout(8, 1, 4, tensor=2, context=2, expert=2),
        Layout(8, 0, 1, context=4, expert=2, pipeline=PipelineLayout(2)),
    ):
        mesh = make_mesh(layout, ranks)
        axes: dict[str, Any] = {"rows": list(mesh.rows), "data": _members(mesh.data.group, rank)}
        for name in ("shard", "replica", "tensor", "context", "expert", "expert_shard", "expert_replica", "pipeline"):
            axis: Axis = getattr(mesh, name)
            axes[name] = _members(axis.group, rank)
            assert axes[name].index(rank) == axis.rank
            assert len(axes[name]) == axis.size
            if axis.mesh is not None:
                assert axis.mesh.mesh.tolist() == axes[name]
            if axis.group is not None:
                seen = torch.tensor([float(rank)])
                dist.all_reduce(seen, group=axis.group)
                assert seen.item() == sum(axes[name])
        again = make_mesh(layout, ranks)
        assert again.data.group is mesh.data.group
        assert again.tensor.mesh is mesh.tensor.mesh
        found.append(axes)
    return found


def _members(group: dist.ProcessGroup | None, rank: int) -> list[int]:
    return [rank] if group is None else dist.get_process_group_ranks(group)


def test_groups_of_composed_layouts() -> None:
    last = run_ranks(describe, 8)[7]
    hybrid, model, expert, both = last
    assert hybrid["shard"] == [4, 5, 6, 7]
    assert hybrid["replica"] == [3, 7]
    assert hybrid["rows"] == [7, 8]
    # [pipeline, data, tensor] with two of each
    assert (model["pipeline"], model["shard"], model["tensor"]) == ([3, 7], [5, 7], [6, 7])
    assert model["data"] == [5, 7]
    # data is 1, 3, 5, 7 for the odd tensor rank; neighbours there share sequences and experts
    assert expert["data"] == [1, 3, 5, 7]
    assert expert["shard"] == [1, 3, 5, 7]
    assert (expert["context"], expert["expert"], expert["expert_shard"]) == ([5, 7], [5, 7], [3, 7])
    assert expert["rows"] == [1, 2]
    assert (both["context"], both["expert"], both["expert_replica"]) == ([4, 5, 6, 7], [6, 7], [5, 7])
    assert both["replica"] == [4, 5, 6, 7]
