"""Runs a function on N processes that form one gloo group, for tests: no ports, a deadline, the rank's own error."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

__all__ = ["RankError", "fork_server", "run_ranks"]

_IMPORTED_ONCE = ["pytest", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "trainwright.trainer"]


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds its traceback."""


def fork_server() -> ForkServerContext:
    """A context whose processes are forked from one that has imported what most tests need and done nothing else: each
    is fresh, and none takes the seconds of importing torch again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    return context


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """`function(rank, world, *arguments)` on `world` fresh processes; gives what each returned, by rank.

    Args:
        function: importable by name (a module's top level).
        arguments: and results: whatever multiprocessing can send.
        timeout: seconds for all ranks together, the start of Python and torch included.

    Raises RankError when a rank raises (with its traceback), exits, or the deadline passes; no process is left behind.
    """
    context = fork_server()
    results: Queue[tuple[int, bool, Any]] = context.Queue()
    with tempfile.TemporaryDirectory(prefix="trainwright-ranks-") as folder, _one_thread_each():
        # A file instead of a port: nothing else on the machine can take it in between.
        meeting = Path(folder) / "store"
        processes = [
            context.Process(
                target=_enter,
                args=(function, rank, world, str(meeting), arguments, results, dict(os.environ)),
                daemon=True,
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, results, world, time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _enter(
    function: Callable[..., Any],
    rank: int,
    world: int,
    meeting: str,
    arguments: tuple[Any, ...],
    results: Queue[tuple[int, bool, Any]],
    environment: dict[str, str],
) -> None:
    os.environ.clear()  # what is forked has the environment of the time when it was started
    os.environ.update(environment)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        results.put((rank, True, function(rank, world, *arguments)))
        dist.destroy_process_group()
    except BaseException:  # it is raised again in the parent, by RankError
        results.put((rank, False, traceback.format_exc()))


def _collect(processes: list[Any], results: Queue[tuple[int, bool, Any]], world: int, deadline: float) -> list[Any]:
    import queue

    returned: dict[int, Any] = {}
    while len(returned) < world:
        try:
            rank, succeeded, value = results.get(timeout=0.2)
        except queue.Empty:
            missing = [rank for rank in range(world) if rank not in returned]
            dead = [rank for rank in missing if processes[rank].exitcode not in (None, 0)]
            if dead:
                raise RankError(f"rank {dead[0]} of {world} exited with {processes[dead[0]].exitcode}") from None
            if time.monotonic() > deadline:
                raise RankError(f"ranks {missing} of {world} did not finish in time") from None
            continue
        if not succeeded:
            # A rank that is gone makes the others fail too; name the cause, not what followed.
            others = [other for other in range(world) if other != rank and _died(processes[other])]
            cause = f"rank {others[0]} of {world} exited with {processes[others[0]].exitcode}; " if others else ""
            raise RankError(f"{cause}rank {rank} of {world} failed:\n{value}")
        returned[rank] = value
    return [returned[rank] for rank in range(world)]


def _died(process: Any) -> bool:
    process.join(0.5)  # its exit may be a moment behind the failure that it caused
    return process.exitcode not in (None, 0)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Children inherit the environment: N ranks with a thread per core each would only fight."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
