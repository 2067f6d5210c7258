"""Operator times of one rank, as a text table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["profiled"]


@contextlib.contextmanager
def profiled(path: str | None) -> Iterator[None]:
    """Write the operators that ran inside, those with the most time of their own first, to `path`; None does nothing.

    Also when what is inside raises: that is how a side's endless loop ends.
    """
    if path is None:
        yield
        return
    import torch

    profile = torch.profiler.profile()
    profile.start()
    try:
        yield
    finally:
        profile.stop()
        Path(path).write_text(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40))
