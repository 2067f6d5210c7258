"""Ranks that save together fail together and resume together: SIGKILL, SIGSTOP, a full disk, flipped bits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainwright.base.errors import CheckpointError, RunInUseError
from trainwright.base.events import Record, listening
from trainwright.base.faults import FAULTS_VARIABLE, registered_points
from trainwright.checkpoint import (
    Checkpointer,
    RunLock,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    save_checkpoint,
    verify,
)
from trainwright.comm import Ranks
from trainwright.testing import fork_server

# Children are forked from a server that has torch loaded and has never computed: no child imports it again.
CONTEXT = fork_server()

EVERY_RANK = ["save.before_data", "save.after_data_file", "save.before_report"]
FIRST_RANK = ["save.before_manifest", "save.before_commit", "save.after_commit", "save.before_retention"]


# --- ranks that may die -----------------------------------------------------------------------------------------------


def _enter(function: Callable[..., Any], rank: int, world: int, meeting: str, seconds: float, pipe: Any, args: Any):
    torch.set_num_threads(1)
    timeout = timedelta(seconds=seconds)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timeout)
    group = dist.group.WORLD
    ranks = Ranks(rank, world, rank, world, torch.device("cpu"), group, group, timeout)
    try:
        pipe.send(function(ranks, *args))
    except Exception as error:
        pipe.send(error)
    os._exit(0)  # the group may hold dead ranks: leaving it in order is not what is tested


def run(function: Callable[..., Any], world: int, folder: Path, *args: Any, seconds: float = 20.0) -> list[Any]:
    """What each rank returned; None for one that was killed."""
    meeting = folder.parent / f"meeting-{time.monotonic_ns()}"
    children = []
    for rank in range(world):
        pipe, theirs = CONTEXT.Pipe(duplex=False)
        arguments = (function, rank, world, str(meeting), seconds, theirs, (str(folder), *args))
        process = CONTEXT.Process(target=_enter, args=arguments, daemon=True)
        process.start()
        theirs.close()
        children.append((process, pipe))
    results = []
    deadline = time.monotonic() + 60
    try:
        for process, pipe in children:
            try:
                assert pipe.poll(max(0.0, deadline - time.monotonic())), "a rank does not come to an end"
                results.append(pipe.recv())
            except EOFError:
                process.join(10)
                assert process.exitcode == -signal.SIGKILL
                results.append(None)
    finally:
        for process, _ in children:
            process.kill()
            process.join()
    errors = [result for result in results if isinstance(result, Exception)]
    if errors:  # a rank that fails makes others fail: the cause comes first
        raise sorted(errors, key=lambda error: isinstance(error, RuntimeError))[0]
    return results


def state_of(ranks: Ranks, step: int) -> dict[str, Any]:
    """Sharded over all ranks (uneven, and empty on the last), and plain; every element depends on the step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks.world,))
    rows = {"wide": 1001, "few": ranks.world - 1}
    sharded = {
        name: distribute_tensor(whole(name, count, step), mesh, [Shard(0)], src_data_rank=None)
        for name, count in rows.items()
    }
    plain = {f"plain.{i}": torch.full((50, 10 + i), float(step)) for i in range(4)}
    return {"model": {**sharded, **plain}, "data": {"index": step}}


def whole(name: str, count: int, step: int) -> torch.Tensor:
    return torch.arange(count * 33, dtype=torch.float32).view(count, 33) + 1000.0 * step


