"""AdamW with moments of 8 bits (2110.02861): 2 bytes of state a parameter instead of 8.

Each block of a row is stored as one fp32 scale and, per number, the index into torchao's table of 256 values whose
spacing is finer near zero. Blocks never reach over the end of a row, nor over a cut of one (parameters that are cut
where a block does not end are refused), so state is the same in every layout; it is made of plain tensors (uint8
indices, fp32 scales), which checkpoints hold like any other. Vectors and matrices whose rows no block divides keep fp32
moments, on the fused kernel.

torchao's own AdamW8bit is not used as it is: its tensor subclasses cannot be saved without pickle, its blocks depend on
how a parameter is sharded, and without a compiler its encoder takes 24 passes of 8-byte integers. The encoder here
gives the same bytes (tests compare) in one.

Shape suffixes: N blocks, K numbers in a block.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from trainwright.base.errors import MissingDependencyError
from trainwright.optim.adamw import ADAMW, uses_fused
from trainwright.optim.algorithm import Algorithm, Group, Item, ParameterState
from trainwright.optim.shard import Shard

__all__ = ["ADAMW_8BIT", "block_size", "decode", "encode"]

BLOCKS = (256, 128, 64)
"""Numbers that share a scale, the first that divides a row; 256 is torchao's and bitsandbytes' choice."""

PIECE = 1 << 20
"""Numbers decoded at a time on CPUs: what is decoded is fp32 and should not outgrow the cache, nor memory."""

SMALLEST_SCALE = 1e-12
MOMENTS = (("exp_avg", True), ("exp_avg_sq", False))
"""State key of each moment, and whether it has a sign."""


def block_size(shape: torch.Size) -> int | None:
    """How many numbers of a row of a parameter share a scale; None where its moments stay fp32.

    The number of rows does not matter, as ranks hold different ones.
    """
    width = shape[1:].numel()
    return next((block for block in BLOCKS if width % block == 0), None) if len(shape) > 1 else None


@functools.cache
def _table(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 values in rising order, and the 255 limits from which on the upper of two neighbours is nearer."""
    try:
        from torchao.optim.quant_utils import create_dynamic_map
    except ImportError:
        raise MissingDependencyError(
            "optimizer adamw_8bit needs torchao, which is not installed", hint="pip install 'trainwright[torchao]'"
        ) from None
    values = torch.tensor(create_dynamic_map(signed=signed), dtype=torch.float32)
    return values.to(device), ((values[1:] + values[:-1]) / 2).to(device)


