"""Where a run runs: devices, strategy and precision, checked against what the machine has; who starts its processes.

Those are started by Lightning itself, torchrun, srun or mpirun, and have to be those that the options ask for.
"""

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import StrategyRegistry

from vlmo.errors import VLMoError
from vlmo.modules.transformer import offloading_wrapper
from vlmo.settings import Settings

ON_GPUS_ONLY = ("deepspeed",)  # beginnings of strategies' names
MPI_PORT = 29500  # where the processes of mpirun meet, unless MASTER_PORT says
SHARDED = ("fsdp2", "fsdp2_cpu_offload")
STARTER = "VLMO_STARTER"  # variable with the PID of the program whose processes Lightning starts
INTERACTIVE_JOBS = ("bash", "interactive")  # Lightning's rule: a shell in a SLURM job, not a step of it


@dataclass(frozen=True)
class Environment:
    """Arguments of Lightning's Trainer, and what the person should know about how they were chosen."""

    accelerator: str
    devices: int | list[int]
    num_nodes: int
    strategy: str
    precision: Any
    cluster: ClusterEnvironment | None
    notices: list[str] = field(default_factory=list)


def choose_environment(settings: Settings) -> Environment:
    """The environment that `settings` asks for on this machine.

    Raises:
        VLMoError: if there are fewer GPUs than asked for, a package that is needed is missing, or the processes that
            were started, or can be, are not those that the settings ask for.
    """
    notices: list[str] = []
    accelerator = _accelerator(settings, notices)
    devices: int | list[int] = settings.devices
    if accelerator == "gpu" and isinstance(settings.num_gpus, tuple):
        devices = list(settings.num_gpus)
    strategy = _strategy(settings, accelerator)
    if settings.activation_checkpointing == "offload":
        offloading_wrapper()
    if settings.compile:
        _check_compiler(accelerator)
    return Environment(
        accelerator,
        devices,
        settings.num_nodes,
        strategy,
        _precision(settings, accelerator, notices),
        choose_cluster(settings),
        notices,
    )


def _accelerator(settings: Settings, notices: list[str]) -> str:
    if settings.num_gpus == 0 or settings.accelerator == "cpu":
        return "cpu"
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.accelerator == "auto" and settings.num_gpus == 1 and present == 0:
        notices.append("no GPU on this machine: running on the CPU (num_gpus=0 says so without this notice)")
        return "cpu"
    if isinstance(settings.num_gpus, tuple):
        absent = [number for number in settings.num_gpus if number >= present]
        if absent:
            raise VLMoError(
                f"num_gpus={list(settings.num_gpus)}: this machine has {present} GPUs, none has number {absent}"
            )
    elif settings.num_gpus > present:
        raise VLMoError(
            f"num_gpus={settings.num_gpus}: this machine has {present}; ask for that many (0 is the CPU), "
            "or add accelerator=cpu for that many CPU processes"
        )
    return "gpu"


def _strategy(settings: Settings, accelerator: str) -> str:
    strategy = "deepspeed_stage_1" if settings.use_sharded_training else settings.strategy
    if strategy.startswith(ON_GPUS_ONLY) and accelerator != "gpu":
        raise VLMoError(
            "DeepSpeed shards over GPUs only: set use_sharded_training=False and strategy=auto or fsdp2 on a CPU"
        )
    if strategy.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise VLMoError("DeepSpeed is not installed: pip install deepspeed")
    if strategy not in ("auto", *SHARDED, *StrategyRegistry.available_strategies()):
        raise VLMoError(
            f"strategy={strategy!r}: there is no such strategy; leave it at auto, or name one such as ddp or fsdp2"
        )
    return "ddp" if strategy == "auto" and settings.devices * settings.num_nodes > 1 else strategy


def _precision(settings: Settings, accelerator: str, notices: list[str]) -> Any:
    asked = str(settings.precision)
    if accelerator == "cpu":
        if asked == "16":
            notices.append("precision=16 is for GPUs: computing in 32 (precision=bf16 if this CPU is fast at it)")
        return "bf16-mixed" if asked == "bf16" else "32-true"
    if asked == "auto":
        asked = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "16"
    return {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true"}[asked]


def _check_compiler(accelerator: str) -> None:
    """Raises VLMoError if what torch.compile builds its kernels with is missing."""
    if accelerator == "gpu" and importlib.util.find_spec("triton") is None:
        raise VLMoError("compile=True: needs triton on a GPU: pip install triton, or leave it at False")
    if accelerator == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise VLMoError("compile=True: needs a C++ compiler on a CPU: install g++, or leave it at False")


# --- who starts the processes -----------------------------------------------------------------------------------------


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
            "mpirun (docs/many_devices.md), or set MASTER_ADDR, MASTER_PORT and NODE_RANK on every node"
        )
    _check_leftovers(settings)
    if settings.devices * settings.num_nodes > 1 and "LOCAL_RANK" not in variables:
        if settings.devices > 1:
            _check_program(settings)
        variables[STARTER] = str(os.getpid())
    # within a SLURM job but not by srun: Lightning would wait for processes that nobody starts
    return LightningEnvironment() if "SLURM_NTASKS" in variables else None


def _check_leftovers(settings: Settings) -> None:
    """With LOCAL_RANK, Lightning takes the processes for started: by hand, or by a run of this program before.

    Raises:
        VLMoError: if they are not as many as the settings ask for, so that some would be waited for in vain.
    """
    variables, total = os.environ, settings.devices * settings.num_nodes
    if "LOCAL_RANK" not in variables or variables.get(STARTER) in (str(os.getpid()), str(os.getppid())):
        return
    started = variables.get("WORLD_SIZE") or "1"
    alone = {variables.get(name, "0") for name in ("RANK", "LOCAL_RANK")} <= {"0", ""}
    if started == str(total) and (total > 1 or alone):
        return
    found = " ".join(f"{name}={variables[name]}" for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE") if name in variables)
    raise VLMoError(
        f"num_gpus={settings.num_gpus} num_nodes={settings.num_nodes}: that is {total} processes, but by the variables "
        f"{found} a launcher has started {started if alone else 'others'}; if none has, remove them (unset LOCAL_RANK "
        "RANK WORLD_SIZE), else have it start as many and set WORLD_SIZE to that"
    )


def _check_program(settings: Settings) -> None:
    """Raises VLMoError if the program is none that can be started again, as Lightning does for further processes."""
    notebook = hasattr(sys, "ps1") or "ipykernel" in sys.modules
    if notebook or not Path(sys.argv[0]).is_file():
        where = "a notebook or prompt" if notebook else "standard input or python -c"
        raise VLMoError(
            f"num_gpus={settings.num_gpus}: the other processes would be started with the same command, which cannot "
            f"be done from {where}; put the program into a file and run that, or give num_gpus=1"
        )


def _started() -> LaunchedProcesses | None:
    def number(name: str) -> int:
        return int(os.environ.get(name) or 0)

    # torchrun and mpirun first: they also run within SLURM jobs, whose variables then say nothing of these processes
    if TorchElasticEnvironment.detect():
        remedy = "torchrun --nnodes {nodes} --nproc_per_node {devices} (num_nodes=auto takes any --nnodes)"
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
