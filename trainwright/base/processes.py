"""Which process of which world this is, as the program that started it says: torchrun, mpirun, srun or our launcher.

Only environment variables are read: no torch, no network. A partial or contradictory environment is refused, because
a rank that misreads its place waits for the others until the timeout, or trains on the wrong rows.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainwright.base.errors import ConfigError

__all__ = [
    "LAUNCH_VARIABLE",
    "Launcher",
    "ProcessEnvironment",
    "derived_port",
    "expand_nodes",
    "process_environment",
]

Launcher = Literal["torchrun", "trainwright", "mpirun", "srun", "none"]

LAUNCH_VARIABLE = "TRAINWRIGHT_LAUNCH"
"""Set by our launcher to the name of the launch: RANK and its companions are then ours."""

LOOPBACK = "127.0.0.1"
FIRST_PORT, PORTS = 20000, 12000
"""Derived ports lie below 32768, where Linux begins to hand out ports for outgoing connections."""

_BATCH_STEP = 0xFFFFFFF0  # Slurm's step numbers from here on are the batch script, the interactive shell and the like


@dataclass(frozen=True)
class ProcessEnvironment:
    """This process's place. rank, local_rank and node_rank count from 0; world, local_world are numbers of processes.

    local_world: processes of this world on this machine. master_port: None when the world is one process that nobody
    launched, or when the launcher names no address to meet at.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    node_rank: int
    master_addr: str
    master_port: int | None
    launcher: Launcher


def process_environment(env: Mapping[str, str] = os.environ) -> ProcessEnvironment:
    """Recognise who started this process.

    The innermost launcher wins: RANK (ours, torchrun's, anybody's) over OpenMPI over Slurm over MPICH, because
    mpirun and torchrun are themselves started by srun and leave its variables for their children to see.

    Raises:
        ConfigError: variables are missing, malformed or contradict each other.
    """
    if any(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", LAUNCH_VARIABLE, "TORCHELASTIC_RUN_ID")):
        return _from_torch_variables(env)
    if "OMPI_COMM_WORLD_RANK" in env or "OMPI_COMM_WORLD_SIZE" in env:
        return _from_openmpi(env)
    slurm = _is_slurm_task(env)
    if slurm and ("PMI_RANK" not in env or env.get("PMI_RANK") == env.get("SLURM_PROCID")):
        return _from_slurm(env)
    if "PMI_RANK" in env or "PMI_SIZE" in env:
        return _from_hydra(env)
    return ProcessEnvironment(0, 1, 0, 1, 0, LOOPBACK, None, "none")


def derived_port(job: str) -> int:
    """A port that every rank computes alike from the name of its job, for launchers that give none."""
    digest = hashlib.sha256(job.encode()).digest()
    return FIRST_PORT + int.from_bytes(digest[:4], "big") % PORTS


def expand_nodes(text: str) -> list[str]:
    """Host names of a Slurm node list: `gpu[01-03,7]x[1-2],login` gives nine.

    Raises:
        ConfigError: the list cannot be read.
    """
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        found = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part):
            ends = [literal] if literal else [number for piece in ranges.split(",") for number in _range(piece, text)]
            found = [name + end for name in found for end in ends]
        names += found
    if not names or text.count("[") != text.count("]"):
        raise _unreadable_nodes(text)
    return names


def _range(piece: str, text: str) -> list[str]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", piece.strip())
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise _unreadable_nodes(text)
    first, last = match[1], match[2] or match[1]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _unreadable_nodes(text: str) -> ConfigError:
    return ConfigError(
        f"cannot read the node list {text!r}, expected a form like node[01-03,7]",
        hint="set MASTER_ADDR to the host of rank 0",
    )


