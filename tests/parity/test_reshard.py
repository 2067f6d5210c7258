"""A checkpoint fits any layout: 4 -> 2 -> 3 -> 1 ranks and back, plain and sharded, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from trainwright.checkpoint import Checkpointer, load_checkpoint, verify
from trainwright.testing import run_ranks


class Block(nn.Module):
    """Uneven rows, a bias of one, a frozen matrix, bfloat16 beside float32, and on 4 ranks some empty shards."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(12, 7)
        self.narrow = nn.Linear(7, 1)
        self.frozen = nn.Parameter(torch.empty(5, 3, 2), requires_grad=False)
        self.low = nn.Parameter(torch.empty(2, 9, dtype=torch.bfloat16))
        self.register_buffer("scale", torch.tensor(1.5))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(12, 37, bias=False)
        self.head.weight = self.embed.weight


def full_values() -> dict[str, torch.Tensor]:
    """The whole tensors that every layout must hold, by name; the same in every process."""
    generator = torch.Generator().manual_seed(7)
    values = {}
    for name, tensor in Model().state_dict().items():
        values[name] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    values["head.weight"] = values["embed.weight"]
    return values


def build(world: int, groups: int = 1) -> Model:
    """The model with the values above, sharded with FSDP2 over `world / groups` ranks (plain with one rank)."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    model = Model()
    model.load_state_dict(full_values())
    if world > 1:
        within = world // groups
        first = dist.get_rank() // within * within
        for start in range(0, world, within):  # a group of ranks is made by all ranks
            group = dist.new_group(list(range(start, start + within)))
            if start == first:
                mesh = DeviceMesh.from_group(group, "cpu")
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def moments(model: Model, scale: float) -> dict[str, Any]:
    """Optimizer state as the contract has it: local tensors shown as DTensors, counters plain."""
    from torch.distributed.tensor import DTensor

    state: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        values = full_values()[name].float() * scale
        if isinstance(parameter, DTensor):
            sharded = torch.distributed.tensor.distribute_tensor(values, parameter.device_mesh, parameter.placements)
            values = DTensor.from_local(
                sharded.to_local().clone(),
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        state[name] = {"step": torch.tensor(3.0), "exp_avg": values}
    return state


def state_of(model: Model, scale: float = 0.5) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optimizer": moments(model, scale),
        "train": {"step": 12, "name": "语料", "best": float("nan")},
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = getattr(tensor, "full_tensor", None)
    return full() if full is not None else tensor


def check(state: dict[str, Any], model: Model) -> None:
    values = full_values()
    like = state_of(model)
    for name, tensor in state["model"].items():
        assert type(tensor) is type(like["model"][name]) or not hasattr(tensor, "full_tensor")
        assert torch.equal(whole(tensor), values[name]), name
    for name, entry in state["optimizer"].items():
        assert torch.equal(whole(entry["exp_avg"]), values[name].float() * 0.5), name
        assert entry["step"].item() == 3.0
    assert state["train"]["step"] == 12
    assert state["train"]["name"] == "语料"
    # And what is loaded goes into the model.
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.zero_()
    model.load_state_dict(state["model"])
    assert torch.equal(whole(model.head.weight), values["head.weight"])
    assert torch.equal(whole(model.blocks[1].wide.weight), values["blocks.1.wide.weight"])


def load_and_save(rank: int, world: int, folder: str, step: int, asynchronous: bool, groups: int = 1) -> int:
    """Load the newest checkpoint into this layout, compare every bit, and save it as the next step."""
    from trainwright.comm import start

    ranks = start(device="cpu")
    model = build(world, groups)
    with Checkpointer(folder, keep=None, asynchronous=asynchronous, ranks=ranks) as checkpointer:
        if step > 1:
            for tensor in model.parameters():
                with torch.no_grad():
                    tensor.zero_()
            loaded = checkpointer.load_latest(like=state_of(model, 9.0))
            assert loaded is not None
            assert loaded.step == step - 1
            check(loaded.state, model)
        checkpointer.save(step, state_of(model), {"world": world}, required=True)
        report = verify(Path(folder) / f"step-{step}")
        assert report.ok, report.problems
    return step


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_reshard(tmp_path: Path, asynchronous: bool) -> None:
    for step, world in enumerate((4, 2, 3, 1, 3, 2), start=1):
        assert run_ranks(load_and_save, world, str(tmp_path), step, asynchronous) == [step] * world
    state, meta = load_checkpoint(tmp_path / "step-6", like=state_of(build(1)))
    assert meta == {"world": 2}
    check(state, build(1))


def test_hybrid(tmp_path: Path) -> None:
    for step, (world, groups) in enumerate(((4, 2), (4, 1), (1, 1)), start=1):
        run_ranks(load_and_save, world, str(tmp_path), step, True, groups)
    sizes = [sum(f.stat().st_size for f in (tmp_path / f"step-{s}").glob("data-*")) for s in (1, 2, 3)]
    assert max(sizes) - min(sizes) < 64 * 400  # replicas are written once; only padding differs