def check(state: dict[str, Any], ranks: Ranks, step: int) -> None:
    wanted = state_of(ranks, step)
    assert state["data"] == {"index": step}
    assert list(state["model"]) == list(wanted["model"])
    for name, tensor in wanted["model"].items():
        found = state["model"][name]
        assert type(found) is type(tensor)
        if name.startswith("plain"):
            assert torch.equal(found, tensor)
        else:
            assert torch.equal(found.to_local(), tensor.to_local())
            assert found.placements == tensor.placements


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def resume_and_die(ranks: Ranks, folder: str, faults: str, asynchronous: bool) -> Any:
    """Load what is there, save the next step, and the one after it with a fault. Returns (loaded step, failure)."""
    with Checkpointer(folder, keep=2, asynchronous=asynchronous, ranks=ranks) as checkpointer:
        names = sorted(os.listdir(folder))
        loaded = checkpointer.load_latest(like=state_of(ranks, -1))
        step = loaded.step if loaded is not None else 0
        if loaded is not None:
            check(loaded.state, ranks, step)
        checkpointer.save(step + 1, state_of(ranks, step + 1), required=True)
        os.environ[FAULTS_VARIABLE] = faults
        started = time.monotonic()
        try:
            checkpointer.save(step + 2, state_of(ranks, step + 2), required=True)
            checkpointer.save(step + 3, state_of(ranks, step + 3), required=True)
        except CheckpointError as error:
            return step, names, str(error), time.monotonic() - started
    return step, names, None, 0.0


@pytest.mark.parametrize(
    ("world", "asynchronous"),
    [(2, True), pytest.param(3, True, marks=pytest.mark.slow), pytest.param(3, False, marks=pytest.mark.slow)],
)
def test_kill_9_of_each_rank_at_each_point_of_a_save(tmp_path: Path, world: int, asynchronous: bool) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    expected = 0
    cases = [(point, rank) for point in EVERY_RANK for rank in range(world)] + [(point, 0) for point in FIRST_RANK]
    for point, victim in cases:
        results = run(resume_and_die, world, folder, f"{point}:kill@rank={victim}", asynchronous)
        assert [rank for rank, result in enumerate(results) if result is None] == [victim], (point, results)
        for result in results:
            if result is None:
                continue
            step, names, failure, seconds = result
            assert step == expected, (point, victim)
            assert all(name.removeprefix("step-").isdigit() for name in names), "litter was not collected"
            assert failure is not None
            assert f"rank {victim} on " in failure, failure
            assert seconds < 10
        committed = 2 if point in ("save.after_commit", "save.before_retention") else 1
        expected += committed
    steps = [info.step for info in list_checkpoints(folder)]
    assert expected in steps


def test_the_points_above_are_all_there_are() -> None:
    assert sorted(EVERY_RANK + FIRST_RANK) == sorted(p for p in registered_points() if p.startswith("save."))


