"""Sums over ranks: exact in fp32, rounded once on the wire, the same on every rank, and never half done."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainwright.base.errors import ConfigError
from trainwright.comm import ALONE, start
from trainwright.comm.collectives import GradientSums, WireGroup
from trainwright.comm.mesh import Layout
from trainwright.comm.traffic import Traffic
from trainwright.testing import run_ranks


def own(rank: int, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank))


def sums(rank: int, world: int) -> dict[str, Any]:
    ranks = start()
    traffic = Traffic()
    sums = GradientSums(depth=2, traffic=traffic)
    found: dict[str, Any] = {}
    for name, wire in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        among = WireGroup(ranks.group, wire)
        part = torch.full((5,), torch.nan)
        sums.reduce_scatter(part, own(rank, 5 * world), among, owner="a")
        whole = own(rank, 7)  # 7 is no multiple of the ranks
        sums.all_reduce(whole, among, owner="b")
        sums.finish()
        found[name] = (part.tolist(), whole.tolist())  # lists: a tensor's memory goes with the process that made it
        found[f"{name} sent"] = traffic.take()
    # Four sums are begun, two may be under way: the first two are complete before anything was waited for.
    parts = [torch.full((3,), torch.nan) for _ in range(4)]
    for number, output in enumerate(parts):
        sums.reduce_scatter(output, torch.ones(3 * world), WireGroup(ranks.group, torch.float32), owner=number)
    found["complete before finish"] = [not bool(p.isnan().any()) for p in parts]
    sums.finish()
    found["all"] = torch.stack(parts).tolist()
    found["agreed"] = (ranks.any(rank == 1), ranks.all(rank == 1), ranks.all_gather_json({"名": rank}))
    found["told"] = ranks.broadcast_json({"from": rank}, root=1)
    own_group = ranks.separate()
    found["apart"] = float(own_group.sum_(torch.tensor(float(rank))))
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_sums_over_ranks(world: int) -> None:
    results = run_ranks(sums, world, timeout=120)
    whole = torch.stack([own(r, 5 * world) for r in range(world)])
    small = torch.stack([own(r, 7) for r in range(world)])
    for rank, found in enumerate(results):
        part, everywhere = found["fp32"]
        assert part == whole.sum(0)[5 * rank : 5 * rank + 5].tolist()
        assert torch.allclose(torch.tensor(everywhere), small.sum(0), atol=1e-6)
        assert everywhere == results[0]["fp32"][1], "bitwise the same on every rank"
        part, everywhere = found["bf16"]
        rounded = whole.bfloat16().float().sum(0)[5 * rank : 5 * rank + 5]
        assert part == rounded.tolist(), "rounded once, then added in fp32"
        assert everywhere == results[0]["bf16"][1]
        padded = -(-7 // world) * world
        sent = found["bf16 sent"]
        assert sent["reduce_scatter"] == 2 * 5 * world * (world - 1) // world + 2 * padded * (world - 1) // world
        assert found["complete before finish"] == [True, True, False, False]
        assert found["all"] == [[float(world)] * 3] * 4
        assert found["agreed"] == (True, False, [{"名": r} for r in range(world)])
        assert found["told"] == {"from": 1}
        assert found["apart"] == sum(range(world))


def test_one_process_agrees_with_itself() -> None:
    assert ALONE.any(True)
    assert not ALONE.all(False)
    assert ALONE.all_gather_json([1, "二"]) == [[1, "二"]]
    assert ALONE.first_then_others(lambda: 3) == 3
    assert ALONE.separate() is ALONE


def fail_on_rank_one(rank: int, world: int) -> str:
    def work() -> int:
        if rank == 1:
            raise ValueError("no such file")
        return 1

    try:
        start().first_then_others(work)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing"


def test_a_failure_in_shared_preparation_reaches_all() -> None:
    told = run_ranks(fail_on_rank_one, 2, timeout=60)
    assert told[1] == "no such file"
    assert "another rank failed" in told[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((4, 3, 3), "does not divide the 4 processes"),
        ((4, 0, 2), "stage 0 shards nothing"),
        ((4, 1, 4, "sharded"), "stage 1 holds whole gradients"),
        ((4, 2, 4, "local", "micro_batch"), "stage 2 holds whole parameters"),
        ((4, 5, 4), "expected 0, 1, 2 or 3"),
    ],
)
def test_layouts_that_cannot_run_are_refused(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout(*values)


def test_a_layout_says_what_it_sends() -> None:
    assert Layout(1, 0, 1).wire_psi(4) == 0
    assert Layout(4, 0, 1).wire_psi(4) == 2
    assert Layout(4, 1, 4).wire_psi(4) == 2
    assert Layout(4, 2, 4, "sharded").wire_psi(4) == 5
    assert Layout(4, 3, 4, "local", "micro_batch").wire_psi(4) == 9
    assert Layout(4, 3, 4, "local", "micro_batch").wire_psi(1) == 3
    assert "2 replicas" in Layout(4, 3, 2, "local", "micro_batch").describe()
