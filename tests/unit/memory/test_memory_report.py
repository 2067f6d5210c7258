"""Counted bytes against bytes by hand, and the meter against a step that is small enough to follow."""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainwright.base.text import display_width
from trainwright.memory import ActivationMeter, MappedState, apply_recompute, count_memory, process_memory
from trainwright.models import LlamaConfig, build_model
from trainwright.optim import OptimizerOptions, build_optimizer
from trainwright.testing import tiny_llama_config


class Tied(nn.Module):
    """10 x 4 words, tied to the head; a 4 x 6 matrix in bf16; a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.words.weight
        self.extra = nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16))
        self.register_buffer("table", torch.zeros(7))


def test_every_kind_by_hand() -> None:
    model = Tied()
    optimizer = build_optimizer(model.named_parameters(), OptimizerOptions(name="adamw", lr=0.1))
    model.words.weight.grad = torch.zeros(10, 4)
    optimizer.step()
    report = count_memory(model, optimizer, activations=11, weight_copies=5, rank=3)
    assert report.parameters == 10 * 4 * 4 + 4 * 6 * 2  # the tied matrix once
    assert report.gradients == 10 * 4 * 4
    assert report.optimizer == 2 * 10 * 4 * 4 + 4  # two moments and a step; the other parameter had no gradient
    assert report.buffers == 7 * 4
    assert report.gathered == report.on_disk == 0
    assert report.total == 208 + 160 + 324 + 28 + 11 + 5
    optimizer.state_dict()  # which makes the state of every parameter, with the fp32 copy of the bf16 one
    assert count_memory(model, optimizer).optimizer == 324 + 3 * 4 * 6 * 4 + 4


def test_state_on_disk_is_not_counted_as_memory(tmp_path: Path) -> None:
    layer = nn.Linear(64, 64, bias=False)
    optimizer = build_optimizer(layer.named_parameters(), OptimizerOptions(name="adamw", lr=0.1))
    placed = MappedState(optimizer, tmp_path)
    report = count_memory(layer, optimizer, on_disk=placed.moved_bytes)
    assert report.on_disk == 2 * 64 * 64 * 4
    assert report.optimizer == 4
    assert "optimizer on disk" in report.table()


def test_the_meter_by_hand() -> None:
    """relu(x @ W) @ V: kept are x [3, 4], the hidden layer [3, 5] once for both uses of it, and nothing of W and V."""
    first, second = nn.Linear(4, 5, bias=False), nn.Linear(5, 2, bias=False)
    model = nn.Sequential(first, nn.ReLU(), second)
    x = torch.ones(3, 4)
    with ActivationMeter(model) as meter:
        out = model(x)
    assert meter.activations == (3 * 4 + 3 * 5) * 4
    assert meter.weight_copies == 0
    out.sum().backward()
    assert meter.activations == 0


def test_copies_of_weights_that_autocast_makes_are_apart() -> None:
    model = nn.Linear(32, 16, bias=False)
    with ActivationMeter(model) as meter, torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.ones(3, 32, requires_grad=True))
    assert meter.activations == 3 * 32 * 2
    assert meter.weight_copies == 32 * 16 * 2
    del out


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc's allocator")
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_the_meter_agrees_with_the_allocator(policy: str) -> None:
    """What malloc has handed out grows over a forward pass by what the meter counts, and little else."""

    class Info(ctypes.Structure):
        names = ("arena", "ord", "smb", "hblks", "hblkhd", "usm", "fsm", "uord", "ford", "keep")
        _fields_ = [(name, ctypes.c_size_t) for name in names]

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not tell")
    libc.mallinfo2.restype = Info

    def allocated() -> int:
        info = libc.mallinfo2()
        return int(info.uord + info.hblkhd)

    config = LlamaConfig(**tiny_llama_config(num_layers=4, hidden_size=128, intermediate_size=352, head_dim=32))
    model = apply_recompute(build_model(config).train(), policy)
    ids = torch.zeros(8, 128, dtype=torch.int64)
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    before = allocated()
    with ActivationMeter(model) as meter:
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    grown = allocated() - before
    assert meter.activations > 1 << 20
    assert abs(grown - meter.activations) < 0.03 * meter.activations + 65536
    del loss


def test_the_process_is_measured() -> None:
    before = process_memory()
    size = 32 << 20
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # never memory that was here before
    block.write(b"1" * size)
    after = process_memory()
    block.close()
    assert after.resident - before.resident > 0.8 * size
    assert after.anonymous - before.anonymous > 0.8 * size
    assert after.resident_peak >= after.resident >= after.anonymous > 0


def test_table_and_json() -> None:
    model = nn.Linear(1024, 1024, bias=False)
    report = count_memory(model, activations=1 << 20, rank=1)
    assert json.loads(json.dumps(report.to_dict()))["parameters"] == 4 << 20
    lines = report.table({"parameters": 4 << 20, "activations": 2 << 20, "optimizer": 8 << 20}).splitlines()
    assert lines[0].split() == ["counted", "predicted", "difference"]
    assert "4 MiB" in lines[1]
    assert "+0.0%" in lines[1]
    assert "-100.0%" in next(line for line in lines if line.startswith("optimizer"))
    assert "-50.0%" in next(line for line in lines if line.startswith("activations"))
    assert len({display_width(line) for line in lines[1:4]}) == 1
    assert any(line.startswith("rank 1: the process holds") for line in lines)
