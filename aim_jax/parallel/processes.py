"""Starts JAX on several hosts: from flags, or from what a cluster puts into the environment."""

import os
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags
from jax.experimental import multihost_utils


def define_flags() -> None:
    """The flags of a program that can run as several processes."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0, where no known cluster starts the processes; "
        "auto on the hosts of a Cloud TPU slice.",
    )
    flags.DEFINE_integer("num_processes", None, "How many processes there are; with --coordinator.")
    flags.DEFINE_integer("process_id", None, "Number of this process; with --coordinator.")
    flags.DEFINE_integer(
        "heartbeat_seconds", 100, "A process silent for so long ends the whole job.", lower_bound=1
    )


def settings(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`; None where this is the only process.

    In this order: the flags, where the coordinator "auto" leaves all to JAX (the environment of
    Cloud TPU VMs says nothing of other hosts, their metadata server does); JAX_COORDINATOR_ADDRESS
    with JAX_NUM_PROCESSES and JAX_PROCESS_ID (on Kubernetes JOB_COMPLETION_INDEX, which indexed
    jobs set); an Open MPI job or a SLURM step of several tasks; a TPU slice of several hosts, or
    several slices.

    Raises:
      ValueError: one of the three is given without the others, or the number is out of range.
    """
    if (coordinator, num_processes, process_id) == ("auto", None, None):
        return {}
    source = "--coordinator, --num_processes and --process_id"
    given: tuple[str | None, str | int | None, str | int | None]
    given = (coordinator, num_processes, process_id)
    if all(x is None for x in given) and "JAX_COORDINATOR_ADDRESS" in environment:
        source = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        given = (
            environment["JAX_COORDINATOR_ADDRESS"],
            environment.get("JAX_NUM_PROCESSES"),
            environment.get("JAX_PROCESS_ID", environment.get("JOB_COMPLETION_INDEX")),
        )
    if any(x is not None for x in given):
        address, count, number = given
        if address is None or count is None or number is None:
            raise ValueError(f"{source} belong together, but only some of them are given.")
        count = int(count)
        number = int(number)
        if not 0 <= number < count:
            raise ValueError(f"process {number} of {count}: they are numbered from 0.")
        return {"coordinator_address": address, "num_processes": count, "process_id": number}
    # Before SLURM: inside an allocation mpirun starts its remote ranks by a step of its own.
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return {"cluster_detection_method": "ompi"}
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return {"cluster_detection_method": "slurm"}
    several_hosts = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    if several_hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return {}
    return None


def wait_for_all(what: str) -> None:
    """Returns when all processes have come here; the name is the same in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def initialize_from(given: flags.FlagValues) -> None:
    """`initialize` with the flags of `define_flags`."""
    names = ("coordinator", "num_processes", "process_id", "heartbeat_seconds")
    values: dict[str, Any] = {name: given[name].value for name in names}
    initialize(**values)


def initialize(
    heartbeat_seconds: int = 100,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connects this process to the others, if there are any; before anything else of JAX.

    Args:
      heartbeat_seconds: after which a process that stopped answering ends all of them.
      coordinator, num_processes, process_id: see `settings`.
    """
    found = settings(os.environ, coordinator, num_processes, process_id)
    if found is not None:
        jax.distributed.initialize(
            **found,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=heartbeat_seconds,
        )