def _from_torch_variables(env: Mapping[str, str]) -> ProcessEnvironment:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR, MASTER_PORT: torch's convention."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names[:2] if name not in env]
    if missing:
        raise _partial(env, names, missing)
    rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    launcher: Launcher = "trainwright" if LAUNCH_VARIABLE in env else "torchrun"
    if launcher == "torchrun" and "TORCHELASTIC_RUN_ID" not in env:
        _agrees_with_outer_launcher(env, rank, world)
    local_world = _number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else None
    address = env.get("MASTER_ADDR")
    one_machine = local_world in (None, world) and address in (None, LOOPBACK, "localhost", "::1")
    if "LOCAL_RANK" in env:
        local_rank = _number(env, "LOCAL_RANK")
    elif one_machine:
        local_rank = rank
    else:
        raise _partial(env, names, ["LOCAL_RANK"])
    if address is None and not one_machine:
        raise _partial(env, names, ["MASTER_ADDR"])
    if local_world is None:
        local_world = world if one_machine else max(1, min(world, world - rank + local_rank))
    node_names = [name for name in ("GROUP_RANK", "NODE_RANK") if name in env]
    node_rank = _number(env, node_names[0]) if node_names else _node_of(rank, world, local_rank, local_world)
    port = _number(env, "MASTER_PORT") if "MASTER_PORT" in env else None
    return _checked(
        ProcessEnvironment(rank, world, local_rank, local_world, node_rank, address or LOOPBACK, port, launcher),
        env,
        (*names, *node_names),
    )


def _agrees_with_outer_launcher(env: Mapping[str, str], rank: int, world: int) -> None:
    """Somebody set RANK by hand below mpirun or srun: then it must be the rank that those give."""
    pairs = [("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")]
    if _is_slurm_task(env):
        pairs.append(("SLURM_PROCID", "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"))
    for rank_name, world_name in pairs:
        if rank_name not in env or world_name not in env or _number(env, world_name) == 1:
            continue
        if _number(env, world_name) == world and _number(env, rank_name) != rank:
            raise ConfigError(
                f"the environment contradicts itself: {_seen(env, ('RANK', 'WORLD_SIZE', rank_name, world_name))}",
                hint="unset RANK, WORLD_SIZE and LOCAL_RANK: the launcher's own variables are enough",
            )


