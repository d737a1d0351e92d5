"""What every program in launch/ does at its start."""

import contextlib
import glob
import logging as standard_logging
import os
import re
import sys
import time
from collections.abc import Sequence

import jax
from absl import flags, logging

from aim_jax.ops.native.build import BuildError, cache_directory
from aim_jax.parallel import processes
from aim_jax.training.monitor import BadStepsError

# EX_TEMPFAIL of sysexits.h: stopped by a signal after saving; the same command goes on.
EXIT_STOPPED = 75
# EX_UNAVAILABLE: another process was lost; the same command goes on from the last checkpoint.
EXIT_LOST = 69
# Seconds between an error of one of several processes and its end.
GRACE = 5.0

SAMPLING_FLAGS = ("cfg_scale", "temperature", "top_k", "top_p")


@contextlib.contextmanager
def errors_in_one_line():
    """Ends the program with status 1 and one line for errors that say what a user should change."""
    logging.set_verbosity(logging.WARNING)
    # Orbax logs the errors that it raises as well, with their tracebacks.
    logging.get_absl_handler().addFilter(_is_not_of_orbax)
    keep_compiled_programs()
    try:
        yield
    except (ValueError, OSError, BadStepsError, BuildError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if jax.distributed.is_initialized():
            # An orderly end waits for the others, is aborted with them, and ends with another code.
            # Those with the same error get the time to say so: they need process 0 until then.
            time.sleep(GRACE)
            os._exit(1)
        raise SystemExit(1) from None
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        # As a rule the exchange with another process failed: it was lost.
        print(f"error: a step over all processes failed: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST)  # an orderly end would wait for the others


def _is_not_of_orbax(record) -> bool:
    return "orbax" not in record.pathname


def _is_not_of_cuda(record) -> bool:
    """JAX's plugin for CUDA, which the tests install to compile kernels, misses cuDNN on a CPU."""
    return not record.getMessage().startswith("Jax plugin configuration error")


# When this file is imported: a configuration may look for devices while flags are parsed.
if not glob.glob("/dev/nvidia*"):
    standard_logging.getLogger("jax._src.xla_bridge").addFilter(_is_not_of_cuda)


def parse(arguments: list[str]) -> list[str]:
    """Parses flags, as `flags_parser` of `app.run`.

    What cannot be understood ends the program with status 1 and one line: flags and settings that
    do not exist, values that do not fit, a configuration that refuses, words beside the flags.
    """
    try:
        rest = flags.FLAGS(arguments)[1:]
    except flags.Error as error:
        # A configuration's own error comes with its traceback.
        message = re.sub(r"^(\w+\.)*\w*Error: ", "", str(error).strip().splitlines()[-1].strip())
    except AttributeError as error:
        if not (error.args and isinstance(error.args[0], KeyError)):  # a fault of the file itself
            raise
        text = str(error).strip("'").replace("\\n", ". ").replace("\\'", "")
        message = f"--config has no such setting: {text}"
    else:
        if not rest:
            return arguments[:1]
        message = (
            f"unexpected {' '.join(rest)!r}; lists have commas and no spaces (--classes cat,ship), "
            "and switches no values (--pngs, --nopngs)."
        )
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def define_sampling_flags() -> None:
    """Flags of the settings that a model has values of its own for; see `given_settings`."""
    own = "The model's own if not given."
    flags.DEFINE_float("cfg_scale", None, f"Guidance; 1 is none. {own}")
    flags.DEFINE_float("temperature", None, f"Divides the logits. {own}")
    flags.DEFINE_integer("top_k", None, f"Keep the k likeliest codes; 0 is off. {own}")
    flags.DEFINE_float("top_p", None, f"Keep the likeliest codes up to this sum; 1 is off. {own}")
    processes.show_in_help(*SAMPLING_FLAGS)


def given_settings(values: flags.FlagValues) -> dict:
    """Arguments of `generate` of the flags of `define_sampling_flags`; None where not given."""
    return {name: values[name].value for name in SAMPLING_FLAGS}


def cores_as_devices() -> None:
    """Makes every core, to eight, a device if JAX computes on a CPU; before anything else of JAX.

    A share of the images for each keeps cores busier than one program over all of them. What the
    environment says of JAX's CPU devices stays.
    """
    given = jax.config.jax_num_cpu_devices != -1
    if not given and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", min(8, os.cpu_count() or 1))


def keep_compiled_programs() -> None:
    """Lets a second run skip most of its compilation.

    What took over half a second to compile is kept in the `cache_directory`;
    JAX_COMPILATION_CACHE_DIR names another place, and
    JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def numbers(name: str, texts: Sequence[str]) -> list[float]:
    """The values that a flag of a sampling setting lists.

    Raises:
      ValueError: one of them is no number, or none of the kind that the setting has.
    """
    kind = int if name == "top_k" else float
    try:
        return [kind(text) for text in texts]
    except ValueError:
        raise ValueError(
            f"--{name}={','.join(texts)}: expected {'whole ' * (kind is int)}numbers between "
            "commas, such as 1,2,4."
        ) from None


def start(train, stage: str, flags) -> None:
    """Runs a training program on its flags.

    Args:
      train: (config, workdir) trains.
      stage: the kind of configuration that it takes.
      flags: parsed flags `config`, `workdir`, `data`, and those of `processes.define_flags`.
    """
    config = flags.config
    with errors_in_one_line():
        processes.initialize_from(flags)
        if config.stage != stage:
            program = {"aim": "launch/train.py", "vq": "launch/train_vq.py"}
            program["eval"] = "launch/evaluate.py"
            raise ValueError(
                f"the configuration is of stage {config.stage!r}; {program[config.stage]} runs it."
            )
        if flags.data:
            config.data.dir = flags.data
        state = train(config, flags.workdir)
        if int(state.step) < config.steps:
            raise SystemExit(EXIT_STOPPED)
