"""What each of several processes has of a machine, as a dry run plans for them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trainwright.base.device import openmp_threads
from trainwright.planner import MachineFacts

CPU = MachineFacts("cpu", "a processor", 8, 64 << 30, True, "/usr/bin/c++", {"fp32": 4e11, "bf16": 8e11})


def test_processes_on_a_cpu_share_its_cores_memory_and_rate() -> None:
    shared = CPU.shared_by(4)
    assert (shared.cores, shared.memory_bytes, shared.ranks) == (2, 16 << 30, 4)
    assert shared.peak == {"fp32": 1e11, "bf16": 2e11}


def test_threads_that_were_asked_for_are_those_of_each_process() -> None:
    one = replace(CPU, threads=1)  # whose rate was measured with one thread
    assert (one.shared_by(4).cores, one.shared_by(4).threads, one.shared_by(4).peak) == (2, 1, CPU.peak)
    assert replace(CPU, threads=4).shared_by(4).peak == {"fp32": 2e11, "bf16": 4e11}


def test_processes_with_devices_of_their_own_share_the_host_alone() -> None:
    gpu = MachineFacts("cuda", "a device", 16, 80 << 30, True, None, {"bf16": 9e14}, host_bytes=256 << 30)
    shared = gpu.shared_by(8)
    assert (shared.memory_bytes, shared.peak, shared.host_bytes) == (80 << 30, {"bf16": 9e14}, 32 << 30)
    assert (shared.cores, shared.ranks, shared.ranks_on_host) == (2, 8, 8)


def test_a_machine_for_one_is_what_it_was() -> None:
    assert CPU.shared_by(1).memory_bytes == CPU.memory_bytes


@pytest.mark.parametrize(
    ("env", "threads"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": " 4,2"}, 4),
        ({"OMP_NUM_THREADS": "many"}, None),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, None),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, 2),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1"}, 1),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 1),
    ],
)
def test_what_the_environment_asks_for(env: dict[str, str], threads: int | None) -> None:
    assert openmp_threads(env) == threads
