"""What each of several processes has of a machine, as a dry run plans for them."""

from __future__ import annotations

from trainwright.planner import MachineFacts

CPU = MachineFacts("cpu", "a processor", 8, 64 << 30, True, "/usr/bin/c++", {"fp32": 4e11, "bf16": 8e11})


def test_processes_on_a_cpu_share_its_cores_memory_and_rate() -> None:
    shared = CPU.shared_by(4)
    assert (shared.cores, shared.memory_bytes, shared.ranks) == (2, 16 << 30, 4)
    assert shared.peak == {"fp32": 1e11, "bf16": 2e11}


def test_processes_with_devices_of_their_own_share_the_host_alone() -> None:
    gpu = MachineFacts("cuda", "a device", 16, 80 << 30, True, None, {"bf16": 9e14}, host_bytes=256 << 30)
    shared = gpu.shared_by(8)
    assert (shared.memory_bytes, shared.peak, shared.host_bytes) == (80 << 30, {"bf16": 9e14}, 32 << 30)
    assert (shared.cores, shared.ranks, shared.ranks_on_host) == (2, 8, 8)


def test_a_machine_for_one_is_what_it_was() -> None:
    assert CPU.shared_by(1).memory_bytes == CPU.memory_bytes
