"""`run.py` with DeepSpeed on CPU processes, which Lightning does not offer; for the tests alone."""

import sys
from argparse import Namespace
from types import SimpleNamespace

from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import deepspeed

from run import command_line
from vlmo.training import environment

environment.ON_GPUS_ONLY = ()
deepspeed.CUDAAccelerator = CPUAccelerator
deepspeed._validate_device_index_selection = lambda devices: None
deepspeed.argparse = SimpleNamespace(Namespace=lambda device_rank: Namespace(device_rank=0))

if __name__ == "__main__":
    sys.exit(command_line(sys.argv))
