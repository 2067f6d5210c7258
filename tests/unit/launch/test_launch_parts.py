"""Output of ranks, the reserved port, environments, heartbeats: each part alone."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from trainwright.base.errors import ConfigError
from trainwright.base.processes import process_environment
from trainwright.launch import Heartbeat, heartbeat_from_environment
from trainwright.launch.output import RankOutput, pump
from trainwright.launch.watch import Beat, process_state, read_heartbeats, stalled
from trainwright.launch.world import core_lists, launched, rank_environment, reserve_port, resolve_processes


def wrote(output: RankOutput, *, out: bytes = b"", err: bytes = b"") -> None:
    os.write(output.out.writing, out)
    os.write(output.err.writing, err)
    pump([output], 0.2)
    pump([output], 0.0)


@pytest.fixture
def speaking(tmp_path: Path) -> RankOutput:
    return RankOutput(0, tmp_path / "rank-0.log", speaks=True)


def test_a_speaking_rank_is_passed_on_and_kept(speaking: RankOutput, capfd: pytest.CaptureFixture[str]) -> None:
    wrote(speaking, out="进度 1\n".encode(), err=b"warning: x\n")
    assert tuple(capfd.readouterr()) == ("进度 1\n", "warning: x\n")
    assert speaking.path.read_text(encoding="utf-8").count("\n") == 2


def test_an_error_is_held_back_and_dropped(speaking: RankOutput, capfd: pytest.CaptureFixture[str]) -> None:
    wrote(speaking, err=b"before\n[rank0]: Traceback (most recent call last):\n  x\n")
    wrote(speaking, out=b"goes on\n", err=b"RuntimeError: Connection closed by peer\n")
    assert tuple(capfd.readouterr()) == ("goes on\n", "before\n")
    assert "Connection closed" in speaking.error()
    speaking.drop()
    assert not speaking.release()
    assert "Connection closed" in speaking.path.read_text(encoding="utf-8")  # the file has it all


def test_an_error_is_held_back_and_released(speaking: RankOutput, capfd: pytest.CaptureFixture[str]) -> None:
    before = time.monotonic()
    wrote(speaking, err=b"error: no\n")
    moment = speaking.error_time(time.monotonic())
    assert moment is not None
    assert before <= moment
    speaking.release_old()
    assert capfd.readouterr().err == ""  # not old yet
    assert speaking.release()
    assert capfd.readouterr().err == "error: no\n"


def test_a_silent_rank_is_only_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = RankOutput(1, tmp_path / "rank-1.log", speaks=False)
    wrote(output, out=b"a\n", err=b"ValueError: b\n")
    assert tuple(capfd.readouterr()) == ("", "")
    assert output.error() == "ValueError: b"
    for channel in output.channels:
        channel.close_writing()
    pump([output], 0.2)
    assert not pump([output], 0.0)  # both streams have ended
    output.close()


def test_the_reserved_port_is_nobody_else_s_and_the_store_s() -> None:
    holder, port = reserve_port()
    with holder:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.socket() as store:  # as torch's and our own stores do
            store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            store.bind(("127.0.0.1", port))
            store.listen()
            with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 cannot be used"):
                reserve_port(port)


def test_the_environment_of_a_rank(tmp_path: Path) -> None:
    outer = {"TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "3", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "A": "1"}
    env = rank_environment(outer, 1, 2, 20000, tmp_path, 5.0)
    found = process_environment(env)
    assert (found.rank, found.world, found.local_rank, found.local_world, found.node_rank) == (1, 2, 1, 2, 0)
    assert (found.master_addr, found.master_port, found.launcher) == ("127.0.0.1", 20000, "trainwright")
    assert env["A"] == "1"
    assert int(env["OMP_NUM_THREADS"]) >= 1
    assert rank_environment({"OMP_NUM_THREADS": "7"}, 0, 2, 1, tmp_path, None)["OMP_NUM_THREADS"] == "7"


def test_cores_are_cut_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 4, 5}, raising=False)
    assert core_lists(2) == ["0,1", "2,4,5"]
    assert core_lists(5) == ["0", "1", "2", "4", "5"]
    assert core_lists(6) == ["-"] * 6


def test_nothing_is_launched_inside_a_launched_world() -> None:
    assert not launched(process_environment({}))
    assert launched(process_environment({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}))
    one_task = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert not launched(process_environment(one_task))
    assert resolve_processes(3) == 3


def test_heartbeats_are_written_by_a_thread(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, 0, hang_after=1.0) as heartbeat:
        assert [beat.beat for beat in read_heartbeats(tmp_path)] == [None]
        heartbeat.beat(11, "load")
        assert read_heartbeats(tmp_path)[0].step == 11  # the first one is written at once
        heartbeat.beat(12, "forward")
        deadline = time.monotonic() + 5
        while read_heartbeats(tmp_path)[0].step != 12 and time.monotonic() < deadline:
            time.sleep(0.02)
        [beat] = read_heartbeats(tmp_path)
        assert (beat.step, beat.phase, beat.pid) == (12, "forward", os.getpid())
        with heartbeat.paused("export"):
            assert read_heartbeats(tmp_path)[0].paused_until > time.monotonic()
        writes = (tmp_path / "heartbeat-0.json").stat().st_mtime_ns
        for step in range(10_000):
            heartbeat.beat(step)
        # ten thousand beats take milliseconds, because none of them writes
        assert (tmp_path / "heartbeat-0.json").stat().st_mtime_ns - writes < 0.5e9
    assert read_heartbeats(tmp_path) == []  # it ended: nothing is watched any more


def test_when_a_job_is_stalled() -> None:
    def beat(rank: int, moment: float | None, paused_until: float = 0.0) -> Beat:
        return Beat(rank, 3, 1, 1, 1, "step", 9.0, moment, paused_until)

    assert stalled([beat(0, 10.0), beat(1, 11.0)], 5.0, now=17.0)
    assert not stalled([beat(0, 10.0), beat(1, 13.0)], 5.0, now=17.0)  # rank 1 goes on
    assert not stalled([beat(0, None), beat(1, None)], 5.0, now=17.0)  # all are still starting
    assert stalled([beat(0, 10.0), beat(1, None)], 5.0, now=17.0)  # rank 1 never began
    assert not stalled([beat(0, 10.0), beat(1, 10.0, paused_until=20.0)], 5.0, now=17.0)
    assert not stalled([], 5.0, now=17.0)


def test_files_of_an_earlier_larger_world_are_passed_over(tmp_path: Path) -> None:
    record = {"world": 2, "pid": 1, "main_thread": 1, "step": 1, "phase": "x", "created": 1.0, "paused_until": 0.0}
    for rank, moment in ((0, 50.0), (1, 50.0), (5, 3.0)):
        text = json.dumps({**record, "rank": rank, "beat": moment, "world": 8 if rank == 5 else 2})
        (tmp_path / f"heartbeat-{rank}.json").write_text(text)
    (tmp_path / "heartbeat-9.json").write_text("{")
    assert [beat.rank for beat in read_heartbeats(tmp_path)] == [0, 1]


def test_one_process_has_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TRAINWRIGHT_LAUNCH"):
        monkeypatch.delenv(name, raising=False)
    assert heartbeat_from_environment() is None


def test_states_of_processes() -> None:
    assert process_state(os.getpid()) == "running"
    child = os.fork()
    if child == 0:
        os._exit(0)
    deadline = time.monotonic() + 5
    while process_state(child) != "gone" and time.monotonic() < deadline:  # a zombie counts as gone
        time.sleep(0.01)
    assert process_state(child) == "gone"
    os.waitpid(child, 0)
