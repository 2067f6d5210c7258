"""The dispatcher: nothing lost that matters, nothing that fails or hangs reaches training."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from trainwright.base.events import Record, emit
from trainwright.monitor import Monitor


class Memory:
    """Keeps what it gets."""

    name = "memory"

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.calls: list[str] = []

    def open(self) -> None:
        self.calls.append("open")

    def write(self, record: Record) -> None:
        self.records.append(record)

    def tick(self) -> None:
        pass

    def close(self) -> None:
        self.calls.append("close")


class Failing(Memory):
    name = "failing"

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        self.attempts = 0

    def _maybe(self, method: str) -> None:
        if method == self.method:
            self.attempts += 1
            raise OSError("no space left on device")

    def open(self) -> None:
        super().open()
        self._maybe("open")

    def write(self, record: Record) -> None:
        self._maybe("write")

    def tick(self) -> None:
        self._maybe("tick")

    def close(self) -> None:
        super().close()
        self._maybe("close")


class Blocked(Memory):
    """Hangs in its first write until released."""

    name = "blocked"

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.release = threading.Event()

    def write(self, record: Record) -> None:
        self.entered.set()
        self.release.wait(30)
        super().write(record)


def kinds(sink: Memory) -> list[str]:
    return [record["kind"] for record in sink.records]


def test_records_arrive_in_order_and_closing_drains() -> None:
    sink = Memory()
    with Monitor([sink]):
        for step in range(500):
            emit("step", step=step)
        emit("run.end")
    emit("step", step=501)  # after the context: nobody listens
    assert [r["step"] for r in sink.records[:-1]] == list(range(500))
    assert kinds(sink)[-1] == "run.end"
    assert sink.calls == ["open", "close"]


def test_records_from_many_threads_all_arrive() -> None:
    sink = Memory()
    with Monitor([sink], capacity=10_000):
        threads = [
            threading.Thread(target=lambda n=n: [emit("step", step=i, thread=n) for i in range(200)]) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(sink.records) == 800
    for n in range(4):
        assert [r["step"] for r in sink.records if r["thread"] == n] == list(range(200))


@pytest.mark.parametrize("method", ["open", "write", "tick"])
def test_a_failing_sink_is_switched_off_with_one_warning(method: str) -> None:
    failing, working = Failing(method), Memory()
    with Monitor([failing, working]) as monitor:
        for step in range(100):
            emit("step", step=step)
    assert monitor.failures == {"failing": "OSError: no space left on device"}
    assert failing.attempts == 1
    assert failing.calls == ["open", "close"], "its handle is closed all the same"
    assert kinds(working).count("step") == 100
    warnings = [r for r in working.records if r["kind"] == "warning"]
    assert len(warnings) == 1
    assert "failing is switched off: OSError: no space left" in warnings[0]["message"]


def test_a_sink_that_fails_in_close_does_not_stop_the_others() -> None:
    failing, working = Failing("close"), Memory()
    with Monitor([failing, working]) as monitor:
        emit("step", step=1)
    assert "failing" in monitor.failures
    assert working.calls == ["open", "close"]


def test_without_any_sink_left_the_failure_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with Monitor([Failing("write")]):
        emit("step", step=1)
    assert "failing is switched off" in caplog.text


def test_a_hanging_sink_blocks_neither_training_nor_closing() -> None:
    sink = Blocked()
    monitor = Monitor([sink], capacity=50, close_deadline=0.3)
    with monitor:
        emit("step", step=-1)
        assert sink.entered.wait(5)
        began = time.perf_counter()
        for step in range(1000):
            emit("step", step=step)
        for step in range(20):
            emit("eval", step=step)
        took = time.perf_counter() - began
        closing = time.perf_counter()
    assert took < 0.5
    assert time.perf_counter() - closing < 3
    assert monitor.dropped == {"step": 950}, "step records are dropped first, and counted"
    sink.release.set()
    monitor._thread.join(10)
    # Released, it still gets everything that was kept, and hears how much was not.
    assert kinds(sink).count("eval") == 20
    assert kinds(sink).count("step") == 51
    assert sink.records[-1]["message"] == "monitor: sinks were too slow, records dropped: 950 step"


def test_even_important_records_are_bounded() -> None:
    sink = Blocked()
    monitor = Monitor([sink], capacity=10, close_deadline=0.1)
    with monitor:
        emit("eval", step=-1)
        assert sink.entered.wait(5)
        for step in range(1000):
            emit("eval", step=step)
    assert monitor.dropped == {"eval": 960}
    sink.release.set()
    monitor._thread.join(10)


def test_an_exception_in_the_run_passes_through_and_records_are_kept() -> None:
    sink = Memory()

    def run() -> None:
        with Monitor([sink]):
            emit("step", step=1)
            raise ValueError("from training")

    with pytest.raises(ValueError, match="from training"):
        run()
    assert kinds(sink) == ["step"]


def test_device_scalars_are_read_on_the_monitors_thread() -> None:
    sink = Memory()
    read_on: list[str] = []

    class Scalar:
        def item(self) -> float:
            read_on.append(threading.current_thread().name)
            return 2.5

    with Monitor([sink]):
        emit("step", step=1, loss=torch.tensor(1.5), grad_norm=Scalar())
    assert (sink.records[0]["loss"], sink.records[0]["grad_norm"]) == (1.5, 2.5)
    assert read_on == ["trainwright-monitor"]


def test_emitting_costs_microseconds() -> None:
    fields: dict[str, Any] = {f"field_{i}": float(i) for i in range(14)}
    with Monitor([Memory()], capacity=100_000):
        began = time.perf_counter()
        for _ in range(2000):
            emit("step", **fields)
        each = (time.perf_counter() - began) / 2000
    assert each < 1e-3, f"{each * 1e6:.0f} us"
