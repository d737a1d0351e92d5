"""What accelerators can do, from their vendors' data sheets."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One chip.

    Attributes:
      flops: dense bfloat16 operations per second.
      memory: bytes.
      bandwidth: bytes per second from that memory.
      link: bytes per second that a ring of chips passes on: inside a slice both directions of one
        axis of the torus, inside a node one direction of NVLink.
      network: bytes per second in one direction, between slices or nodes, per chip.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float


# By the beginning of JAX's `device_kind`; the longer of two that fit counts.
ACCELERATORS = {
    "TPU v4": Accelerator(275e12, 32 * 2**30, 1228e9, 90e9, 6.25e9),
    "TPU v5 lite": Accelerator(197e12, 16 * 2**30, 819e9, 90e9, 6.25e9),
    "TPU v5": Accelerator(459e12, 95 * 2**30, 2765e9, 180e9, 6.25e9),
    "TPU v6 lite": Accelerator(918e12, 32 * 2**30, 1640e9, 180e9, 12.5e9),
    "NVIDIA A100-SXM4-40GB": Accelerator(312e12, 40 * 2**30, 1555e9, 300e9, 25e9),
    "NVIDIA A100": Accelerator(312e12, 80 * 2**30, 2039e9, 300e9, 25e9),
    "NVIDIA H100": Accelerator(989e12, 80 * 2**30, 3350e9, 450e9, 50e9),
    "NVIDIA H200": Accelerator(989e12, 141 * 10**9, 4800e9, 450e9, 50e9),
}


def accelerator(kind: str) -> Accelerator | None:
    """The entry for a `device_kind`, or None."""
    names = [name for name in ACCELERATORS if kind.startswith(name)]
    return ACCELERATORS[max(names, key=len)] if names else None


def peak_flops(devices: Iterable) -> float | None:
    """Operations per second of all devices together, or None where one of them is unknown."""
    chips = [accelerator(device.device_kind) for device in devices]
    return None if None in chips else sum(chip.flops for chip in chips)
