"""Recomputing and offloading change what is held for backward and nothing else: losses, gradients bitwise equal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainwright.base.errors import ConfigError
from trainwright.memory import (
    ActivationMeter,
    ActivationOffload,
    HostCopies,
    apply_recompute,
    read_policy,
    remove_recompute,
)
from trainwright.models import Decoder, GPT2Config, LlamaConfig, build_model
from trainwright.testing import tiny_gpt2_config, tiny_llama_config

POLICIES: list[Any] = ["full", {"every": 2}, "selective"]
ROWS, LENGTH = 4, 64


def llama() -> Decoder:
    return build_model(LlamaConfig(**tiny_llama_config(num_layers=4)), seed=3).train()


def gpt2() -> Decoder:
    config = tiny_gpt2_config(num_layers=4, attn_dropout=0.1, resid_dropout=0.1, embd_dropout=0.1)
    return build_model(GPT2Config(**config), seed=3).train()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 256, (ROWS, LENGTH + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def train_twice(model: nn.Module, *, autocast: bool = False) -> tuple[list[Tensor], int]:
    """Losses and gradients of two accumulated passes, and the activation bytes of the first."""
    torch.manual_seed(11)
    inputs, labels = batch()
    results, held = [], 0
    for _ in range(2):
        with ActivationMeter(model) as meter, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        held = held or meter.activations
        loss.backward()
        results.append(loss.detach())
    return results + [p.grad for p in model.parameters() if p.grad is not None], held


def assert_bitwise(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs), (mine - theirs).abs().max()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_and_gradients_are_bitwise_equal_and_memory_is_saved(policy: Any, build: Any, autocast: bool) -> None:
    expected, plain_bytes = train_twice(build(), autocast=autocast)
    model = apply_recompute(build(), policy)
    found, held = train_twice(model, autocast=autocast)
    assert_bitwise(found, expected)
    assert held < 0.75 * plain_bytes


def test_less_is_held_the_more_is_recomputed() -> None:
    held = {
        str(policy): train_twice(apply_recompute(llama(), policy))[1]
        for policy in ("none", {"every": 2}, "selective", "full")
    }
    assert held["full"] < held["selective"] < held["none"]
    assert held["full"] < held["{'every': 2}"] < held["none"]


def test_full_holds_the_input_of_each_block() -> None:
    """Beside the block inputs [B, T, D]: ids, final norm, logits and what the loss keeps; counted on an empty stack."""
    rest = build_model(LlamaConfig(**tiny_llama_config(num_layers=1)), seed=3).train()
    one = train_twice(apply_recompute(rest, "full"))[1]
    four = train_twice(apply_recompute(llama(), "full"))[1]
    assert four - one == 3 * ROWS * LENGTH * 64 * 4


def test_names_and_state_do_not_change() -> None:
    plain, model = llama(), apply_recompute(llama(), "full")
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]


def test_a_copy_of_the_model_computes_with_its_own_weights() -> None:
    model = apply_recompute(llama(), "full")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    expected, _ = train_twice(llama())
    found, _ = train_twice(twin)
    assert_bitwise(found, expected)
    assert all(p.grad is None for p in model.parameters())


def test_removed_it_is_the_plain_model_again() -> None:
    model = apply_recompute(llama(), "full")
    assert isinstance(model, Decoder)
    remove_recompute(list(model.blocks))
    assert "forward" not in model.blocks[0].__dict__
    expected, plain_bytes = train_twice(llama())
    found, held = train_twice(model)
    assert_bitwise(found, expected)
    assert held == plain_bytes


def test_without_gradients_nothing_is_recomputed() -> None:
    model = apply_recompute(llama(), "full")
    calls = []
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    with torch.no_grad():
        expected = llama()(batch()[0])
        assert torch.equal(model(batch()[0]), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("policy", ["none", "full", {"every": 2}, "selective"], ids=str)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_offloaded_activations_come_back_bitwise(policy: Any, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainwright.memory.offload.SMALLEST_BYTES", 1024)
    expected, plain_bytes = train_twice(build())
    offload = ActivationOffload(HostCopies())
    model = apply_recompute(build(), policy, offload=offload)
    found, held = train_twice(model)
    assert_bitwise(found, expected)
    assert offload.sent_bytes > 0
    # Pieces of all blocks but the last come back before they are asked for.
    assert offload.early > offload.late > 0
    if policy in ("none", "full"):
        assert held < 0.6 * plain_bytes


def test_a_module_of_another_house_needs_its_blocks_named() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.2)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    def run(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(2)
        loss = model(torch.ones(5, 8)).square().sum()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    torch.manual_seed(1)
    plain = Stack()
    model = copy.deepcopy(plain)
    with pytest.raises(ConfigError, match="blocks"):
        apply_recompute(model, "full")
    apply_recompute(model, "full", blocks=list(model.layers))
    assert_bitwise(run(model), run(plain))


def test_a_block_called_with_names_only() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, *, hidden: Tensor, scale: Tensor, past_key_values: Any = None) -> Tensor:
            assert past_key_values is None
            return torch.tanh(self.linear(hidden)) * scale

    torch.manual_seed(1)
    plain = Named()
    model = copy.deepcopy(plain)
    apply_recompute(model, "full", blocks=[model])
    for module in (plain, model):
        cache = None if module is plain else object()
        module(hidden=torch.ones(2, 8), scale=torch.full((8,), 2.0), past_key_values=cache).sum().backward()
    assert torch.equal(model.linear.weight.grad, plain.linear.weight.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["auto", "some", {"every": 0}, {"each": 2}, {"every": True}])
def test_unknown_policies_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"memory\.recompute"):
        read_policy(wrong)


def test_a_block_is_treated_once_and_before_it_is_compiled() -> None:
    model = apply_recompute(llama(), "full")
    with pytest.raises(ConfigError, match="already"):
        apply_recompute(model, "full")
    other = llama()
    other.blocks[0].compile()
    with pytest.raises(ConfigError, match=r"before block\.compile"):
        apply_recompute(other, "full")
