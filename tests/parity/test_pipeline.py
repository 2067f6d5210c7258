"""Every schedule computes the training of one process: losses, gradients and steps, alone and with ZeRO in parts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainwright.comm import start
from trainwright.comm.layout import SCHEDULES, Layout, PipelineLayout
from trainwright.comm.mesh import Mesh, make_mesh
from trainwright.models import GPT2Config, LlamaConfig, build_model
from trainwright.parallel import ZeroOptions, apply_zero
from trainwright.parallel.pipeline import (
    PipelineRunner,
    alias_parameters,
    order_of_work,
    split_model,
)
from trainwright.parallel.tensor import apply_tensor
from trainwright.tasks import CausalLM
from trainwright.testing import run_ranks, tiny_gpt2_config, tiny_llama_config

ROWS, LENGTH, VOCABULARY, STEPS = 16, 12, 97, 20
VIRTUAL = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "interleaved_zb": 2, "zbv": 2, "dualpipev": 2}
TASK = CausalLM(z_loss=1e-4)


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to train: a model, a schedule, and what divides the parts (`zero`: arguments of the layout)."""

    kind: str
    schedule: str
    zero: dict[str, Any] = dataclasses.field(default_factory=lambda: {"zero": 0, "shard": 1})
    micro_batches: int = 8
    divide: bool | None = None
    steps: int = STEPS
    layers: int = 8


def build(kind: str, layers: int = 8) -> nn.Module:
    if kind == "llama":
        return build_model(
            LlamaConfig(**tiny_llama_config(num_layers=layers, hidden_size=32, vocab_size=VOCABULARY)), seed=1
        )
    if kind == "gpt2":
        sizes = tiny_gpt2_config(num_layers=layers, hidden_size=32, intermediate_size=64, vocab_size=VOCABULARY)
        still = {"attn_dropout": 0.0, "resid_dropout": 0.0, "embd_dropout": 0.0}
        model = build_model(GPT2Config(**sizes, **still), seed=1)
        assert model.lm_head.weight is model.embedding.weight, "a tied model is what this kind is for"
        return model
    raise AssertionError(kind)


def rows_of(step: int) -> dict[str, Tensor]:
    """Counting in threes, two documents in every row, some tokens that do not count."""
    generator = torch.Generator().manual_seed(100 + step)
    first = torch.randint(0, VOCABULARY, (ROWS, 1), generator=generator)
    tokens = (first + 3 * torch.arange(LENGTH + 1)) % VOCABULARY
    border = torch.randint(2, LENGTH - 2, (ROWS, 1), generator=generator)
    place = torch.arange(LENGTH)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    return {
        "input_ids": tokens[:, :-1],
        "labels": labels,
        "document_ids": (place >= border).long(),
        "position_ids": torch.where(place >= border, place - border, place),
    }


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1, foreach=False)


def divide_gradients(model: nn.Module, count: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= count


def alone(kind: str, steps: int, layers: int = 8) -> tuple[list[float], dict[str, Tensor], float]:
    """Losses of one process, the gradients of its first step, and the loss after the last one."""
    model = build(kind, layers)
    optimizer = optimizer_of(model)
    losses, gradients = [], {}
    for step in range(steps):
        output = TASK.loss(model, rows_of(step))
        output.loss_sum.backward()
        count = float(output.count)
        losses.append(float(output.loss_sum.detach()) / count)
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        divide_gradients(model, count)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        last = TASK.evaluate(model, rows_of(0))
    return losses, gradients, float(last.loss_sum) / float(last.count)


def over_pipeline(case: Case, mesh: Mesh, layout: PipelineLayout) -> dict[str, Any]:
    model = split_model(build(case.kind, case.layers), mesh.pipeline, layout)
    apply_tensor(model, mesh.tensor)
    data = apply_zero(model, mesh, ZeroOptions())
    runner = PipelineRunner(
        model,
        mesh.pipeline,
        device=torch.device("cpu"),
        layout=mesh.layout,
        sequence_parts=mesh.tensor.size,
        divide_backward=case.divide,
    )
    optimizer = optimizer_of(model)
    place, places = mesh.rows
    losses: list[float] = []
    worst = 0.0
    expected, gradients, evaluated = alone(case.kind, case.steps, case.layers)
    aliases = alias_parameters(model)
    for step in range(case.steps):
        own = {name: value.chunk(places)[place] for name, value in rows_of(step).items()}
        sums = runner.forward_backward(
            TASK.loss,
            own,
            micro_batches=case.micro_batches,
            begin_backward=data.begin_backward,
            end_backward=data.end_backward,
        )
        total = mesh.ranks.sum_(torch.stack([part.double() for part in sums])) / mesh.tensor.size
        losses.append(float(total[0] / total[1]))
        if step == 0:
            done = [(a.kind, a.part, a.micro_batch) for a in runner.actions if a.kind != "R"]
            for name, parameter in model.named_parameters():
                grad = parameter.grad
                assert grad is not None, name
                whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                known = gradients[aliases.get(name, name)]
                worst = max(worst, float((whole - known).abs().max() / known.abs().max()))
        divide_gradients(model, float(total[1]))
        optimizer.step()
        optimizer.zero_grad()
        data.drop_gathered()
    ended = mesh.ranks.sum_(torch.stack([part.double() for part in runner.evaluate(TASK.evaluate, rows_of(0))]))
    # Not data.close(): DTensor keeps meshes in caches of its own, and the next case's equal mesh would get dead groups.
    return {
        "gradients": worst,
        "losses": max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)),
        "learned": losses[0] - losses[-1],
        "evaluated": abs(float(ended[0] / ended[1]) - evaluated) / evaluated,
        "done": done,
    }


