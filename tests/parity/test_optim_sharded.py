"""Every optimizer on parameters sharded over ranks equals the same optimizer on one process."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Rows

from trainwright.base.errors import CheckpointError, ConfigError
from trainwright.optim import (
    EMA,
    GroupedOptimizer,
    OptimizerOptions,
    StepInBackward,
    build_optimizer,
    clip_factor,
    clip_gradients,
    gradient_norm,
    parts_of,
    squared_norm_sum,
)
from trainwright.optim.exchange import assign_owners
from trainwright.optim.shard import local_part, shard_of
from trainwright.testing import run_ranks

SHAPES = {
    "embed_tokens.weight": (11, 6),  # 11 rows on 4 ranks: 3, 3, 3, 2
    "layers.0.up.weight": (7, 12),
    "layers.0.experts": (5, 8, 4),
    "layers.1.one_row.weight": (1, 6),  # rank 0 alone holds something
    "layers.1.down.weight": (9, 5),  # 3, 3, 3, none
    "layers.1.never.weight": (6, 6),  # never has a gradient
    "layers.1.late.weight": (8, 3),  # has its first gradient in step 3
    "layers.2.up.weight": (19, 16),
    "layers.2.experts": (3, 2, 32),  # 64 numbers a row: a block of adamw_8bit
    "norm.weight": (10,),
    "bias": (2,),
}
REPLICATED = ("plain.weight", (4, 6))
ELEMENTWISE = ("adamw", "sgd", "lion", "adamw_8bit")
VECTOR = 16  # torch's fused CPU kernels round the numbers beyond the last full vector of a tensor differently
STEPS = 20


def whole_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = dict([*SHAPES.items(), REPLICATED])
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def whole_grads(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    shapes = dict([*SHAPES.items(), REPLICATED])
    grads = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    del grads["layers.1.never.weight"]
    if step < 3:
        del grads["layers.1.late.weight"]
    return grads


def make(mesh: Any, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Parameters: sharded over the mesh, or all plain where it is None; `plain.weight` is always replicated."""
    made = {}
    for name, weight in whole_weights(dtype).items():
        sharded = mesh is not None and name != REPLICATED[0]
        made[name] = nn.Parameter(distribute_tensor(weight, mesh, [Rows(0)]) if sharded else weight.clone())
    return made


def give_grads(parameters: dict[str, nn.Parameter], step: int) -> None:
    grads = whole_grads(step, next(iter(parameters.values())).dtype)
    for name, parameter in parameters.items():
        parameter.grad = None
        if name in grads:
            shard = shard_of(parameter)
            parameter.grad = grads[name] if shard is None else shard.wrap(shard.unwrap(grads[name], name).clone())


def train(
    parameters: dict[str, nn.Parameter], optimizer: GroupedOptimizer, steps: range, ema: EMA | None = None
) -> list[float]:
    norms = []
    for step in steps:
        give_grads(parameters, step)
        norm = gradient_norm(parameters.values())
        optimizer.step(gradient_factor=clip_factor(norm, 1.0, scale=0.3))
        norms.append(float(norm))
        if ema is not None:
            ema.update()
    return norms


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def options(name: str, **changes: Any) -> OptimizerOptions:
    return OptimizerOptions(name=name, lr=0.01, newton_schulz_dtype="float32", **changes)


def assert_close(mine: dict[str, Tensor], other: dict[str, Tensor], name: str, *, dtype: torch.dtype) -> None:
    """Bit by bit for elementwise optimizers and rows of full vectors, else 1e-6 (or an ulp of bf16)."""
    for key, expected in other.items():
        found = full(mine[key])
        if name in ELEMENTWISE and (expected.ndim == 0 or expected.shape[1:].numel() % VECTOR == 0 or name == "lion"):
            assert torch.equal(found, expected.detach()), f"{name} {key}"
        else:
            tolerance = 1e-6 if dtype == torch.float32 else 2**-7
            torch.testing.assert_close(found, expected.detach(), rtol=tolerance, atol=tolerance)


def check_equals_one_process(mesh: Any, name: str, dtype: torch.dtype, update: str = "master") -> None:
    sharded, plain = make(mesh, dtype), make(None, dtype)
    one = build_optimizer(sharded.items(), options(name, half_update=update))
    other = build_optimizer(plain.items(), options(name, half_update=update))
    averages = [EMA(p.items(), decay=0.9) for p in (sharded, plain)]
    # The clipping factor is that of the plain side on both: here it is the optimizers that are compared.
    norms: list[list[float]] = [[], []]
    for step in range(STEPS):
        give_grads(sharded, step)
        give_grads(plain, step)
        found = [gradient_norm(p.values()) for p in (sharded, plain)]
        factor = clip_factor(found[1], 1.0, scale=0.3)
        one.step(gradient_factor=factor)
        other.step(gradient_factor=factor)
        for seen, norm in zip(norms, found, strict=True):
            seen.append(float(norm))
        for ema in averages:
            ema.update()
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert_close(sharded, plain, name, dtype=dtype)
    for key, state in other.state_dict()["parameters"].items():
        mine = one.state_dict()["parameters"][key]
        assert set(mine) == set(state)
        assert_close(mine, state, name, dtype=torch.float32 if update == "master" else dtype)
    assert_close(averages[0].state_dict()["averages"], averages[1].state_dict()["averages"], name, dtype=dtype)


