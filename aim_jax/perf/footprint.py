"""What a program will need on devices that are not here: memory, exchange, time by a model."""

import dataclasses

import jax

from aim_jax.perf.accelerators import Accelerator, known_accelerator
from aim_jax.perf.hlo import Program

# Of what arithmetic or memory allow, the share that a good program attains. The rest of the model
# of time is written at `Footprint`.
ATTAINED = 0.8
# A GPU program cannot have all memory: the CUDA context, NCCL and fragmentation take some.
GPU_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class Footprint:
    """A compiled program on a kind of device; all figures are per device.

    A step is modelled as max(compute, memory) / 0.8 + links: arithmetic and memory traffic overlap
    and attain 80 % of their peaks, exchange overlaps with nothing. Exchange between slices is
    counted as if it were inside one.

    Attributes:
      arguments, temporaries, outputs: bytes; outputs that replace arguments are not counted.
      capacity: bytes that a program may use.
      collectives: (runs, bytes sent) by kind.
      compute, memory, links: seconds for the operations at peak, for reading and writing what every
        fusion takes and makes, and for sending what collectives exchange.
    """

    arguments: int
    temporaries: int
    outputs: int
    capacity: int
    collectives: dict[str, tuple[int, int]]
    compute: float
    memory: float
    links: float

    @property
    def needed(self) -> int:
        """Bytes in all."""
        return self.arguments + self.temporaries + self.outputs

    @property
    def fits(self) -> bool:
        """Whether the program has room."""
        return self.needed <= self.capacity

    @property
    def seconds(self) -> float:
        """One run of the program."""
        return max(self.compute, self.memory) / ATTAINED + self.links


class DoesNotFitError(RuntimeError):
    """The compiler found no way to fit a program into the memory of a device."""


def footprint(lowered: jax.stages.Lowered, flops: float, device: jax.Device) -> Footprint:
    """Compiles a program and reads what it needs.

    Args:
      flops: operations of one run on one device.
      device: one of those that the program was lowered for.

    Raises:
      DoesNotFitError: the compiler ran out of the device's memory.
      ValueError: a device whose figures are not known.
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
    """The `Footprint` of a program that is compiled."""
    text = compiled.as_text()
    stats = compiled.memory_analysis()
    if text is None or stats is None:
        raise ValueError("the compiler tells neither the program's text nor its memory.")
    program = Program(text)
    collectives = program.collectives()
    return Footprint(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes + stats.generated_code_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        capacity=round(chip.memory * (GPU_SHARE if gpu else 1)),
        collectives=collectives,
        compute=flops / chip.flops,
        memory=program.memory_traffic() / chip.bandwidth,
        links=sum(sent for _, sent in collectives.values()) / chip.link,
    )


def _first_line_about_memory(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "Used" in line or "memory" in line]
    return (lines or text.splitlines())[0][:300]


def describe(found: Footprint) -> str:
    """The figures for people."""
    lines = [
        f"memory      {gib(found.needed)} of {gib(found.capacity)}: arguments "
        f"{gib(found.arguments)}, temporaries {gib(found.temporaries)}"
        + ("" if found.fits else "  DOES NOT FIT"),
        f"time        {1e3 * found.seconds:.1f} ms modelled; at their peaks compute "
        f"{1e3 * found.compute:.1f}, memory {1e3 * found.memory:.1f}, "
        f"links {1e3 * found.links:.1f}",
    ]
    for kind, (runs, sent) in sorted(found.collectives.items()):
        lines.append(f"{kind:<20}{runs:>7} runs  {sent / 1e6:>10.1f} MB sent")
    return "\n".join(lines)


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.2f} GiB"