def compare(rank: int, world: int, cases: list[Case], stages: int) -> list[dict[str, Any]]:
    ranks = start()
    found = []
    for case in cases:
        layout = PipelineLayout(stages, case.schedule, VIRTUAL[case.schedule])
        mesh = make_mesh(Layout(world, pipeline=layout, **case.zero), ranks)
        found.append(over_pipeline(case, mesh, layout))
        dist.barrier()
    return found


def check(cases: list[Case], world: int, stages: int, timeout: float = 300) -> None:
    for rank, results in enumerate(run_ranks(compare, world, cases, stages, timeout=timeout)):
        for case, result in zip(cases, results, strict=True):
            assert result["gradients"] < 1e-5, (rank, case)
            assert result["losses"] < 1e-5, (rank, case)
            assert result["evaluated"] < 1e-5, (rank, case)
            assert case.steps < 20 or result["learned"] > 0.3, "it learns, so that wrong gradients would show"
            divided = case.divide is not False and not {"accumulate", "gather"} & set(case.zero)
            order = order_of_work(case.schedule, stages, VIRTUAL[case.schedule], case.micro_batches)
            assert result["done"] == as_run(order[rank * stages // world], divided), (rank, case)


def as_run(order: list[tuple[str, int, int]], divided: bool) -> list[tuple[str, int, int]]:
    """What an order comes to: the first part's backward pass is whole at its W, an undivided one whole at its I."""
    if divided:
        kept = [action for action in order if not (action[0] == "I" and action[1] == 0)]
        return [
            ("B", part, number) if (kind, part) == ("W", 0) else (kind, part, number) for kind, part, number in kept
        ]
    return [("B" if kind == "I" else kind, part, number) for kind, part, number in order if kind != "W"]


def test_two_ranks_train_as_one_with_every_schedule() -> None:
    kinds = {"gpipe": "llama", "1f1b": "gpt2", "interleaved": "llama", "interleaved_zb": "gpt2", "zbv": "gpt2"}
    check(
        [Case(kinds.get(schedule, "llama"), schedule, micro_batches=4, steps=2, layers=4) for schedule in SCHEDULES],
        world=2,
        stages=2,
    )


@pytest.mark.slow
def test_two_ranks_train_as_one_for_longer() -> None:
    cases = [Case(kind, schedule) for kind in ("llama", "gpt2") for schedule in SCHEDULES]
    cases += [Case("gpt2", "zbv", divide=False), Case("llama", "interleaved_zb", divide=False)]
    cases += [Case("llama", "1f1b", micro_batches=16), Case("gpt2", "gpipe", micro_batches=1)]
    check(cases, world=2, stages=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_four_ranks_train_as_one_with_every_schedule(kind: str) -> None:
    check([Case(kind, schedule) for schedule in SCHEDULES], world=4, stages=4)


ZERO = [
    {"zero": 0, "shard": 1},
    {"zero": 1, "shard": 2},
    {"zero": 2, "shard": 2},
    {"zero": 2, "shard": 2, "accumulate": "sharded"},
    {"zero": 3, "shard": 2},
    {"zero": 3, "shard": 2, "gather": "micro_batch"},
    {"zero": 3, "shard": 2, "gather": "micro_batch", "accumulate": "sharded"},
]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_two_stages_of_two_data_parallel_ranks_train_as_one(schedule: str) -> None:
    check([Case("gpt2", schedule, zero, micro_batches=4, steps=6) for zero in ZERO], world=4, stages=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_two_stages_of_two_tensor_parallel_ranks_train_as_one(kind: str) -> None:
    halves = {"zero": 0, "shard": 1, "tensor": 2}
    schedules = ("1f1b", "interleaved", "interleaved_zb", "zbv", "dualpipev")
    check([Case(kind, schedule, halves, micro_batches=4, steps=6) for schedule in schedules], world=4, stages=2)
