"""Heads of tasks and the bert family under every layout compute what one process computes, dropout included.

fp32, clipped, AdamW with eps 1e-3, three steps and an evaluation; relative differences by norm.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_runs import MODELS, train

from trainwright.base.errors import ConfigError
from trainwright.comm import start
from trainwright.comm.mesh import Axis, Layout, PipelineLayout
from trainwright.models import attach_head, build_model
from trainwright.parallel.context import apply_context, context_problems
from trainwright.testing import run_ranks

TOLERANCE = 1e-6

ALONE = Layout(1, 0, 1)
LAYOUTS = {
    "data 2": Layout(2, 0, 1),
    "zero-1": Layout(2, 1, 2),
    "zero-2": Layout(2, 2, 2, accumulate="sharded"),
    "zero-3": Layout(2, 3, 2, gather="micro_batch"),
    "tensor 2": Layout(2, 0, 1, tensor=2),
    "pipeline 2": Layout(2, 0, 1, pipeline=PipelineLayout(2)),
}


def differences(run: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Largest relative differences; tied parameters have one name on one process and two over a pipeline."""

    def apart(kind: str, smallest: float) -> float:
        found = []
        for name, ours in run[kind].items():
            theirs = reference[kind].get(name)
            if theirs is None:
                assert name.startswith("lm_head"), name
                theirs = next(value for key, value in reference[kind].items() if "word_embeddings" in key)
            found.append(float((ours - theirs).norm() / theirs.norm().clamp(min=smallest)))
        return max(found, default=0.0)

    def numbers(kind: str) -> float:
        return max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(run[kind], reference[kind], strict=True))

    # Gradients that are zero but for rounding (biases before a softmax) are compared to the whole gradient.
    total = float(torch.stack([value.norm() for value in reference["gradients"].values()]).norm())
    return {
        "loss": numbers("losses"),
        "norm": numbers("norms"),
        "gradient": apart("gradients", 0.1 * total),
        "parameter": apart("parameters", 0.03),
    }


def _worker(rank: int, world: int, models: list[str], layouts: list[str]) -> dict[str, dict[str, float]]:
    ranks = start()
    found = {}
    for name in models:
        reference = train(name, ALONE)
        for layout in layouts:
            found[f"{name}, {layout}"] = differences(train(name, LAYOUTS[layout], ranks), reference)
    return found


def _check(models: list[str], layouts: list[str]) -> None:
    for told in run_ranks(_worker, 2, models, layouts, timeout=400):
        assert len(told) == len(models) * len(layouts)
        wrong = {key: value for key, value in told.items() if max(value.values()) > TOLERANCE}
        assert not wrong, wrong


def test_a_few_of_all() -> None:
    _check(["bert-lm", "bert-token-crf", "llama-entities"], ["zero-3", "tensor 2", "pipeline 2"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_two_ranks_compute_what_one_computes(layout: str) -> None:
    _check(list(MODELS), [layout])


@pytest.mark.parametrize(("name", "reason"), [("bert-lm", "both directions"), ("llama-sequence", "task's head")])
def test_rows_are_not_cut_under_heads_and_encoders(name: str, reason: str) -> None:
    make_config, spec = MODELS[name]
    model = build_model(make_config())
    if spec is not None:
        attach_head(model, spec)
    with pytest.raises(ConfigError, match=reason):
        apply_context(model, Axis("context", 0, 2))
    assert any(reason in problem for problem in context_problems(model.config, 16, 2))
    assert not context_problems(model.config, 16, 1)


@pytest.mark.parametrize("name", ["bert-sequence", "bert-lm"])
def test_recomputing_changes_nothing(name: str) -> None:
    plain = train(name, ALONE)
    for how in ("full", "selective"):
        again = train(name, ALONE, memory={"recompute": how})
        assert again["losses"] == plain["losses"], how
        assert all(torch.equal(value, plain["gradients"][key]) for key, value in again["gradients"].items())


@pytest.mark.slow
def test_compiled_blocks_compute_the_same() -> None:
    reference = train("bert-sequence", ALONE)
    found = differences(train("bert-sequence", ALONE, compiled=True), reference)
    assert max(found.values()) < 1e-5, found
    assert found["parameter"] > 0  # it was compiled
