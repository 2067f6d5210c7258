"""Every dtype, shape and layout of memory goes to disk and comes back bit by bit; any box of it can be read alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoint_states import make_state, same
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint import (
    Attempt,
    CheckpointReader,
    Piece,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    verify,
    write_pieces,
)
from trainwright.checkpoint.manifest import DTYPE_BYTES
from trainwright.checkpoint.tensors import chunks_of, torch_dtype
from trainwright.checkpoint.tree import flatten


@pytest.mark.parametrize("name", DTYPE_BYTES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7, 5), (2, 3, 4, 5)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_by_bit(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    dtype = torch_dtype(name)
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype is torch.bool else 256  # all bit patterns, NaN with payload included
    raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    tensor = raw.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    saved = save_checkpoint(tmp_path, 0, {"x": {"t": tensor}})
    state, _ = load_checkpoint(saved.path)
    assert same(state, {"x": {"t": tensor}})


def test_memory_layouts_come_back_as_values(tmp_path: Path) -> None:
    base = torch.randn(8, 6, 4)
    views = {
        "transposed": base.transpose(0, 2),
        "strided": base[::2, 1:5:3],
        "expanded": torch.randn(1, 5).expand(4, 5),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conjugate": torch.randn(3, 4, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, 4, dtype=torch.complex64).conj().imag,
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    state, _ = load_checkpoint(save_checkpoint(tmp_path, 0, {"v": views}).path)
    for name, tensor in views.items():
        assert torch.equal(state["v"][name], tensor), name
        assert not state["v"][name].requires_grad


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.empty(3, device="meta"), torch.empty(3, dtype=torch.uint4)],
    ids=["sparse", "meta", "dtype"],
)
def test_tensors_without_plain_bytes_are_refused_by_name(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"model/odd"):
        save_checkpoint(tmp_path, 0, {"model": {"odd": tensor}})
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(1, 9), max_size=4), st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_chunks_tile_the_tensor(shape: list[int], limit: int) -> None:
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.int16).view(shape)
    filled = torch.full(tensor.shape, -1, dtype=torch.int16)
    for offset, part in chunks_of(tensor, limit):
        place = filled[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))]
        assert part.is_contiguous()
        assert (place == -1).all()
        assert part.numel() * 2 <= max(limit, 2)
        place.copy_(part)
    assert torch.equal(filled, tensor)


def _save_in_boxes(root: Path, tensor: torch.Tensor, cuts: list[list[int]]) -> Path:
    """Save a tensor cut into a grid of boxes, each written by a rank of its own; returns the folder."""
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for size, dim_cuts in zip(tensor.shape, cuts, strict=True):
        edges = [0, *sorted({c for c in dim_cuts if 0 < c < size}), size]
        spans = list(pairwise(edges))
        boxes = [((*o, a), (*s, b - a)) for o, s in boxes for a, b in spans]
    with Attempt.open(root, 3, 1 << 20) as attempt:
        reports = []
        for rank, (offset, shape) in enumerate(boxes):
            box = tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
            piece = Piece("w", tuple(tensor.shape), offset, box)
            reports.append(write_pieces(attempt.folder, rank, [piece], step=3))
        return attempt.commit(reports, flatten({"w": tensor}).tree, {})


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_tensor_saved_by_many_ranks_loads_in_any_other_cut(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    tensor = torch.randn(shape)
    cuts = [data.draw(st.lists(st.integers(1, 6), max_size=2)) for _ in shape]
    path = _save_in_boxes(tmp_path_factory.mktemp("boxes"), tensor, cuts)
    assert verify(path).ok
    assert torch.equal(load_checkpoint(path)[0]["w"], tensor)
    low = [data.draw(st.integers(0, n)) for n in shape]
    high = [data.draw(st.integers(a, n)) for a, n in zip(low, shape, strict=True)]
    with CheckpointReader(path) as reader:
        box = reader.read_box("w", low, [b - a for a, b in zip(low, high, strict=True)])
    assert torch.equal(box, tensor[tuple(slice(a, b) for a, b in zip(low, high, strict=True))])


def test_ranks_that_leave_a_hole_overlap_or_disagree_cannot_commit(tmp_path: Path) -> None:
    tensor = torch.randn(4, 4)
    plans = {
        "hole": [Piece("w", (4, 4), (0, 0), tensor[:1]), Piece("w", (4, 4), (2, 0), tensor[2:])],
        "overlap": [Piece("w", (4, 4), (0, 0), tensor[:3]), Piece("w", (4, 4), (2, 0), tensor[2:3])],
        "outside": [Piece("w", (4, 4), (0, 0), tensor[:2]), Piece("w", (4, 4), (3, 0), tensor[2:])],
        "disagree": [Piece("w", (4, 4), (0, 0), tensor[:2]), Piece("w", (5, 4), (2, 0), tensor[2:])],
    }
    for pieces in plans.values():
        with Attempt.open(tmp_path, 1, 0) as attempt:
            reports = [write_pieces(attempt.folder, r, [piece], step=1) for r, piece in enumerate(pieces)]
            tree = flatten({"w": tensor}).tree
            with pytest.raises(CheckpointError, match="'w'"):
                attempt.commit(reports, tree, {})
        assert list(tmp_path.iterdir()) == []


def test_large_tensors_take_several_files_and_chunks(tmp_path: Path) -> None:
    tensor = torch.randn(3000, 3001)
    with Attempt.open(tmp_path, 5, 0) as attempt:
        report = write_pieces(attempt.folder, 0, [Piece("w", (3000, 3001), (0, 0), tensor)], step=5, file_bytes=1 << 20)
        path = attempt.commit([report], flatten({"w": tensor}).tree, {})
    assert sorted(p.name for p in path.iterdir()) == ["data-00000-000.bin", "data-00000-001.bin", "manifest.json"]
    assert torch.equal(load_checkpoint(path)[0]["w"], tensor)
    assert verify(path).bytes == sum(p.stat().st_size for p in path.glob("*.bin"))


def test_torch_optimizers_and_modules_resume_exactly(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 2))
        return module, torch.optim.AdamW(module.parameters(), lr=0.01)

    def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()

    module, optimizer = build()
    train(module, optimizer, range(5))
    path = save_checkpoint(tmp_path, 5, {"model": module.state_dict(), "optimizer": optimizer.state_dict()}).path
    train(module, optimizer, range(5, 9))
    other, other_optimizer = build()
    state, _ = load_checkpoint(path, like={"model": other.state_dict(), "optimizer": optimizer.state_dict()})
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    train(other, other_optimizer, range(5, 9))
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_what_does_not_fit_is_named_completely(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, make_state(1)).path
    like = make_state(1)
    like["model"]["norm.weight"] = torch.zeros(41)
    like["model"]["new.weight"] = torch.zeros(2)
    like["optimizer"]["state"][1]["exp_avg"] = torch.zeros(40)
    del like["data"]["mask"]
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path, like=like)
    text = str(refused.value)
    assert "model/norm.weight: the checkpoint has float32 [40], wanted float32 [41]" in text
    assert "model/new.weight: the checkpoint has nothing of this name" in text
    assert "optimizer/state/[1]/exp_avg: the checkpoint has bfloat16 [40], wanted float32 [40]" in text
    assert "data/mask: the checkpoint has bool [9], wanted nothing of this name" in text
    load_checkpoint(path, like=make_state(2))


def test_an_empty_state_and_paths_in_any_script(tmp_path: Path) -> None:
    root = tmp_path / "模型 训练"
    saved = save_checkpoint(root, 0, {}, {"名": "值"})
    assert load_checkpoint(saved.path) == ({}, {"名": "值"})
    (info,) = list_checkpoints(root)
    assert (info.step, info.complete, info.bytes, dict(info.meta)) == (0, True, 0, {"名": "值"})
