"""Every ZeRO stage computes the training of one process: losses of 20 clipped steps, for four kinds of modules."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainwright.comm import start
from trainwright.comm.ranks import Ranks
from trainwright.engine.initialize import initialize
from trainwright.models import build_model, preset
from trainwright.testing import run_ranks

STEPS = 20
ROWS, LENGTH, VOCABULARY = 16, 12, 67

STAGES = [
    {"zero": 0},
    {"zero": 1},
    {"zero": 2},
    {"zero": 2, "accumulate": "sharded"},
    {"zero": 3},
    {"zero": 3, "accumulate": "sharded"},
    {"zero": 3, "gather": "step"},
]
HYBRID = [{"zero": 1, "shard": 2}, {"zero": 3, "shard": 2, "accumulate": "sharded"}]


class HandWritten(nn.Module):
    """Tied, frozen, scalar and unused parameters, odd shapes, and blocks that are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 15)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(15, 7), nn.Tanh(), nn.Linear(7, 15)) for _ in range(3))
        self.frozen = nn.Linear(15, 15).requires_grad_(False)
        self.unused = nn.Linear(3, 5)
        self.head = nn.Linear(15, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for _ in range(2):
            for layer in self.layers:
                hidden = hidden + layer(hidden)
        return self.head(self.frozen(hidden) * self.scale)


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 24, "num_layers": 3, "num_heads": 3, "num_kv_heads": 3, "head_dim": 8}
        return build_model(preset("llama-15m", vocab_size=VOCABULARY, intermediate_size=50, **sizes), seed=1)
    if kind == "gpt2":
        sizes = {"hidden_size": 20, "num_layers": 2, "num_heads": 2, "intermediate_size": 44}
        base = preset("gpt2", vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes)
        still = {field.name: 0.0 for field in dataclasses.fields(base) if field.name.endswith("dropout")}
        return build_model(dataclasses.replace(base, **still), seed=1)
    if kind == "transformers":
        from transformers import Qwen2Config, Qwen2ForCausalLM

        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "max_position_embeddings": 32}
        heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
        return Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, tie_word_embeddings=True, **sizes, **heads))
    return HandWritten()


def config(precision: str, parallel: dict[str, Any], accumulation: int, **more: Any) -> dict[str, Any]:
    return {
        "batch": {"global": ROWS, "accumulation": accumulation},
        "optim": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1, "clip_norm": 0.5},
        "precision": precision,
        "parallel": parallel,
        **more,
    }


def losses(model: nn.Module, ranks: Ranks, settings: dict[str, Any], steps: int = STEPS) -> list[float]:
    engine = initialize(model=model, config=settings, ranks=ranks).engine
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(steps):
        first = torch.randint(0, VOCABULARY, (ROWS, 1), generator=generator)
        tokens = (first + 3 * torch.arange(LENGTH)) % VOCABULARY  # counting in threes: something to learn
        share = tokens.chunk(ranks.world)[ranks.rank]
        for rows in share.chunk(engine.accumulation):
            output = engine(rows[:, :-1])
            logits = output if isinstance(output, Tensor) else output.logits
            engine.backward(F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten()))
            report = engine.step()
        assert report is not None
        found.append(float(report.loss))
    engine.destroy()
    return found


def all_losses(rank: int, world: int, cases: list[tuple[str, str, dict[str, Any], int]]) -> list[list[float]]:
    ranks = start()
    return [losses(make(kind), ranks, config(precision, stage, k)) for kind, precision, stage, k in cases]


def worst(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


KINDS = ("llama", "gpt2", "transformers", "hand-written")


def compare(cases: list[tuple[str, str, dict[str, Any], int]], world: int) -> None:
    """Losses of these cases on `world` ranks against those of one process, to 1e-6 of their value."""
    alone = start()
    expected = {
        (kind, k): losses(make(kind), alone, config("fp32", {"zero": 0}, k))
        for kind, k in {(kind, k) for kind, _, _, k in cases}
    }
    for (kind, _), found in expected.items():
        assert found[-1] < found[0] - 0.3, f"{kind} learns, so that wrong gradients would show"
    for case, found in zip(cases, run_ranks(all_losses, world, cases, timeout=400)[0], strict=True):
        # Adam divides by the root of squared gradients, so rounding grows over the steps; measured 4e-7 at most.
        assert worst(found, expected[case[0], case[3]]) < 1e-6, case


def test_stages_compute_the_training_of_one_process() -> None:
    pytest.importorskip("transformers")
    stages = [{"zero": 0}, {"zero": 1}, {"zero": 2, "accumulate": "sharded"}, {"zero": 3}]
    compare([(kind, "fp32", stage, 2) for kind in KINDS for stage in stages], world=2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_matrix_of_stages(kind: str, world: int) -> None:
    if kind == "transformers":
        pytest.importorskip("transformers")
    stages = STAGES + (HYBRID if world == 4 else [])
    compare([(kind, "fp32", stage, k) for stage in stages for k in (1, 4)], world)


def test_bf16_stays_near_fp32_at_every_stage() -> None:
    expected = losses(make("llama"), start(), config("fp32", {"zero": 0}, 1))
    cases = [("llama", "bf16", stage, k) for stage in ({"zero": 0}, {"zero": 1}, {"zero": 3}) for k in (1, 4)]
    for case, found in zip(cases, run_ranks(all_losses, 2, cases, timeout=240)[0], strict=True):
        assert worst(found, expected) < 2e-3, case
        assert worst(found, expected) > 0, "products were really made in bf16"
