"""Devices that a run may be planned for: their published rates, or this machine's own.

Dense rates, without sparsity, products in half precision summed in float32. Sources: NVIDIA's
datasheets of H100, H200, A100, L40S, L4, A10, A40, T4 and V100; its architecture papers on
Blackwell (B200), RTX Blackwell (GeForce RTX 5090), Ada (GeForce RTX 4090) and Ampere (GeForce RTX
3090, RTX A6000); AMD's datasheet of the Instinct MI300X. Links are NVLink's or
Infinity Fabric's where the form has them, else PCI Express of its generation, a direction.

Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """One accelerator: FLOPs a second by precision (0 = it has no such units), bytes that it reads
    and sends to others a second, and bytes that a process may take of its memory.
    """

    name: str
    float32: float
    bfloat16: float
    float16: float
    bytes_per_second: float
    memory: float
    link: float

    def flops(self, dtype: str) -> float:
        """FLOPs a second in this precision; without bfloat16 units it is computed in float32."""
        return getattr(self, dtype) or self.float32


def _device(
    name: str,
    float32: float,
    half: float,
    bandwidth: float,
    memory: float,
    link: float,
    *,
    bfloat16: bool = True,
) -> Device:
    """From teraFLOPs, gigabytes a second, GiB and gigabytes a second."""
    return Device(
        name=name,
        float32=float32 * TERA,
        bfloat16=half * TERA if bfloat16 else 0.0,
        float16=half * TERA,
        bytes_per_second=bandwidth * GIGA,
        memory=memory * 2**30,
        link=link * GIGA,
    )


DEVICES = {
    device.name: device
    for device in (
        _device("b200", 75.0, 2250.0, 8000, 179, 900),
        _device("h200", 66.9, 989.4, 4800, 140, 450),
        _device("h100", 66.9, 989.4, 3350, 79, 450),
        _device("h100-pcie", 51.2, 756.0, 2000, 79, 64),
        _device("a100-80", 19.5, 312.0, 2039, 79, 300),
        _device("a100-40", 19.5, 312.0, 1555, 39, 300),
        _device("l40s", 91.6, 362.0, 864, 44, 32),
        _device("l4", 30.3, 121.0, 300, 22, 32),
        _device("a40", 37.4, 149.7, 696, 44, 32),
        _device("a10", 31.2, 125.0, 600, 22, 32),
        _device("t4", 8.1, 65.0, 300, 14.6, 16, bfloat16=False),
        _device("v100", 15.7, 125.0, 900, 31.7, 150, bfloat16=False),
        _device("rtx5090", 104.8, 209.5, 1792, 31.3, 64),
        _device("rtx4090", 82.6, 165.2, 1008, 23.5, 32),
        _device("rtx3090", 35.6, 71.0, 936, 23.5, 32),
        _device("a6000", 38.7, 154.8, 768, 47.5, 32),
        _device("mi300x", 163.4, 1307.4, 5300, 191, 448),
    )
}
HERE = ("auto", "cpu", "cuda")
"""What `device=` calls this machine; its rates are measured."""

# How torch calls them: the first pattern that is found in a name.
_NAMES = (
    (r"B200", "b200"),
    (r"H200", "h200"),
    (r"H100.*PCIe", "h100-pcie"),
    (r"H100", "h100"),
    (r"A100.*40GB", "a100-40"),
    (r"A100", "a100-80"),
    (r"L40S", "l40s"),
    (r"\bL4\b", "l4"),
    (r"\bA40\b", "a40"),
    (r"\bA10G?\b", "a10"),
    (r"\bT4\b", "t4"),
    (r"V100", "v100"),
    (r"RTX 5090", "rtx5090"),
    (r"RTX 4090", "rtx4090"),
    (r"RTX 3090", "rtx3090"),
    (r"RTX A6000", "a6000"),
    (r"MI300X", "mi300x"),
)


def named(torch_name: str) -> Device | None:
    """The device that torch gives this name; None where it is not in the table."""
    found = (name for pattern, name in _NAMES if re.search(pattern, torch_name))
    return DEVICES.get(next(found, ""))


def choices() -> Collection[str]:
    """What `device=` may be, but for a numbered GPU of this machine."""
    return (*HERE, *DEVICES)
