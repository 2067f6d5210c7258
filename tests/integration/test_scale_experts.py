"""Mixtral 8x7B on 64 ranks and Qwen3 30B-A3B on 256 without their hardware: experts take the bytes of the formulas."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import test_scale
import torch
from test_scale import Case, Report, step_of

from trainwright.comm.layout import Layout
from trainwright.comm.mesh import Mesh
from trainwright.models import MoEConfig, count_parameters, preset

CASES = {
    "mixtral on 64": Case(
        "mixtral-8x7b", Layout(64, 3, 64, gather="micro_batch", expert=8), rows=1, length=4096, micro_batches=2
    ),
    "qwen3 on 256, tensor 2": Case(
        "qwen3-30b-a3b", Layout(256, 3, 32, gather="micro_batch", expert=16, tensor=2), rows=2, length=4096
    ),
}


def axes(mesh: Mesh) -> dict[str, str]:
    found = {}
    for name in ("replica", "expert_replica", "shard", "expert_shard", "expert", "tensor"):
        group = getattr(mesh, name).group
        if group is not None:
            found[group.group_name] = name
    if mesh.data.group is not None:
        found.setdefault(mesh.data.group.group_name, "data")
    assert mesh.ranks.group is not None
    return {mesh.ranks.group.group_name: "shard" if mesh.shard.size == mesh.layout.world else "all"} | found


def one(name: str, rank: int) -> Report:
    test_scale._axes = axes
    return step_of(CASES[name], rank)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_of_the_first_a_middle_and_the_last_rank(name: str) -> None:
    case = CASES[name]
    layout, config = case.layout, preset(case.preset)
    assert isinstance(config, MoEConfig)
    layers = len(config.moe_layers())
    experts = 3 * layers * config.num_experts * config.expert_size * config.hidden_size
    context = multiprocessing.get_context("spawn")
    for rank in (0, layout.world // 2 + 1, layout.world - 1):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            report = pool.submit(one, name, rank).result(timeout=900)
        assert report.finished
        here = sum(torch.Size(shape).numel() for key, shape in report.shapes.items() if ".mlp.experts." in key)
        # Over the expert axis, the tensor axis and what is left of the shards: evenly, for these sizes divide.
        assert here == experts // (layout.shard * layout.tensor)
        assert report.numbers == pytest.approx(
            count_parameters(config) / (layout.shard * layout.tensor), rel=0.02
        )  # norms and routers are on all tensor ranks
        calls, sent = report.messages[("alltoall_base", "expert")]
        # There and back, in the forward pass, where it is recomputed and in the backward pass. The counts that go
        # ahead of them are contents, which a dry run has not.
        assert calls == 6 * layers * case.micro_batches
        copies = case.rows * case.length * config.experts_per_token * config.hidden_size
        assert sent == calls * copies * 2  # in bf16
