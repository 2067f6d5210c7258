"""What state on a disk does to the memory of the process, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
import torch
from trainwright.base.device import memory_bytes
from trainwright.memory import MappedState
from trainwright.optim import OptimizerOptions, build_optimizer

weights = torch.nn.ParameterDict({f"w{i}": torch.nn.Parameter(torch.ones(2048, 1024)) for i in range(16)})
weights["embed"] = torch.nn.Parameter(torch.ones(8192, 1024))
optimizer = build_optimizer(weights.named_parameters(), OptimizerOptions(name="adamw", lr=1e-3))
for weight in weights.values():
    weight.grad = torch.full_like(weight, 0.1)
before = memory_bytes()
placed = MappedState(optimizer, sys.argv[1]) if sys.argv[1] else None
after = []
for _ in range(3):
    optimizer.step()
    after.append(memory_bytes() - before)
saved = []
for values in optimizer.state_dict()["parameters"].values():
    saved += [float(tensor.double().sum()) for tensor in values.values()]
optimizer.step()
after.append(memory_bytes() - before)
state = sum(weight.numel() for weight in weights.values()) * 8
print(json.dumps({"state": state, "added": max(after), "sums": saved, "weight": float(weights["embed"].sum())}))
if placed is not None:
    print(f"pid {os.getpid()}", flush=True)
    os.kill(os.getpid(), 9)
"""


def measure(folder: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == (-9 if folder else 0), done.stderr
    result: dict[str, float] = json.loads(done.stdout.splitlines()[0])
    return result


@pytest.mark.slow
def test_resident_memory_falls_by_nine_tenths_of_the_state_and_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    in_memory, on_disk = measure(""), measure(str(tmp_path))
    assert in_memory["added"] > 0.95 * in_memory["state"]
    assert in_memory["added"] - on_disk["added"] > 0.9 * on_disk["state"]
    assert on_disk["sums"] == in_memory["sums"]
    assert on_disk["weight"] == in_memory["weight"]
    assert list(tmp_path.iterdir()) == []
