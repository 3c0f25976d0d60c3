"""`run.py` with FSDP and DeepSpeed on CPU processes, which Lightning does not offer; for the tests alone."""

import sys
from argparse import Namespace
from types import SimpleNamespace

import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import deepspeed
from torch.distributed.fsdp import FullyShardedDataParallel

from run import command_line
from vlmo.training import environment

environment.ON_GPUS_ONLY = ()
make_sharded = FullyShardedDataParallel.__init__


def make_sharded_on_cpu(*arguments, **options):
    """Lightning hands on the number of a GPU, which a CPU has not."""
    make_sharded(*arguments, **options | {"device_id": torch.device("cpu")})


FullyShardedDataParallel.__init__ = make_sharded_on_cpu
deepspeed.CUDAAccelerator = CPUAccelerator
deepspeed._validate_device_index_selection = lambda devices: None
deepspeed.argparse = SimpleNamespace(Namespace=lambda device_rank: Namespace(device_rank=0))

if __name__ == "__main__":
    sys.exit(command_line(sys.argv))
