"""What every benchmark against a trainer of transformers gives it. Needs no trainwright."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alternate import STEPS_FOR_EVER

__all__ = ["arguments", "calling"]


def arguments(**own: Any) -> dict[str, Any]:
    """Arguments of `TrainingArguments` and of what is built on it: bf16 autocast, fused AdamW at a constant rate, and
    no logging or saving, which ours does not do either while it is timed. `own` are those of one benchmark."""
    import torch

    return {
        "max_steps": STEPS_FOR_EVER,
        "bf16": True,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        **own,
    }


def calling(step_done: Callable[[], None]) -> Any:
    """A callback of transformers that calls `step_done` after every optimizer step."""
    import transformers

    class Tick(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            step_done()

    return Tick()
