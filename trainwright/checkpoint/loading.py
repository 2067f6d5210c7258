"""Loading by one process or by many: each rank reads its part, and all take the same checkpoint or none.

What is wanted is compared with what is stored before a byte is read. A checkpoint knows nothing of the ranks that read
it: whatever wrote it, each rank asks for the boxes of its own tensors.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint.agreement import failure_of
from trainwright.checkpoint.discovery import all_refused, report_refused, step_folders
from trainwright.checkpoint.manifest import Manifest, encode_manifest
from trainwright.checkpoint.merge import pruned
from trainwright.checkpoint.reader import CheckpointReader
from trainwright.checkpoint.sharding import boxes_of, is_sharded, like_sharded, local_part
from trainwright.checkpoint.storage import hash_bytes
from trainwright.checkpoint.tensors import dtype_name
from trainwright.checkpoint.tree import Json, Leaves, leaves_of, tensor_paths
from trainwright.comm import ALONE, Ranks
from trainwright.comm.boxes import Box

__all__ = ["Loaded", "agree", "check_same_tensors", "load_checkpoint", "load_latest"]

SHOWN = 20


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: the state and meta that were saved at `step`."""

    path: Path
    step: int
    state: dict[str, Any]
    meta: dict[str, Any]


def load_checkpoint(
    path: Path | str, *, like: Mapping[str, Any] | None = None, ranks: Ranks = ALONE
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint; returns (state, meta) exactly as they were saved, tensors on the host.

    Args:
        like: a state with the tensors that are wanted. Names, dtypes and shapes are compared before a byte is read; no
            value is ever cast or dropped silently. Ranks may want different names (stages of a pipeline do), if
            together they want all: each then gets the places of its own `like`. Where it has a DTensor, only this
            rank's part is read, and a DTensor of the same mesh and placements comes back (its local part on the host);
            where it has a plain tensor, the whole. Without it every tensor comes whole.
        ranks: all of them call this, and all succeed or fail together.

    Raises:
        CheckpointError: it is damaged, or does not fit `like`; names the rank, and the file or the tensors.
    """
    path = Path(path)
    with _Together(path, ranks) as loading:
        agree(ranks, loading.open())
        agree(ranks, loading.compare(like))
        agree(ranks, loading.read())
        return loading.state, loading.meta


def load_latest(root: Path | str, *, like: Mapping[str, Any] | None = None, ranks: Ranks = ALONE) -> Loaded | None:
    """Read the newest checkpoint that can be believed; None when there is none at all.

    A damaged one is reported by name with the event `warning`, and the one before it is taken: by all ranks, if one of
    them finds it damaged. One that is whole but does not fit `like` is an error at once: an older one would not fit
    either.

    Raises:
        CheckpointError: all are damaged, or the newest good one does not fit `like`.
    """
    root = Path(root)
    refused: list[CheckpointError] = []
    for step in ranks.broadcast_json([step for step, _ in step_folders(root)] if ranks.is_first else None):
        path = root / f"step-{step}"
        with _Together(path, ranks) as loading:
            error = agreed_error(ranks, loading.open())
            if error is None:
                agree(ranks, loading.compare(like))
                error = agreed_error(ranks, loading.read())
            if error is None:
                return Loaded(path, step, loading.state, loading.meta)
        refused.append(report_refused(path, error) if ranks.is_first else error)
    if refused:
        raise all_refused(root, refused)
    return None


def agree(ranks: Ranks, error: Exception | None) -> None:
    """All ranks say whether they failed; if any did, all raise the same error, which names it.

    Raises:
        CheckpointError: as above; a process on its own raises its own.
    """
    agreed = agreed_error(ranks, error)
    if agreed is not None:
        raise agreed from (error.__cause__ if ranks.world == 1 and error is not None else error)


def agreed_error(ranks: Ranks, error: Exception | None) -> CheckpointError | None:
    """The errors of all ranks as one, on all of them; None when no rank has any."""
    if ranks.world == 1:
        if error is not None and not isinstance(error, CheckpointError):
            raise error
        return error
    mine = None
    if error is not None:
        failure = failure_of(error)
        mine = [socket.gethostname(), failure["message"], failure["hint"]]
    found = [(rank, *told) for rank, told in enumerate(ranks.all_gather_json(mine)) if told is not None]
    if not found:
        return None
    lines = [f"rank {rank} on {host}: {message}" for rank, host, message, _ in found[:4]]
    more = [f"and {len(found) - 4} more ranks"] if len(found) > 4 else []
    return CheckpointError("\n".join(lines + more), hint=found[0][3])


class _Together:
    """Loading in steps; each returns its error instead of raising it, because the other ranks must hear of it."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self._path = path
        self._ranks = ranks
        self._reader: CheckpointReader | None = None
        self._wanted: dict[str, torch.Tensor] | None = None
        self._tree: Json = None
        self.state: dict[str, Any] = {}
        self.meta: dict[str, Any] = {}

    def __enter__(self) -> _Together:
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.__exit__()

    def open(self) -> Exception | None:
        """Check the manifest and the sizes, and that all ranks see the same checkpoint."""
        error: Exception | None = None
        try:
            self._reader = CheckpointReader(self._path)
        except Exception as caught:
            error = caught
        if self._ranks.world > 1:
            digest = hash_bytes(encode_manifest(self._reader.manifest)) if self._reader is not None else ""
            first = self._ranks.broadcast_json(digest)
            if error is None and first and digest != first:
                error = CheckpointError(f"{self._path} is not the checkpoint that rank 0 sees under this path")
        return error

    def compare(self, like: Mapping[str, Any] | None) -> Exception | None:
        """Does it hold what is wanted, and do all ranks together want what it holds?"""
        assert self._reader is not None
        manifest, leaves, error = self._reader.manifest, None, None
        try:
            leaves = leaves_of(like) if like is not None else None
        except Exception as caught:  # the other ranks wait below
            error = caught
        stored = tensor_paths(manifest.state)
        unwanted = [] if leaves is None else [place for place in stored if place not in leaves.tensors]
        nowhere = set(unwanted)
        if self._ranks.world > 1:
            wants = torch.tensor([leaves is None or place in leaves.tensors for place in stored], dtype=torch.int32)
            nowhere = {
                place for place, ranks in zip(stored, self._ranks.sum_(wants).tolist(), strict=True) if not ranks
            }
        if error is not None or leaves is None:
            return error
        try:
            self._wanted = check_same_tensors(manifest, leaves, self._path, nowhere)
        except Exception as caught:
            return caught
        if unwanted:  # other ranks have asked for them
            self._tree = pruned(manifest.state, like)
        return None

    def read(self) -> Exception | None:
        """Read what is wanted. Of the padding of files each rank checks a share, so that together it is all."""
        assert self._reader is not None
        reader, ranks = self._reader, self._ranks
        try:
            if self._wanted is None:
                self.state = reader.read_state()
            else:
                parts = {name: _part(tensor, name) for name, tensor in self._wanted.items()}
                mine = sorted(reader.manifest.files)[ranks.rank :: ranks.world]
                tensors = reader.read_parts(parts, padding_of=mine)
                placed = {name: _placed(self._wanted[name], tensor) for name, tensor in tensors.items()}
                self.state = reader.state_with(placed, self._tree)
            self.meta = reader.meta
        except Exception as error:
            return error
        return None


def _part(tensor: torch.Tensor, name: str) -> tuple[tuple[int, ...], tuple[Box, ...]]:
    return tuple(local_part(tensor).shape), boxes_of(tensor, name)


def _placed(like: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    return like_sharded(like, read) if is_sharded(like) else read


# --- is it what is wanted? --------------------------------------------------------------------------------------------


def check_same_tensors(
    manifest: Manifest, leaves: Leaves, path: Path, unwanted: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """Compare what a checkpoint holds with what is wanted: names, dtypes and shapes, all differences at once.

    Args:
        leaves: of this rank's `like`.
        unwanted: places of the checkpoint that no rank wants.

    Returns stored name -> the tensor of `like` that stands in its place.

    Raises:
        CheckpointError: they differ.
    """
    stored = tensor_paths(manifest.state)
    wanted = {place: (dtype_name(tensor, place), tuple(tensor.shape)) for place, tensor in leaves.tensors.items()}
    held = {place: (manifest.tensors[name].dtype, manifest.tensors[name].shape) for place, name in stored.items()}
    lines = []
    for place in sorted(wanted.keys() | unwanted):
        if wanted.get(place) != held.get(place):
            lines.append(f"  {place}: the checkpoint has {_shown(held.get(place))}, wanted {_shown(wanted.get(place))}")
    mine = {place: name for place, name in stored.items() if place in wanted}
    lines = lines or _differently_shared(mine, leaves)
    if lines:
        more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise CheckpointError(
            "\n".join([f"checkpoint {path} does not fit what is to be loaded:", *lines[:SHOWN], *more]),
            hint="resume with the model and optimizer that the run began with, or start a new run",
        )
    chosen: dict[str, torch.Tensor] = {}
    for place, name in mine.items():
        chosen.setdefault(name, leaves.tensors[place])
    return chosen


def _differently_shared(stored: Mapping[str, str], leaves: Leaves) -> list[str]:
    """Tensors that are one on one side and two on the other. Names on both sides are the same here."""
    lines: list[str] = []
    first: dict[str, str] = {}
    for place, name in stored.items():
        first.setdefault(name, place)
        mine = leaves.same.get(place)
        theirs = first[name]
        if mine is None or leaves.same.get(theirs) is None:
            continue  # this rank holds nothing of it
        if mine != place and stored[mine] != name:
            lines.append(f"  {place}: wanted as one tensor with {mine}; the checkpoint has two")
        if theirs != place and leaves.same[theirs] != mine:
            lines.append(f"  {place}: the checkpoint has one tensor for it and {theirs}; wanted are two")
    return lines


def _shown(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing of this name" if entry is None else f"{entry[0]} {list(entry[1])}"
