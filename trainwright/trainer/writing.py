"""Answers of a model in training or evaluation, for tasks whose predictions are written token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trainwright.engine import Engine
from trainwright.inference.write import write
from trainwright.tasks.task import GeneratingTask
from trainwright.trainer.judge import Writer

__all__ = ["engine_writer"]


def engine_writer(engine: Engine, *, rows: int, beat: Callable[[], None] = lambda: None) -> Writer:
    """A writer with the engine's model, its averaged weights where it keeps them.

    All ranks write the same answers in step, so that parameters which are divided among them come together.

    Args:
        rows: prompts of one batch.
        beat: called before every batch.
    """

    def answers(prompts: list[list[int]], task: GeneratingTask) -> list[list[int]]:
        model = engine.model
        was_training = model.training
        model.eval()
        found: list[list[int]] = []
        try:
            with torch.no_grad(), engine.averaged(), engine.autocast():
                for first in range(0, len(prompts), rows):
                    beat()
                    found += write(
                        model,
                        prompts[first : first + rows],
                        max_new_tokens=task.max_new_tokens,
                        stop_ids=task.stop_ids,
                        batch_rows=rows,
                    )
        finally:
            model.train(was_training)
        return found

    return answers