def _from_openmpi(env: Mapping[str, str]) -> ProcessEnvironment:
    prefix = "OMPI_COMM_WORLD_"
    names = tuple(prefix + name for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    missing = [name for name in names if name not in env]
    if missing:
        raise _partial(env, names, missing)
    jobs = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid")
    return _from_mpi(env, names, next((env[name] for name in jobs if name in env), None))


def _from_hydra(env: Mapping[str, str]) -> ProcessEnvironment:
    """MPICH, Intel MPI and others whose process manager is Hydra."""
    local = next(
        (
            pair
            for pair in (("MPI_LOCALRANKID", "MPI_LOCALNRANKS"), ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"))
            if pair[0] in env and pair[1] in env
        ),
        ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    )
    names = ("PMI_RANK", "PMI_SIZE", *local)
    missing = [name for name in names if name not in env]
    if missing:
        raise _partial(env, names, missing)
    jobs = ("I_MPI_HYDRA_UUID", "PMI_JOBID", "PMI_ID_MAP", "SLURM_JOB_ID")
    return _from_mpi(env, names, next((env[name] for name in jobs if env.get(name)), None))


def _from_mpi(env: Mapping[str, str], names: tuple[str, ...], job: str | None) -> ProcessEnvironment:
    rank, world, local_rank, local_world = (_number(env, name) for name in names)
    nodes = env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    if "MASTER_ADDR" in env:
        address = env["MASTER_ADDR"]
    elif local_world == world:
        address = LOOPBACK
    elif nodes:
        address = expand_nodes(nodes)[0]
    else:
        raise ConfigError(
            f"mpirun started {world} processes on several machines and nothing tells the address of rank 0: "
            f"{_seen(env, names)}",
            hint="pass it on: mpirun -x MASTER_ADDR=HOST (OpenMPI) or mpirun -genv MASTER_ADDR HOST (MPICH, Intel)",
        )
    node_rank = _node_of(rank, world, local_rank, local_world)
    port = _port(env, f"mpi {os.getuid() if hasattr(os, 'getuid') else 0} {job}")
    found = ProcessEnvironment(rank, world, local_rank, local_world, node_rank, address, port, "mpirun")
    return _checked(found, env, names)


def _is_slurm_task(env: Mapping[str, str]) -> bool:
    """srun started this process. A batch script has SLURM_PROCID too, but no step: nobody launched it."""
    if "SLURM_PROCID" not in env:
        return False
    if "SLURM_STEP_NUM_TASKS" in env:
        return True
    step = env.get("SLURM_STEP_ID", "")
    return "SLURM_NTASKS" in env and step.isdecimal() and int(step) < _BATCH_STEP


def _from_slurm(env: Mapping[str, str]) -> ProcessEnvironment:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    names = ("SLURM_PROCID", tasks, "SLURM_LOCALID", "SLURM_NODEID")
    missing = [name for name in names if name not in env]
    if missing:
        raise _partial(env, names, missing)
    rank, world, local_rank, node_rank = (_number(env, name) for name in names)
    per_node_name = next(
        (n for n in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if n in env), "SLURM_STEP_TASKS_PER_NODE"
    )
    counts = _tasks_per_node(env.get(per_node_name, ""))
    if not counts and (world == 1 or "SLURM_NTASKS_PER_NODE" in env):
        counts = [1] if world == 1 else [_number(env, "SLURM_NTASKS_PER_NODE")] * (node_rank + 1)
    if node_rank >= len(counts):
        raise _partial(env, (*names, per_node_name), [per_node_name])
    nodes = next((env[n] for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if env.get(n)), None)
    if "MASTER_ADDR" in env:
        address = env["MASTER_ADDR"]
    elif counts[node_rank] == world:
        address = LOOPBACK
    elif nodes:
        address = expand_nodes(nodes)[0]
    else:
        raise _partial(env, (*names, "SLURM_STEP_NODELIST"), ["SLURM_STEP_NODELIST"])
    port = _port(env, f"slurm {env.get('SLURM_JOB_ID')} {env.get('SLURM_STEP_ID')}")
    found = ProcessEnvironment(rank, world, local_rank, counts[node_rank], node_rank, address, port, "srun")
    return _checked(found, env, names)


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigError(f"cannot read the tasks per node {text!r}, expected a form like 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _node_of(rank: int, world: int, local_rank: int, local_world: int) -> int:
    """MPI tells no node number: computed for ranks placed in blocks (the default) or in turn over equal nodes."""
    nodes = max(1, world // max(1, local_world))
    if rank % max(1, local_world) != local_rank and rank // nodes == local_rank:
        return rank % nodes
    return rank // max(1, local_world)


def _port(env: Mapping[str, str], job: str) -> int:
    return _number(env, "MASTER_PORT") if "MASTER_PORT" in env else derived_port(job)


def _checked(found: ProcessEnvironment, env: Mapping[str, str], names: tuple[str, ...]) -> ProcessEnvironment:
    """Refuse places that cannot exist."""
    problems = []
    if not 0 <= found.rank < found.world:
        problems.append(f"rank {found.rank} of {found.world} processes")
    if not 0 <= found.local_rank < found.local_world:
        problems.append(f"local rank {found.local_rank} of {found.local_world} processes on this machine")
    if found.local_world > found.world:
        problems.append(f"{found.local_world} processes on this machine, {found.world} in all")
    if found.local_rank > found.rank:
        problems.append(f"local rank {found.local_rank} above rank {found.rank}")
    if found.master_port is not None and not 0 < found.master_port < 65536:
        problems.append(f"port {found.master_port}")
    if problems:
        raise ConfigError(
            f"the environment contradicts itself: {'; '.join(problems)} ({_seen(env, names)})",
            hint="start through torchrun, mpirun, srun or trainwright, or unset these variables to run one process",
        )
    return found


def _number(env: Mapping[str, str], name: str) -> int:
    text = env[name].strip()
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"{name}={env[name]!r}, expected a whole number", hint=f"unset {name} to run one process")
    return int(text)


def _partial(env: Mapping[str, str], names: tuple[str, ...], missing: list[str]) -> ConfigError:
    return ConfigError(
        f"this process looks launched, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; "
        f"seen: {_seen(env, names)}",
        hint="start through torchrun, mpirun, srun or trainwright, or unset these variables to run one process",
    )


def _seen(env: Mapping[str, str], names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}={env[name]}" for name in names if name in env) or "none of them"
