"""The trainer: settle, build, the loop, callbacks, evaluation, resume, the run folder."""

from trainwright.trainer.callbacks import Callback, EarlyStopping
from trainwright.trainer.export import export_run
from trainwright.trainer.repeats import Repeats, repeat
from trainwright.trainer.settle import Settled, settle
from trainwright.trainer.trainer import RunResult, Trainer

__all__ = [
    "Callback",
    "EarlyStopping",
    "Repeats",
    "RunResult",
    "Settled",
    "Trainer",
    "export_run",
    "repeat",
    "settle",
]
