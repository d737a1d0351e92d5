"""How the tests and the programs that they start compile: quickly, as it is most of their time."""

from importlib.metadata import version

# Without optimisation, and with the older emitters, which are on their way out, much less is
# compiled. XLA ends a process that names a flag it does not know.
FAST = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    FAST += " --xla_cpu_use_fusion_emitters=false"


def xla_flags(devices: int) -> str:
    """Of a program that sees `devices` devices of the host."""
    return f"--xla_force_host_platform_device_count={devices} {FAST}"
