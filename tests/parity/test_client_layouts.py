"""A client's own optimizer over the stages of a pipeline: its training, and its checkpoints in other layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainwright.comm import ALONE, Ranks
from trainwright.engine.initialize import initialize
from trainwright.models import GPT2Config, build_model
from trainwright.tasks import CausalLM
from trainwright.testing import run_ranks, tiny_gpt2_config

ROWS, TOKENS, STEPS = 8, 16, 3
NO_DROPOUT = {"resid_dropout": 0.0, "attn_dropout": 0.0, "embd_dropout": 0.0}


def make(parallel: dict[str, Any], ranks: Ranks, *, called: bool) -> Any:
    """An engine with torch's AdamW over two groups; the model's head is tied to its embedding."""
    model = build_model(GPT2Config(**tiny_gpt2_config(vocab_size=64, num_layers=4, **NO_DROPOUT)), seed=2)

    def adamw(parameters: Any) -> torch.optim.Optimizer:
        known = list(parameters)
        groups = [
            {"params": [p for p in known if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in known if p.ndim == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)

    config = {"batch": {"global": ROWS, "accumulation": 4}, "precision": "fp32", "parallel": parallel, "seed": 1}
    optimizer = adamw if called else adamw(model.parameters())
    return initialize(model=model, config=config, optimizer=optimizer, ranks=ranks).engine


def train(engine: Any, steps: range) -> list[float]:
    seen = []
    for step in steps:
        ids = torch.randint(64, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        engine.forward_backward(CausalLM().loss, {"input_ids": ids, "labels": labels}, micro_rows=engine.batch.micro)
        report = engine.step()
        seen.append(float(report.loss))
    return seen


def over_a_pipeline(rank: int, world: int, folder: str) -> list[list[float]]:
    from trainwright.comm import start

    ranks = start(device="cpu")
    found = []
    for called in (False, True):
        engine = make({"pipeline": 2}, ranks, called=called)
        found.append(train(engine, range(STEPS)))
        engine.save_checkpoint(Path(folder) / str(called))
        engine.destroy()
    engine = make({"pipeline": 2}, ranks, called=False)
    assert engine.load_checkpoint(Path(folder) / "alone")[0] is not None
    found.append(train(engine, range(STEPS, 2 * STEPS)))
    engine.destroy()
    return found


def test_the_training_is_that_of_one_process_and_goes_on_in_either(tmp_path: Path) -> None:
    engine = make({"zero": 0}, ALONE, called=False)
    first = train(engine, range(STEPS))
    engine.save_checkpoint(tmp_path / "alone")
    second = train(engine, range(STEPS, 2 * STEPS))
    for objects, callables, resumed in run_ranks(over_a_pipeline, 2, str(tmp_path), timeout=150):
        assert objects == pytest.approx(first, rel=1e-5)
        assert callables == pytest.approx(first, rel=1e-5)
        assert resumed == pytest.approx(second, rel=1e-5)
    for saved in ("False", "True"):
        again = make({"zero": 0}, ALONE, called=True)
        assert again.load_checkpoint(tmp_path / saved)[0] is not None
        assert train(again, range(STEPS, 2 * STEPS)) == pytest.approx(second, rel=1e-5)
