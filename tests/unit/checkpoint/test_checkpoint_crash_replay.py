"""Every prefix of the file operations of a save, replayed as the disk that a crash leaves: old or new, no third.

Two disks are imagined for each prefix: one that kept everything (the process was killed), and one that lost whatever
was not forced out (the power failed): content of files that were not synced, names in folders that were not synced.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoint_states import make_state, same

from trainwright.checkpoint import Checkpointer, latest, load_checkpoint, save_checkpoint, storage
from trainwright.checkpoint.retention import collect_litter


@dataclass(frozen=True)
class Operation:
    what: str
    path: Path
    other: Path | None = None
    data: bytes = b""


class Recorder:
    """Puts itself between the checkpoint code and the disk, and notes every change in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.operations: list[Operation] = []
        self._paths: dict[int, Path] = {}
        for name in ("make_folder", "create_file", "write_all", "sync", "sync_folder", "rename", "exchange"):
            monkeypatch.setattr(storage, name, self._wrap(name, getattr(storage, name)))
        for name in ("remove_file", "remove_tree"):
            monkeypatch.setattr(storage, name, self._wrap(name, getattr(storage, name)))

    def _wrap(self, name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            result = real(*args, **options)
            match name:
                case "create_file":
                    self._paths[result] = args[0]
                    self.operations.append(Operation(name, args[0]))
                case "write_all":
                    self.operations.append(Operation(name, self._paths[args[0]], data=bytes(args[1])))
                case "sync":
                    self.operations.append(Operation(name, self._paths[args[0]]))
                case "rename" | "exchange":
                    assert result is not False
                    self.operations.append(Operation(name, args[0], args[1]))
                case _:
                    self.operations.append(Operation(name, args[0]))
            return result

        return call


def replay(operations: list[Operation], source: Path, target: Path, *, power_lost: bool) -> None:
    """Apply operations that were recorded under `source` to a copy at `target`."""
    at = lambda path: target / path.relative_to(source)  # noqa: E731
    unsynced: set[Path] = set()

    def moved(old: Path, new: Path) -> None:
        for path in list(unsynced):
            if path == old or old in path.parents:
                unsynced.discard(path)
                unsynced.add(new / path.relative_to(old))

    for operation in operations:
        path = at(operation.path)
        match operation.what:
            case "make_folder":
                path.mkdir()
            case "create_file":
                path.touch(exist_ok=False)
                unsynced.add(path)
            case "write_all":
                with open(path, "ab") as file:
                    file.write(operation.data)
                unsynced.add(path)
            case "sync":
                unsynced.discard(path)
            case "rename":
                assert operation.other is not None
                os.rename(path, at(operation.other))
                moved(path, at(operation.other))
            case "exchange":
                assert operation.other is not None
                assert storage.exchange(path, at(operation.other))
            case "remove_file":
                path.unlink(missing_ok=True)
            case "remove_tree":
                shutil.rmtree(path, ignore_errors=True)
    if power_lost:
        for path in unsynced:
            if path.exists():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def unsynced_renames(operations: list[Operation]) -> list[int]:
    """Positions of renames whose folder was not synced afterwards: the disk may not have them yet."""
    return [
        i
        for i, operation in enumerate(operations)
        if operation.what == "rename"
        and not any(o.what == "sync_folder" and o.path == operation.path.parent for o in operations[i + 1 :])
    ]


def check_every_prefix(
    recorder: Recorder, base: Path, source: Path, tmp_path: Path, allowed: dict[int, list[int]]
) -> set[tuple[int, int]]:
    """`allowed` maps a step to the seeds that its content may have; returns which (step, seed) were seen."""
    seen = set()
    operations = recorder.operations
    for count in range(len(operations) + 1):
        prefix = operations[:count]
        variants = [(prefix, False), (prefix, True)]
        for lost in unsynced_renames(prefix):
            # Metadata is journalled in order: when one rename is lost, everything after it is too.
            variants.append((prefix[:lost], True))
        for number, (part, power_lost) in enumerate(variants):
            target = tmp_path / f"replay-{count}-{number}"
            shutil.copytree(base, target)
            replay(part, source, target, power_lost=power_lost)
            best = latest(target)
            assert best is not None, (count, power_lost)
            state, meta = load_checkpoint(best)
            step = int(best.name.removeprefix("step-"))
            assert meta["seed"] in allowed[step], (count, best)
            assert same(state, make_state(meta["seed"]))
            seen.add((step, meta["seed"]))
            collect_litter(target)
            names = sorted(path.name for path in target.iterdir())
            assert all(name.startswith("step-") and ".tmp-" not in name for name in names), names
            assert latest(target) == best
            shutil.rmtree(target)
    return seen


@pytest.fixture
def recorder_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda: Recorder(monkeypatch)


def test_every_prefix_of_a_save_with_retention(tmp_path: Path, recorder_of: Any) -> None:
    base, source = tmp_path / "base", tmp_path / "source"
    for step in (1, 2):
        save_checkpoint(base, step, make_state(step), {"seed": step})
    shutil.copytree(base, source)
    with Checkpointer(source, keep=2, asynchronous=False) as checkpointer:
        recorder = recorder_of()
        checkpointer.save(3, make_state(3), {"seed": 3}, required=True)
    whats = [operation.what for operation in recorder.operations]
    assert whats.count("rename") == 3  # manifest, commit, trash
    commit = next(i for i, o in enumerate(recorder.operations) if o.what == "rename" and o.path.parent == source)
    before = recorder.operations[:commit]
    written = {o.path for o in before if o.what == "write_all"}
    assert len(written) == 2
    assert written <= {o.path for o in before if o.what == "sync"}  # nothing is committed that is not on the disk
    assert before[-1].what == "sync_folder"
    assert recorder.operations[commit + 1] == Operation("sync_folder", source)
    seen = check_every_prefix(recorder, base, source, tmp_path, {2: [2], 3: [3]})
    assert seen == {(2, 2), (3, 3)}


def test_every_prefix_of_replacing_the_only_checkpoint(tmp_path: Path, recorder_of: Any) -> None:
    base, source = tmp_path / "base", tmp_path / "source"
    save_checkpoint(base, 5, make_state(1), {"seed": 1})
    shutil.copytree(base, source)
    with Checkpointer(source, keep=1, asynchronous=False) as checkpointer:
        recorder = recorder_of()
        checkpointer.save(5, make_state(2), {"seed": 2}, required=True)
    if "exchange" not in [operation.what for operation in recorder.operations]:
        pytest.skip("this file system cannot exchange two names in one step")
    seen = check_every_prefix(recorder, base, source, tmp_path, {5: [1, 2]})
    assert seen == {(5, 1), (5, 2)}
