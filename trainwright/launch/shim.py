"""Becomes the rank: a small script that ties the process to its launcher and then replaces itself by the command.

    python -I -S shim.py LAUNCHER_PID CORES COMMAND [ARGUMENT]...

CORES is a comma separated list of cores to stay on, or `-`. The kernel kills the rank when the launcher dies, however
it dies (PR_SET_PDEATHSIG survives exec). A script of its own, because code between fork and exec of a process with
threads may deadlock. It imports nothing of the package: a start costs about 20 ms.
"""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Never returns: the command runs, or the process exits with 127 (not found) or 126 (cannot be run)."""
    launcher, cores, command = int(arguments[0]), arguments[1], arguments[2:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if cores != "-":
            os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    # The launcher may have died before the request was in place: then another process is the parent by now.
    if os.getppid() != launcher:
        os._exit(128 + signal.SIGKILL)
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        os.write(2, f"error: {command[0]!r} is not a program on the PATH\n".encode(errors="backslashreplace"))
        os._exit(127)
    except OSError as error:
        os.write(2, f"error: {command[0]!r} cannot be run: {error.strerror}\n".encode(errors="backslashreplace"))
        os._exit(126)


if __name__ == "__main__":
    main(sys.argv[1:])
