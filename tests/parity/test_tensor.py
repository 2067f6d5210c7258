"""Tensor parallelism computes what one process computes: losses, gradients, twenty steps, logits, generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from trainwright.comm.mesh import Axis
from trainwright.models import Decoder, GPT2Config, LlamaConfig, ModelConfig, build_model
from trainwright.ops.linear_cross_entropy import LossSums
from trainwright.parallel import complete_sums
from trainwright.parallel.tensor import apply_tensor
from trainwright.testing import run_ranks, tiny_gpt2_config, tiny_llama_config

ROWS, LENGTH = 4, 24

# What each variant adds: heads that divide, untied; tied with q/k norms; biases on every linear and a vocabulary that
# does not divide; one key/value head for all; 3 of them for 12 heads, which no rank count divides.
CONFIGS: dict[str, Callable[[], ModelConfig]] = {
    "llama": lambda: LlamaConfig(**tiny_llama_config(num_kv_heads=4)),
    "qwen3-tied": lambda: LlamaConfig(**tiny_llama_config(architecture="qwen3", qk_norm=True, tie_embeddings=True)),
    "llama-biases": lambda: LlamaConfig(
        **tiny_llama_config(vocab_size=251, qkv_bias=True, output_bias=True, mlp_bias=True)
    ),
    "llama-one-kv": lambda: LlamaConfig(**tiny_llama_config(num_kv_heads=1)),
    "qwen3-three-kv": lambda: LlamaConfig(
        **tiny_llama_config(
            architecture="qwen3", qk_norm=True, hidden_size=96, num_heads=12, num_kv_heads=3, head_dim=8, vocab_size=101
        )
    ),
    "gpt2": lambda: GPT2Config(**tiny_gpt2_config(vocab_size=131)),
    "gpt2-dropout": lambda: GPT2Config(
        **tiny_gpt2_config(embd_dropout=0.1, attn_dropout=0.1, resid_dropout=0.1, num_heads=8)
    ),
    "gpt2-bare": lambda: GPT2Config(**tiny_gpt2_config(bias=False, tie_embeddings=False)),
}


def tensor_axis(rank: int, degree: int) -> tuple[DeviceMesh, Axis]:
    """The root mesh (shard, tensor) of all ranks, and this rank's tensor axis."""
    grid = torch.arange(dist.get_world_size()).view(-1, degree)
    root = DeviceMesh("cpu", grid, mesh_dim_names=("shard", "tensor"))
    mesh = root["tensor"]
    return root, Axis("tensor", rank % degree, degree, mesh.get_group(), mesh)


def batch(config: ModelConfig, seed: int, rows: int = ROWS, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels (some not trained) and documents of packed rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=generator)
    labels = (ids + 1) % 8  # can be learned
    labels[torch.rand(rows, length, generator=generator) < 0.2] = -100
    documents = (torch.rand(rows, length, generator=generator) < 0.1).cumsum(1)
    return ids, labels, documents


