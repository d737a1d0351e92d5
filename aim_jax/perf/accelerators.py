"""Data-sheet figures of accelerators, and devices for ahead-of-time compilation."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterable
from typing import Any

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Data-sheet figures of one chip.

    Attributes:
      flops: dense bfloat16 operations per second.
      memory: bytes of device memory.
      bandwidth: bytes per second of that memory.
      link: bytes per second that a ring of chips can pass on: within a TPU slice both directions of
        one axis of the torus, within a GPU node one direction of NVLink.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float


# Keys are prefixes of JAX's `device_kind`; the longest match wins.
ACCELERATORS = {
    "TPU v4": Accelerator(275e12, 32 * 2**30, 1228e9, 90e9),
    "TPU v5 lite": Accelerator(197e12, 16 * 2**30, 819e9, 90e9),
    "TPU v5e": Accelerator(197e12, 16 * 2**30, 819e9, 90e9),
    "TPU v5": Accelerator(459e12, 95 * 2**30, 2765e9, 180e9),
    "TPU v6 lite": Accelerator(918e12, 32 * 2**30, 1640e9, 180e9),
    "TPU v6e": Accelerator(918e12, 32 * 2**30, 1640e9, 180e9),
    "NVIDIA A100-SXM4-40GB": Accelerator(312e12, 40 * 2**30, 1555e9, 300e9),
    "NVIDIA A100-PCIE-40GB": Accelerator(312e12, 40 * 2**30, 1555e9, 300e9),
    "NVIDIA A100": Accelerator(312e12, 80 * 2**30, 2039e9, 300e9),
    "NVIDIA H100": Accelerator(989e12, 80 * 2**30, 3350e9, 450e9),
    "NVIDIA H100 PCIe": Accelerator(756e12, 80 * 2**30, 2039e9, 300e9),
    "NVIDIA H100 NVL": Accelerator(835e12, 94 * 10**9, 3938e9, 300e9),
    "NVIDIA H200 NVL": Accelerator(835e12, 141 * 10**9, 4800e9, 450e9),
    "NVIDIA H200": Accelerator(989e12, 141 * 10**9, 4800e9, 450e9),
}


def accelerator(kind: str) -> Accelerator | None:
    """Return the entry for a `device_kind`, or None if it is unknown or a MIG part of a GPU."""
    names = [name for name in ACCELERATORS if kind.startswith(name) and "MIG" not in kind]
    return ACCELERATORS[max(names, key=len)] if names else None


def known_accelerator(kind: str) -> Accelerator:
    """Return the entry for a `device_kind`.

    Raises:
      ValueError: the device is unknown.
    """
    chip = accelerator(kind)
    if chip is None:
        raise ValueError(f"unknown accelerator {kind!r}; known are {', '.join(ACCELERATORS)}.")
    return chip


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
    """Return the operations per second of all devices together, or None if one is unknown."""
    chips = [accelerator(device.device_kind) for device in devices]
    known = [chip.flops for chip in chips if chip is not None]
    return sum(known) if len(known) == len(chips) else None


# Shapes of TPU slices, by family and number of chips.
SHAPES = {
    "v4": {
        2**i: shape
        for i, shape in enumerate(["-", "-", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"])
    },
    "v5e": {
        2**i: shape
        for i, shape in enumerate(["1x1", "-", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"])
    },
}
SHAPES |= {"v5p": SHAPES["v4"], "v6e": SHAPES["v5e"]}
CORES_COUNTED = ("v4", "v5p")  # families whose slice names count TensorCores, two per chip
TPU_OPTIONS: dict[str, dict[str, Any]] = {
    "v4": {"chip_config_name": "megacore"},
    "1x1": {"chips_per_host_bounds": (1, 1, 1)},
}
# Device properties for XLA's GPU compiler, in the order of GPU_TARGET; all are SXM modules.
GPUS = {
    "A100-80G": ("NVIDIA A100-SXM4-80GB", 8, 108, 1.41, 166912, 167936, 41943040, 2039, 64),
    "H100": ("NVIDIA H100 80GB HBM3", 9, 132, 1.98, 232448, 233472, 52428800, 3352, 128),
    "H200": ("NVIDIA H200", 9, 132, 1.98, 232448, 233472, 62914560, 4800, 128),
}
GPU_TARGET = """
platform_name: "CUDA"
device_description_str: "{}"
dnn_version_info {{ major: 9 minor: 3 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {} }}
  core_count: {}
  clock_rate_ghz: {}
  shared_memory_per_block_optin: {}
  shared_memory_per_core: {}
  l2_cache_size: {}
  memory_bandwidth: {}000000000
  fpus_per_core: {}
  device_memory_size: {}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""
TOPOLOGY_HELP = (
    "expected a TPU slice by its shape or name, such as v5e:16x16, v5e-256 or v5p-32 (16 chips), "
    f"or GPUs of one node, such as 8xA100-80G ({', '.join(GPUS)})."
)


def topology(name: str, slices: int = 1) -> list[jax.Device]:
    """Return devices to compile programs for without having the devices.

    Args:
      name: a TPU slice by family (v4, v5e, v5p, v6e) and shape, such as "v5e:16x16", or by its
        cloud name, such as "v5e-256"; or GPUs of one node, such as "8xA100-80G".
      slices: number of such TPU slices.

    Raises:
      ValueError: the name is unknown, GPUs are requested with more than one slice, or the compiler
        for these devices is not installed.
    """
    if match := re.fullmatch(r"(\d+)x([A-Z].*)", name):
        if match[2] not in GPUS or slices != 1:
            raise ValueError(f"topology {name!r} with {slices} slices: {TOPOLOGY_HELP}")
        return _gpus(int(match[1]), match[2])
    family, _, shape = re.sub("[-:]", " ", name).partition(" ")
    if family in SHAPES and "-" in name and shape.isdecimal():
        chips = int(shape) // (2 if family in CORES_COUNTED else 1)
        shape = SHAPES[family].get(chips, "")
    if family not in SHAPES or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise ValueError(f"topology {name!r}: {TOPOLOGY_HELP}")
    return _tpus(family, shape, slices)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _tpus(family: str, shape: str, slices: int) -> list[jax.Device]:
    if not _is_installed("libtpu"):
        raise ValueError(
            "compiling for TPUs needs libtpu (700 MB on disk): pip install 'aim_jax[tpu]'."
        )
    # Otherwise libtpu looks for a TPU and its metadata server.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    options = TPU_OPTIONS.get(family, {}) | TPU_OPTIONS.get(shape, {})
    if slices > 1:
        options["num_slices"] = slices
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{family}:{shape}", **options
    ).devices


def _gpus(count: int, kind: str) -> list[jax.Device]:
    if not (_is_installed("jax_plugins") and _is_installed("jax_plugins.xla_cuda13")):
        # The message asks for a separate directory. Installed beside jax, JAX would load the plugin
        # at every start and print a traceback where cuDNN is missing.
        version = jax.__version__
        raise ValueError(
            "compiling for NVIDIA GPUs needs JAX's CUDA plugin (400 MB on disk): pip install "
            f"--no-deps --target cuda jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}, "
            "then set PYTHONPATH=cuda."
        )
    jax.devices()  # JAX discovers plugins when it first lists devices
    memory = math.floor(known_accelerator(GPUS[kind][0]).memory)
    target = GPU_TARGET.format(*GPUS[kind], memory)
    return topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{count}", target_config=target
    ).devices
