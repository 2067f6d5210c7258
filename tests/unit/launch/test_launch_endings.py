"""Which failure came first, and how endings are told."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from trainwright.launch import endings
from trainwright.launch.endings import (
    Ending,
    describe_ending,
    exit_code,
    first_failure,
    is_consequence,
    last_error,
    memory_kills,
)

GLOO = (
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:53120. "
    "This is typically caused by a remote worker hanging"
)


def test_all_well() -> None:
    assert first_failure([]) is None
    assert first_failure([Ending(0, 0, 1.0), Ending(1, 0, 2.0)]) is None


def test_a_lost_connection_is_never_the_cause_while_there_is_another() -> None:
    echo = Ending(0, 1, 10.0, 9.9, GLOO)
    cause = Ending(1, 1, 10.5, 9.95, "ValueError: no")
    assert is_consequence(echo)
    assert not is_consequence(cause)
    assert first_failure([echo, cause]) is cause
    assert first_failure([echo]) is echo


@pytest.mark.parametrize(
    "text",
    [
        "error: unexpected RuntimeError: another rank failed while it prepared what all share; its error is elsewhere",
        "error: rank 0 failed: DataError: no text",
        "error: rank 1 (host a) died, or gave up waiting for another rank (Connection ...)",
        "[rank1]: trainwright.trainer.together.FollowedError: rank 0 failed: x",
    ],
)
def test_our_own_ranks_say_that_they_follow(text: str) -> None:
    assert is_consequence(Ending(1, 1, 10.0, 9.9, text))


def test_a_killed_rank_is_a_cause_whatever_it_wrote_before() -> None:
    echo = Ending(0, 1, 10.0, 9.9, GLOO)
    killed = Ending(1, -signal.SIGKILL, 10.2, None, GLOO)
    assert first_failure([echo, killed]) is killed


def test_the_error_that_was_written_first_counts_not_the_exit() -> None:
    early = Ending(2, 1, ended_at=12.0, error_at=10.0, error="KeyError: 'a'")
    late = Ending(1, 1, ended_at=11.0, error_at=10.9, error="RuntimeError: rank 2 said no")
    assert first_failure([late, early]) is early


def test_the_same_mistake_on_every_rank_is_told_by_rank_0() -> None:
    same = [Ending(rank, 3, 10.0 + rank * 1e-3, 9.0, "error: no such file") for rank in (2, 1, 0)]
    found = first_failure(same)
    assert found is not None
    assert found.rank == 0


def test_interrupted_ranks_stand_behind_failures() -> None:
    stopped, failed = Ending(0, 75, 1.0), Ending(1, 5, 9.0, 9.0, "error: checkpoint")
    assert first_failure([stopped, failed]) is failed
    assert first_failure([stopped]) is stopped


def test_words() -> None:
    assert describe_ending(3) == "exit code 3 (DataError)"
    assert describe_ending(10) == "exit code 10 (HangError)"
    assert describe_ending(1) == "exit code 1"
    assert describe_ending(-signal.SIGSEGV) == "killed by SIGSEGV"
    assert "OOM killer: it struck twice" not in describe_ending(-signal.SIGKILL)
    assert "likely by the OOM killer: it struck 2 times" in describe_ending(-signal.SIGKILL, oom_kills=2)
    assert "counts no out-of-memory kill" in describe_ending(-signal.SIGKILL)
    assert (exit_code(-9), exit_code(75), exit_code(0)) == (137, 75, 0)


def test_the_kernel_s_count_of_memory_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.events").write_text("low 0\nhigh 3\nmax 4\noom 2\noom_kill 2\noom_group_kill 0\n")
    monkeypatch.setattr(endings, "_cgroup_event_files", lambda: [tmp_path / "absent", tmp_path / "memory.events"])
    assert memory_kills() == 2


def test_the_last_error_of_a_long_output() -> None:
    noise = "\n".join(f"step {number}" for number in range(100))
    chained = (
        "Traceback (most recent call last):\n  a\nKeyError: 1\n\nDuring handling...\n\nTraceback (most recent call "
    )
    text = f"{noise}\n{chained}last):\n  b\nValueError: 2\n"
    assert last_error(text).startswith("Traceback (most recent call last):\n  a")
    assert last_error(text).endswith("ValueError: 2")
    assert last_error("error: no\n  -> do this\n") == "error: no\n  -> do this"
    assert last_error("[rank1]: Traceback (most recent call last):\n[rank1]: x").startswith("[rank1]: Traceback")
    assert last_error(noise).splitlines() == [f"step {number}" for number in range(88, 100)]
