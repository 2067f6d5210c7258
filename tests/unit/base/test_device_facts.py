"""Facts about this machine: plausible, within the limits of its container, and found without torch where possible."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainwright.base import device
from trainwright.base.device import chosen_device, device_facts
from trainwright.base.errors import ConfigError


def test_facts_of_the_cpu() -> None:
    facts = device.device_facts("cpu")
    assert facts.kind == "cpu"
    assert 1 <= facts.cores <= (os.cpu_count() or 1)
    assert 2**27 < facts.memory_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert facts.compiler is None or Path(facts.compiler).exists()
    assert facts.name


def test_a_tighter_limit_of_any_level_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n", encoding="utf-8")
    (inner.parent / "memory.max").write_text(f"{2**28}\n", encoding="utf-8")
    (inner.parent / "cpu.max").write_text("50000 100000\n", encoding="utf-8")
    folders = [(inner, 2), (inner.parent, 2), (tmp_path, 2)]
    monkeypatch.setattr(device, "_cgroup_folders", lambda controller: folders)
    assert device.host_memory_limit() == 2**28
    assert device.cpu_cores() == 1


def test_version_one_control_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n", encoding="utf-8")
    monkeypatch.setattr(device, "_cgroup_folders", lambda controller: [(tmp_path, 1)])
    unlimited = device.host_memory_limit()
    assert unlimited == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "memory.limit_in_bytes").write_text("104857600\n", encoding="utf-8")
    assert device.host_memory_limit() == 104857600
    (tmp_path / "cpu.cfs_quota_us").write_text("-1\n", encoding="utf-8")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n", encoding="utf-8")
    assert device.cpu_cores() >= 1


def test_the_compiler_named_by_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "my-c++"
    compiler.write_text("#!/bin/sh\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert device.find_compiler() == str(compiler)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.find_compiler() is None


def test_memory_grows_with_what_is_held() -> None:
    before = device.memory_bytes()
    held = mmap.mmap(-1, 64 * 2**20)  # pages of its own, whatever the C allocator keeps from earlier tests
    held.write(os.urandom(1) * (64 * 2**20))
    assert device.memory_bytes() - before > 48 * 2**20
    assert device.peak_memory_bytes() >= device.memory_bytes() - 2**20
    held.close()


def test_the_matmul_peak_is_a_rate_this_machine_can_have() -> None:
    import torch

    peak = device.measure_matmul_peak("cpu", torch.float32, seconds=0.2)
    assert 1e8 < peak < 1e14


def test_importing_the_room_does_not_import_torch() -> None:
    code = (
        "import sys, trainwright.base.device, trainwright.base.units, trainwright.base.faults, trainwright.base.text\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_device_is_chosen_by_its_name() -> None:
    assert str(chosen_device("cpu")) == "cpu"
    assert chosen_device("auto").type == device_facts().kind


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1", "cpu:7", "cuda:99", "CPU"])
def test_a_device_that_is_not_there_is_refused_with_what_is(name: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no device|this machine has 1 cpu") as caught:
        chosen_device(name)
    assert caught.value.hint is not None
