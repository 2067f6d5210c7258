"""What a failed command says and exits with: one message, what to do next, and a code that scripts can tell apart."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

from trainwright.base import errors
from trainwright.base.errors import ConfigError, MemoryLimitError, TrainwrightError
from trainwright.base.processes import process_environment

__all__ = ["EXIT_INTERRUPTED", "EXIT_PIPE", "EXIT_UNEXPECTED", "exit_codes", "report"]

EXIT_UNEXPECTED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
EXIT_PIPE = 141  # 128 + SIGPIPE: the reader of our output went away


def exit_codes() -> list[tuple[int, str, str]]:
    """(code, name, meaning) of every way in which a command can end, in the order of the codes."""
    found = [(0, "success", "The command did what it was asked to.")]
    for name in errors.__all__:
        cls = getattr(errors, name)
        if cls is TrainwrightError:
            meaning = "Unexpected: a bug of Trainwright or of what it stands on; the traceback is in a file."
        else:
            meaning = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
        found.append((cls.exit_code, name, meaning))
    found.append((EXIT_INTERRUPTED, "KeyboardInterrupt", "Ctrl-C outside of training: nothing was saved."))
    found.append((EXIT_PIPE, "BrokenPipeError", "The program that read the output has ended."))
    return sorted(found)


def report(error: BaseException, *, debug: bool) -> int:
    """Say on standard error what failed and return the exit code.

    debug: print the traceback too. Without it the traceback of an unexpected failure goes to a file that is named.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_UNEXPECTED
    if isinstance(error, BrokenPipeError):
        _silence_output()
        return EXIT_PIPE
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, TrainwrightError):
        _say(error.message, error.hint)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        _say("interrupted", None)
        return EXIT_INTERRUPTED
    if _is_out_of_memory(error):
        first = str(error).splitlines()[0] if str(error) else "the host has no more to give"
        _say(f"out of memory: {first}", "use a smaller model, train.micro_batch=1 or a shorter data.sequence_length")
        return MemoryLimitError.exit_code
    _say(f"unexpected {type(error).__name__}: {_first_line(error)}", _saved_traceback(error, debug))
    return EXIT_UNEXPECTED


def _say(message: str, hint: str | None) -> None:
    text = f"error: {_speaker()}{message}\n" + (f"  -> {hint}\n" if hint else "")
    # In one piece: the ranks of torchrun or mpirun share a terminal.
    sys.stderr.write(text)
    sys.stderr.flush()


def _speaker() -> str:
    """`rank 1: ` where ranks share a terminal. Below our launcher each has its own file, and the launcher names it."""
    try:
        place = process_environment()
    except ConfigError:
        return ""
    return f"rank {place.rank}: " if place.world > 1 and place.launcher != "trainwright" else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # if torch was never imported, it did not run out of memory
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _saved_traceback(error: BaseException, debug: bool) -> str:
    if debug:
        return "the traceback stands above"
    try:
        descriptor, path = tempfile.mkstemp(prefix="trainwright-error-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"command: {sys.argv}\n\n")
            traceback.print_exception(error, file=file)
    except OSError:
        return "run again with --debug to see the traceback"
    return f"traceback: {path} (or run again with --debug); please report it with the command you ran"


def _silence_output() -> None:
    # Python flushes standard output once more at exit and would complain about the pipe a second time.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
