"""Feed-forward halves in pieces: the same losses and gradients, activations that fall with the number of pieces."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainwright.base.errors import ConfigError
from trainwright.memory import ActivationMeter, apply_recompute
from trainwright.memory.chunked_mlp import apply_chunked_mlp
from trainwright.models import Decoder, GPT2Config, LlamaConfig, MoEConfig, build_model
from trainwright.testing import tiny_gpt2_config, tiny_llama_config
from trainwright.testing.models import tiny_moe_config

ROWS, LENGTH = 2, 64
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**tiny_llama_config(intermediate_size=512)),
    "gpt2": GPT2Config(**tiny_gpt2_config(intermediate_size=512)),
    "dropout": GPT2Config(**tiny_gpt2_config(resid_dropout=0.2, embd_dropout=0.1, attn_dropout=0.1)),
}


def make(kind: str) -> Decoder:
    model = build_model(MODELS[kind], seed=3)
    assert isinstance(model, Decoder)
    return model.train()


def loss_and_gradients(model: Decoder, *, known_rows: bool = True) -> tuple[list[Tensor], int]:
    ids = torch.randint(0, 256, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(11)
    if known_rows:
        model.set_dropout(seed=7, rows=torch.arange(ROWS))
    model.zero_grad()
    with ActivationMeter(model) as meter:
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    held = meter.activations
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], held


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm().clamp_min(1e-3)) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("chunks", [2, 7, 64, 1000])
def test_losses_and_gradients_are_those_of_the_whole(kind: str, chunks: int) -> None:
    model = make(kind)
    expected, _ = loss_and_gradients(model)
    pieces = apply_chunked_mlp(copy.deepcopy(model), chunks)
    found, _ = loss_and_gradients(pieces)
    assert found[0] == expected[0] or kind != "dropout" or abs(found[0] - expected[0]) < 1e-6
    assert worst(found, expected) < 2e-6
    assert list(pieces.state_dict()) == list(model.state_dict())


def test_under_recomputing_too() -> None:
    for kind in MODELS:
        expected, _ = loss_and_gradients(make(kind))
        found, _ = loss_and_gradients(apply_recompute(apply_chunked_mlp(make(kind), 4), "full"))
        assert worst(found, expected) < 2e-6


def test_torchs_own_dropout_is_drawn_again_in_backward() -> None:
    model = apply_chunked_mlp(make("dropout"), 4)
    found, _ = loss_and_gradients(model, known_rows=False)
    again, _ = loss_and_gradients(model, known_rows=False)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_only_the_input_of_a_half_is_held() -> None:
    config = MODELS["llama"]
    whole = loss_and_gradients(make("llama"))[1]
    pieces = loss_and_gradients(apply_chunked_mlp(make("llama"), 4))[1]
    inner = 4 * ROWS * LENGTH * config.intermediate_size * config.num_layers  # bytes of one inner activation, fp32
    assert whole - pieces >= 4 * inner, "gate, up, the activation and the product are not held"


def test_what_works_at_once_falls_with_the_pieces() -> None:
    seen: list[int] = []
    model = apply_chunked_mlp(make("llama"), 8)
    for block in model.blocks.children():
        block.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    loss_and_gradients(model)
    assert seen == [LENGTH // 8] * (2 * 2 * 8), "two layers, 8 pieces, forward and again in backward"


def test_compiled_blocks_run() -> None:
    expected, _ = loss_and_gradients(make("llama"))
    model = apply_chunked_mlp(make("llama"), 2)
    for block in model.blocks.children():
        block.compile(backend="aot_eager")
    found, _ = loss_and_gradients(model)
    assert worst(found, expected) < 2e-6


def test_what_is_refused() -> None:
    model = make("llama")
    assert apply_chunked_mlp(model, 1) is model
    assert "forward" not in model.blocks[0].mlp.__dict__
    with pytest.raises(ConfigError, match="at least 1"):
        apply_chunked_mlp(model, 0)
    with pytest.raises(ConfigError, match="repeated blocks"):
        apply_chunked_mlp(torch.nn.Linear(1, 1), 2)
    with pytest.raises(ConfigError, match="no module 'feed'"):
        apply_chunked_mlp(model, 2, name="feed")
    with pytest.raises(ConfigError, match="already"):
        apply_chunked_mlp(apply_chunked_mlp(model, 2), 2)
    experts = build_model(MoEConfig(**tiny_moe_config()), seed=1)
    with pytest.raises(ConfigError, match="layers of experts"):
        apply_chunked_mlp(experts, 2)
