"""The errors that users meet: one small tree, each with the exit code of the command line.

A message says what was seen, what was expected and what to do. `hint` is the last part, kept apart so that the
command line can print it on a line of its own.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "HangError",
    "Interrupted",
    "MemoryLimitError",
    "MissingDependencyError",
    "ModelError",
    "RunInUseError",
    "TrainwrightError",
]


class TrainwrightError(Exception):
    """Base of every error that is the user's to mend. Anything else that escapes is a bug of ours.

    Args:
        message: what was seen and what was expected.
        hint: what to do next; shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.hint}" if self.hint else self.message


class ConfigError(TrainwrightError):
    """The recipe or the command line cannot be what was meant."""

    exit_code = 2


class DataError(TrainwrightError):
    """Input text, a tokenizer or a built dataset is missing, malformed or changed."""

    exit_code = 3


class ModelError(TrainwrightError):
    """A model folder or model configuration is unsupported, incomplete or does not fit its tokenizer."""

    exit_code = 4


class CheckpointError(TrainwrightError):
    """A checkpoint is damaged, incomplete or belongs to another run."""

    exit_code = 5


class MemoryLimitError(TrainwrightError):
    """The device or the host ran out of memory, or would."""

    exit_code = 6


class DivergedError(TrainwrightError):
    """The loss became NaN, infinite or spiked, and the policy says stop."""

    exit_code = 7


class RunInUseError(TrainwrightError):
    """Another process holds the run folder."""

    exit_code = 8


class MissingDependencyError(TrainwrightError):
    """An optional package is needed; the message names the extra that installs it."""

    exit_code = 9


class HangError(TrainwrightError):
    """A rank made no progress for comm.hang_after; the message names it and what the others wait in."""

    exit_code = 10


class Interrupted(TrainwrightError):
    """SIGTERM or Ctrl-C arrived; the state is saved and the run can be resumed (75 = EX_TEMPFAIL, "try again")."""

    exit_code = 75
