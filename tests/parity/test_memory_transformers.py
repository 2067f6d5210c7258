"""Recomputing and offloading the blocks of Hugging Face models, which make a key-value cache even while they train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from trainwright.memory import ActivationMeter, ActivationOffload, HostCopies, apply_recompute
from trainwright.parallel import find_blocks

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=2),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=3, n_head=4),  # with dropout
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=128),
}


def run(model: Any) -> tuple[list[Tensor], int]:
    torch.manual_seed(9)
    ids = torch.randint(0, 128, (2, 48), generator=torch.Generator().manual_seed(4))
    with ActivationMeter(model) as meter:
        loss = model(input_ids=ids, labels=ids).loss
    held = meter.activations
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], held


@pytest.mark.parametrize("family", CONFIGS)
def test_bitwise_equal_with_less_held(family: str) -> None:
    torch.manual_seed(1)
    original = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).train()
    expected, plain_bytes = run(copy.deepcopy(original))
    cases: list[tuple[Any, ActivationOffload | None]] = [
        ("full", None),
        ("selective", None),
        ({"every": 2}, None),
        ("full", ActivationOffload(HostCopies())),
    ]
    for policy, offload in cases:
        model = copy.deepcopy(original)
        apply_recompute(model, policy, blocks=[block for _, block in find_blocks(model)], offload=offload)
        assert list(model.state_dict()) == list(original.state_dict())
        found, held = run(model)
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), policy
        assert held < 0.8 * plain_bytes, policy
