"""Devices by name: memory, and the peak of their matrix products, each with its source.

Peaks are those of dense products of 16-bit numbers that are summed in 32 bits; where a data sheet gives them with
sparsity alone, half of it.
"""

import re
from dataclasses import dataclass

from vlmo.errors import VLMoError


@dataclass(frozen=True)
class Device:
    """A kind of accelerator.

    Attributes:
        memory: 1e9 bytes, by its name. (Makers count 2^30 bytes: the 7 % more that there are is left for what is not
            planned: the driver's context, NCCL's buffers, fragmentation.)
        teraflops: 1e12 operations a second at the most, bf16 (V100, which has none: fp16).
        source: of that number.
    """

    name: str
    memory: float
    teraflops: float
    source: str


DEVICES = {
    each.name: each
    for each in (
        Device("V100", 32, 125, "NVIDIA V100 data sheet, SXM2, Tensor performance (fp16: it has no bf16)"),
        Device("A100-40", 40, 312, "NVIDIA A100 data sheet, bfloat16 Tensor Core"),
        Device("A100-80", 80, 312, "NVIDIA A100 data sheet, bfloat16 Tensor Core"),
        Device("H100-PCIe", 80, 756, "NVIDIA H100 data sheet, PCIe: 1,513 with sparsity"),
        Device("H100", 80, 989, "NVIDIA H100 data sheet, SXM: 1,979 with sparsity"),
        Device("H200", 141, 989, "NVIDIA H200 data sheet, SXM: 1,979 with sparsity"),
        Device("L40S", 48, 362, "NVIDIA L40S data sheet, bfloat16 Tensor Core"),
        Device("RTX4090", 24, 165, "NVIDIA Ada GPU architecture white paper, appendix A, bf16 with fp32 accumulate"),
    )
}


# what the names that CUDA gives consist of, and nothing else: "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"
CUDA_NAMES = {
    "V100": r"V100-SXM2(-\d+GB)?",
    "A100-40": r"A100-(SXM4|PCIE)-40GB",
    "A100-80": r"A100[- ](SXM4[- ])?80GB( PCIe)?",
    "H100-PCIe": r"H100 PCIe",
    "H100": r"H100( SXM5)?( 80GB HBM3)?",
    "H200": r"H200",
    "L40S": r"L40S",
    "RTX4090": r"GeForce RTX 4090",
}


def find_device(cuda_name: str) -> Device | None:
    """Gives the device that CUDA calls by this name; None for one that is not known, or a part of one (MIG)."""
    names = (name for name, form in CUDA_NAMES.items() if re.fullmatch(f"(NVIDIA |Tesla )?{form}", cuda_name))
    return DEVICES.get(next(names, ""))


def device(name: str) -> Device:
    """The device of that name, in upper or lower case. Raises VLMoError if there is none."""
    for known, found in DEVICES.items():
        if known.lower() == name.lower():
            return found
    raise VLMoError(f"--device {name}: is not known; give {', '.join(DEVICES)}, or --memory GB")
