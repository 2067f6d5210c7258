"""Who started this process: environments as torchrun, mpirun (OpenMPI, MPICH, Intel) and srun really set them."""

from __future__ import annotations

import pytest

from trainwright.base.errors import ConfigError
from trainwright.base.processes import (
    LAUNCH_VARIABLE,
    ProcessEnvironment,
    derived_port,
    expand_nodes,
    process_environment,
)

TORCHRUN = {
    "LOCAL_RANK": "1",
    "RANK": "3",
    "GROUP_RANK": "1",
    "ROLE_RANK": "3",
    "ROLE_NAME": "default",
    "LOCAL_WORLD_SIZE": "2",
    "WORLD_SIZE": "4",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-node1-4711@1",
    "PMIX_RANK": "1",
}
MPICH = {
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
    "PMI_FD": "9",
    "MPI_LOCALNRANKS": "4",
    "MPI_LOCALRANKID": "2",
    "HYDI_CONTROL_FD": "8",
}
SRUN = {
    "SLURM_JOB_ID": "8123",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_TASKS_PER_NODE": "2(x3),1",
    "SLURM_JOB_NODELIST": "gpu-[008-010,012]",
    "SLURM_STEP_NODELIST": "gpu-[008-010,012]",
}


def test_nobody_launched() -> None:
    assert process_environment({}) == ProcessEnvironment(0, 1, 0, 1, 0, "127.0.0.1", None, "none")
    assert process_environment({"MASTER_ADDR": "node1", "MASTER_PORT": "1"}).launcher == "none"


def test_torchrun() -> None:
    assert process_environment(TORCHRUN) == ProcessEnvironment(3, 4, 1, 2, 1, "node1", 29500, "torchrun")


def test_our_launcher() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "20001", LAUNCH_VARIABLE: "x"}
    assert process_environment(env) == ProcessEnvironment(1, 2, 1, 2, 0, "127.0.0.1", 20001, "trainwright")
    assert process_environment({**SRUN, **env}).launcher == "trainwright"


def test_ranks_on_one_machine_without_an_address() -> None:
    found = process_environment({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    assert found == ProcessEnvironment(1, 2, 1, 2, 0, "127.0.0.1", None, "torchrun")


def test_openmpi() -> None:
    found = process_environment(OPENMPI)
    assert found == ProcessEnvironment(1, 2, 1, 2, 0, "127.0.0.1", found.master_port, "mpirun")
    assert found.master_port is not None
    first = process_environment({**OPENMPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"})
    assert first.master_port == found.master_port
    other = process_environment({**OPENMPI, "PMIX_NAMESPACE": "prterun-node1-4712@1"})
    assert other.master_port != found.master_port


def test_openmpi_on_several_machines() -> None:
    spread = {**OPENMPI, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    with pytest.raises(ConfigError, match="address of rank 0"):
        process_environment(spread)
    given = process_environment({**spread, "MASTER_ADDR": "node1", "MASTER_PORT": "4000"})
    assert (given.master_addr, given.master_port, given.node_rank) == ("node1", 4000, 1)
    # mpirun inside a Slurm job: its daemons are srun's tasks, SLURM_PROCID is theirs.
    inside = process_environment({**SRUN, **spread})
    assert (inside.launcher, inside.rank, inside.world, inside.master_addr) == ("mpirun", 3, 4, "gpu-008")
    # placed in turn over the nodes: rank 1 of 4 is the first of the second node
    turn = {**spread, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "MASTER_ADDR": "node1"}
    assert process_environment(turn).node_rank == 1


def test_mpich_and_intel() -> None:
    found = process_environment(MPICH)
    assert found == ProcessEnvironment(2, 4, 2, 4, 0, "127.0.0.1", found.master_port, "mpirun")
    newer = {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "2", "PMI_LOCAL_SIZE": "4"}
    assert process_environment(newer).local_rank == 2


def test_srun() -> None:
    found = process_environment(SRUN)
    assert found == ProcessEnvironment(5, 7, 1, 2, 2, "gpu-008", derived_port("slurm 8123 0"), "srun")
    last = process_environment({**SRUN, "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"})
    assert (last.local_world, last.master_port) == (1, found.master_port)
    # srun --mpi=pmi2 sets PMI_RANK beside its own
    assert process_environment({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "7"}).launcher == "srun"
    one_node = {**SRUN, "SLURM_STEP_NUM_TASKS": "7", "SLURM_NODEID": "0", "SLURM_LOCALID": "5"}
    assert process_environment({**one_node, "SLURM_STEP_TASKS_PER_NODE": "7"}).master_addr == "127.0.0.1"


def test_a_batch_script_is_not_a_task() -> None:
    batch = {k: v for k, v in SRUN.items() if not k.startswith("SLURM_STEP")}
    assert process_environment({**batch, "SLURM_PROCID": "0"}).launcher == "none"
    assert process_environment({**batch, "SLURM_PROCID": "0", "SLURM_STEP_ID": str(0xFFFFFFFB)}).launcher == "none"


def test_torchrun_inside_srun() -> None:
    assert process_environment({**SRUN, **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set; seen: RANK=0"),
        ({"LOCAL_RANK": "0"}, "RANK and WORLD_SIZE are not set; seen: LOCAL_RANK=0"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, "LOCAL_RANK is not set"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "rank 4 of 4 processes"),
        ({"RANK": "two", "WORLD_SIZE": "4"}, "RANK='two', expected a whole number"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "local rank 2 of 2 processes on this machine"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, "8 processes on this machine, 4 in all"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "port 99999"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE and OMPI_COMM_WORLD_LOCAL_RANK and"),
        ({**OPENMPI, "RANK": "0", "WORLD_SIZE": "2"}, "contradicts itself: RANK=0, WORLD_SIZE=2, OMPI_COMM_WORLD_RANK"),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "7", "LOCAL_RANK": "0"}, "SLURM_PROCID=5"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID is not set"),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu-[3-1]"}, "cannot read the node list"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x)"}, "cannot read the tasks per node"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALRANKID and MPI_LOCALNRANKS are not set"),
    ],
)
def test_refused_with_what_was_seen(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        process_environment(env)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("node[01-03,7]", ["node01", "node02", "node03", "node7"]),
        ("a[1-2]b[3,4],login", ["a1b3", "a1b4", "a2b3", "a2b4", "login"]),
        ("n[099-101]", ["n099", "n100", "n101"]),
        ("a-1.cluster,b-2.cluster", ["a-1.cluster", "b-2.cluster"]),
    ],
)
def test_node_lists(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


@pytest.mark.parametrize("text", ["", "n[1", "n[]", "n[1-]", "n[a-b]"])
def test_unreadable_node_lists(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the node list"):
        expand_nodes(text)


def test_derived_ports_lie_below_those_of_outgoing_connections() -> None:
    assert all(20000 <= derived_port(f"job {number}") < 32000 for number in range(1000))
