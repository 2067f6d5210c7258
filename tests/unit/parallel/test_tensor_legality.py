"""Over how many ranks a model can be divided, with every reason why not."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from trainwright.comm.mesh import Axis
from trainwright.models import ModelPlan, SplitLinear, model_plan, preset
from trainwright.parallel.tensor import legal_degrees, tensor_problems
from trainwright.parallel.tensor.parameters import part_of


def plan_of(*linears: SplitLinear) -> ModelPlan:
    return dataclasses.replace(model_plan(preset("llama-5m")), linears=linears)


@pytest.mark.parametrize(
    ("name", "degrees"),
    [("gpt2", [1, 2, 3, 4, 6, 12]), ("gpt2-xl", [1, 5, 25]), ("qwen3-0.6b", [1, 2, 4, 8, 16])],
)
def test_degrees_of_known_models(name: str, degrees: list[int]) -> None:
    assert legal_degrees(model_plan(preset(name)), 32) == degrees


def test_every_reason_is_given() -> None:
    plan = plan_of(SplitLinear("q", "column", 6), SplitLinear("k", "column", 4, serves="q"),
                   SplitLinear("o", "row", 6), SplitLinear("up", "column", 10))  # fmt: skip
    problems = tensor_problems(plan, 4)
    assert problems == [
        "parallel.tensor 4 does not divide the 6 units of q and o",
        "parallel.tensor 4 does not divide the 10 units of up",
        "k has 4 units for the 6 of q",
    ]
    assert tensor_problems(plan, 0) == ["parallel.tensor is 0, expected at least 1"]


def test_shared_heads_need_not_divide() -> None:
    plan = plan_of(SplitLinear("q", "column", 12), SplitLinear("k", "column", 3, serves="q"))
    assert legal_degrees(plan, 12) == [1, 2, 3, 4, 6, 12]
    lost = plan_of(SplitLinear("k", "column", 3, serves="q"))
    assert "of q" in tensor_problems(lost, 3)[0]


@pytest.mark.parametrize("size", [1, 5, 12, 251])
def test_parts_cover_everything_once(size: int) -> None:
    parts = [part_of(size, Axis("tensor", rank, 4)) for rank in range(4)]
    covered = [index for first, count in parts for index in range(first, first + count)]
    assert covered == list(range(size))


def test_axis_of_one_needs_nothing() -> None:
    from trainwright.parallel.tensor import apply_tensor

    module = nn.Linear(2, 2)
    assert apply_tensor(module, Axis.alone("tensor")) is module
