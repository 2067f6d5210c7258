"""`trainwright doctor`: what this machine offers, measured, and what stands in the way of training on it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from trainwright.base.device import DeviceFacts, cpu_cores, device_facts, measure_matmul_peak
from trainwright.base.text import align_columns, human_bytes, human_duration

__all__ = ["EXTRAS", "DiskSpeed", "doctor", "find_problems", "measure_disk"]

EXTRAS = {
    "hub": ("datasets", "hf:// datasets and model names"),
    "arrow": ("pyarrow", "parquet and arrow files"),
    "zstd": ("zstandard", ".zst files"),
    "sentencepiece": ("sentencepiece", "sentencepiece tokenizers"),
    "tensorboard": ("tensorboard", "TensorBoard events in the run folder"),
    "transformers": ("transformers", "opening exported models in Python"),
}
"""Optional extras: the module that tells whether one is installed, and what it is for."""

SAMPLE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class DiskSpeed:
    """fsync_seconds: median time to make 4 KiB safe; bytes_per_second: of a large file, fsync included."""

    fsync_seconds: float
    bytes_per_second: float
    free_bytes: int


@dataclass
class Findings:
    """What `find_problems` judges."""

    facts: DeviceFacts
    peak: dict[str, float]
    disk: DiskSpeed
    threads: int
    python_headers: bool
    missing: list[str] = field(default_factory=list)


def doctor(
    runs: Annotated[Path, typer.Option("--dir", help="Folder whose disk is measured (run.dir of the recipe).")] = Path(
        "runs"
    ),
) -> None:
    """Measure this machine and list what to mend. Takes about ten seconds."""
    findings = _examine(runs)
    facts, disk = findings.facts, findings.disk
    rows = [
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{facts.torch_version}, {findings.threads} threads"),
        ("device", f"{facts.kind}: {facts.name}" + (f" x {facts.count}" if facts.count > 1 else "")),
        ("cores", str(facts.cores)),
        ("memory", human_bytes(facts.memory_bytes)),
        ("bf16", "in hardware" if facts.bf16 else "not in hardware: precision auto takes fp32"),
        ("compiler", facts.compiler or "none found"),
        *((f"matmul {name}", f"{rate / 1e9:,.0f} GFLOP/s") for name, rate in findings.peak.items()),
        ("disk", f"{disk.bytes_per_second / 2**20:,.0f} MiB/s written, {human_duration(disk.fsync_seconds)} per fsync"),
        ("disk free", f"{human_bytes(disk.free_bytes)} for {runs}"),
    ]
    for extra, (_, purpose) in EXTRAS.items():
        rows.append((f"extra {extra}", f"{'missing' if extra in findings.missing else 'installed'}: {purpose}"))
    print("\n".join(align_columns(rows)))
    problems = find_problems(findings)
    print("\n" + ("no problems found" if not problems else "problems"))
    for problem, advice in problems:
        print(f"  {problem}\n    -> {advice}")


def _examine(runs: Path) -> Findings:
    import torch

    facts = device_facts()
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16} if facts.bf16 else {"fp32": torch.float32}
    return Findings(
        facts=facts,
        peak={name: measure_matmul_peak(facts.kind, dtype) for name, dtype in dtypes.items()},
        disk=measure_disk(runs),
        threads=torch.get_num_threads(),
        python_headers=(Path(sysconfig.get_path("include")) / "Python.h").is_file(),
        missing=[extra for extra, (module, _) in EXTRAS.items() if importlib.util.find_spec(module) is None],
    )


def measure_disk(folder: Path) -> DiskSpeed:
    """Speed of the disk that holds `folder`, or would: the nearest folder above it that exists and can be written."""
    place = folder.resolve()
    while not (place.is_dir() and os.access(place, os.W_OK)) and place != place.parent:
        place = place.parent
    with tempfile.TemporaryFile(dir=place) as file:
        syncs = []
        for _ in range(9):
            file.write(os.urandom(4096))
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            syncs.append(time.perf_counter() - start)
        block = os.urandom(2**20)  # random, so that a compressing file system cannot cheat
        start = time.perf_counter()
        for _ in range(SAMPLE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - start
    return DiskSpeed(sorted(syncs)[len(syncs) // 2], SAMPLE_BYTES / seconds, shutil.disk_usage(place).free)


def find_problems(findings: Findings) -> list[tuple[str, str]]:
    """(problem, advice) for everything that makes training slow, or fail."""
    facts, disk = findings.facts, findings.disk
    found = []
    if facts.kind == "cpu" and facts.compiler is None:
        found.append(
            (
                "no C++ compiler: torch.compile is off on the CPU, training runs at about 60 % speed",
                "install g++ or clang",
            )
        )
    elif facts.kind == "cpu" and not findings.python_headers:
        found.append(
            ("Python.h is missing: torch.compile fails on the CPU", "install the headers of this Python (python3-dev)")
        )
    if facts.bf16 and findings.peak.get("bf16", 0) < 1.2 * findings.peak["fp32"]:
        found.append(("bf16 is hardly faster than fp32 here", "set precision=fp32 if precision=auto does not"))
    if findings.threads < cpu_cores():
        found.append(
            (
                f"torch uses {findings.threads} of {cpu_cores()} cores",
                "unset OMP_NUM_THREADS and MKL_NUM_THREADS, or set train.threads",
            )
        )
    if facts.memory_bytes < 2 * 2**30:
        found.append(
            (f"only {human_bytes(facts.memory_bytes)} of memory", "train small models, with train.micro_batch=1")
        )
    if disk.free_bytes < 5 * 2**30:
        found.append((f"only {human_bytes(disk.free_bytes)} free on disk", "free some, or set run.dir to another disk"))
    if disk.fsync_seconds > 0.1:
        found.append(
            (
                f"fsync takes {human_duration(disk.fsync_seconds)}",
                "set run.dir to a local disk; checkpoints will stall less",
            )
        )
    return found
