"""Who starts the processes of a run: Lightning itself, torchrun, srun or mpirun, and whether that fits the options."""

import os
from dataclasses import dataclass

from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from vlmo.errors import VLMoError
from vlmo.settings import Settings

MPI_PORT = 29500  # where the processes of mpirun meet, unless MASTER_PORT says
INTERACTIVE_JOBS = ("bash", "interactive")  # Lightning's rule: a shell in a SLURM job, not a step of it


class OpenMPIEnvironment(ClusterEnvironment):
    """Processes of OpenMPI's mpirun, by the variables that it sets (Lightning's own needs mpi4py)."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        return int(os.environ.get("MASTER_PORT", MPI_PORT))

    @staticmethod
    def detect() -> bool:
        return "OMPI_COMM_WORLD_SIZE" in os.environ

    def world_size(self) -> int:
        return int(os.environ["OMPI_COMM_WORLD_SIZE"])

    def set_world_size(self, size: int) -> None:
        """mpirun has decided."""

    def global_rank(self) -> int:
        return int(os.environ["OMPI_COMM_WORLD_RANK"])

    def set_global_rank(self, rank: int) -> None:
        """mpirun has decided."""

    def local_rank(self) -> int:
        return int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"])

    def node_rank(self) -> int:
        return self.global_rank() // int(os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"])


@dataclass(frozen=True)
class LaunchedProcesses:
    """What a launcher has started.

    Attributes:
        launcher: its name.
        total, per_node: numbers of processes; 0 where it does not say.
        remedy: its options for a run of {devices} x {nodes} processes.
    """

    launcher: str
    environment: ClusterEnvironment
    total: int
    per_node: int
    remedy: str


def choose_cluster(settings: Settings) -> ClusterEnvironment | None:
    """How the processes of this run find each other; None: Lightning starts them, or knows who has.

    Raises:
        VLMoError: if a launcher has started other processes than the options say, or nobody starts those of the other
            nodes.
    """
    started = _started()
    if started:
        _compare(started, settings)
        return started.environment
    variables = os.environ
    if settings.num_nodes > 1 and not (
        "JSM_NAMESPACE_SIZE" in variables  # LSF, which Lightning knows
        or ("MASTER_ADDR" in variables and {"NODE_RANK", "GROUP_RANK", "RANK"} & variables.keys())
    ):
        raise VLMoError(
            f"num_nodes={settings.num_nodes}: nothing starts the processes of the other nodes; use torchrun, srun or "
            "mpirun (README, Many devices), or set MASTER_ADDR, MASTER_PORT and NODE_RANK on every node"
        )
    # within a SLURM job but not by srun: Lightning would wait for processes that nobody starts
    return LightningEnvironment() if "SLURM_NTASKS" in variables else None


def _started() -> LaunchedProcesses | None:
    def number(name: str) -> int:
        return int(os.environ.get(name) or 0)

    # torchrun and mpirun first: they also run within SLURM jobs, whose variables then say nothing of these processes
    if TorchElasticEnvironment.detect():
        remedy = "torchrun --nnodes {nodes} --nproc_per_node {devices}"
        environment: ClusterEnvironment = TorchElasticEnvironment()
        return LaunchedProcesses("torchrun", environment, number("WORLD_SIZE"), number("LOCAL_WORLD_SIZE"), remedy)
    if OpenMPIEnvironment.detect():
        sizes = number("OMPI_COMM_WORLD_SIZE"), number("OMPI_COMM_WORLD_LOCAL_SIZE")
        if sizes[0] > sizes[1] and "MASTER_ADDR" not in os.environ:
            raise VLMoError("mpirun over several nodes: say where they meet, mpirun -x MASTER_ADDR=<first node> ...")
        return LaunchedProcesses("mpirun", OpenMPIEnvironment(), *sizes, "mpirun -np {all} --map-by ppr:{devices}:node")
    if "SLURM_STEP_NUM_TASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE_JOBS:
        tasks = number("SLURM_STEP_NUM_TASKS")
        remedy = "srun --nodes {nodes} --ntasks-per-node {devices}"
        if tasks > 1 and not number("SLURM_NTASKS_PER_NODE"):
            raise VLMoError(f"srun has started {tasks} tasks: give it --ntasks-per-node too, which says where they are")
        # its own answer to SLURM's signals saves in the middle of a step, into the working directory (see signals.py)
        return LaunchedProcesses(
            "srun", SLURMEnvironment(auto_requeue=False), tasks, number("SLURM_NTASKS_PER_NODE"), remedy
        )
    return None


def _compare(started: LaunchedProcesses, settings: Settings) -> None:
    devices, nodes = settings.devices, settings.num_nodes
    if started.total == devices * nodes and started.per_node in (devices, 0):
        return
    per_node = started.per_node or started.total
    remedy = started.remedy.format(devices=devices, nodes=nodes, all=devices * nodes)
    raise VLMoError(
        f"num_gpus={settings.num_gpus} num_nodes={nodes}: that is {devices} x {nodes} processes, but "
        f"{started.launcher} has started {started.total}, {per_node} a node; give num_gpus={per_node} "
        f"num_nodes={started.total // per_node}, or start it with {remedy}"
    )
