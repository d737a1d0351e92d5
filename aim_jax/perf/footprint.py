"""Footprint of a compiled program: memory, communication and modelled time, without the device."""

import dataclasses

import jax

from aim_jax.perf.accelerators import Accelerator, known_accelerator
from aim_jax.perf.hlo import Program

# Fraction of peak arithmetic or memory bandwidth that a good program attains. `Footprint` documents
# the model of time.
ATTAINED = 0.8
# Fraction of GPU memory that a program can use; the CUDA context, NCCL and fragmentation take some.
GPU_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Footprint of a compiled program on a kind of device; all figures are per device.

    The time of a run is modelled as max(compute, memory) / 0.8 + links: arithmetic and memory
    traffic overlap and attain 80 % of their peaks, and communication overlaps with nothing.
    Communication between slices is counted as if it were within a slice.

    Attributes:
      arguments, temporaries, outputs: bytes; outputs that reuse the memory of arguments are not
        counted.
      capacity: bytes that a program may use.
      collectives: (runs, bytes sent) by kind.
      compute: seconds for the operations at peak rate.
      memory: seconds to read the inputs and write the outputs of every fusion at peak bandwidth.
      links: seconds to send the data of the collectives at peak bandwidth.
      moved: bytes of `memory`.
    """

    arguments: int
    temporaries: int
    outputs: int
    capacity: int
    collectives: dict[str, tuple[int, int]]
    compute: float
    memory: float
    links: float
    moved: int = 0

    @property
    def needed(self) -> int:
        """Bytes of arguments, temporaries and outputs."""
        return self.arguments + self.temporaries + self.outputs

    @property
    def fits(self) -> bool:
        """True if the program fits into the capacity."""
        return self.needed <= self.capacity

    @property
    def seconds(self) -> float:
        """Modelled seconds of one run of the program."""
        return max(self.compute, self.memory) / ATTAINED + self.links


class DoesNotFitError(RuntimeError):
    """The compiler could not fit a program into the memory of a device."""


def footprint(lowered: jax.stages.Lowered, flops: float, device: jax.Device) -> Footprint:
    """Compile a program and compute its `Footprint`.

    Args:
      lowered: the lowered program.
      flops: operations of one run on one device.
      device: one of the devices that the program was lowered for.

    Raises:
      DoesNotFitError: the compiler ran out of the device's memory.
      ValueError: the device is unknown.
    """
    chip = known_accelerator(device.device_kind)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(_first_line_about_memory(str(error))) from None
    return read(compiled, flops, chip, gpu=device.platform != "tpu")


def read(compiled: jax.stages.Compiled, flops: float, chip: Accelerator, gpu: bool) -> Footprint:
    """Compute the `Footprint` of a compiled program.

    Args:
      compiled: the compiled program.
      flops: operations of one run on one device.
      chip: figures of the device.
      gpu: True for GPUs, where only `GPU_SHARE` of the memory is usable.

    Raises:
      ValueError: the compiler does not report the program's HLO text or memory use.
    """
    text = compiled.as_text()
    stats = compiled.memory_analysis()
    if text is None or stats is None:
        raise ValueError("the compiler does not report the program's HLO text or memory use.")
    program = Program(text)
    collectives = program.collectives()
    moved = program.memory_traffic()
    return Footprint(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes + stats.generated_code_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        capacity=round(chip.memory * (GPU_SHARE if gpu else 1)),
        collectives=collectives,
        compute=flops / chip.flops,
        memory=moved / chip.bandwidth,
        links=sum(sent for _, sent in collectives.values()) / chip.link,
        moved=moved,
    )


def _first_line_about_memory(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "Used" in line or "memory" in line]
    return (lines or text.splitlines())[0][:300]


def describe(found: Footprint) -> str:
    """Format a footprint as text."""
    lines = [
        f"memory      {gib(found.needed)} of {gib(found.capacity)}: arguments "
        f"{gib(found.arguments)}, temporaries {gib(found.temporaries)}"
        + ("" if found.fits else "  DOES NOT FIT"),
        f"time        {1e3 * found.seconds:.1f} ms modelled; at peak rates compute "
        f"{1e3 * found.compute:.1f}, memory {1e3 * found.memory:.1f} ({found.moved / 1e9:.1f} GB), "
        f"links {1e3 * found.links:.1f}",
    ]
    for kind, (runs, sent) in sorted(found.collectives.items()):
        lines.append(f"{kind:<20}{runs:>7} runs  {sent / 1e6:>10.1f} MB sent")
    return "\n".join(lines)


def gib(size: float) -> str:
    """Format bytes as GiB."""
    return f"{size / 2**30:.2f} GiB"
