"""Process-wide settings that make training on a CPU faster; called once by whoever starts a run, never on import.

A training step makes and drops tensors of tens of megabytes. glibc gives each of them back to the kernel at once, and
the kernel fills the next one with zeros, page by page: measured on a 34M-parameter llama, 400 000 page faults and
28 % of each step. Kept in the process instead, the same memory is used again from step to step.
"""

from __future__ import annotations

import ctypes
import platform
from typing import NamedTuple

__all__ = ["RuntimeSetting", "tune_cpu_runtime"]

# Numbers of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# Blocks up to 1 GiB come from the heap, which is never given back: larger ones are rare (an optimizer's first step) and
# better returned.
_MMAP_FROM_BYTES = 1 << 30
_TRIM_NEVER = (1 << 31) - 1


class RuntimeSetting(NamedTuple):
    """One thing that was set or left alone: for the plan that a run prints and saves."""

    name: str
    value: str
    reason: str


def tune_cpu_runtime() -> list[RuntimeSetting]:
    """Tell the C allocator to keep freed memory; says what was done. Calling it again changes nothing.

    Peak memory stays as it was; what the process holds between steps is its peak. Only glibc is known to need and to
    understand this; elsewhere nothing is done. Wins over the environment variables of glibc (MALLOC_*).
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return [RuntimeSetting("allocator", "unchanged", "not glibc")]
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_FROM_BYTES) and libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_NEVER)
    if not kept:
        return [RuntimeSetting("allocator", "unchanged", "mallopt refused")]
    return [
        RuntimeSetting(
            "allocator", "keeps freed memory", "page faults of large tensors cost a quarter of a step and more"
        )
    ]
