"""Who starts the processes, told by the variables that each launcher sets."""

import os
import sys

import pytest
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from tests import tiny
from vlmo.errors import VLMoError
from vlmo.settings import Settings
from vlmo.training.environment import OpenMPIEnvironment, choose_cluster

TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "LOCAL_RANK": "1"}
SLURM_JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "vlmo", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}
SRUN = SLURM_JOB | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "5"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
}


@pytest.fixture
def choose(monkeypatch):
    """The environment with these variables alone, by default of 2 nodes with 4 devices."""
    launchers = ("TORCHELASTIC", "SLURM", "OMPI", "MASTER", "WORLD_SIZE", "LOCAL_", "RANK", "NODE_RANK", "JSM", "VLMO")
    for name in os.environ:
        if name.startswith(launchers):
            monkeypatch.delenv(name)

    def chosen(variables, **options):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        options = {"num_gpus": 4, "num_nodes": 2, "per_gpu_batchsize": 3, "batch_size": 24} | options
        return choose_cluster(Settings.from_config(tiny.config(**options)))

    return chosen


def without(variables, name):
    return {key: value for key, value in variables.items() if key != name}


@pytest.mark.parametrize(
    "variables, kind",
    [
        (TORCHRUN, TorchElasticEnvironment),
        (SRUN, SLURMEnvironment),
        (MPI, OpenMPIEnvironment),
        (SLURM_JOB | TORCHRUN, TorchElasticEnvironment),  # torchrun or mpirun within a SLURM job
        (SLURM_JOB | MPI, OpenMPIEnvironment),
    ],
)
def test_processes_that_a_launcher_has_started(choose, variables, kind):
    environment = choose(variables)
    assert type(environment) is kind
    assert environment.world_size() == 8
    assert environment.global_rank() == 5
    assert environment.creates_processes_externally


def test_as_many_nodes_as_torchrun_has_joined(choose):
    options = {"num_nodes": "auto", "layout_invariant": True}
    assert choose({}, **options | {"num_gpus": 1}) is None
    assert choose(TORCHRUN | {"GROUP_WORLD_SIZE": "2"}, **options).world_size() == 8
    with pytest.raises(VLMoError, match="that is 4 x 1 processes"):
        choose({"GROUP_WORLD_SIZE": "1"}, **options)


def test_nobody_has_started_any(choose):
    assert choose({}, num_nodes=1) is None
    assert type(choose(SLURM_JOB, num_nodes=1)) is LightningEnvironment  # in a SLURM job, but not by srun
    assert type(choose(SRUN | {"SLURM_JOB_NAME": "interactive"}, num_nodes=1)) is LightningEnvironment  # a shell


HAND = {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    "variables, options",
    [
        ({"LOCAL_RANK": "0"}, {}),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}, {}),
        (HAND, {"num_gpus": 2}),
        (HAND, {"num_gpus": 1}),
        ({"LOCAL_RANK": "1"}, {"num_gpus": 1}),  # a second process of something else: it would write nothing
        ({"LOCAL_RANK": "0", "NODE_RANK": "0", "MASTER_ADDR": "node0"}, {"num_nodes": 2}),
    ],
)
def test_processes_that_nobody_starts_are_not_waited_for(choose, variables, options):
    with pytest.raises(VLMoError, match="LOCAL_RANK") as error:
        choose(variables, **{"num_nodes": 1, "accelerator": "cpu"} | options)
    assert "unset" in str(error.value) and "\n" not in str(error.value)


def test_processes_started_by_hand(choose):
    assert choose(HAND, num_nodes=1) is None
    assert choose({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, num_gpus=1, num_nodes=1) is None


def test_a_second_run_of_a_program_whose_processes_lightning_started(choose, monkeypatch):
    assert choose({}, num_nodes=1) is None
    assert choose({"LOCAL_RANK": "0"}, num_nodes=1) is None
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    monkeypatch.setattr(os, "getppid", lambda: pid)
    assert choose({"LOCAL_RANK": "1"}, num_nodes=1) is None  # in a process that was started


@pytest.mark.parametrize("program", ["-", "", "-c"])
def test_a_program_that_cannot_be_started_again(choose, monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(VLMoError, match="num_gpus=4.*file"):
        choose({}, num_nodes=1)
    assert choose({}, num_gpus=1, num_nodes=1) is None


def test_a_notebook(choose, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(VLMoError, match="notebook"):
        choose({}, num_nodes=1)


def test_nodes_by_hand(choose):
    assert choose({"MASTER_ADDR": "node0", "MASTER_PORT": "1234", "NODE_RANK": "1"}) is None


def test_mpi(choose):
    environment = choose(MPI)
    assert (environment.local_rank(), environment.node_rank()) == (1, 1)
    assert (environment.main_address, environment.main_port) == ("node0", 29500)
    single = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    assert choose(without(MPI, "MASTER_ADDR") | single, num_nodes=1).node_rank() == 0


@pytest.mark.parametrize(
    "variables, options, message",
    [
        (
            TORCHRUN,
            {"num_nodes": 1},
            "num_gpus=4 num_nodes=1: that is 4 x 1 processes, but torchrun has started 8, 4 a node; give num_gpus=4 "
            "num_nodes=2, or start it with torchrun --nnodes 1 --nproc_per_node 4",
        ),
        (TORCHRUN, {"num_gpus": 8, "num_nodes": 1}, "torchrun has started 8, 4 a node"),  # as many, but elsewhere
        (TORCHRUN, {"num_gpus": 0, "num_nodes": 1}, "num_gpus=0 num_nodes=1: that is 1 x 1 processes"),
        (SRUN, {"num_gpus": 2}, "or start it with srun --nodes 2 --ntasks-per-node 2"),
        (without(SRUN, "SLURM_NTASKS_PER_NODE"), {}, "srun has started 8 tasks: give it --ntasks-per-node too"),
        (MPI, {"num_gpus": [0, 1]}, "or start it with mpirun -np 4 --map-by ppr:2:node"),
        (without(MPI, "MASTER_ADDR"), {}, "mpirun -x MASTER_ADDR=<first node>"),
        ({}, {}, "num_nodes=2: nothing starts the processes of the other nodes; use torchrun, srun or mpirun"),
        ({"MASTER_ADDR": "node0"}, {}, "set MASTER_ADDR, MASTER_PORT and NODE_RANK on every node"),
    ],
)
def test_contradictions_are_one_line(choose, variables, options, message):
    with pytest.raises(VLMoError) as error:
        choose(variables, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
