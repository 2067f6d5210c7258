"""Whatever happens to the files: the checkpoint is refused by name, the one before is used, nothing is executed."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_states import make_state, same

from trainwright.base.errors import CheckpointError
from trainwright.base.events import Record
from trainwright.checkpoint import (
    Checkpointer,
    latest,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    save_checkpoint,
    verify,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints, of steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, make_state(step), {"step": step})
    return tmp_path


class Bomb:
    """Executes code when it is unpickled: makes a file that the test then looks for."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch '{self.witness}'",)


def refused_and_stepped_back(root: Path, records: list[Record], *names: str) -> str:
    """Every way to load refuses step 2 by its path and `names`, and falls back to step 1. Returns the reason."""
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(root / "step-2")
    assert latest(root) == root / "step-1"
    loaded = load_latest(root)
    assert loaded is not None
    assert same(loaded.state, make_state(1))
    assert loaded.meta == {"step": 1}
    report = verify(root / "step-2")
    assert not report.ok
    warnings = [r["message"] for r in records if r["kind"] == "warning"]
    texts = [str(refused.value), " ".join(map(str, report.problems)), *warnings]
    assert len(warnings) == 2
    for text in texts:
        for name in names:
            assert name in text, text
    assert "step-2" in str(refused.value)
    return str(refused.value)


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir())


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_anywhere(root: Path, records: list[Record], seed: int) -> None:
    choose = random.Random(seed)
    target = files_of(root / "step-2")[seed % 2]
    data = bytearray(target.read_bytes())
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    target.write_bytes(data)
    refused_and_stepped_back(root, records, target.name)


def test_a_flipped_bit_is_reported_with_its_tensor(root: Path, records: list[Record]) -> None:
    weight = make_state(2)["model"]["norm.weight"]
    raw = weight.view(torch.uint8).numpy().tobytes()
    target = root / "step-2" / "data-00000-000.bin"
    data = bytearray(target.read_bytes())
    data[data.index(raw) + 5] ^= 16
    target.write_bytes(data)
    refused_and_stepped_back(root, records, target.name, "model/norm.weight")
    (problem,) = verify(root / "step-2").problems
    assert (problem.file, problem.tensor) == (target.name, "model/norm.weight")


def test_a_change_in_the_padding(root: Path, records: list[Record]) -> None:
    target = root / "step-2" / "data-00000-000.bin"
    data = bytearray(target.read_bytes())
    zeros = data.index(bytes(32))
    data[zeros + 7] = 1
    target.write_bytes(data)
    refused_and_stepped_back(root, records, target.name, "padding")


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("how", ["truncated", "longer", "empty", "missing", "folder", "link", "pipe", "pickle"])
def test_a_file_that_is_not_what_it_was(root: Path, records: list[Record], index: int, how: str) -> None:
    target = files_of(root / "step-2")[index]
    data = target.read_bytes()
    witness = root / "executed"
    target.unlink()
    match how:
        case "truncated":
            target.write_bytes(data[:-1])
        case "longer":
            target.write_bytes(data + b"\0")
        case "empty":
            target.write_bytes(b"")
        case "folder":
            target.mkdir()
        case "link":  # even to the very bytes
            (root / "elsewhere").write_bytes(data)
            target.symlink_to(root / "elsewhere")
        case "pipe":
            os.mkfifo(target)
        case "pickle":
            target.write_bytes(pickle.dumps(Bomb(witness)))
    refused_and_stepped_back(root, records, target.name)
    assert not witness.exists()


@pytest.mark.parametrize("padded", [False, True])
def test_a_torch_pickle_in_place_of_the_data_file(root: Path, records: list[Record], padded: bool) -> None:
    witness = root / "executed"
    target = root / "step-2" / "data-00000-000.bin"
    size = target.stat().st_size
    torch.save({"model": Bomb(witness)}, target)
    if padded:  # of the right size, so that only its hash is wrong
        data = target.read_bytes()[:size]
        target.write_bytes(data + bytes(size - len(data)))
    refused_and_stepped_back(root, records, target.name)
    assert not witness.exists()


def test_a_folder_that_is_a_link_or_renamed(root: Path, records: list[Record]) -> None:
    shutil.move(root / "step-2", root / "kept")
    (root / "step-2").symlink_to(root / "kept", target_is_directory=True)
    assert "symbolic link" in refused_and_stepped_back(root, records, "symbolic link")
    (root / "step-2").unlink()
    assert load_checkpoint(root / "kept")[1] == {"step": 2}  # a copy under another name is fine
    shutil.move(root / "kept", root / "step-3")
    with pytest.raises(CheckpointError, match="it is of step 2, the folder is named step-3"):
        load_checkpoint(root / "step-3")


def test_an_extra_file_is_never_opened_but_verify_names_it(root: Path, records: list[Record]) -> None:
    witness = root / "executed"
    (root / "step-2" / "model.pt").write_bytes(pickle.dumps(Bomb(witness)))
    assert same(load_checkpoint(root / "step-2")[0], make_state(2))
    (problem,) = verify(root / "step-2").problems
    assert problem.file == "model.pt"
    assert not witness.exists()


def test_files_swapped_between_two_checkpoints(root: Path, records: list[Record]) -> None:
    shutil.copy(root / "step-1" / "data-00000-000.bin", root / "step-2" / "data-00000-000.bin")
    refused_and_stepped_back(root, records, "data-00000-000.bin")


def test_when_all_are_damaged_nothing_starts_over_silently(root: Path, records: list[Record]) -> None:
    (root / "step-1" / "manifest.json").unlink()
    data = root / "step-2" / "data-00000-000.bin"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    for load in (latest, load_latest, Checkpointer(root).latest, Checkpointer(root).load_latest):
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints") as refused:
            load(root) if load in (latest, load_latest) else load()
        assert "step-1" in str(refused.value)
        assert "step-2" in str(refused.value)


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert load_latest(tmp_path / "nowhere") is None
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_listing_shows_the_damaged_ones_too(root: Path) -> None:
    (root / "step-2" / "data-00000-000.bin").unlink()
    (root / "step-03").mkdir()
    (root / "step-4.tmp-x").mkdir()
    one, two = list_checkpoints(root)
    assert (one.step, one.complete, dict(one.meta)) == (1, True, {"step": 1})
    assert one.bytes > 0
    assert (two.step, two.complete) == (2, False)
    assert "data-00000-000.bin: the file is missing" in (two.problem or "")


def test_bytes_that_are_no_bool_are_refused_although_their_hash_is_right(tmp_path: Path) -> None:
    odd = torch.tensor([2, 1, 0], dtype=torch.uint8).view(torch.bool)
    path = save_checkpoint(tmp_path, 0, {"x": {"mask": odd}}).path
    with pytest.raises(CheckpointError, match="'x/mask'"):
        load_checkpoint(path)