def loss_sums(model: Decoder, ids: Tensor, labels: Tensor, documents: Tensor) -> LossSums:
    model.set_dropout(seed=3, rows=torch.arange(len(ids)))
    hidden = model.hidden_states(ids, document_ids=documents)
    assert hidden.shape[:2] == ids.shape, "from outside the model is whole"
    return model.head_loss(hidden.flatten(0, 1), labels.flatten(), label_smoothing=0.1, z_loss=1e-3)


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative, of whole tensors."""
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def worst(ours: nn.Module, theirs: nn.Module, read: Callable[[nn.Parameter], Tensor | None]) -> tuple[float, str]:
    pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    found = []
    for (name, mine), (other, reference) in pairs:
        assert name == other
        assert mine.shape == reference.shape
        found.append((distance(whole(read(mine)).detach(), whole(read(reference)).detach()), name))
    return max(found)


def train(model: Decoder, config: ModelConfig, steps: int, finish: Callable[[], None]) -> list[float]:
    """Two micro-batches a step; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-5, foreach=False)
    losses = []
    for step in range(steps):
        parts = [batch(config, 2 * step + part, rows=2) for part in range(2)]
        count = sum(int((labels != -100).sum()) for _, labels, _ in parts)
        total = 0.0
        for part in parts:
            loss = loss_sums(model, *part).loss_sum / count
            loss.backward()
            total += loss.item()
        finish()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def check_one(kind: str, axis: Axis, dtype: torch.dtype) -> dict[str, Any]:
    config = CONFIGS[kind]()
    reference = build_model(config, seed=1, dtype=dtype)
    model = apply_tensor(build_model(config, seed=1, dtype=dtype), axis)
    assert isinstance(model, Decoder)
    parameters = list(model.parameters())

    def finish() -> None:
        complete_sums(parameters)

    found: dict[str, Any] = {}
    ours, theirs = (loss_sums(each, *batch(config, 0)) for each in (model, reference))
    apart = [(a - b).abs() / b.abs().clamp_min(1) for a, b in zip(ours, theirs, strict=True)]
    found["sums"] = max(value.item() for value in apart)
    ours.loss_sum.backward()
    theirs.loss_sum.backward()
    finish()
    found["gradients"] = worst(model, reference, lambda parameter: parameter.grad)
    found["whole gradients"] = all(p.grad.placements == p.placements for p in parameters)  # type: ignore[union-attr]
    for each in (model, reference):
        each.zero_grad()
        each.eval()
    found["logits"] = [logits_apart(model, reference, config, tokens) for tokens in (LENGTH, 7, 1)]
    found["generated"] = generated_apart(model, reference, config)
    for each in (model, reference):
        each.train()
    steps = [train(model, config, 20, finish), train(reference, config, 20, lambda: None)]
    found["losses"] = max(abs(a / b - 1) for a, b in zip(*steps, strict=True))
    found["learned"] = steps[0][0] - steps[0][-1]
    found["parameters"] = worst(model, reference, lambda parameter: parameter)
    return found


@torch.no_grad()
def logits_apart(model: Decoder, reference: Decoder, config: ModelConfig, tokens: int) -> float:
    ids = batch(config, 5, length=tokens)[0]
    return distance(model(ids), reference(ids))


@torch.no_grad()
def generated_apart(model: Decoder, reference: Decoder, config: ModelConfig) -> float:
    """A prompt of odd length, then single tokens, through a key/value cache."""
    ids = batch(config, 6, rows=2, length=11)[0]
    caches = model.make_cache(2, 16), reference.make_cache(2, 16)
    furthest = 0.0
    for piece in (ids[:, :7], ids[:, 7:8], ids[:, 8:]):
        furthest = max(furthest, distance(model(piece, cache=caches[0]), reference(piece, cache=caches[1])))
    return furthest


def parity_rank(rank: int, world: int, kinds: list[str], dtype: str) -> dict[str, Any]:
    axis = tensor_axis(rank, world)[1]
    return {kind: check_one(kind, axis, getattr(torch, dtype)) for kind in kinds}


def check(found: dict[str, Any], tolerance: float, drift: float) -> None:
    """drift: of parameters over 20 steps, which AdamW moves by much where gradients are hardly more than rounding."""
    assert found["sums"] < tolerance, found
    assert found["gradients"][0] < tolerance, found
    assert found["whole gradients"], found
    assert max(found["logits"]) < tolerance, found
    assert found["generated"] < tolerance, found
    assert found["learned"] > 0.1, found
    assert found["losses"] < tolerance, found
    assert found["parameters"][0] < drift, found


@pytest.mark.parametrize(
    ("degree", "kinds"),
    [
        (2, ["llama-biases", "gpt2-dropout"]),
        pytest.param(2, list(CONFIGS), marks=pytest.mark.slow),
        pytest.param(4, list(CONFIGS), marks=pytest.mark.slow),
    ],
)
def test_the_same_training(degree: int, kinds: list[str]) -> None:
    for result in run_ranks(parity_rank, degree, kinds, "float32", timeout=300):
        for found in result.values():
            check(found, 1e-5, 1e-4)


def test_what_differs_is_rounding() -> None:
    """In float64 twenty steps end in the same parameters to 1e-11."""
    for result in run_ranks(parity_rank, 2, ["qwen3-three-kv"], "float64", timeout=120):
        for found in result.values():
            check(found, 1e-12, 1e-11)
