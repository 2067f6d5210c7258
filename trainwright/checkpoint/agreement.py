"""How the ranks of a save agree: rank 0 collects what all say, decides, and tells them; a lost rank is named.

The messages go from rank to rank over a gloo group of their own, so that a saver's thread never meets a collective of
training, and one rank that died or hangs is known by its number. Every wait ends.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from trainwright.base.errors import CheckpointError, RunInUseError, TrainwrightError
from trainwright.checkpoint.tree import Json
from trainwright.comm import ALONE, Ranks

__all__ = ["Agreement", "Cancelled", "RankLost", "failure_of"]

PATIENCE = timedelta(seconds=30)
"""What the other ranks wait longer than rank 0: so that it is the one to find out who is missing."""


class Cancelled(CheckpointError):
    """A save was told to stop before it was complete; nothing of it is left."""


class RankLost(CheckpointError):
    """A rank died, or did not answer in time."""


def failure_of(error: BaseException) -> Json:
    """An error as JSON, for the other ranks."""
    kind = next((k.__name__ for k in (Cancelled, RunInUseError, RankLost) if isinstance(error, k)), "CheckpointError")
    if isinstance(error, TrainwrightError):
        return {"kind": kind, "message": error.message, "hint": error.hint}
    return {"kind": kind, "message": f"{type(error).__name__}: {error}", "hint": None}


class Agreement:
    """One conversation among all ranks; all call the same methods in the same order.

    Args:
        ranks: what `Ranks.separate` gives. Its timeout is how long rank 0 waits for a rank that is alive but silent;
            one that died is noticed at once.
        own: the group is used by nobody else, and `close` ends it.
    """

    def __init__(self, ranks: Ranks = ALONE, *, own: bool = False) -> None:
        self.ranks = ranks
        self._own = own
        self._hosts = ranks.all_gather_json(socket.gethostname())

    @property
    def leads(self) -> bool:
        """Whether this is the rank that decides."""
        return self.ranks.is_first

    def name(self, rank: int) -> str:
        """A rank as people can find it."""
        return f"rank {rank} on {self._hosts[rank]}"

    def close(self) -> None:
        """Give back the sockets of the group, if it is one of our own and still there."""
        if self.ranks.world > 1 and self._own and dist.is_initialized():
            self._own = False
            with contextlib.suppress(ValueError):  # everything was torn down before us
                dist.destroy_process_group(self.ranks.host_group)

    # --- messages ---

    def collect(self, value: Json) -> list[Json]:
        """On rank 0 what every rank passed, by rank, with None for lost ones; on the others an empty list.

        Raises:
            RankLost: on another rank, when rank 0 is gone.
        """
        if self.ranks.world == 1:
            return [value]
        if not self.leads:
            try:
                self._send(value, 0)
            except RuntimeError as error:
                raise self._lost(0, error) from error
            return []
        deadline = time.monotonic() + self.ranks.timeout.total_seconds()
        return [value, *(self._receive_or_none(rank, deadline) for rank in range(1, self.ranks.world))]

    def _receive_or_none(self, rank: int, deadline: float) -> Json:
        try:
            return self._receive(rank, max(1.0, deadline - time.monotonic()))
        except RuntimeError:
            return None

    def deal(self, values: Sequence[Json]) -> Json:
        """Give every rank its own of rank 0's values (the others pass nothing); lost ranks are passed over.

        Raises:
            RankLost: on another rank, when rank 0 is gone or silent.
        """
        if self.ranks.world == 1:
            return values[0]
        if not self.leads:
            try:
                return self._receive(0, 2 * self.ranks.timeout.total_seconds() + PATIENCE.total_seconds())
            except RuntimeError as error:
                raise self._lost(0, error) from error
        for rank in range(1, self.ranks.world):
            try:
                self._send(values[rank], rank)
            except RuntimeError:
                continue  # it is lost: those that live shall still hear what was decided
        return values[0]

    def announce(self, value: Json = None) -> Json:
        """What rank 0 passed, on every rank.

        Raises:
            RankLost: on another rank, when rank 0 is gone or silent.
        """
        return self.deal([value] * self.ranks.world if self.leads else [])

    def _lost(self, rank: int, error: RuntimeError) -> RankLost:
        reason = str(error).splitlines()[0][:200]
        return RankLost(
            f"{self.name(rank)} died, or gave up waiting for another rank ({reason})",
            hint=f"the output of rank {rank} says more; earlier checkpoints are untouched",
        )

    def _send(self, value: Json, to: int) -> None:
        data = torch.frombuffer(bytearray(json.dumps(value).encode("ascii")), dtype=torch.uint8)
        for part in (torch.tensor([data.numel()]), data):
            dist.send(part, group=self.ranks.host_group, group_dst=to)

    def _receive(self, rank: int, seconds: float) -> Json:
        size = torch.zeros(1, dtype=torch.int64)
        self._await(size, rank, seconds)
        data = torch.empty(int(size), dtype=torch.uint8)
        self._await(data, rank, seconds)
        return json.loads(bytes(data.numpy()))

    def _await(self, tensor: torch.Tensor, rank: int, seconds: float) -> None:
        work = dist.irecv(tensor, group=self.ranks.host_group, group_src=rank)
        assert work is not None
        work.wait(timedelta(seconds=seconds))

    # --- failures ---

    def first_failures(self, reports: Sequence[Json]) -> Json:
        """On rank 0: the failures among collected reports (their key `failure`) as one, or None."""
        failures = []
        for rank, report in enumerate(reports):
            if report is None:
                waited = f"did not answer within {self.ranks.timeout.total_seconds():.0f} s"
                failure: Json = {"kind": "RankLost", "message": f"it died or {waited}", "hint": None}
            else:
                failure = report["failure"]
            if failure is not None:
                message = failure["message"]
                failures.append({**failure, "message": f"{self.name(rank)}: {message}", "rank": rank})
        if not failures:
            return None
        # A lost rank makes others fail as well: what really happened comes first, then what is known of others.
        failures.sort(key=lambda failure: failure["kind"] in ("RankLost", "Cancelled"))
        more = [f"and {len(failures) - 4} more ranks"] if len(failures) > 4 else []
        message = "\n".join([failure["message"] for failure in failures[:4]] + more)
        return {**failures[0], "message": message}

    def settle(self, error: Exception | None) -> None:
        """All ranks say whether they failed; if any did, all raise the same error.

        Raises:
            CheckpointError: naming the ranks that failed and why; a process on its own raises its own error.
        """
        reports = self.collect({"failure": failure_of(error) if error is not None else None})
        verdict = self.announce(self.first_failures(reports) if self.leads else None)
        self.raise_for(verdict, error)

    def raise_for(self, verdict: Json, own: Exception | None = None) -> None:
        """Raise what rank 0 announced, if it is a failure; alone, the error itself."""
        if verdict is None:
            return
        if self.ranks.world == 1 and own is not None:
            raise own
        kinds = {"Cancelled": Cancelled, "RunInUseError": RunInUseError, "RankLost": RankLost}
        raise kinds.get(verdict["kind"], CheckpointError)(verdict["message"], hint=verdict["hint"]) from own
