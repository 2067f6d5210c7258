"""Optimizer state on the host and on disk: the update is the optimizer's own, so all is bitwise equal to memory."""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainwright.base.errors import ConfigError, MemoryLimitError
from trainwright.memory import HostState, MappedState, StateFile, place_state
from trainwright.memory.state_file import ALIGNMENT, aligned_buffer
from trainwright.optim import GroupedOptimizer, OptimizerOptions, build_optimizer

OPTIMIZERS = ["adamw", "lion", "sgd", "muon", "adafactor"]
BUCKET = 96 << 10  # small, so that the embedding below is cut into slices and there are more buckets than buffers


class Net(nn.Module):
    """An embedding much larger than a bucket, matrices, vectors below and above the size that moves, an odd shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(1500, 128)
        self.up = nn.Linear(128, 333)
        self.norm = nn.LayerNorm(333)
        self.wide = nn.Parameter(torch.randn(3001))
        self.down = nn.Linear(333, 128, bias=False)
        self.unused = nn.Linear(64, 64)


def build(name: str, dtype: torch.dtype = torch.float32, half_update: str = "master") -> tuple[Net, GroupedOptimizer]:
    torch.manual_seed(3)
    net = Net().to(dtype)
    options = OptimizerOptions(name=name, lr=0.01, weight_decay=0.1, half_update=half_update)
    return net, build_optimizer(net.named_parameters(), options)


def give_gradients(net: Net, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for name, parameter in net.named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        # One parameter never has a gradient, another only in some steps: whole buckets then have no work.
        absent = name.startswith("unused") or (name == "embed_tokens.weight" and step == 1)
        parameter.grad = None if absent else gradient


def run(net: Net, optimizer: GroupedOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.set_lr(1.0 / (1 + step))
        give_gradients(net, step)
        optimizer.step(gradient_factor=torch.tensor(0.37))


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield prefix + key, value


def assert_same(first: tuple[Net, GroupedOptimizer], second: tuple[Net, GroupedOptimizer]) -> None:
    for (name, mine), theirs in zip(first[0].named_parameters(), second[0].parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    mine_state, their_state = dict(flat(first[1].state_dict())), dict(flat(second[1].state_dict()))
    assert set(mine_state) == set(their_state)
    for key, value in mine_state.items():
        assert torch.equal(value, their_state[key]), key
    assert first[1].steps == second[1].steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_on_disk_is_bitwise_equal_to_memory(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plain, other = build(name, dtype), build(name, dtype)
    placed = MappedState(other[1], tmp_path, bucket_bytes=BUCKET)
    for net, optimizer in (plain, other):
        run(net, optimizer, range(4))
    assert_same(plain, other)
    # Reading it all as one must not disturb what follows.
    for net, optimizer in (plain, other):
        run(net, optimizer, range(4, 6))
    assert_same(plain, other)
    placed.close()
    for net, optimizer in (plain, other):
        run(net, optimizer, range(6, 7))
    assert_same(plain, other)


@pytest.mark.parametrize("half_update", ["kahan", "stochastic"])
@pytest.mark.parametrize("place", ["host", "nvme", "nvme, staged"])
def test_every_way_to_update_half_precision_weights(half_update: str, place: str, tmp_path: Path) -> None:
    plain, other = (build("adamw", torch.bfloat16, half_update) for _ in range(2))
    if place == "host":
        HostState(other[1], bucket_bytes=BUCKET, staged=True)
    else:
        MappedState(other[1], tmp_path, bucket_bytes=BUCKET, staged=True if "staged" in place else None)
    for pair in (plain, other):
        run(*pair, range(3))
    assert_same(plain, other)


@pytest.mark.parametrize("staged", [False, True])
def test_moments_of_eight_bits(staged: bool, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    plain, other = build("adamw_8bit"), build("adamw_8bit")
    placed = MappedState(other[1], tmp_path, bucket_bytes=BUCKET, staged=staged)
    # Codes of a matrix cannot be cut, so that they stay on the device where weights have to travel.
    assert placed.moved_bytes > 2 * 333 * 128 * 4
    assert any(one.name == "embed_tokens.weight" for one in placed._placed) != staged
    for pair in (plain, other):
        run(*pair, range(3))
    assert_same(plain, other)


@pytest.mark.parametrize("half_update", ["master", "kahan"])
def test_weights_that_are_loaded_later_reach_the_state(half_update: str, tmp_path: Path) -> None:
    plain, other = (build("adamw", torch.bfloat16, half_update) for _ in range(2))
    MappedState(other[1], tmp_path, bucket_bytes=BUCKET)
    for net, optimizer in (plain, other):
        run(net, optimizer, range(1))
        with torch.no_grad():
            net.embed_tokens.weight.mul_(3)
        optimizer.weights_changed()
        run(net, optimizer, range(1, 3))
    assert_same(plain, other)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("place", ["host", "nvme"])
def test_weights_that_travel_to_the_host_and_back(name: str, dtype: torch.dtype, place: str, tmp_path: Path) -> None:
    """The path of a GPU with the CPU in the place of the device: copies are made, only streams and pinning are not."""
    plain, other = build(name, dtype), build(name, dtype)
    if place == "host":
        HostState(other[1], bucket_bytes=BUCKET, staged=True)
    else:
        MappedState(other[1], tmp_path, bucket_bytes=BUCKET, staged=True)
    for net, optimizer in (plain, other):
        run(net, optimizer, range(3))
    assert_same(plain, other)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_state_dict_moves_between_places(name: str, tmp_path: Path) -> None:
    plain = build(name)
    run(*plain, range(2))
    other = build(name)
    MappedState(other[1], tmp_path, bucket_bytes=BUCKET)
    run(*other, range(1))  # something else is in it, and read ahead
    other[0].load_state_dict(plain[0].state_dict())
    other[1].load_state_dict(plain[1].state_dict())
    assert_same(plain, other)
    third = build(name)
    third[0].load_state_dict(other[0].state_dict())
    third[1].load_state_dict(other[1].state_dict())
    for pair in (plain, other, third):
        run(*pair, range(2, 4))
    assert_same(plain, other)
    assert_same(plain, third)


def test_state_that_exists_already_moves_too(tmp_path: Path) -> None:
    plain, other = build("adamw", torch.bfloat16), build("adamw", torch.bfloat16)
    for pair in (plain, other):
        run(*pair, range(2))
    MappedState(other[1], tmp_path, bucket_bytes=BUCKET)
    for pair in (plain, other):
        run(*pair, range(2, 4))
    assert_same(plain, other)


def test_updates_in_parts_see_what_steps_wrote(tmp_path: Path) -> None:
    plain, other = build("adamw"), build("adamw")
    MappedState(other[1], tmp_path, bucket_bytes=BUCKET)
    for net, optimizer in (plain, other):
        run(net, optimizer, range(2))
        give_gradients(net, 2)
        optimizer.begin_step()
        for parameter in reversed(list(net.parameters())):
            optimizer.step_part([parameter], 0.5)
        run(net, optimizer, range(3, 5))
    assert_same(plain, other)


def test_the_file_has_no_name_and_its_space_is_reserved_and_freed(tmp_path: Path) -> None:
    gc.collect()  # what earlier tests have left
    _, optimizer = build("adamw")
    placed = MappedState(optimizer, tmp_path, bucket_bytes=BUCKET)
    assert list(tmp_path.iterdir()) == []
    status = os.fstat(placed.file._fd)
    assert status.st_nlink == 0
    assert status.st_blocks * 512 >= placed.moved_bytes > 2 * 4 * 1500 * 128
    descriptors = len(os.listdir("/proc/self/fd"))
    placed.close(keep=False)
    del placed, optimizer
    # The descriptor and the one that the mapping holds.
    assert len(os.listdir("/proc/self/fd")) == descriptors - 2


def test_a_failing_update_leaves_the_store_usable(tmp_path: Path) -> None:
    net, optimizer = build("adamw")
    placed = MappedState(optimizer, tmp_path, bucket_bytes=BUCKET)
    give_gradients(net, 0)
    group = optimizer.param_groups[0]
    betas = group.pop("betas")
    with pytest.raises(KeyError):
        optimizer.step()
    group["betas"] = betas
    optimizer.step()
    placed.close()


def test_disk_space_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    too_much = (os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize // ALIGNMENT + 1000) * ALIGNMENT
    with pytest.raises(MemoryLimitError, match="on disk") as caught:
        StateFile(tmp_path, too_much)
    assert "nvme_path" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_limit_that_only_the_kernel_knows_is_refused_too(tmp_path: Path) -> None:
    _, optimizer = build("adamw")
    descriptors = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(MemoryLimitError, match="on disk"):
            MappedState(optimizer, tmp_path, bucket_bytes=BUCKET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert type(optimizer).step.__get__(optimizer) == optimizer.step


def test_folders_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="nvme_path"):
        StateFile(file / "below", ALIGNMENT)
    if Path("/dev/shm").is_dir():
        with pytest.raises(ConfigError, match="memory itself"):
            StateFile("/dev/shm", ALIGNMENT)


def test_transfers_and_mapped_tensors_see_the_same_bytes(tmp_path: Path) -> None:
    file = StateFile(tmp_path, 4 * ALIGNMENT)
    buffer = aligned_buffer(2 * ALIGNMENT)
    buffer.random_(0, 256)
    file.write(ALIGNMENT, buffer)
    mapped = file.tensor(0, torch.Size([4 * ALIGNMENT]), torch.uint8)
    assert torch.equal(mapped[ALIGNMENT : 3 * ALIGNMENT], buffer)
    assert not mapped[:ALIGNMENT].any()
    mapped[3 * ALIGNMENT :] = 7
    file.settle()
    file.read(2 * ALIGNMENT, buffer)
    assert torch.equal(buffer[ALIGNMENT:], torch.full((ALIGNMENT,), 7, dtype=torch.uint8))
    buffer.fill_(9)  # over pages that are mapped and in memory
    file.write(2 * ALIGNMENT, buffer)
    assert torch.equal(mapped[2 * ALIGNMENT :], buffer)


def test_places_that_need_no_move(tmp_path: Path) -> None:
    _, optimizer = build("adamw")
    assert place_state(optimizer, "device") is None
    assert place_state(optimizer, "host") is None  # parameters are in host memory, and so is their state
    with pytest.raises(ConfigError, match="folder"):
        place_state(optimizer, "nvme")
    placed = place_state(optimizer, "nvme", folder=tmp_path / "made" / "for it")
    assert isinstance(placed, MappedState)
    placed.close()
