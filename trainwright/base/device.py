"""What this machine offers: device, memory, bf16, compiler, and how fast its matrix multiplication really is.

torch is imported inside the functions, so that the command line can import this file and stay quick.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainwright.base.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DeviceFacts",
    "DeviceKind",
    "chosen_device",
    "cpu_cores",
    "cpu_flags",
    "device_facts",
    "find_compiler",
    "free_disk_bytes",
    "host_memory_limit",
    "measure_matmul_peak",
    "memory_bytes",
    "openmp_threads",
    "peak_memory_bytes",
]

DeviceKind = Literal["cpu", "cuda", "mps"]

_NO_LIMIT = 1 << 60  # cgroup v1 writes 2^63 rounded to a page for "no limit"


@dataclass(frozen=True)
class DeviceFacts:
    """The device that a run would use, as found."""

    kind: DeviceKind
    name: str
    count: int
    """Devices of this kind; 1 for the CPU."""
    cores: int
    """CPU cores that this process may use (affinity and cgroup quota respected)."""
    memory_bytes: int
    """Memory of one device; for the CPU the smaller of physical memory and the cgroup's limit."""
    bf16: bool
    """Whether the hardware multiplies bfloat16 itself (a CPU without it emulates, slower than fp32)."""
    compiler: str | None
    """The C++ compiler that torch.compile would use on the CPU, if one is found."""
    torch_version: str


@functools.cache
def device_facts(kind: DeviceKind | None = None) -> DeviceFacts:
    """The facts of `kind`, or of the best device present: CUDA, then Apple's MPS, then the CPU. Found once, cached."""
    import torch

    if kind is None:
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, count, memory = properties.name, torch.cuda.device_count(), int(properties.total_memory)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "mps":
        name, count, memory, bf16 = f"Apple {platform.machine()}", 1, host_memory_limit(), True
    else:
        name, count, memory = _cpu_name(), 1, host_memory_limit()
        # avx512_bf16 multiplies bf16 in vector registers, amx_bf16 in tiles, bf16 is the name of the same on ARM.
        bf16 = bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})
    return DeviceFacts(
        kind=kind,
        name=name,
        count=count,
        cores=cpu_cores(),
        memory_bytes=memory,
        bf16=bf16,
        compiler=find_compiler(),
        torch_version=str(torch.__version__),
    )


def chosen_device(name: str) -> torch.device:
    """The device of that name: cpu, cuda (or cuda:1), mps; "auto" is the best one present.

    Raises:
        ConfigError: no device is called so, or this machine has none.
    """
    import torch

    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    kind, _, number = name.partition(":")
    if name == "auto":
        return torch.device(device_facts().kind)
    if kind not in there or not (number.isdecimal() or number == ""):
        raise ConfigError(f"there is no device {name!r}", hint="auto, cpu, cuda, cuda:1 or mps")
    if int(number or 0) >= there[kind]:
        present = ", ".join(f"{count} {one}" for one, count in there.items() if count)
        raise ConfigError(f"device {name} is not here; this machine has {present}", hint="leave it at auto")
    return torch.device(name)


def cpu_cores() -> int:
    """CPU cores this process may use: the smaller of its affinity mask and its cgroup's CPU quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_cpu_quota()
    return max(1, min(cores, int(quota + 0.5))) if quota is not None else cores


def openmp_threads(env: Mapping[str, str] | None = None) -> int | None:
    """Threads of this process that OMP_NUM_THREADS asks for, or None.

    torchrun writes 1 into the environment of several ranks where nobody set it: from there 1 asks for nothing.
    """
    env = os.environ if env is None else env
    first = env.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # further numbers are of nested regions
    if not first.isdecimal() or int(first) == 0:
        return None
    by_torchrun = "TORCHELASTIC_RUN_ID" in env and env.get("LOCAL_WORLD_SIZE", "1") != "1"
    return None if by_torchrun and int(first) == 1 else int(first)


def host_memory_limit() -> int:
    """Bytes of memory this process can have: physical memory or the cgroup's limit, whichever is smaller."""
    limits = [limit for limit in _cgroup_memory_limits() if limit < _NO_LIMIT]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits) if limits else 0


def free_disk_bytes(folder: str | Path) -> int:
    """Bytes that are free where `folder` lies or would be made."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _cgroup_folders(controller: str) -> list[tuple[Path, int]]:
    """(folder, cgroup version) of this process and its ancestors; empty outside Linux."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders: list[tuple[Path, int]] = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            base, version = root, 2
        elif controller in controllers.split(","):
            base, version = root / controller, 1
        else:
            continue
        # A limit may stand at any level above; inside a container the path may not exist, and only the root does.
        parts = Path(path.lstrip("/")).parts
        folders += [(base.joinpath(*parts[:depth]), version) for depth in range(len(parts), -1, -1)]
    return folders


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _cgroup_memory_limits() -> list[int]:
    found = []
    for folder, version in _cgroup_folders("memory"):
        text = _read_text(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        if text and text.isdecimal():
            found.append(int(text))
    return found


def _cgroup_cpu_quota() -> float | None:
    """Cores granted by the tightest CPU quota above this process, or None."""
    found = []
    for folder, version in _cgroup_folders("cpu"):
        if version == 2:
            quota, _, period = (_read_text(folder / "cpu.max") or "").partition(" ")
        else:
            quota, period = (_read_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period):
            found.append(int(quota) / int(period))
    return min(found) if found else None


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the first CPU as the kernel names them ("avx512_bf16"); empty where it tells none."""
    for line in (_read_text(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _cpu_name() -> str:
    for line in (_read_text(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def find_compiler() -> str | None:
    """Path of the C++ compiler torch.compile would take: $CXX, else g++, clang++ or c++; None when there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def measure_matmul_peak(device: str | torch.device, dtype: torch.dtype, *, seconds: float = 1.5) -> float:
    """The best matrix-multiplication rate of this device, in FLOP/s: the yardstick for model FLOPs utilisation.

    Tries a few large square shapes and takes the fastest single run of each, because a neighbour can only slow one
    down. Takes about `seconds`; uses the thread count that torch is set to.
    """
    import torch

    device = torch.device(device)
    sizes = (1024, 2048) if device.type == "cpu" else (4096, 8192)
    best = 0.0
    for size in sizes:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty(size, size, device=device, dtype=dtype)
        torch.mm(a, b, out=out)  # the first call packs weights, picks kernels and starts threads
        _synchronize(device)
        end = time.perf_counter() + seconds / len(sizes)
        while True:
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            _synchronize(device)
            now = time.perf_counter()
            best = max(best, 2 * size**3 / (now - start))
            if now >= end:
                break
    return best


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_bytes() -> int:
    """Resident memory of this process now, in bytes (0 where the system does not tell)."""
    text = _read_text(Path("/proc/self/statm"))
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") if text else peak_memory_bytes()


def peak_memory_bytes() -> int:
    """The most resident memory this process has had since it started, in bytes."""
    for line in (_read_text(Path("/proc/self/status")) or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # not a Unix
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
