"""Recomputing beside block compilation: one graph for all blocks, and the numbers of the compiled plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F

from trainwright.base.device import find_compiler
from trainwright.memory import ActivationMeter, ActivationOffload, HostCopies, apply_recompute
from trainwright.models import GPT2Config, build_model
from trainwright.testing import tiny_gpt2_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_compiler() is None, reason="torch.compile on the CPU needs a C++ compiler"),
]


def step(policy: Any, offload: ActivationOffload | None = None, *, autocast: bool = False) -> tuple[list[Tensor], int]:
    torch._dynamo.reset()
    counters.clear()
    config = tiny_gpt2_config(num_layers=3, attn_dropout=0.1, resid_dropout=0.1, embd_dropout=0.1)
    model = build_model(GPT2Config(**config), seed=3).train()
    if policy != "none" or offload is not None:
        apply_recompute(model, policy, offload=offload)
    for block in model.blocks:
        block.compile(dynamic=False)
    ids = torch.randint(0, 256, (2, 65), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(11)
    with ActivationMeter(model) as meter, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
    held = meter.activations
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], held


def test_compiled_blocks_recompute_bitwise() -> None:
    expected, plain_bytes = step("none")
    offload = ActivationOffload(HostCopies())
    cases: list[tuple[Any, ActivationOffload | None]] = [("full", None), ("selective", None), ("none", offload)]
    for policy, away in cases:
        found, held = step(policy, away)
        assert counters["frames"]["ok"] == counters["frames"]["total"] == 1, (policy, counters["frames"])
        assert not counters["graph_break"], (policy, counters["graph_break"])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), policy
        assert held < 0.6 * plain_bytes, policy
    assert offload.sent_bytes > 0


def test_compiled_selective_recomputing_under_autocast_differs_by_rounding_only() -> None:
    expected, _ = step("none", autocast=True)
    found, _ = step("selective", autocast=True)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
