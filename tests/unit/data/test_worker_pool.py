"""Worker processes: answers in order, errors as they were raised, none left behind."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import ConfigError, DataError
from trainwright.data.worker_pool import WorkerPool, portable


def answer(request: tuple[str, Any]) -> Any:
    """The job of these tests; workers import this file."""
    what, value = request
    if what == "refuse":
        raise ConfigError(value, hint="do something else")
    if what == "divide":
        return 1 / value
    if what == "unsendable":
        return lambda: value
    if what == "exit":
        os._exit(value)
    if what == "sleep":
        time.sleep(value)
    print("what a library says")  # must not be taken for an answer
    return value, os.getpid()


def gone(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        pytest.skip("this system has no /proc")
    return not path.exists()


def test_jobs_of_the_callers_script_are_not_portable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert portable(answer)
    assert portable(partial(answer, ("say", 1)))
    assert not portable(lambda request: request)
    monkeypatch.setattr(answer, "__module__", "__main__")
    monkeypatch.setattr("__main__.answer", answer, raising=False)
    assert not portable(answer)


def test_answers_come_in_order_from_all_workers_which_end_with_the_pool() -> None:
    batches = [("sleep", 0.2), *(("say", number) for number in range(20))]
    with WorkerPool(answer, 2, "a tested process") as pool:
        found = list(pool.map(batches, lambda batch: batch))
        pids = {worker.process.pid for worker in pool._workers}
    assert [batch for batch, _ in found] == batches
    assert [value for _, (value, _) in found] == [0.2, *range(20)]
    assert {pid for _, (_, pid) in found} == pids
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_batches_are_read_as_they_are_needed() -> None:
    read = []

    def batches() -> Any:
        for number in range(50):
            read.append(number)
            yield ("say", number)

    with WorkerPool(answer, 2, "a tested process") as pool:
        next(pool.map(batches(), lambda batch: batch))
    assert read == [0, 1, 2, 3, 4]  # two a worker, and the one whose answer is given


def test_errors_of_a_job_are_raised_here_and_the_worker_goes_on() -> None:
    with WorkerPool(answer, 1, "a tested process") as pool:
        with pytest.raises(ConfigError) as refused:
            pool.submit(("refuse", "not this")).result()
        assert (refused.value.message, refused.value.hint) == ("not this", "do something else")
        with pytest.raises(RuntimeError, match=r"a tested process failed:\n[\s\S]*ZeroDivisionError"):
            pool.submit(("divide", 0)).result()
        with pytest.raises(RuntimeError, match=r"a tested process failed:\n[\s\S]*pickle"):
            pool.submit(("unsendable", 0)).result()
        assert pool.submit(("divide", 4)).result() == 0.25


def test_a_dead_worker_is_named() -> None:
    with WorkerPool(answer, 1, "a tested process") as pool:
        waiting = pool.submit(("sleep", 60.0))
        os.kill(pool._workers[0].process.pid, signal.SIGKILL)
        with pytest.raises(DataError, match="a tested process was killed by SIGKILL") as killed:
            waiting.result()
    assert killed.value.hint == "if memory ran out, lower data.workers"
    with WorkerPool(answer, 1, "a tested process") as pool, pytest.raises(DataError, match="ended with exit code 3"):
        pool.submit(("exit", 3)).result()


def test_an_error_here_kills_workers_at_work() -> None:
    began = time.monotonic()
    pool = WorkerPool(answer, 2, "a tested process")
    pids = [worker.process.pid for worker in pool._workers]
    with pytest.raises(KeyError), pool:
        raise keeping_busy(pool)
    assert all(gone(pid) for pid in pids)
    assert time.monotonic() - began < 60


def keeping_busy(pool: WorkerPool) -> KeyError:
    for _ in range(6):
        pool.submit(("sleep", 600.0))
    return KeyError()
