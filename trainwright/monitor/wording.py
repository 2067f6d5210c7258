"""Records as lines that people read. Pure: the same record and clock give the same text, in any terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainwright.base.events import Record
from trainwright.base.text import display_width, human_bytes, human_count, human_duration

__all__ = ["LossAverage", "ago", "describe", "fit", "step_parts"]

SEPARATOR = " | "


class LossAverage:
    """Running average of the shown losses, corrected for its start as Adam's is; non-finite losses are left out."""

    def __init__(self, decay: float = 0.9) -> None:
        self._decay = decay
        self._sum = 0.0
        self._weight = 0.0

    def add(self, loss: float) -> float | None:
        """The average with `loss` taken in; None before the first finite loss."""
        if math.isfinite(loss):
            self._sum = self._decay * self._sum + (1 - self._decay) * loss
            self._weight = self._decay * self._weight + (1 - self._decay)
        return self._sum / self._weight if self._weight else None


def step_parts(
    record: Record, *, average: float | None, memory_total: float | None, saved_ago: float | None
) -> list[str]:
    """The parts of a progress line, most important first.

    Args:
        average: running average of the loss.
        memory_total: bytes that the device has.
        saved_ago: seconds since the last checkpoint.
    """
    step, total = record.get("step", 0), record.get("total_steps")
    parts = [f"step {step}/{total} {100 * step / total:.1f}%" if total else f"step {step}"]
    parts.append(_loss(record, average))
    rate = _number(record, "inputs_per_second") or _number(record, "tokens_per_second")
    if rate is not None:
        parts.append(f"{human_count(rate)} tok/s")
    eta = _number(record, "eta_seconds")
    if (mfu := _number(record, "mfu")) is not None:
        parts.append(f"{100 * mfu:.1f}% MFU")
    if (used := _number(record, "memory_bytes")) is not None:
        parts.append(f"mem {_memory(used, memory_total)}")
    if (wait := _number(record, "data_wait")) is not None:
        parts.append(f"data wait {100 * wait:.1f}%")
    if saved_ago is not None:
        parts.append(f"ckpt {ago(saved_ago)}")
    if eta is not None and step != total:
        parts.append(f"ETA {human_duration(max(1, round(eta)))}")
    return parts


def fit(parts: Sequence[str], width: int | None) -> str:
    """The parts joined; where `width` terminal cells do not hold all, the least telling ones go first.

    The first two (step, loss) and the last (time left) stay longest.
    """
    kept = list(parts)
    while width is not None and len(kept) > 1 and display_width(SEPARATOR.join(kept)) > width:
        kept.pop(-2 if len(kept) > 3 else -1)
    return SEPARATOR.join(kept)


def describe(record: Record) -> list[str]:
    """Lines for every record but those of steps; none for a kind that has nothing to say on a terminal."""
    match record["kind"]:
        case "eval":
            return [_evaluation(record)]
        case "report":
            return [_report(record)]
        case "checkpoint.saved":
            return [_saved(record)]
        case "checkpoint.failed":
            return [f"checkpoint of step {record.get('step')} FAILED: {record.get('reason', 'no reason given')}"]
        case "sample":
            return [f"sample at step {record.get('step')}:", *(f"  {line}" for line in _sample(record).splitlines())]
        case "notice":
            return [str(record.get("message", ""))]
        case "resume":
            return [f"resumed from {record.get('path')}: step {record.get('step')} of {record.get('total_steps')}"]
        case "warning":
            lines = [f"warning: {record.get('message', '')}"]
            return [*lines, f"  -> {record['hint']}"] if record.get("hint") else lines
        case "run.start" | "plan" | "run.end" if isinstance(record.get("text"), str):
            return str(record["text"]).splitlines()
        case "run.start":
            return [_start(record)]
        case "run.end":
            return [_end(record)]
        case _:
            return []


def ago(seconds: float) -> str:
    """ "8 min ago": whole minutes are enough for a checkpoint."""
    if seconds < 60:
        return f"{seconds:.0f} s ago"
    return f"{seconds // 60:.0f} min ago" if seconds < 5400 else f"{seconds / 3600:.1f} h ago"


def _loss(record: Record, average: float | None) -> str:
    loss = _number(record, "loss")
    text = "loss ?" if loss is None else f"loss {loss:.3f}"
    if average is not None and loss is not None:
        text += f" (ema {average:.3f})"
    return text + (" SKIPPED" if record.get("skipped") else "")


def _memory(used: float, total: float | None) -> str:
    if not total:
        return human_bytes(used, digits=2)
    return f"{used / 2**30:.1f}/{total / 2**30:.0f} GiB"


SHOWN_METRICS = 6
"""Metrics on a line of the terminal; the files have all of them."""


def _evaluation(record: Record) -> str:
    metrics = _metrics(record)
    parts = [f"eval at step {record.get('step')}", *metrics[:1]]
    parts.append(f"validation loss {_shown(record.get('loss'), '.4f')}")
    if record.get("perplexity") is not None and not metrics:
        parts.append(f"perplexity {_shown(record['perplexity'], '.4g')}")
    parts += metrics[1:]
    baselines = record.get("baselines") or {}
    if baselines:
        parts.append(", ".join(f"{name} baseline {_shown(loss, '.4f')}" for name, loss in baselines.items()))
    return SEPARATOR.join(parts)


def _report(record: Record) -> str:
    metrics = _metrics(record)
    parts = [f"{record.get('split')} at the end", *metrics[:1], f"loss {_shown(record.get('loss'), '.4f')}"]
    return SEPARATOR.join([*parts, *metrics[1:]])


def _metrics(record: Record) -> list[str]:
    """The task's metrics as text: the one that models are compared by (`metric`) first, then the others, not all."""
    values = record.get("metrics")
    if not isinstance(values, Mapping):
        return []
    first = [name for name in values if name == record.get("metric")]
    names = first + [name for name in values if name not in first and name != "loss"]
    more = [f"+{len(names) - SHOWN_METRICS} more"] if len(names) > SHOWN_METRICS else []
    return [f"{name} {_metric(values[name])}" for name in names[:SHOWN_METRICS]] + more


def _metric(value: Any) -> str:
    """Four digits behind the point for fractions, two for scores up to 100."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return _shown(value, ".4f" if number and abs(value) < 10 else ".2f")


def _saved(record: Record) -> str:
    text = f"checkpoint saved: {record.get('path', '?')}"
    details = []
    if (size := _number(record, "bytes")) is not None:
        details.append(human_bytes(size))
    if (seconds := _number(record, "seconds")) is not None:
        details.append(f"written in {human_duration(seconds)}")
    if (stall := _number(record, "stall_seconds")) is not None:
        details.append(f"training waited {human_duration(stall)}")
    return f"{text} ({', '.join(details)})" if details else text


def _start(record: Record) -> str:
    name = record.get("name") or record.get("path") or record.get("folder") or ""
    resumed = f", resumed at step {record['step']}" if record.get("step") else ""
    return f"run {name} started{resumed}".replace("  ", " ")


def _end(record: Record) -> str:
    parts = [f"run ended: {record.get('status') or record.get('reason') or 'done'}"]
    if record.get("step") is not None:
        parts.append(f"step {record['step']}")
    if (seconds := _number(record, "seconds")) is not None:
        parts.append(human_duration(seconds))
    return SEPARATOR.join(parts)


def _sample(record: Record) -> str:
    return str(record.get("prompt") or "") + str(record.get("text") or "")


def _number(record: Record, key: str) -> float | None:
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _shown(value: Any, form: str) -> str:
    return format(float(value), form) if isinstance(value, (int, float)) else str(value)
