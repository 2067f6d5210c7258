"""Training with dropout does not depend on the layout: micro-batches and ranks against one process, one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainwright.base.seeds import derive_seed
from trainwright.comm import ALONE, start
from trainwright.comm.mesh import Layout, make_mesh
from trainwright.comm.ranks import Ranks
from trainwright.memory import apply_recompute
from trainwright.models import GPT2Config, LlamaConfig, build_model
from trainwright.models.decoder import Decoder
from trainwright.parallel import apply_zero
from trainwright.tasks import CausalLM
from trainwright.testing import run_ranks, tiny_gpt2_config, tiny_llama_config

STEPS, ROWS, LENGTH, RATE = 5, 8, 24, 0.3


def make(family: str) -> Decoder:
    if family == "llama":
        return build_model(LlamaConfig(**tiny_llama_config(attention_dropout=0.3, initializer_range=0.1)), seed=1)
    drops = {"attn_dropout": 0.3, "resid_dropout": 0.3, "embd_dropout": 0.3}
    return build_model(GPT2Config(**tiny_gpt2_config(**drops, initializer_range=0.1)), seed=1)


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    start_at = torch.randint(0, 256, (ROWS, 1), generator=generator)
    ids = (start_at + 3 * torch.arange(LENGTH + 1)) % 256  # counting in threes: something to learn
    place = torch.arange(LENGTH).repeat(ROWS, 1)
    return {
        "input_ids": ids[:, :-1],
        "labels": ids[:, 1:],
        "position_ids": place % 13,
        "document_ids": (place // 13).int(),
    }


def losses(
    family: str, ranks: Ranks, zero: int, micro_batches: int, recompute: str, *, placed: bool = True
) -> list[float]:
    """Mean losses of the steps of plain gradient descent."""
    net = make(family)
    apply_recompute(net, recompute)
    parallel = apply_zero(net, make_mesh(Layout(ranks.world, zero, 1 if zero == 0 else ranks.world), ranks))
    found = []
    for step in range(STEPS):
        torch.manual_seed(derive_seed(step, ranks.rank))
        mine = torch.arange(ROWS).chunk(ranks.world)[ranks.rank].chunk(micro_batches)
        total = torch.zeros((), dtype=torch.float64)
        for index, rows in enumerate(mine):
            if placed:
                net.set_dropout(seed=derive_seed("step", step), rows=rows)
            loss = CausalLM().loss(net, {name: value[rows] for name, value in batch(step).items()}).loss_sum
            last = index == len(mine) - 1
            parallel.begin_backward(last=last)
            loss.backward()
            parallel.end_backward(last=last)
            total += loss.detach()
        tokens = ROWS * LENGTH
        found.append(float(ranks.sum_(total)) / tokens)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(parameter.grad, alpha=RATE / tokens)
                parameter.grad = None
    parallel.close()
    return found


def on_ranks(rank: int, world: int, cases: list[tuple[Any, ...]]) -> list[list[float]]:
    ranks = start()
    return [losses(family, ranks, *case) for family, *case in cases]


def worst(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def test_training_with_dropout_is_that_of_one_process() -> None:
    expected = {family: losses(family, ALONE, 0, 1, "none") for family in ("gpt2", "llama")}
    for family, values in expected.items():
        assert values[-1] < values[0] - 0.05, f"{family} learns, so that wrong gradients would show"
        for micro_batches, recompute in ((2, "none"), (8, "none"), (2, "full"), (2, "selective")):
            assert worst(losses(family, ALONE, 0, micro_batches, recompute), values) < 1e-6
        assert worst(losses(family, ALONE, 0, 1, "none", placed=False), values) > 1e-4, "dropout was on"
    layouts = [(0, 1, "none"), (3, 2, "none"), (3, 1, "full"), (2, 4, "selective")]
    cases = [("gpt2", *layout) for layout in layouts] + [("llama", 3, 2, "full")]
    for case, found in zip(cases, run_ranks(on_ranks, 2, cases, timeout=120)[0], strict=True):
        assert worst(found, expected[case[0]]) < 1e-6, case
