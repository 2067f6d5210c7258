"""Names the rank for which the others wait, from stacks and flight recorders. Pure: evidence in, words out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Collective", "HangFinding", "RankReport", "analyse", "innermost_frames"]


_WRAPPER = " in wrapper"  # decorators of torch.distributed: they say nothing


@dataclass(frozen=True)
class RankReport:
    """What is known of one rank. age: seconds since its last progress.

    state: `running`, `stopped`, `disk` or `gone`. stack: faulthandler's text. flight: torch's flight recorder with
    `entries` and `groups` (name: ranks), None when the rank could not give it. main_thread: its identifier.
    """

    rank: int
    pid: int
    state: str
    step: int
    phase: str
    age: float
    stack: str = ""
    main_thread: int = 0
    flight: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Collective:
    """One collective of one process group: what it does, on what, and its number in the group (from 1)."""

    group: str
    sequence: int
    operation: str
    tensors: str

    def __str__(self) -> str:
        where = "" if self.group == "default" else f" of group {self.group}"
        return f"{self.operation} #{self.sequence}{where} ({self.tensors})"


@dataclass(frozen=True)
class HangFinding:
    """culprits: the ranks to look at, empty when the evidence names none. waited_in: what the others wait in."""

    culprits: tuple[int, ...]
    waited_in: Collective | None
    message: str
    details: tuple[str, ...] = ()


@dataclass
class _Group:
    """One process group: who is in it, how far each came, and in what each waits."""

    name: str
    members: set[int] = field(default_factory=set)
    joined: dict[int, int] = field(default_factory=dict)
    waiting: dict[int, Collective] = field(default_factory=dict)
    seen: dict[tuple[int, int], Collective] = field(default_factory=dict)


def analyse(reports: Sequence[RankReport], hang_after: float) -> HangFinding:
    """Who holds the job up.

    In this order: ranks that are stopped or gone; ranks that never entered the collective in which others wait (and
    wait in none themselves); ranks that entered a different operation or shape under the same number; ranks that give
    no evidence; and when all have entered the same collective, nobody: then it is the network or a device.
    """
    groups = _groups(reports)
    culprits, waited, words = _judge(reports, groups)
    # What the reader wants first: where the culprits are.
    ordered = sorted(reports, key=lambda report: (report.rank not in culprits, report.rank))
    details = tuple(line for report in ordered for line in _detail(report, groups))
    return HangFinding(tuple(culprits), waited, f"no progress for {hang_after:g} s: {words}", details)


def _judge(reports: Sequence[RankReport], groups: list[_Group]) -> tuple[Sequence[int], Collective | None, str]:
    """(culprits, what the others wait in, in words)."""
    waited = _oldest_wait(groups)
    for state, words in (("stopped", "is stopped (SIGSTOP, or a debugger)"), ("gone", "is gone")):
        found = [report.rank for report in reports if report.state == state]
        if found:
            return found, waited, _blame(found, words, waited, groups)
    for group in groups:
        absent, collective = _absent(group, groups)
        if absent and collective is not None:
            return absent, collective, _blame(absent, f"did not join {collective}", collective, groups)
    for group in groups:
        mismatch = _mismatch(group)
        if mismatch is not None:
            return mismatch
    crossed = _crossed(groups)
    if crossed:
        return (), waited, crossed
    silent = [report.rank for report in reports if report.flight is None]
    if silent and len(silent) < len(reports):
        words = "did not answer (its interpreter hangs, or a system call does)"
        return silent, waited, _blame(silent, words, waited, groups)
    if waited is not None:
        words = f"every rank of {_ranks(_members(waited, groups))} has joined {waited}, and it does not finish"
        return (), waited, f"{words}: look at the network or the device"
    slowest = min((report.step for report in reports), default=0)
    behind = [report.rank for report in reports if report.step == slowest]
    uneven = len(behind) < len(reports)
    words = f"at step {slowest}, behind the others" if uneven else f"at step {slowest}, in no collective"
    return behind, None, f"{_ranks(behind)} {words}"


def _groups(reports: Sequence[RankReport]) -> list[_Group]:
    groups: dict[str, _Group] = {}
    for report in reports:
        flight = report.flight or {}
        names = {name: set(ranks) for name, ranks in flight.get("groups", {}).items()}
        for entry in flight.get("entries", ()):
            if entry.get("is_p2p"):
                continue
            name = str(entry["process_group"][0])
            group = groups.setdefault(name, _Group(_group_name(entry)))
            group.members |= {report.rank} | names.get(name, set())
            collective = _collective(entry, group.name)
            group.joined[report.rank] = max(group.joined.get(report.rank, 0), collective.sequence)
            group.seen[report.rank, collective.sequence] = collective
            if not entry.get("retired") and entry.get("state") != "completed":
                before = group.waiting.get(report.rank)
                if before is None or collective.sequence < before.sequence:
                    group.waiting[report.rank] = collective
    for group in groups.values():
        if group.name == "default":
            group.members |= {report.rank for report in reports}
    return list(groups.values())


def _group_name(entry: Mapping[str, Any]) -> str:
    name, description = (*entry["process_group"], "")[:2]
    if name == "0" or description == "default_pg":
        return "default"
    # Several groups may share a description (one "shard" group for each replica): the number keeps them apart.
    return f"{description} ({name})" if description and description != "undefined" else str(name)


def _collective(entry: Mapping[str, Any], group: str) -> Collective:
    sizes, types = entry.get("input_sizes") or [], entry.get("input_dtypes") or []
    texts = [f"{types[i] if i < len(types) else 'tensor'} {list(size)}" for i, size in enumerate(sizes[:3])]
    if len(sizes) > 3:
        texts.append(f"and {len(sizes) - 3} more")
    operation = str(entry.get("profiling_name", "collective")).rpartition(":")[2]
    return Collective(group, int(entry["collective_seq_id"]), operation, ", ".join(texts) or "no tensors")


def _oldest_wait(groups: Iterable[_Group]) -> Collective | None:
    waits = [wait for group in groups for wait in group.waiting.values()]
    return min(waits, key=lambda wait: wait.sequence, default=None)


def _absent(group: _Group, groups: Iterable[_Group]) -> tuple[list[int], Collective | None]:
    """Members that never entered the collective in which others of the group wait, and that wait nowhere else."""
    if not group.waiting:
        return [], None
    collective = min(group.waiting.values(), key=lambda wait: wait.sequence)
    behind = [rank for rank in sorted(group.members) if group.joined.get(rank, 0) < collective.sequence]
    elsewhere = {rank for other in groups if other is not group for rank in other.waiting}
    return [rank for rank in behind if rank not in elsewhere], collective


def _mismatch(group: _Group) -> tuple[list[int], Collective, str] | None:
    """Ranks that entered something else under the same number than most of the group did."""
    if not group.waiting:
        return None
    sequence = min(wait.sequence for wait in group.waiting.values())
    entered = {rank: group.seen[rank, sequence] for rank in sorted(group.members) if (rank, sequence) in group.seen}
    kinds = list(dict.fromkeys(entered.values()))
    if len(kinds) < 2:
        return None
    usual = max(kinds, key=lambda kind: sum(other == kind for other in entered.values()))
    odd = [rank for rank, kind in entered.items() if kind != usual]
    words = "; ".join(
        f"{_ranks([rank for rank, other in entered.items() if other == kind])} entered {kind}" for kind in kinds
    )
    return odd, usual, f"the ranks disagree about a collective: {words}"


def _crossed(groups: Sequence[_Group]) -> str | None:
    """Ranks that wait for each other in different groups: the order of their collectives differs."""
    waits = {rank: wait for group in groups for rank, wait in group.waiting.items()}
    if len({wait.group for wait in waits.values()}) < 2:
        return None
    words = "; ".join(f"rank {rank} in {wait}" for rank, wait in sorted(waits.items()))
    return f"ranks wait for each other in different groups ({words}): the order of their collectives differs"


def _members(wait: Collective, groups: Iterable[_Group]) -> list[int]:
    return sorted({rank for group in groups if group.name == wait.group for rank in group.members})


def _blame(culprits: list[int], words: str, wait: Collective | None, groups: Sequence[_Group]) -> str:
    waiting = sorted({rank for group in groups for rank in group.waiting} - set(culprits))
    text = f"{_ranks(culprits)} {words}"
    if not waiting or wait is None:
        return text
    verb = "waits" if len(waiting) == 1 else "wait"
    return (
        f"{text}, in which {_ranks(waiting)} {verb}"
        if "join" in words
        else (f"{text}; {_ranks(waiting)} {verb} in {wait}")
    )


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(str(rank) for rank in ranks[:16])
    return f"ranks {shown}" + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")


def _detail(report: RankReport, groups: Sequence[_Group]) -> list[str]:
    waits = [str(group.waiting[report.rank]) for group in groups if report.rank in group.waiting]
    state = {"stopped": "stopped (SIGSTOP, or a debugger)", "gone": "gone", "disk": "in an uninterruptible wait"}
    head = f"rank {report.rank} (pid {report.pid}): step {report.step}, {report.phase}, {report.age:.0f} s ago"
    lines = [f"  {head}" + (f"; {state[report.state]}" if report.state in state else "")]
    lines += [f"    waits in {wait}" for wait in waits]
    frames = innermost_frames(report.stack, report.main_thread)
    lines += [f"    {frame}" for frame in frames]
    if not frames:
        why = "it is stopped" if report.state == "stopped" else "it did not answer"
        lines.append(f"    its stack cannot be had: {why}")
    return lines


def innermost_frames(stack: str, main_thread: int, *, count: int = 6) -> list[str]:
    """The newest frames of the main thread in faulthandler's text, newest first; [] when there are none."""
    blocks = re.findall(r"^(?:Current thread|Thread) (0x[0-9a-f]+)[^\n]*\n((?:  File [^\n]*\n?)*)", stack, re.MULTILINE)
    if not blocks:
        return []
    # The last thread is the oldest: the main one, should its number be unknown.
    frames = next((body for number, body in blocks if int(number, 16) == main_thread), blocks[-1][1])
    lines = [_unescaped(line.strip()) for line in frames.splitlines() if not line.rstrip().endswith(_WRAPPER)]
    return lines[:count]


def _unescaped(text: str) -> str:
    """faulthandler writes characters beyond ASCII as backslash escapes."""
    escape = r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))"
    return re.sub(escape, lambda match: chr(int(match[1] or match[2] or match[3], 16)), text)
