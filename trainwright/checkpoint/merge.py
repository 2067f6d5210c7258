"""The trees of ranks that hold different names as one tree, and of the one tree what such a rank asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint.tree import Json

__all__ = ["merged", "pruned"]

TAG = "$"


def merged(trees: Mapping[int, Json]) -> Json:
    """The union of the trees of several ranks (by rank): names that only some have stand beside those that all have.

    Raises:
        CheckpointError: ranks hold different values, or different kinds of things, under one name.
    """
    whole: Json = None
    seen: list[int] = []
    for rank, tree in trees.items():
        whole = _join(whole, tree, "", seen, rank) if seen else tree
        seen.append(rank)
    return whole


def _join(one: Json, other: Json, path: str, ranks: list[int], rank: int) -> Json:
    mine, theirs = _entries(one), _entries(other)
    if mine is None or theirs is None:
        if json.dumps(one) != json.dumps(other):  # not ==, for which 1, 1.0 and true are the same
            raise _conflict(one, other, path, ranks, rank)
        return one
    joined = {
        key: _join(item, theirs[key], f"{path}/{key}", ranks, rank) if key in theirs else item
        for key, item in mine.items()
    }
    return _dict_of({**joined, **{key: item for key, item in theirs.items() if key not in mine}})


def _entries(node: Json) -> dict[Any, Json] | None:
    """What a dict holds, plain or with keys that JSON cannot have; None for everything else."""
    if not isinstance(node, dict):
        return None
    if TAG not in node:
        return node
    return dict(node["items"]) if node[TAG] == "dict" else None


def _dict_of(entries: dict[Any, Json]) -> Json:
    if all(type(key) is str and not key.startswith(TAG) for key in entries):
        return entries
    return {TAG: "dict", "items": [[key, item] for key, item in entries.items()]}


def _conflict(one: Json, other: Json, path: str, ranks: list[int], rank: int) -> CheckpointError:
    among = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return CheckpointError(
        f"the ranks hold different states to save: {path.lstrip('/')} is {_shown(one)} on {among}, "
        f"{_shown(other)} on rank {rank}",
        hint="what differs between ranks is saved under a name of its own for each rank",
    )


def _shown(node: Json) -> str:
    kind = {"tensor": "a tensor", "tuple": "a tuple", "dict": "a dict"}.get(
        node.get(TAG, "dict") if isinstance(node, dict) else "", ""
    )
    text = str(node)
    return kind or (text if len(text) <= 60 else f"{text[:60]}...")


def pruned(tree: Json, like: Any) -> Json:
    """The tree without the keys that `like` (a state with the places of one rank) does not have in its dicts."""
    entries = _entries(tree)
    if entries is None or not isinstance(like, Mapping):
        return tree
    return _dict_of({key: pruned(item, like[key]) for key, item in entries.items() if key in like})
