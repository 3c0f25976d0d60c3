"""Which process of a run is the first, by what launchers set: known before they have met, and without torch."""

import os

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK")


def is_first_process() -> bool:
    """Whether this process does what is done once a run, such as making its folder."""
    return all(os.environ.get(name, "0") in ("0", "") for name in RANKS)
