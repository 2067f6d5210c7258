"""Every optimizer on parameters divided over two mesh dimensions equals the same optimizer on one process."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from trainwright.base.errors import ConfigError
from trainwright.comm.boxes import cut, local_boxes
from trainwright.optim import (
    EMA,
    OptimizerOptions,
    StepInBackward,
    build_optimizer,
    clip_factor,
    clip_gradients,
    gradient_norm,
    parts_of,
    squared_norm_sum,
)
from trainwright.optim.shard import Shard as Part
from trainwright.optim.shard import local_part, shard_of
from trainwright.testing import run_ranks

ROWS = (_StridedShard(0, split_factor=2), Shard(0))
BOTH = (Shard(0), Shard(1))
ONE = (Shard(0), Replicate())
NONE = (Replicate(), Replicate())

# name -> (shape, placements over (shard, tensor); a single one is over tensor alone)
DIVIDED: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "embed_tokens.weight": ((11, 6), ROWS),
    "layers.0.up.weight": ((7, 12), ROWS),
    "layers.0.down.weight": ((7, 13), BOTH),  # 7 and 6 columns
    "layers.0.k.weight": ((9, 5), ONE),
    "layers.1.down.weight": ((16, 512), BOTH),  # 256 numbers a row and rank: a block of adamw_8bit
    "layers.1.o.weight": ((6, 10), (Shard(1),)),
    "layers.1.up.weight": ((1, 6), ROWS),  # three ranks hold nothing
    "layers.2.never.weight": ((6, 6), BOTH),  # never has a gradient
    "layers.2.late.weight": ((8, 3), ROWS),  # has its first gradient in step 3
    "layers.2.experts": ((5, 8, 4), ROWS),
    "layers.3.experts": ((4, 8, 64), (Shard(1), Shard(0))),
    "layers.3.flat": ((6, 4), NONE),
    "norm.weight": ((10,), ONE),
    "bias": ((5,), ROWS),
}
EXPERT_COLUMNS = {"layers.4.experts": ((4, 8, 64), (Shard(0), Shard(2)))}  # adamw_8bit refuses it
STEPS = 8


def table(name: str) -> dict[str, tuple[tuple[int, ...], tuple[Any, ...]]]:
    return DIVIDED if name == "adamw_8bit" else DIVIDED | EXPERT_COLUMNS


def values(of: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, _) in of.items()}


def divide(whole: Tensor, mesh: Any, placements: tuple[Any, ...]) -> Tensor:
    mesh = mesh if len(placements) == 2 else mesh["tensor"]
    local = cut(whole, *local_boxes(whole.shape, mesh.shape, mesh.get_coordinate(), placements)).clone()
    stride = whole.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=stride)


def make(of: dict[str, Any], mesh: Any, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(whole if mesh is None else divide(whole, mesh, of[name][1]))
        for name, whole in values(of, 1, dtype).items()
    }


def give_grads(parameters: dict[str, nn.Parameter], of: dict[str, Any], step: int) -> None:
    dtype = next(iter(parameters.values())).dtype
    for name, grad in values(of, 100 + step, dtype).items():
        parameter = parameters[name]
        parameter.grad = None
        if "never" in name or ("late" in name and step < 3):
            continue
        own: Any = parameter
        divided = isinstance(own, DTensor)
        parameter.grad = divide(grad, own.device_mesh, tuple(own.placements)) if divided else grad.clone()


def same_part(mine: Tensor, whole: Tensor, what: str, tolerance: float) -> None:
    """What this rank holds is its part of the whole."""
    expected = whole.detach()
    if isinstance(mine, DTensor):
        assert mine.shape == whole.shape, what
        shard = shard_of(mine)
        expected = expected if shard is None else shard.unwrap(expected, what)
    torch.testing.assert_close(
        local_part(mine), expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}"
    )


def check_equals_one_process(mesh: Any, name: str, dtype: torch.dtype, update: str = "master") -> None:
    of = table(name)
    divided, plain = make(of, mesh, dtype), make(of, None, dtype)
    options = OptimizerOptions(name=name, lr=0.01, newton_schulz_dtype="float32", half_update=update)
    one, other = (build_optimizer(p.items(), options) for p in (divided, plain))
    averages = [EMA(p.items(), decay=0.9) for p in (divided, plain)]
    for step in range(STEPS):
        give_grads(divided, of, step)
        give_grads(plain, of, step)
        norm = gradient_norm(plain.values())
        torch.testing.assert_close(gradient_norm(divided.values()), norm, rtol=1e-6, atol=0)
        factor = clip_factor(norm, 1.0, scale=0.3)
        one.step(gradient_factor=factor)
        other.step(gradient_factor=factor)
        for ema in averages:
            ema.update()
    # Sums over parts are in another order; fused kernels round the last numbers of a tensor differently.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    whole = other.state_dict()["parameters"]
    presented = one.state_dict()
    for key, parameter in divided.items():
        same_part(parameter, plain[key], f"{name} {dtype} {update} {key}", tolerance)
        assert set(presented["parameters"][key]) == set(whole[key])
        for entry, tensor in presented["parameters"][key].items():
            # 8-bit codes near a limit may fall on either side of it.
            near = 1 if tensor.dtype == torch.uint8 else tolerance
            same_part(tensor, whole[key][entry], f"{name} {dtype} {update} {key} {entry}", near)
            if isinstance(tensor, DTensor):
                assert local_part(tensor).data_ptr() == one.state[parameter][entry].data_ptr()
    for key, average in averages[0].state_dict()["averages"].items():
        same_part(average, averages[1].averages[key], f"ema {key}", tolerance)
    check_resume(mesh, of, options, presented, other.state_dict(), averages)


def check_resume(mesh: Any, of: dict[str, Any], options: OptimizerOptions, *states: Any) -> None:
    """A state dict of divided tensors, and one of whole ones, go into a fresh optimizer bit by bit."""
    presented, whole, averages = states
    dtype = next(iter(averages[0]._parameters.values())).dtype
    for state in (presented, whole):
        fresh = build_optimizer(make(of, mesh, dtype).items(), options)
        fresh.load_state_dict(state)
        for key, entries in fresh.state_dict()["parameters"].items():
            for entry, tensor in entries.items():
                same_part(tensor, state["parameters"][key][entry], f"{key} {entry}", 0) if state is whole else None
                assert state is whole or torch.equal(local_part(tensor), local_part(state["parameters"][key][entry]))
    ema = EMA(make(of, mesh, dtype).items())
    ema.load_state_dict(averages[1].state_dict())
    assert all(torch.isfinite(part).all() for part in ema.averages.values())


def check_norms(mesh: Any) -> None:
    of = table("adamw")
    divided, plain = make(of, mesh, torch.float32), make(of, None, torch.float32)
    give_grads(divided, of, 5)
    give_grads(plain, of, 5)
    assert [parts_of(divided[key]) for key in ("bias", "norm.weight", "layers.3.flat", "layers.1.o.weight")] == [
        4,
        2,
        1,
        2,
    ]
    squares = squared_norm_sum(divided.values(), lambda p: 4 // parts_of(p))
    dist.all_reduce(squares)
    torch.testing.assert_close(squares.sqrt().float(), gradient_norm(plain.values()), rtol=1e-6, atol=0)
    clip_gradients(divided.values(), 0.5, scale=0.1)
    clip_gradients(plain.values(), 0.5, scale=0.1)
    for key, parameter in plain.items():
        if parameter.grad is not None:
            same_part(divided[key].grad, parameter.grad, key, 1e-6)  # type: ignore[arg-type]


def check_refusals(mesh: Any) -> None:
    for shape, placements, cuts in (
        ((4, 8, 64), (Shard(0), Shard(2)), "512 numbers"),  # in the middle of rows
        ((8, 192), BOTH, "192 numbers"),  # 96 numbers a rank, blocks of 64
        ((2, 3, 512), (Replicate(), Shard(1)), "1536 numbers"),  # rows of 2 and 1, blocks of 3 and 3
    ):
        weight = nn.Parameter(divide(torch.zeros(shape), mesh, placements))
        with pytest.raises(ConfigError, match=f"adamw_8bit cannot update w: its rows of {cuts}"):
            build_optimizer([("w", weight)], OptimizerOptions(name="adamw_8bit"))
        build_optimizer([("w", weight)], OptimizerOptions(name="adafactor"))
    weight = nn.Parameter(divide(torch.zeros(4, 4), mesh, BOTH))
    optimizer = build_optimizer([("w", weight)], OptimizerOptions())
    weight.grad = DTensor.from_local(
        torch.ones(2, 2), mesh, (Shard(0), Partial()), run_check=False, shape=torch.Size((4, 4)), stride=(4, 1)
    )
    with pytest.raises(RuntimeError, match="not summed over its ranks"):
        optimizer.step()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.up = nn.Linear(5, 14)
        self.act = nn.GELU()
        self.down = nn.Linear(14, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.down(self.act(self.up(x))))
        return out


def sharded_net(mesh: Any) -> Net:
    net = Net()
    parallelize_module(net, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    modules: list[Any] = [net.up, net.down, net]
    for module in modules:
        fully_shard(module, mesh=mesh["shard"])
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    return net


def check_fsdp_over_tensor_parallel(mesh: Any, name: str, release: bool) -> None:
    """The real thing: parameters and gradients that FSDP2 and tensor parallelism made, of odd sizes."""
    spread, alone = sharded_net(mesh), Net()
    options = OptimizerOptions(name=name, lr=0.01, newton_schulz_dtype="float32")
    mine, other = (build_optimizer(net.named_parameters(), options) for net in (spread, alone))
    stepping = StepInBackward(mine, holders=lambda p: 4 // parts_of(p)) if release else None
    row = mesh.get_local_rank("shard")
    for step in range(6):
        torch.manual_seed(step)
        batch = torch.randn(8, 5)
        loss = spread(batch.chunk(2)[row]).square().sum()
        if stepping is not None:
            stepping.arm(0.1)
        loss.backward()
        alone(batch).square().sum().backward()
        norm = gradient_norm(alone.parameters())
        if stepping is not None:
            stepping.finish()
            squares = stepping.squared_norm.clone()
            dist.all_reduce(squares)
            torch.testing.assert_close(squares.sqrt().float(), norm, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(gradient_norm(spread.parameters()), norm, rtol=1e-4, atol=1e-5)
            mine.step(gradient_factor=0.1)
        other.step(gradient_factor=0.1)
        mine.zero_grad()
        other.zero_grad()
    for (key, p), q in zip(spread.named_parameters(), alone.parameters(), strict=True):
        same_part(p, q, f"fsdp {name} {key}", 2e-5)


def on_ranks(rank: int, world: int) -> bool:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    has_torchao = importlib.util.find_spec("torchao") is not None
    for name in ("adamw", "sgd", "lion", "adafactor", "muon", *(["adamw_8bit"] if has_torchao else [])):
        check_equals_one_process(mesh, name, torch.float32)
        check_fsdp_over_tensor_parallel(mesh, name, release=False)
    for update in ("master", "kahan", "stochastic"):
        check_equals_one_process(mesh, "adamw", torch.bfloat16, update)
    check_equals_one_process(mesh, "muon", torch.bfloat16)
    check_fsdp_over_tensor_parallel(mesh, "adamw", release=True)
    check_norms(mesh)
    check_refusals(mesh)
    return True


def test_two_mesh_dimensions_equal_one_process() -> None:
    assert run_ranks(on_ranks, 4, timeout=300) == [True] * 4


def test_parts_hold_every_number_once() -> None:
    """`over` and `without` keep how the remaining dimensions are cut."""

    class Mesh:
        shape = (2, 2)
        ndim = 2

        def __init__(self, place: tuple[int, int]) -> None:
            self.place = place

        def size(self, dim: int) -> int:
            return self.shape[dim]

        def get_local_rank(self, dim: int) -> int:
            return self.place[dim]

    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        shard = Part(Mesh(place), torch.Size((7, 6, 13)), (Shard(0), Shard(2)))  # type: ignore[arg-type]
        columns, lead = shard.over(-1), shard.without(-1)
        assert columns is not None
        assert lead is not None
        assert shard.over(1) is None
        assert columns.shape == ((4, 3)[place[0]], 6, 13)
        assert columns.mesh_dims == (1,)
        assert lead.shape == (7, 6, 1)
        assert lead.part()[0] == ((4, 3)[place[0]], 6, 1)
        assert shard.part()[0] == ((4, 3)[place[0]], 6, (7, 6)[place[1]])
