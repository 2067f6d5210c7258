"""TensorBoard events of a run: scalars of steps and evaluations, generated samples as text."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from trainwright.base.errors import MissingDependencyError
from trainwright.base.events import Record

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoardSink"]

# Everything else that a record holds is bookkeeping, not a curve.
STEP_TAGS = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens": "train/tokens",
    "tokens_per_second": "speed/tokens_per_second",
    "inputs_per_second": "speed/inputs_per_second",
    "mfu": "speed/mfu",
    "data_wait": "speed/data_wait",
    "step_seconds": "speed/step_seconds",
    "memory_bytes": "memory/bytes",
    "peak_memory_bytes": "memory/peak_bytes",
}
CHECKPOINT_TAGS = {
    "seconds": "checkpoint/seconds",
    "stall_seconds": "checkpoint/stall_seconds",
    "bytes": "checkpoint/bytes",
}
BOOKKEEPING = frozenset({"kind", "time", "step", "tokens"})


class TensorBoardSink:
    """Writes event files into `folder`.

    Args:
        resume_step: TensorBoard hides what an earlier part of the run wrote for later steps; None hides nothing.

    Raises MissingDependencyError when tensorboard is not installed.
    """

    name = "tensorboard"

    def __init__(self, folder: Path | str, *, resume_step: int | None = None, flush_seconds: int = 10) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingDependencyError(
                "monitor.tensorboard is on, but tensorboard is not installed",
                hint="pip install 'trainwright[tensorboard]', or set monitor.tensorboard=false",
            )
        self.folder = Path(folder)
        self._resume_step = resume_step
        self._flush_seconds = flush_seconds
        self._writer: SummaryWriter | None = None

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if self._resume_step is None else self._resume_step + 1
        self._writer = SummaryWriter(str(self.folder), purge_step=purge, flush_secs=self._flush_seconds)

    def write(self, record: Record) -> None:
        step = record.get("step")
        if not isinstance(step, int):
            return
        match record["kind"]:
            case "step":
                self._scalars(record, STEP_TAGS, step)
            case "checkpoint.saved":
                self._scalars(record, CHECKPOINT_TAGS, step)
            case "eval":
                self._scalars(record, {key: f"eval/{key}" for key in record if key not in BOOKKEEPING}, step)
                baselines = record.get("baselines") or {}
                self._scalars(baselines, {key: f"eval/baseline_{key}" for key in baselines}, step)
                self._metrics(record, "eval", step)
            case "report":
                self._metrics(record, f"final_{record.get('split')}", step)
            case "sample":
                assert self._writer is not None, "written before open"
                self._writer.add_text("sample", str(record.get("text", "")), step)

    def tick(self) -> None:
        """The writer flushes by itself, on its own thread."""

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _metrics(self, record: Record, folder: str, step: int) -> None:
        """The task's own metrics."""
        metrics = record.get("metrics") or {}
        self._scalars(metrics, {key: f"{folder}/{key}" for key in metrics}, step)

    def _scalars(self, record: Record, tags: dict[str, str], step: int) -> None:
        assert self._writer is not None, "written before open"
        for key, tag in tags.items():
            value = record.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(tag, value, step)
