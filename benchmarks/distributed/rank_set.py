"""A contender of N processes: a set of ranks that compute together, are timed together, and whose bytes are counted."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from alternate import Contender, alternate

__all__ = ["RankSet", "alternate", "enter_own_network", "loopback_bytes"]

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


def enter_own_network() -> bool:
    """Move this process (and its future children) into a network of its own, where only they use `lo`.

    Needs the right to do so (root, Linux); without it nothing changes and False is returned.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(_CLONE_NEWNET) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))
    return True


def loopback_bytes() -> int:
    """Bytes that `lo` has received so far, TCP and IP headers included (below 0.1 % with loopback's large packets)."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    raise RuntimeError("no interface lo in /proc/net/dev")


class RankSet(Contender):
    """`ranks` processes of one script, one thread each, driven in step.

    Args:
        name: shown in the tables.
        command: interpreter, script and its arguments; RANK and the like are set here.
        ranks: how many processes.

    Attributes:
        losses: of every step, the mean over the ranks.
        bytes_of_turns: that `lo` carried.
        peak: largest resident memory of any rank, bytes, so far.
        disturbances: of every turn, processors that other programs kept busy meanwhile, on average.
    """

    def __init__(self, name: str, command: Sequence[str], ranks: int) -> None:
        super().__init__(name)
        self.command = list(command)
        self.ranks = ranks
        self.bytes_of_turns: list[int] = []
        self.losses: list[float] = []
        self.peak = 0
        self.disturbances: list[float] = []
        self._processes: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        for rank in range(self.ranks):
            self._processes.append(
                subprocess.Popen(
                    self.command,
                    env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

    def turn(self, steps: int) -> None:
        """All ranks take `steps` steps; the time of a step is that of its slowest rank."""
        before, others, began = loopback_bytes(), self._ticks_of_others(), time.perf_counter()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        reports = [self._report(rank) for rank in range(self.ranks)]
        self.bytes_of_turns.append(loopback_bytes() - before)
        busy = (self._ticks_of_others() - others) / os.sysconf("SC_CLK_TCK")
        self.disturbances.append(max(0.0, busy / (time.perf_counter() - began)))
        self.seconds_of_turns.append([max(of_step) for of_step in zip(*(r["seconds"] for r in reports), strict=True)])
        self.peak = max(_peak_resident(process.pid) for process in self._processes)
        self.losses += [sum(of_step) / self.ranks for of_step in zip(*(r["values"] for r in reports), strict=True)]

    def _ticks_of_others(self) -> int:
        """Processor time of the whole machine, less that of the ranks, in clock ticks."""
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        user, nice, system, _, _, irq, softirq = map(int, words[1:8])
        return user + nice + system + irq + softirq - sum(_processor_ticks(process.pid) for process in self._processes)

    def _report(self, rank: int) -> dict[str, list[float]]:
        process = self._processes[rank]
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: rank {rank} ended early with exit code {process.wait()}")
        report: dict[str, list[float]] = json.loads(line)
        return report

    def psi(self, steps: int, parameters: int) -> float:
        """Bytes of a step in units of Psi, counted in the last turn, which had `steps` steps.

        Psi is what a rank sends of one bf16 copy of all parameters, 2 bytes each, when it keeps its own 1/N of them:
        so an all-gather or a reduce-scatter that sends no more than needed costs 1, an all-reduce 2.
        """
        share = (self.ranks - 1) * 2 * parameters
        return self.bytes_of_turns[-1] / steps / share

    def finish(self, timeout: float = 60.0) -> None:
        """No more turns: let the ranks do what they do at the end (such as writing weights) and wait for them."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for rank, process in enumerate(self._processes):
            if process.wait(timeout) != 0:
                raise RuntimeError(f"{self.name}: rank {rank} ended with exit code {process.returncode}")

    def stop(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _processor_ticks(pid: int) -> int:
    """User and system time of a process and all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _peak_resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no VmHWM of process {pid}")
