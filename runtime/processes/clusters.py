"""Processes that a cluster's launcher (srun, mpirun, a Kubernetes operator) starts without torchrun.

Such launchers describe each process in variables of their own, which `torch_variables` translates into the variables of
torch's launchers. The conventions are from the manuals of Slurm (srun), Open MPI (mpirun), MPICH and Intel MPI (PMI),
MVAPICH, IBM's jsrun, HPE's PALS and Flux, and from Kubeflow's PyTorchJob.
"""

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from options import UsageError
from runtime.cpu.cores import usable_cores

__all__ = ["first_host", "torch_variables"]

FIRST_PORT, PORTS = 15000, 15000  # ports of jobs: below those that Linux hands out itself
LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class Convention:
    """The variables that describe a process: its rank among all processes and on its machine.

    Args:
        name: the launcher, for messages.
        size: the number of processes.
        rank: this process's index among them.
        local_rank: its index on its machine.
        local_size: the number of processes on its machine; "" if it is not described.
        hosts: the list of machines; "" if it is not described.
        job: variables that identify the job; all its processes have the same.
    """

    name: str
    size: str
    rank: str
    local_rank: str
    local_size: str = ""
    hosts: str = ""
    job: tuple[str, ...] = ()


# The batch script of a Slurm job, which is one process, has SLURM_NTASKS and SLURM_PROCID too, but no SLURM_STEP_NUM_TASKS.
CONVENTIONS = (
    Convention("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE",
               "SLURM_STEP_NODELIST", ("SLURM_JOB_ID", "SLURM_STEP_ID")),
    Convention("mpirun (Open MPI)", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK",
               "OMPI_COMM_WORLD_LOCAL_SIZE", job=("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")),
    Convention("mpirun (MVAPICH)", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK",
               "MV2_COMM_WORLD_LOCAL_SIZE"),
    Convention("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE",
               "LSB_MCPU_HOSTS", ("LSB_JOBID",)),
    Convention("mpiexec (MPICH, Intel MPI)", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Convention("mpiexec (PALS)", "PMI_SIZE", "PALS_RANKID", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE", job=("PALS_APID",)),
    Convention("flux run", "FLUX_JOB_SIZE", "FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID", job=("FLUX_JOB_ID",)),
)  # fmt: skip


def torch_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that a launcher of torch would have set for this process; {} if no cluster's launcher started several.

    MASTER_ADDR and MASTER_PORT are used if they are set. Otherwise, the address is the first machine of the job, and the port
    follows from the job's identifier.

    Raises:
        UsageError: the processes are on several machines, and nothing says on which the first one is.
    """
    if "SLURM_PTY_PORT" in environment:  # a shell of srun --pty: it is one of several tasks, and the others do nothing
        return {}
    for convention in CONVENTIONS:
        names = (convention.size, convention.rank, convention.local_rank)
        if all(environment.get(name, "").isdecimal() for name in names) and int(environment[convention.size]) > 1:
            return _translated(convention, environment)
    return _operator_variables(environment)


def first_host(hosts: str) -> str:
    """The first machine in Slurm's compressed list, such as node[07-12,20],login1, or in LSF's list of names and slots."""
    first = re.match(r"(?:[^\s,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else ""


def _translated(convention: Convention, environment: Mapping[str, str]) -> dict[str, str]:
    size, rank, local_rank = (environment[name] for name in (convention.size, convention.rank, convention.local_rank))
    local_size = _local_size(environment.get(convention.local_size, ""), environment.get("SLURM_NODEID", "0"))
    alone = local_size == size or environment.get("SLURM_STEP_NUM_NODES") == "1"
    address = environment.get("MASTER_ADDR") or (LOCAL if alone else first_host(environment.get(convention.hosts, "")))
    if not address:
        if rank != "0":  # one process reports the error
            raise SystemExit(UsageError.exit_code)
        raise UsageError(
            f"{convention.name} started {size} processes on several machines: export MASTER_ADDR, the name of the machine of "
            "rank 0, and MASTER_PORT, a free port there, to all of them (Open MPI: mpirun -x MASTER_ADDR=... -x "
            "MASTER_PORT=...), or use torchrun"
        )
    job = " ".join(environment.get(name, "") for name in convention.job)
    port = environment.get("MASTER_PORT") or str(FIRST_PORT + zlib.crc32(job.encode()) % PORTS)
    described = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    return described | ({"LOCAL_WORLD_SIZE": local_size} if local_size else {}) | _own_cores(int(local_size or size))


def _own_cores(processes: int) -> dict[str, str]:
    """The number of threads, if the launcher bound each of a machine's processes to its own cores."""
    cores = usable_cores()
    return {"OMP_NUM_THREADS": str(cores)} if cores * processes <= (os.cpu_count() or 1) else {}


def _local_size(described: str, machine: str) -> str:
    """The number of processes on machine number `machine`: a number, or Slurm's list such as 4(x2),3."""
    counts: list[str] = []
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", described):
        counts += [count] * int(repeated or 1)
    return counts[min(int(machine), len(counts) - 1)] if counts and machine.isdecimal() else ""


def _operator_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The local variables, which PyTorchJob leaves out. It starts one process per pod."""
    given = [environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    if "LOCAL_RANK" in environment or not all(given) or not given[1].isdecimal() or int(given[1]) < 2:
        return {}
    return {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
