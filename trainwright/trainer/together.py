"""What all ranks of a run do as one: rank 0 decides and tells, the others follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainwright.base.errors import TrainwrightError
from trainwright.comm import Ranks

__all__ = ["FollowedError", "first_decides"]


class FollowedError(TrainwrightError):
    """Rank 0 failed, so this rank ends too; what happened is told by rank 0."""


def first_decides(ranks: Ranks, decide: Callable[[], Any]) -> Any:
    """Run `decide` on rank 0 and give its JSON value to all ranks; a collective.

    Raises:
        FollowedError: on the other ranks, when it failed on rank 0, which raises what it raised.
    """
    if ranks.world == 1:
        return decide()
    told: dict[str, Any] = {}
    failure: BaseException | None = None
    if ranks.is_first:
        try:
            told = {"value": decide()}
        except BaseException as error:
            failure = error
            told = {"failed": f"{type(error).__name__}: {error}"}
    told = ranks.broadcast_json(told)
    if failure is not None:
        raise failure
    if "failed" in told:
        raise FollowedError(f"rank 0 failed: {told['failed']}")
    return told["value"]