def check_state_is_sharded_without_copies(mesh: Any, name: str) -> None:
    parameters = make(mesh)
    optimizer = build_optimizer(parameters.items(), options(name))
    train(parameters, optimizer, range(2))
    for key, state in optimizer.state_dict()["parameters"].items():
        parameter = parameters[key]
        rows = local_part(parameter).shape[0]
        for entry, tensor in state.items():
            spread = key != REPLICATED[0] and entry != "step" and not (entry == "col_var" and parameter.ndim == 2)
            assert isinstance(tensor, DTensor) == spread, f"{name} {key} {entry}"
            if spread:
                assert tensor.shape[0] == parameter.shape[0]
                assert local_part(tensor).shape[0] == rows
                assert local_part(tensor).data_ptr() == optimizer.state[parameter][entry].data_ptr()


def check_resume_in_the_same_and_in_other_layouts(mesh: Any, name: str, dtype: torch.dtype) -> None:
    undisturbed = make(mesh, dtype)
    train(undisturbed, build_optimizer(undisturbed.items(), options(name)), range(8))
    first = make(mesh, dtype)
    optimizer = build_optimizer(first.items(), options(name))
    train(first, optimizer, range(2))  # the late parameter has no gradient yet
    saved = optimizer.state_dict()
    whole = {p: {key: full(t) for key, t in state.items()} for p, state in saved["parameters"].items()}
    for state in (saved, saved | {"parameters": whole}):
        second = make(mesh, dtype)
        with torch.no_grad():
            for key, parameter in second.items():
                local_part(parameter).copy_(local_part(first[key]))
        resumed = build_optimizer(second.items(), options(name))
        resumed.load_state_dict(state)
        train(second, resumed, range(2, 8))
        for key, parameter in second.items():
            assert torch.equal(local_part(parameter), local_part(undisturbed[key])), f"{name} {dtype} {key}"
    # and what many ranks saved, one process loads
    alone = make(None, dtype)
    lone = build_optimizer(alone.items(), options(name))
    lone.load_state_dict(saved | {"parameters": whole})
    for key, entries in lone.state_dict()["parameters"].items():
        assert all(torch.equal(entries[entry], whole[key][entry]) for entry in entries)


def check_refusals(mesh: Any, rank: int) -> None:
    parameters = make(mesh)
    optimizer = build_optimizer(parameters.items(), options("adamw"))
    state = optimizer.state_dict()
    state["parameters"]["norm.weight"]["exp_avg"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"exp_avg of norm\.weight has shape \[3\], expected \[10\]"):
        optimizer.load_state_dict(state)
    other = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("a", "b"))["a"]
    state["parameters"]["norm.weight"]["exp_avg"] = DTensor.from_local(torch.zeros(10), other, [Rows(0)])
    with pytest.raises(CheckpointError, match=r"expected \(Shard\(dim=0\),\) over"):
        optimizer.load_state_dict(state)


def check_norms(mesh: Any) -> None:
    sharded, plain = make(mesh), make(None)
    for step in (0, 4):
        give_grads(sharded, step)
        give_grads(plain, step)
        expected = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in plain.values() if p.grad is not None]))
        torch.testing.assert_close(gradient_norm(sharded.values()), expected, rtol=1e-6, atol=0)
        squares = squared_norm_sum(sharded.values(), lambda p: mesh.size() // parts_of(p))
        assert squares.dtype == torch.float64
        assert squares.shape == ()
        dist.all_reduce(squares)
        torch.testing.assert_close(squares.sqrt().float(), expected, rtol=1e-6, atol=0)
        clip_gradients(sharded.values(), 0.5, scale=0.1)
        clip_gradients(plain.values(), 0.5, scale=0.1)
        for key, parameter in plain.items():
            if parameter.grad is not None:
                torch.testing.assert_close(full(sharded[key].grad), parameter.grad, rtol=1e-6, atol=0)  # type: ignore[arg-type]


def check_ema(mesh: Any) -> None:
    parameters = make(mesh, torch.bfloat16)
    ema = EMA(parameters.items(), decay=0.5)
    ema.update()
    own = {key: local_part(p).clone() for key, p in parameters.items()}
    with torch.no_grad():
        for p in parameters.values():
            local_part(p).mul_(3)
    with ema.applied():
        assert all(torch.equal(local_part(p), own[key]) for key, p in parameters.items())
    assert all(torch.equal(local_part(p), own[key] * 3) for key, p in parameters.items())
    ema.update()
    other = EMA(make(mesh, torch.bfloat16).items(), decay=0.5)
    other.load_state_dict(ema.state_dict())
    assert other.steps == 2
    assert all(torch.equal(other.averages[key], ema.averages[key]) for key in parameters)


def check_a_rank_without_gradients_does_not_hang(mesh: Any, rank: int, name: str) -> None:
    parameters = make(mesh)
    optimizer = build_optimizer(parameters.items(), options(name))
    before = {key: local_part(p).detach().clone() for key, p in parameters.items()}
    give_grads(parameters, 5)
    if rank == 1:
        for parameter in parameters.values():
            parameter.grad = None
    optimizer.step(gradient_factor=0.5)
    moved = [key for key, p in parameters.items() if not torch.equal(local_part(p), before[key])]
    assert bool(moved) == (rank != 1)


def small_model() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3), nn.LayerNorm(3), nn.Linear(3, 1))


