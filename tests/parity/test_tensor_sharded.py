"""Tensor parallelism under FSDP2: parameters divided over two mesh dimensions train as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainwright.comm.mesh import Axis
from trainwright.memory.recompute import apply_recompute
from trainwright.models import Decoder, GPT2Config, LlamaConfig, ModelConfig, build_model
from trainwright.parallel.sharded import run_as_forward
from trainwright.parallel.tensor import apply_tensor
from trainwright.testing import run_ranks, tiny_gpt2_config, tiny_llama_config

CONFIGS: dict[str, ModelConfig] = {
    "llama-one-kv": LlamaConfig(
        **tiny_llama_config(vocab_size=250, num_kv_heads=1, architecture="qwen3", qk_norm=True, tie_embeddings=True)
    ),
    "llama-biases": LlamaConfig(**tiny_llama_config(qkv_bias=True, output_bias=True, mlp_bias=True)),
    "llama-odd-words": LlamaConfig(**tiny_llama_config(vocab_size=251)),
    "gpt2": GPT2Config(**tiny_gpt2_config(embd_dropout=0.1, attn_dropout=0.1, resid_dropout=0.1)),
}


def rows_of(config: ModelConfig, step: int) -> Tensor:
    return torch.randint(0, config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(step))


def loss_of(model: Decoder, rows: Tensor, first: int) -> Tensor:
    model.set_dropout(seed=5, rows=torch.arange(first, first + len(rows)))
    hidden = model.hidden_states(rows)
    return model.head_loss(hidden.flatten(0, 1), ((rows + 1) % 8).flatten()).loss_sum / 64


def shard(model: Decoder, mesh: DeviceMesh, free: bool) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=free)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for name in ("hidden_states", "head_loss"):
        run_as_forward(model, name)


def sharded_rank(rank: int, world: int, name: str, free: bool, recompute: bool) -> dict[str, Any]:
    config = CONFIGS[name]
    root = DeviceMesh("cpu", torch.arange(world).view(2, 2), mesh_dim_names=("shard", "tensor"))
    axis = Axis("tensor", rank % 2, 2, root["tensor"].get_group(), root["tensor"])
    model = apply_tensor(build_model(config, seed=1), axis)
    reference = build_model(config, seed=1)
    assert isinstance(model, Decoder)
    if recompute:
        apply_recompute(model, "full")
    shard(model, root["shard"], free)
    found: dict[str, Any] = {"losses": [], "apart": 0.0}
    found["numbers"] = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[operator]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, reference)]
    own = slice(2 * (rank // 2), 2 * (rank // 2) + 2)
    for step in range(6):
        rows = rows_of(config, step)
        loss = loss_of(model, rows[own], own.start)
        expected = loss_of(reference, rows, 0)
        for each in (loss, expected):
            each.backward()
        total = loss.detach().clone()
        dist.all_reduce(total, group=root["shard"].get_group())
        found["losses"].append(abs(total.item() / expected.item() - 1))
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert isinstance(mine.grad, DTensor)
            assert theirs.grad is not None
            assert mine.grad.placements == mine.placements  # type: ignore[attr-defined]
            apart = (mine.grad.full_tensor() - theirs.grad).norm() / theirs.grad.norm()
            found["apart"] = max(found["apart"], apart.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return found


@pytest.mark.parametrize(
    ("name", "free", "recompute"),
    [
        ("llama-one-kv", False, False),
        ("llama-biases", True, True),
        ("llama-odd-words", True, False),
        ("gpt2", True, True),
    ],
)
def test_two_by_two(name: str, free: bool, recompute: bool) -> None:
    """Gathered for a step or for each block, recomputed or not, with a vocabulary that does not divide."""
    results = run_ranks(sharded_rank, 4, name, free, recompute, timeout=120)
    for found in results:
        assert max(found["losses"]) < 1e-5, found
        assert found["apart"] < 1e-5, found
    config = CONFIGS[name]
    whole = sum(p.numel() for p in build_model(config, device="meta").parameters())
    assert max(found["numbers"] for found in results) < 0.3 * whole
