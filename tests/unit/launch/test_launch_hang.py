"""Who holds the job up: the analyser on evidence in the form that torch and faulthandler write it."""

from __future__ import annotations

from typing import Any

from trainwright.launch.hang import RankReport, analyse, innermost_frames

STACK = """Thread 0x00007f2b8bfff6c0 (most recent call first):
  File "/lib/threading.py", line 331 in wait
  File "/lib/threading.py", line 1002 in _bootstrap

Current thread 0x00007f2ba5b14740 (most recent call first):
  File "/site/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/home/me/\\u8bad\\u7ec3.py", line 13 in load_rows
  File "/home/me/\\u8bad\\u7ec3.py", line 99 in <module>
"""
MAIN = 0x00007F2BA5B14740


def entry(sequence: int, *, done: bool, op: str = "all_reduce", shape: tuple[int, ...] = (5, 3), pg: str = "0") -> Any:
    return {
        "collective_seq_id": sequence,
        "input_dtypes": ["Float"],
        "input_sizes": [list(shape)],
        "is_p2p": False,
        "process_group": [pg, "default_pg" if pg == "0" else "undefined"],
        "profiling_name": f"gloo:{op}",
        "retired": done,
        "state": "scheduled",
    }


def report(rank: int, entries: list[Any] | None, **changes: Any) -> RankReport:
    flight = None if entries is None else {"entries": entries, "groups": changes.pop("groups", {})}
    given = {"pid": 100 + rank, "state": "running", "step": 7, "phase": "forward", "age": 9.0, "flight": flight}
    return RankReport(rank=rank, **{**given, **changes})


def test_the_rank_that_did_not_join() -> None:
    waiting = [entry(1, done=True), entry(2, done=False)]
    found = analyse(
        [
            report(0, waiting),
            report(1, [entry(1, done=True)], stack=STACK, main_thread=MAIN),
            report(2, waiting),
        ],
        600,
    )
    assert found.culprits == (1,)
    assert found.waited_in is not None
    assert (found.waited_in.operation, found.waited_in.sequence) == ("all_reduce", 2)
    assert found.message == (
        "no progress for 600 s: rank 1 did not join all_reduce #2 (Float [5, 3]), in which ranks 0, 2 wait"
    )
    assert found.details[0].startswith("  rank 1 (pid 101): step 7, forward")  # the culprit comes first
    assert found.details[1] == '    File "/home/me/训练.py", line 13 in load_rows'


def test_a_stopped_rank_is_named_without_its_stack() -> None:
    found = analyse([report(0, [entry(1, done=False)]), report(1, None, state="stopped")], 5)
    assert found.culprits == (1,)
    assert "rank 1 is stopped (SIGSTOP, or a debugger); rank 0 waits in all_reduce #1" in found.message
    assert "    its stack cannot be had: it is stopped" in found.details


def test_members_of_a_group_come_from_the_group_itself() -> None:
    """Ranks 2 and 3 are not in group 5 and are not blamed; rank 1 is, though it never used the group."""
    groups = {"5": [0, 1]}
    found = analyse(
        [
            report(0, [entry(1, done=False, pg="5", op="all_gather")], groups=groups),
            report(1, [], groups=groups),
            report(2, [entry(1, done=True, pg="6")], groups={"6": [2, 3]}),
            report(3, [entry(1, done=True, pg="6")], groups={"6": [2, 3]}),
        ],
        5,
    )
    assert found.culprits == (1,)
    assert "all_gather #1 of group 5" in found.message


def test_the_end_of_a_chain_is_blamed_not_its_middle() -> None:
    """Rank 0 waits for rank 1 in the world; rank 1 waits for rank 2 in their group; rank 2 sleeps."""
    groups = {"5": [1, 2]}
    found = analyse(
        [
            report(0, [entry(4, done=False)]),
            report(1, [entry(3, done=True), entry(1, done=False, pg="5")], groups=groups),
            report(2, [entry(3, done=True)], groups=groups),
        ],
        5,
    )
    assert found.culprits == (2,)


def test_different_collectives_under_one_number() -> None:
    found = analyse(
        [
            report(0, [entry(3, done=False)]),
            report(1, [entry(3, done=False)]),
            report(2, [entry(3, done=False, shape=(4, 3))]),
        ],
        5,
    )
    assert found.culprits == (2,)
    assert "rank 2 entered all_reduce #3 (Float [4, 3])" in found.message
    assert "ranks 0, 1 entered all_reduce #3 (Float [5, 3])" in found.message


def test_ranks_that_wait_for_each_other() -> None:
    groups = {"1": [0, 1], "2": [0, 1]}
    found = analyse(
        [
            report(0, [entry(1, done=False, pg="1")], groups=groups),
            report(1, [entry(1, done=False, pg="2")], groups=groups),
        ],
        5,
    )
    assert found.culprits == ()
    assert "the order of their collectives differs" in found.message


def test_everybody_joined() -> None:
    found = analyse([report(0, [entry(3, done=False)]), report(1, [entry(3, done=False)])], 5)
    assert found.culprits == ()
    assert "every rank of ranks 0, 1 has joined all_reduce #3" in found.message


def test_without_a_collective_the_rank_behind_is_named() -> None:
    found = analyse([report(0, [], step=8), report(1, [], step=7)], 5)
    assert found.culprits == (1,)
    assert "rank 1 at step 7, behind the others" in found.message


def test_a_rank_that_cannot_answer() -> None:
    found = analyse([report(0, []), report(1, None, stack=STACK, main_thread=MAIN)], 5)
    assert found.culprits == (1,)
    assert "rank 1 did not answer" in found.message


def test_point_to_point_entries_are_not_counted() -> None:
    sent = {**entry(9, done=False), "is_p2p": True}
    found = analyse([report(0, [sent, entry(1, done=False)]), report(1, [])], 5)
    assert found.waited_in is not None
    assert found.waited_in.sequence == 1


def test_frames_of_the_main_thread() -> None:
    frames = innermost_frames(STACK, MAIN)
    assert frames == [
        'File "/home/me/训练.py", line 13 in load_rows',
        'File "/home/me/训练.py", line 99 in <module>',
    ]
    assert innermost_frames(STACK, 0) == frames  # unknown: the oldest thread, which is written last
    assert innermost_frames("", MAIN) == []