def test_a_rank_that_hangs_does_not_hold_the_others_for_ever(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    started = time.monotonic()
    results = run(save_while_one_hangs, 3, folder, seconds=3.0)
    assert time.monotonic() - started < 50
    assert "rank 1 on " in results[0]
    assert "did not answer within 3 s" in results[0]
    assert "rank 0 on " in results[2] or "rank 1 on " in results[2]
    assert [path.name for path in folder.iterdir()] == ["step-1"]


def save_while_one_hangs(ranks: Ranks, folder: str) -> Any:
    with Checkpointer(folder, ranks=ranks) as checkpointer:
        checkpointer.save(1, state_of(ranks, 1), required=True)
        os.environ[FAULTS_VARIABLE] = "save.before_data:sleep=8@rank=1"
        checkpointer.save(2, state_of(ranks, 2))
        try:
            checkpointer.wait()
        except CheckpointError as error:
            return str(error)
    return None


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_on_one_rank(tmp_path: Path, asynchronous: bool) -> None:
    folder = tmp_path / "checkpoints"
    for rank, (failures, names, kinds) in enumerate(run(save_on_full_disks, 2, folder, asynchronous)):
        for victim, (required, periodic, after_three) in enumerate(failures):
            for failure in (required, after_three):
                assert f"rank {victim} on " in failure, failure
                assert f"data-{victim:05d}-000.bin: No space left on device" in failure, failure
            assert f"rank {1 - victim}" not in required
            assert periodic == ([True, True] if asynchronous else [False])
            assert "3 checkpoints in a row" in after_three
        assert names == ["step-1", "step-10"]
        assert kinds.count("checkpoint.failed") == (6 if rank == 0 else 0)
        assert kinds.count("checkpoint.saved") == (2 if rank == 0 else 0)


def save_on_full_disks(ranks: Ranks, folder: str, asynchronous: bool) -> Any:
    """With the disk of each rank in turn: a required save, then periodic ones until it is too much; then it works."""
    records: list[Record] = []
    failures = []
    with (
        listening(records.append),
        Checkpointer(folder, asynchronous=asynchronous, keep=None, ranks=ranks) as checkpointer,
    ):
        checkpointer.save(1, state_of(ranks, 1), required=True)
        for victim in range(ranks.world):
            os.environ[FAULTS_VARIABLE] = f"save.after_data_file:enospc@rank={victim}"
            required, periodic, after_three = "", [], ""
            try:
                checkpointer.save(2, state_of(ranks, 2), required=True)
            except CheckpointError as error:
                required = str(error)
            try:
                for step in (3, 4, 5, 6):
                    periodic.append(checkpointer.save(step, state_of(ranks, step)))
                    checkpointer._join(None)
            except CheckpointError as error:
                after_three = str(error)
            failures.append((required, periodic[:2], after_three))
            del os.environ[FAULTS_VARIABLE]
            checkpointer._failures = 0
        assert checkpointer.save(10, state_of(ranks, 10), required=True)
        loaded = checkpointer.load_latest(like=state_of(ranks, 0))
        assert loaded is not None
        check(loaded.state, ranks, 10)
        names = sorted(os.listdir(folder))
    return failures, names, [record["kind"] for record in records]


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_each_file(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run(save_two, 2, folder)
    newest = folder / "step-2"
    files = sorted(path.name for path in newest.iterdir())
    assert files == ["data-00000-000.bin", "data-00001-000.bin", "manifest.json"]
    sizes = {name: (newest / name).stat().st_size for name in files}
    for seen in run(load_with_flipped_bits, 2, folder, sizes):
        assert len(seen) > 30
        for file, at, step, warning, saw in seen:
            assert step == 1, (file, at)
            assert file in warning, (file, at, warning)
            assert saw, "no rank was named"


def save_two(ranks: Ranks, folder: str) -> None:
    with Checkpointer(folder, ranks=ranks) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state_of(ranks, step), {"step": step}, required=True)


def load_with_flipped_bits(ranks: Ranks, folder: str, sizes: dict[str, int]) -> Any:
    """Flip one bit at several places of each file in turn; both ranks must take step 1, and the warning names why."""
    seen = []
    with Checkpointer(folder, ranks=ranks) as checkpointer:
        for name, size in sizes.items():
            path = Path(folder) / "step-2" / name
            for at in [*range(0, size, size // 12 + 1), size - 1]:
                if ranks.is_first:
                    flip(path, at)
                ranks.barrier()
                warnings: list[Record] = []
                with listening(warnings.append):
                    loaded = checkpointer.load_latest(like=state_of(ranks, 0))
                assert loaded is not None
                check(loaded.state, ranks, loaded.step)
                ranks.barrier()
                if ranks.is_first:
                    flip(path, at)
                warning = ranks.broadcast_json(" ".join(w["message"] for w in warnings))
                seen.append((name, at, loaded.step, warning, "rank 0 on " in warning or "rank 1 on " in warning))
                ranks.barrier()
        loaded = checkpointer.load_latest(like=state_of(ranks, 0))
        assert loaded is not None
        assert loaded.step == 2  # it was the bit
    return seen


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


# --- asynchronous -----------------------------------------------------------------------------------------------------


def test_asynchronous_is_synchronous_byte_for_byte_while_training_communicates(tmp_path: Path) -> None:
    run(save_while_training, 2, tmp_path / "checkpoints")
    folders = [tmp_path / "checkpoints" / name / "step-5" for name in ("sync", "async")]
    names = sorted(path.name for path in folders[0].iterdir() if path.name.startswith("data"))
    assert len(names) == 2
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert verify(folders[1]).ok


def save_while_training(ranks: Ranks, folder: str) -> None:
    with Checkpointer(Path(folder) / "sync", asynchronous=False, ranks=ranks) as checkpointer:
        checkpointer.save(5, state_of(ranks, 5), required=True)
    state = state_of(ranks, 5)
    with Checkpointer(Path(folder) / "async", ranks=ranks) as checkpointer:
        checkpointer.prepare(state)
        # One rank is far slower than the other, so that its thread and the training of the other really overlap.
        os.environ[FAULTS_VARIABLE] = "save.before_data:sleep=0.5@rank=1;save.before_commit:sleep=0.3"
        checkpointer.save(5, state)
        for tensor in state["model"].values():
            (tensor.to_local() if hasattr(tensor, "to_local") else tensor).zero_()
        busy = 0
        gradients = torch.ones(10_000)
        for _ in range(200):
            busy += checkpointer.is_busy
            dist.all_reduce(gradients.fill_(1.0), group=ranks.group)
            assert gradients[0].item() == ranks.world
        assert busy > 100
        del os.environ[FAULTS_VARIABLE]
        checkpointer.wait()


def test_checkpointers_come_and_go_without_leaving_sockets(tmp_path: Path) -> None:
    for first, last in run(open_and_close, 2, tmp_path / "checkpoints"):
        assert last <= first + 2


def open_and_close(ranks: Ranks, folder: str) -> tuple[int, int]:
    counts = []
    for step in range(12):
        with Checkpointer(folder, ranks=ranks) as checkpointer:
            checkpointer.save(step, state_of(ranks, step), required=True)
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts[1], counts[-1]


# --- what the ranks must agree on -------------------------------------------------------------------------------------


def test_ranks_that_do_not_have_one_state_are_refused_by_name(tmp_path: Path) -> None:
    results = run(save_different_states, 2, tmp_path / "checkpoints")
    assert results[0] == results[1]
    value, kind, layout, unsavable, step, values, lost_lock = results[0]
    assert "data/index is 0 on rank 0, 1 on rank 1" in value
    assert "model/plain.1 is a tensor on rank 0, 3 on rank 1" in kind
    assert "rank 0 has float32 [50, 10], rank 1 has float64 [50, 10]" in layout
    assert "rank 1 on " in unsavable
    assert "data/hook" in unsavable
    assert "the ranks do not save the same step: [6, 7]" in step
    assert values == 0
    assert "rank 0 on " in lost_lock
    assert "RunInUseError" in lost_lock


def test_a_rank_that_wants_something_else_stops_all_before_anything_is_read(tmp_path: Path) -> None:
    run(save_two, 2, tmp_path / "checkpoints")
    messages = run(load_something_else, 2, tmp_path / "checkpoints")
    assert messages[0] == messages[1]
    for message in messages[0]:
        assert "rank 1 on " in message
        assert "model/plain.0: the checkpoint has float32 [50, 10], wanted float32 [50, 11]" in message
        assert "model/more: the checkpoint has nothing of this name, wanted float32 [1]" in message
        # Rank 0 wants plain.1; plain.2 is wanted by nobody.
        assert "model/plain.1" not in message
        assert "model/plain.2: the checkpoint has float32 [50, 12], wanted nothing of this name" in message


def load_something_else(ranks: Ranks, folder: str) -> list[str]:
    like = state_of(ranks, 0)
    del like["model"]["plain.2"]
    if ranks.rank == 1:
        like["model"] |= {"plain.0": torch.ones(50, 11), "more": torch.ones(1)}
        del like["model"]["plain.1"]
    told = []
    os.environ[FAULTS_VARIABLE] = "load.before_read:raise"
    for load in (
        lambda: load_checkpoint(Path(folder) / "step-2", like=like, ranks=ranks),
        lambda: load_latest(folder, like=like, ranks=ranks),
    ):
        try:
            load()
        except CheckpointError as error:
            told.append(str(error))
    return told


def save_different_states(ranks: Ranks, folder: str) -> list[Any]:
    told: list[Any] = []

    def failing(save: Callable[[], Any]) -> None:
        try:
            save()
        except (CheckpointError, RunInUseError) as error:
            told.append(f"{type(error).__name__}: {error}")

    lock = RunLock(folder) if ranks.is_first else None
    with Checkpointer(Path(folder) / "saves", ranks=ranks, lock=lock) as checkpointer:
        state = state_of(ranks, 5)
        if ranks.rank == 1:
            state["model"]["extra"] = torch.ones(2)  # names may differ, but what both have must be the same
        state["data"]["index"] = ranks.rank
        failing(lambda: checkpointer.save(5, state, required=True))
        state = state_of(ranks, 5)
        if ranks.rank == 1:
            state["model"]["plain.1"] = 3
        failing(lambda: checkpointer.save(5, state, required=True))
        state = state_of(ranks, 5)
        if ranks.rank == 1:
            state["model"]["plain.0"] = state["model"]["plain.0"].double()
        failing(lambda: checkpointer.save(5, state, required=True))
        state = state_of(ranks, 5)
        if ranks.rank == 1:
            state["data"]["hook"] = print
        failing(lambda: checkpointer.save(5, state, required=True))
        failing(lambda: checkpointer.save(6 + ranks.rank, state_of(ranks, 6), required=True))
        state = state_of(ranks, 7)
        state["data"]["index"] = ranks.rank  # of states with the same names the values of rank 0 are saved
        checkpointer.save(7, state, required=True)
        loaded = checkpointer.load_latest(like=state)
        assert loaded is not None
        told.append(loaded.state["data"]["index"])
        if lock is not None:
            (Path(folder) / "run.lock").unlink()
        failing(lambda: checkpointer.save(8, state_of(ranks, 8), required=True))
        assert sorted(os.listdir(Path(folder) / "saves")) == ["step-7"]
    return told


# --- meshes of two dimensions -----------------------------------------------------------------------------------------


def test_meshes_of_two_dimensions_to_one_process_and_back(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run(save_on_a_mesh, 4, folder, 1)
    state, _ = load_checkpoint(folder / "step-1")
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, mesh_values()[name]), name
    save_checkpoint(folder, 2, state)
    run(save_on_a_mesh, 4, folder, 3)
    assert verify(folder / "step-3").ok


def mesh_values() -> dict[str, torch.Tensor]:
    names = ("rows and columns", "replicated rows", "rows twice", "all")
    return {name: torch.arange(11.0 * 7).view(11, 7) + 100 * i for i, name in enumerate(names)}


def save_on_a_mesh(ranks: Ranks, folder: str, step: int) -> None:
    """Save what tensor parallelism and FSDP2 make of tensors; at a later step, load it first."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    placements: dict[str, Any] = {
        "rows and columns": (Shard(0), Shard(1)),
        "replicated rows": (Replicate(), Shard(0)),
        "rows twice": (_StridedShard(0, split_factor=2), Shard(0)),
        "all": (Replicate(), Replicate()),
    }
    weights = {}
    for name, whole in mesh_values().items():
        local = whole
        for size, index, placement in zip((2, 2), mesh.get_coordinate(), placements[name], strict=True):
            if not placement.is_replicate():
                local = placement._split_tensor(local, size, with_padding=False)[0][index]
        weights[name] = DTensor.from_local(
            local, mesh, placements[name], run_check=False, shape=whole.shape, stride=whole.stride()
        )
    if step > 1:
        like = {"model": {name: weights[name] * 0 for name in weights}}
        loaded = load_latest(folder, like=like, ranks=ranks)
        assert loaded is not None
        for name, tensor in loaded.state["model"].items():
            assert tensor.placements == weights[name].placements
            assert torch.equal(tensor.to_local(), weights[name].to_local()), name
    save_checkpoint(folder, step, {"model": weights}, ranks=ranks)