def encode(values: Tensor, codes: Tensor, scales: Tensor, *, signed: bool) -> None:
    """Write fp32 `values` [N, K] as `codes` (uint8 [N, K]) and `scales` (fp32 [N], the largest of each block)."""
    _, limits = _table(signed, values.device)
    _encode(values, codes, scales, limits)


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The fp32 numbers [N, K] of `codes` [N, K] and `scales` [N]."""
    table, _ = _table(signed, codes.device)
    return _decode(codes, scales, table)


def _encode(values: Tensor, codes: Tensor, scales: Tensor, limits: Tensor) -> None:
    scales.copy_(values.abs().amax(dim=-1).clamp(min=SMALLEST_SCALE))
    codes.copy_(torch.bucketize(values / scales[:, None], limits, out_int32=True, right=True))


def _decode(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    return table.index_select(0, codes.view(-1).int()).view(codes.shape) * scales[:, None]


def _init(parameter: Tensor, group: Group) -> ParameterState:
    block = block_size(parameter.shape)
    if block is None:
        return ADAMW.init(parameter, group)
    device = parameter.device
    if device.type != "meta":
        _table(True, device)  # says now that torchao is missing, if it is
    blocks = (parameter.shape[0], parameter.shape[1:].numel() // block)
    # On the parameter's device: a step count on the host would have to be read for the bias correction.
    state: ParameterState = {"step": torch.zeros((), dtype=torch.float32, device=device)}
    for key, _ in MOMENTS:
        # A scale of zero makes every code a zero.
        state[key] = torch.zeros(parameter.shape, dtype=torch.uint8, device=device)
        state[f"{key}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=device)
    return state


def _update(group: Group, items: list[Item], gradient_factor: Tensor | None) -> None:
    plain = [item for item in items if "exp_avg_scale" not in item.state]
    if plain:
        _update_plain(group, plain, gradient_factor)
    for item in items:
        if "exp_avg_scale" in item.state:
            item.state["step"] += 1
            if item.weights.numel():
                _update_blocks(group, item, gradient_factor)


def _update_plain(group: Group, items: list[Item], gradient_factor: Tensor | None) -> None:
    if gradient_factor is not None and not uses_fused(group, items[0].weights.device):
        torch._foreach_mul_([item.grad for item in items], gradient_factor)
        gradient_factor = None
    ADAMW.update(group, items, gradient_factor)


def _update_blocks(group: Group, item: Item, gradient_factor: Tensor | None) -> None:
    block = block_size(item.shape)
    assert block is not None
    device = item.weights.device
    beta1, beta2 = group["betas"]
    step = item.state["step"]
    first, second = 1 - beta1**step, (1 - beta2**step).sqrt()
    rate = torch.full((), float(group["lr"]), device=device)  # filled there: a copy from the host would wait
    # All numbers that change from step to step are tensors, so that a compiled step is compiled once.
    scalars = [rate / first, second, 1 - rate * group["weight_decay"], torch.ones_like(rate)]
    if gradient_factor is not None:
        scalars[3] = gradient_factor
    weights = item.weights if item.weights.is_contiguous() else item.weights.contiguous()
    tensors = [weights.view(-1, block), item.grad.reshape(-1, block)]
    for key, _ in MOMENTS:
        tensors += [item.state[key].view(-1, block), item.state[f"{key}_scale"].view(-1)]
    tables = [*_table(True, device), *_table(False, device)]
    step_of: Callable[..., None] = _compiled() if device.type == "cuda" else _adamw_blocks
    size = len(tensors[0]) if device.type == "cuda" else max(1, PIECE // block)
    for pieces in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        step_of(*pieces, *scalars, *tables, beta1, beta2, group["eps"])
    if weights is not item.weights:
        item.weights.copy_(weights)


@functools.cache
def _compiled() -> Callable[..., None]:
    # One kernel instead of twenty passes; the number of blocks is left open, so all parameters share it.
    compiled: Callable[..., None] = torch.compile(_adamw_blocks, fullgraph=True, dynamic=True)
    return compiled


def _adamw_blocks(
    weights: Tensor,
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    codes_sq: Tensor,
    scales_sq: Tensor,
    rate: Tensor,
    correction: Tensor,
    decay: Tensor,
    factor: Tensor,
    table: Tensor,
    limits: Tensor,
    table_sq: Tensor,
    limits_sq: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step on blocks [N, K]; the update uses the moments before they are rounded to 8 bits again."""
    grad = grad * factor
    average = _decode(codes, scales, table).lerp(grad, 1 - beta1)
    squares = _decode(codes_sq, scales_sq, table_sq).lerp(grad.square(), 1 - beta2)
    _encode(average, codes, scales, limits)
    _encode(squares, codes_sq, scales_sq, limits_sq)
    weights.mul_(decay).sub_(rate * average / (squares.sqrt() / correction + eps))


def _scale_shard(shard: Shard, block: int) -> Shard:
    """How the scales [rows, blocks of a row] of a divided parameter are divided."""
    return replace(shard, shape=torch.Size((shard.shape[0], shard.shape[1:].numel() // block)))


def _placed(key: str, shard: Shard) -> Shard | None:
    block = block_size(shard.shape)
    return _scale_shard(shard, block) if block is not None and key.endswith("_scale") else shard


def _refuses(shard: Shard) -> str | None:
    block = block_size(shard.shape)
    cuts = {placement.dim for placement in shard.placements if not placement.is_replicate()} - {0}
    if block is None or not cuts:
        return None
    reason = f"its rows of {shard.shape[1:].numel()} numbers are cut where no block of {block} ends"
    if cuts != {1}:
        return reason
    for place in itertools.product(*(range(size) for size in shard.sizes)):
        shape, boxes = shard.part(place)
        width = math.prod(shape[1:])
        # The local part must have the blocks that the whole has: in number, in size and in their places.
        scales = _scale_shard(shard, block).part(place)[0]
        if any(box.shape != shape for box in boxes) and len({box.offset[1] for box in boxes}) > 1:
            return reason
        if scales != (shape[0], width // block) or (width and block_size(torch.Size(shape)) != block):
            return reason
    return None


def _folds(group: Group, device: torch.device) -> bool:
    return True


ADAMW_8BIT = Algorithm(init=_init, update=_update, folds_factor=_folds, placed=_placed, refuses=_refuses)
