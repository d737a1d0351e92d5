"""Initialization of JAX on several hosts, from flags or a cluster's environment variables."""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from aim_jax.parallel.watch import watch_others
from aim_jax.utils.signals import EXIT_LOST, RESUMES, end_with_line

TEXT_BYTES = 1000  # of a text that processes exchange
MEETING_SECONDS = 5.0
# Seconds by which JAX's own bounds are wider than ours. They abort the process, with a dump of the
# native stack.
MARGIN = 30
# Start of the runtime's errors, such as those of a connection.
STATUS = re.compile("(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE|UNKNOWN): ")


def define_flags() -> None:
    """Define the flags of a program that can run as several processes."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0, if no supported cluster starts the processes; "
        "auto on the hosts of a Cloud TPU slice.",
    )
    flags.DEFINE_integer("num_processes", None, "Number of processes; requires --coordinator.")
    flags.DEFINE_integer(
        "process_id", None, "Number of this process, from 0; requires --coordinator."
    )
    flags.DEFINE_integer(
        "heartbeat_seconds",
        100,
        "Seconds without a heartbeat from a process after which the whole job ends.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "start_seconds",
        300,
        "Seconds for all processes to connect, after which those that have started end.",
        lower_bound=1,
    )


def settings(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> dict[str, Any] | None:
    """Return the arguments for `jax.distributed.initialize`, or None for a single process.

    The first of these that applies is used:

    1. The arguments of this function. The coordinator "auto" leaves everything to JAX: the
       environment of Cloud TPU VMs does not list other hosts, but their metadata server does.
    2. JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID. Without the last,
       JOB_COMPLETION_INDEX is used, which Kubernetes sets in indexed jobs.
    3. An Open MPI job, or a SLURM step of several tasks.
    4. A TPU slice of several hosts, or several slices.

    Args:
      environment: environment variables.
      coordinator: "HOST:PORT" of process 0, or "auto".
      num_processes: number of processes.
      process_id: number of this process, from 0.

    Raises:
      ValueError: only some of coordinator, num_processes and process_id (or of the variables) are
        set, or process_id is out of range.
    """
    if (coordinator, num_processes, process_id) == ("auto", None, None):
        return {}
    source = "--coordinator, --num_processes and --process_id"
    explicit: tuple[str | None, str | int | None, str | int | None]
    explicit = (coordinator, num_processes, process_id)
    if all(x is None for x in explicit) and "JAX_COORDINATOR_ADDRESS" in environment:
        source = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        explicit = (
            environment["JAX_COORDINATOR_ADDRESS"],
            environment.get("JAX_NUM_PROCESSES"),
            environment.get("JAX_PROCESS_ID", environment.get("JOB_COMPLETION_INDEX")),
        )
    if any(x is not None for x in explicit):
        address, count, number = explicit
        if address is None or count is None or number is None:
            raise ValueError(f"{source} must be set together, but only some of them are.")
        count = int(count)
        number = int(number)
        if not 0 <= number < count:
            raise ValueError(f"process {number} of {count}: processes are numbered from 0.")
        return {"coordinator_address": address, "num_processes": count, "process_id": number}
    # Checked before SLURM: in an allocation, mpirun starts its remote ranks as a SLURM step.
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return {"cluster_detection_method": "ompi"}
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return {"cluster_detection_method": "slurm"}
    several_hosts = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    if several_hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return {}
    return None


def wait_for_all(what: str) -> None:
    """Wait until all processes reach this call; `what` names it, equally in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def text_of_first(make: Callable[[], str]) -> str:
    """Return the text that `make` returns on process 0; all processes must call this.

    `make` may take minutes. The processes meet every `MEETING_SECONDS` meanwhile, because those of
    CPU devices end with an error if one of them comes half a minute late to the first exchange.

    Args:
      make: Called on process 0 only. Its text is cut to `TEXT_BYTES`.
    """
    if jax.process_count() == 1:
        return make()
    with ThreadPoolExecutor(1) as pool:
        made = [pool.submit(make)] if jax.process_index() == 0 else []
        while True:
            is_done = bool(made and wait(made, MEETING_SECONDS).done)
            text = f"+{made[0].result()}" if is_done else ""
            data = np.frombuffer(text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES), np.uint8)
            data = multihost_utils.broadcast_one_to_all(data)
            if text := data.tobytes().decode(errors="replace").strip():
                return text[1:]


def is_failed_step(error: BaseException) -> bool:
    """Return whether `error` is that of a step over several processes, such as a lost connection.

    Errors of collectives are not always of JAX's type, but begin with the name of a status.
    """
    is_of_runtime = isinstance(error, jax.errors.JaxRuntimeError) or STATUS.match(str(error))
    return jax.distributed.is_initialized() and bool(is_of_runtime)


def initialize_from(given: flags.FlagValues) -> None:
    """Call `initialize` with the flags of `define_flags`."""
    names = ("coordinator", "num_processes", "process_id", "heartbeat_seconds", "start_seconds")
    values: dict[str, Any] = {name: given[name].value for name in names}
    initialize(**values)


def initialize(
    heartbeat_seconds: int = 100,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    start_seconds: int = 300,
) -> None:
    """Connect this process to the others, if there are any. Call it before any other use of JAX.

    Args:
      heartbeat_seconds: seconds without a heartbeat after which a process ends the whole job.
      coordinator, num_processes, process_id: see `settings`.
      start_seconds: seconds for all processes to connect. If they do not, this one ends with a line
        and `EXIT_LOST`.
    """
    arguments = settings(os.environ, coordinator, num_processes, process_id)
    if arguments is None:
        return
    with _bounded(start_seconds):
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=start_seconds + MARGIN,
            heartbeat_timeout_seconds=heartbeat_seconds + MARGIN,
            shutdown_timeout_seconds=heartbeat_seconds,
        )
    watch_others(heartbeat_seconds)


@contextlib.contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """End the process with `EXIT_LOST` if the block, which connects it to others, takes longer."""
    line = (
        f"error: the processes did not all connect within {seconds:g} s (--start_seconds): one was "
        f"lost, or cannot reach the address of process 0; {RESUMES}"
    )
    timer = threading.Timer(seconds, end_with_line, (line, EXIT_LOST))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
