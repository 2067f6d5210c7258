"""Fault points: each action does what it says, conditions hold it back, and misspelt rules are refused."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from trainwright.base import faults
from trainwright.base.errors import ConfigError
from trainwright.base.faults import FAULTS_VARIABLE, InjectedFault, fault_point, parse_faults, registered_points


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "registered_points", lambda: ("data.next", "save.*"))


def test_does_nothing_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FAULTS_VARIABLE, raising=False)
    assert fault_point("data.next", step=3) is None


def test_costs_little_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FAULTS_VARIABLE, raising=False)
    start = time.perf_counter()
    for step in range(10_000):
        fault_point("data.next", step=step)
    assert (time.perf_counter() - start) / 10_000 < 20e-6  # about 1 us; a loaded machine gets room


@pytest.mark.usefixtures("points")
def test_raises_only_where_the_conditions_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "data.next:raise@step=3,rank=0")
    for fields in ({"step": 2, "rank": 0}, {"step": 3, "rank": 1}, {"step": 3}):
        assert fault_point("data.next", **fields) is None
    with pytest.raises(InjectedFault, match=r"data\.next"):
        fault_point("data.next", step=3, rank=0)


@pytest.mark.usefixtures("points")
def test_hit_counts_the_times_that_the_other_conditions_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "save.before_commit:raise@rank=0,hit=2")
    for rank in (1, 0, 1):
        assert fault_point("save.before_commit", rank=rank) is None
    with pytest.raises(InjectedFault):
        fault_point("save.before_commit", rank=0)
    assert fault_point("save.before_commit", rank=0) is None


@pytest.mark.usefixtures("points")
def test_a_full_disk_a_stall_and_a_poisoned_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, "save.write:enospc; data.next:nan; save.sync:sleep=0.05")
    with pytest.raises(OSError, match="No space left") as error:
        fault_point("save.write")
    assert error.value.errno == errno.ENOSPC
    assert fault_point("data.next") == "nan"
    start = time.perf_counter()
    assert fault_point("save.sync") is None
    assert time.perf_counter() - start >= 0.05


@pytest.mark.parametrize(("action", "expected"), [("kill", -signal.SIGKILL), ("raise", 1)])
def test_kill_is_a_real_sigkill(action: str, expected: int) -> None:
    code = (
        "from trainwright.base import faults; faults.registered_points = lambda: ('p.q',)\n"
        "try: faults.fault_point('p.q')\nfinally: print('handlers ran')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, FAULTS_VARIABLE: f"p.q:{action}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expected
    assert ("handlers ran" in done.stdout) == (action == "raise")


def test_stop_hangs_the_process_until_it_is_killed() -> None:
    code = "from trainwright.base import faults; faults.registered_points = lambda: ('p.q',); faults.fault_point('p.q')"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, FAULTS_VARIABLE: "p.q:stop"})
    try:
        pid, status = os.waitpid(process.pid, os.WUNTRACED)
        assert pid == process.pid
        assert os.WIFSTOPPED(status)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "wrong",
    [
        "data.next",
        "data.next:explode",
        ":raise",
        "a:sleep",
        "a:sleep=soon",
        "a:raise=3",
        "a:raise@step",
        "a:raise@hit=x",
    ],
)
def test_rules_that_cannot_be_read_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=FAULTS_VARIABLE):
        parse_faults(wrong)


def test_a_point_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="befor_commit"):
        parse_faults("save.befor_commit:kill", known=("save.before_commit",))
    assert parse_faults("save.chunk:raise", known=("save.*",))[0].point == "save.chunk"


def test_the_list_of_points_is_read_from_the_source(tmp_path: object) -> None:
    found = registered_points()
    assert list(found) == sorted(set(found))
    assert all("." in point for point in found)
