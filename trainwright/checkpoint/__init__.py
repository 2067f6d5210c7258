"""A dict of state to disk and back: atomic, hashed, without pickle, loadable into any layout.

The format is specified in docs/checkpoints.md. Names are imported when they are first used, so that listing and
verifying checkpoints does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainwright.checkpoint.checkpointer import Checkpointer
    from trainwright.checkpoint.discovery import CheckpointInfo, latest, list_checkpoints
    from trainwright.checkpoint.interval import expected_overhead, recommended_interval
    from trainwright.checkpoint.loading import Loaded, load_checkpoint, load_latest
    from trainwright.checkpoint.lock import RunLock
    from trainwright.checkpoint.reader import CheckpointReader
    from trainwright.checkpoint.saving import Saved, save_checkpoint
    from trainwright.checkpoint.tensors import Piece
    from trainwright.checkpoint.verification import Problem, VerifyReport, verify
    from trainwright.checkpoint.writer import Attempt, RankFiles, write_pieces

__all__ = [
    "Attempt",
    "CheckpointInfo",
    "CheckpointReader",
    "Checkpointer",
    "Loaded",
    "Piece",
    "Problem",
    "RankFiles",
    "RunLock",
    "Saved",
    "VerifyReport",
    "expected_overhead",
    "latest",
    "list_checkpoints",
    "load_checkpoint",
    "load_latest",
    "recommended_interval",
    "save_checkpoint",
    "verify",
    "write_pieces",
]

_HOME = {
    "Attempt": "writer",
    "CheckpointInfo": "discovery",
    "CheckpointReader": "reader",
    "Checkpointer": "checkpointer",
    "Loaded": "loading",
    "Piece": "tensors",
    "Problem": "verification",
    "RankFiles": "writer",
    "RunLock": "lock",
    "Saved": "saving",
    "VerifyReport": "verification",
    "expected_overhead": "interval",
    "latest": "discovery",
    "list_checkpoints": "discovery",
    "load_checkpoint": "loading",
    "load_latest": "loading",
    "recommended_interval": "interval",
    "save_checkpoint": "saving",
    "verify": "verification",
    "write_pieces": "writer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