def sharded_model(mesh: Any) -> nn.Sequential:
    model = small_model()
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    return model


def check_release_in_backward(mesh: Any, rank: int, name: str) -> None:
    ordinary, released = sharded_model(mesh), sharded_model(mesh)
    mine = build_optimizer(ordinary.named_parameters(), options(name))
    other = build_optimizer(released.named_parameters(), options(name))
    stepping = StepInBackward(other)
    for step in range(4):
        torch.manual_seed(step)
        rows = torch.randn(4 * mesh.size(), 5).chunk(mesh.size())[rank]
        ordinary(rows).square().sum().backward()
        norm = gradient_norm(ordinary.parameters())
        mine.step(gradient_factor=0.1)
        mine.zero_grad()
        loss = released(rows).square().sum()
        stepping.arm(gradient_factor=0.1)
        loss.backward()
        left = [p for p in released.parameters() if p.grad is not None]
        assert not left, f"{len(left)} gradients are still there after the backward pass"
        stepping.finish()
        squares = stepping.squared_norm.clone()
        dist.all_reduce(squares)
        torch.testing.assert_close(squares.sqrt().float(), norm, rtol=1e-6, atol=0)
    for p, q in zip(ordinary.parameters(), released.parameters(), strict=True):
        assert torch.equal(local_part(p), local_part(q))
    with pytest.raises(ConfigError, match="muon looks at whole matrices"):
        StepInBackward(build_optimizer(released.named_parameters(), options("muon")))


def check_fsdp_training(mesh: Any, rank: int, name: str) -> None:
    """The real thing: gradients that FSDP2 made, on a model with odd widths."""

    spread, alone = sharded_model(mesh), small_model()
    mine = build_optimizer(spread.named_parameters(), options(name))
    other = build_optimizer(alone.named_parameters(), options(name))
    for step in range(8):
        torch.manual_seed(step)
        batch = torch.randn(4 * mesh.size(), 5)
        rows = batch.chunk(mesh.size())[rank]
        spread(rows).square().sum().backward()
        alone(batch).square().sum().backward()
        for optimizer, parameters in ((mine, spread.parameters()), (other, alone.parameters())):
            optimizer.step(gradient_factor=clip_factor(gradient_norm(parameters), 1.0, scale=1 / len(batch)))
            optimizer.zero_grad()
    for (key, p), q in zip(spread.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(
            full(p), q.detach(), rtol=2e-4, atol=2e-5, msg=lambda t, key=key: f"{name} {key}: {t}"
        )


def on_ranks(rank: int, world: int) -> bool:
    mesh = init_device_mesh("cpu", (world,))
    has_torchao = importlib.util.find_spec("torchao") is not None
    for name in ("adamw", "sgd", "lion", "adafactor", "muon", *(["adamw_8bit"] if has_torchao else [])):
        check_equals_one_process(mesh, name, torch.float32)
        if world == 2:
            check_equals_one_process(mesh, name, torch.bfloat16)
            check_resume_in_the_same_and_in_other_layouts(mesh, name, torch.bfloat16)
            check_fsdp_training(mesh, rank, name)
            if name in ELEMENTWISE:
                check_release_in_backward(mesh, rank, name)
                check_equals_one_process(mesh, name, torch.bfloat16, "kahan")
                check_equals_one_process(mesh, name, torch.bfloat16, "stochastic")
            check_a_rank_without_gradients_does_not_hang(mesh, rank, name)
        check_resume_in_the_same_and_in_other_layouts(mesh, name, torch.float32)
        check_state_is_sharded_without_copies(mesh, name)
    check_norms(mesh)
    check_ema(mesh)
    check_refusals(mesh, rank)
    return True


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_equals_one_process(world: int) -> None:
    assert run_ranks(on_ranks, world, timeout=180) == [True] * world


def test_work_on_whole_matrices_is_spread_evenly() -> None:
    assert assign_owners([5, 5, 5, 5], 2) in ([0, 1, 0, 1],)
    owners = assign_owners([10, 1, 1, 1, 7], 3)
    load = [sum(cost for cost, owner in zip([10, 1, 1, 1, 7], owners, strict=True) if owner == r) for r in range(3)]
    assert max(load) == 10
    assert assign_owners([], 4) == []
