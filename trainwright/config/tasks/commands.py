"""What people do with a finished run: the commands that its task is used by."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

__all__ = ["use_commands"]


def use_commands(task: str, run: Path, splits: Sequence[str] = ("validation",)) -> list[str]:
    """Shell commands for the run folder of a task (a word of TASK_NAMES).

    Args:
        splits: of its data; `eval` is shown on the test rows where there are any, else on those of validation.
    """
    folder = shlex.quote(str(run))
    if task == "causal_lm":
        return [f"trainwright generate {folder} --prompt 'def '"]
    if task == "masked_lm":
        return [f"trainwright train YOUR_TASK.yaml model.path={shlex.quote(str(run / 'model'))}"]
    used = f"trainwright chat {folder}" if task == "sft" else f"trainwright predict {folder} YOUR_FILE"
    judged = next((split for split in ("test", "validation") if split in splits), None)
    return [used, *([f"trainwright eval {folder} --split {judged}"] if judged is not None else [])]
