"""Shared start-up of the programs: flags, recipes by name, one-line errors, compile cache."""

import contextlib
import inspect
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from logging import LogRecord
from pathlib import Path
from types import ModuleType

import jax
from absl import app, flags, logging
from clu import platform
from ml_collections import config_flags

from aim_jax.ops.native.build import BuildError, cache_directory
from aim_jax.parallel import processes
from aim_jax.sampling.config import SETTINGS
from aim_jax.training.monitor import BadStepsError

# EX_TEMPFAIL of sysexits.h: stopped by a signal after saving; the same command resumes.
EXIT_STOPPED = 75
# EX_UNAVAILABLE: another process was lost; the same command resumes from the last checkpoint.
EXIT_LOST = 69
# 128 + SIGINT, as shells have it.
EXIT_INTERRUPTED = 130
# Seconds between an error of one of several processes and its end.
GRACE = 5.0


def run(program: ModuleType, name: str, arguments: Sequence[str]) -> int:
    """Runs a program of this package: parses its flags, then calls its `main`.

    Args:
      program: a module whose docstring is its help, with `define_flags()` and `main()`, or with
        `main(arguments)` alone if it parses its arguments itself.
      name: how users call it.
      arguments: of the command line, without the name.

    Returns:
      The exit status.
    """
    with errors_in_one_line():
        if not hasattr(program, "define_flags"):
            return program.main(arguments) or 0
        known = set(flags.FLAGS)
        program.define_flags()
        if {"-h", "-help", "--help", "--helpshort"} & set(arguments):
            # Building a configuration may import packages that define flags of theirs.
            own = [x for x in flags.FLAGS if x not in known and _is_ours(x)]
            print(help_text(program, [flags.FLAGS[x] for x in own]))
            return 0
        try:
            app.run(lambda _: program.main(), [name, *arguments], flags_parser=parse)
        except SystemExit as stop:  # which is how app.run returns
            return stop.code if isinstance(stop.code, int) else 0
    return 0


def _is_ours(flag: str) -> bool:
    return (flags.FLAGS.find_module_defining_flag(flag) or "").startswith("aim_jax")


def help_text(program: ModuleType, own: Sequence[flags.Flag]) -> str:
    """The docstring of a program and its flags with their defaults."""
    lines = [inspect.cleandoc(program.__doc__ or ""), "", "flags:"]
    names = {str(path): name for name, path in recipes().items()}
    for flag in own:
        shown = f"  --{flag.name}"
        if isinstance(flag.parser, flags.EnumParser):
            shown += "=" + "|".join(flag.parser.enum_values)
        elif flag.boolean:
            shown = f"  --[no]{flag.name}"
        if flag.default not in (None, "", []):
            default = str(flag.default_as_str).strip("'")
            shown += f"  (default: {names.get(default, default)})"
        text = " ".join((flag.help or "").split())
        lines += [shown, textwrap.indent(textwrap.fill(text, 90), "      ")]
    return "\n".join(lines)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the program with one line for errors that say what a user should change, and for Ctrl-C.

    The status is 1, or 130 after Ctrl-C.
    """
    logging.set_verbosity(logging.WARNING)
    # Orbax logs the errors that it raises as well, with their tracebacks.
    logging.get_absl_handler().addFilter(_is_not_of_orbax)
    keep_compiled_programs()
    try:
        yield
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
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


def _is_not_of_orbax(record: LogRecord) -> bool:
    return "orbax" not in record.pathname


def recipes() -> dict[str, Path]:
    """The shipped configurations, by the names that `--config` takes."""
    root = Path(str(resources.files("aim_jax.configs")))
    return {
        file.stem: file
        for file in sorted(root.glob("*.py"))
        if "def get_config(" in file.read_text()
    }


def define_config(help: str, default: str | None = None) -> None:
    """The flag `--config`, which takes a recipe's name or a file, and `--config.FIELD=VALUE`."""
    path = default and str(recipes()[default])
    config_flags.DEFINE_config_file("config", path, help)


def config_path(value: str) -> str:
    """A value of `--config`, with the file of a recipe in the place of its name.

    Args:
      value: NAME or FILE, or NAME:ARGUMENT or FILE:ARGUMENT.

    Raises:
      ValueError: neither a recipe nor a file.
    """
    name, colon, argument = value.partition(":")
    known = recipes()
    if name in known:
        return f"{known[name]}{colon}{argument}"
    if Path(name).is_file():
        return value
    raise ValueError(
        f"--config={value}: no such file or recipe; the recipes are {', '.join(known)}."
    )


def _with_config_paths(arguments: Sequence[str]) -> list[str]:
    """The command line with the files of recipes in the place of their names."""
    found = list(arguments)
    for i, argument in enumerate(found):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config") or "config" not in flags.FLAGS:
            continue
        if equals:
            found[i] = f"{flag}={config_path(value)}"
        elif i + 1 < len(found):
            found[i + 1] = config_path(found[i + 1])
    return found


def parse(arguments: Sequence[str]) -> list[str]:
    """Parses flags, as `flags_parser` of `app.run`.

    What cannot be understood ends the program with status 1 and one line: flags and settings that
    do not exist, values that do not fit, a configuration that refuses, words beside the flags.
    """
    try:
        remaining = flags.FLAGS(_with_config_paths(arguments))[1:]
    except ValueError as error:
        message = str(error)
    except flags.Error as error:
        # A configuration's own error comes with its traceback.
        message = re.sub(r"^(\w+\.)*\w*Error: ", "", str(error).strip().splitlines()[-1].strip())
    except AttributeError as error:
        if not (error.args and isinstance(error.args[0], KeyError)):  # a fault of the file itself
            raise
        text = str(error).strip("'").replace("\\n", ". ").replace("\\'", "")
        message = f"--config has no such setting: {text}"
    else:
        if not remaining:
            return list(arguments[:1])
        message = (
            f"unexpected {' '.join(remaining)!r}; lists have commas and no spaces (--classes "
            "cat,ship), and switches no values (--pngs, --nopngs)."
        )
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def define_sampling_flags() -> None:
    """Flags of the settings that a model has values of its own for; see `given_settings`."""
    for name, setting in SETTINGS.items():
        define = flags.DEFINE_integer if setting.kind is int else flags.DEFINE_float
        define(name, None, f"{setting.help} The model's own if not given.")


def given_settings(values: flags.FlagValues) -> dict:
    """Arguments of `generate` of the flags of `define_sampling_flags`; None where not given."""
    return {name: values[name].value for name in SETTINGS}


def cores_as_devices() -> None:
    """Makes every core, to eight, a device if JAX computes on a CPU; before anything else of JAX.

    A share of the images for each keeps cores busier than one program over all of them. What the
    environment says of JAX's CPU devices stays.
    """
    given = jax.config.jax_num_cpu_devices != -1  # type: ignore[attr-defined]
    if not given and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", min(8, os.cpu_count() or 1))


def keep_compiled_programs() -> None:
    """Lets a second run skip most of its compilation.

    What took over half a second to compile is kept in the `cache_directory`;
    JAX_COMPILATION_CACHE_DIR names another place, and
    JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def numbers(name: str, texts: Sequence[str]) -> list[float]:
    """The values that a flag of a sampling setting lists.

    Raises:
      ValueError: one of them is no number, or none of the kind that the setting has.
    """
    kind = SETTINGS[name].kind
    try:
        return [kind(text) for text in texts]
    except ValueError:
        raise ValueError(
            f"--{name}={','.join(texts)}: expected {'whole ' * (kind is int)}numbers between "
            "commas, such as 1,2,4."
        ) from None


def start_training(train: Callable, stage: str) -> int:
    """Runs a training on the parsed flags.

    Args:
      train: (config, workdir) trains.
      stage: the kind of configuration that it takes.

    Returns:
      The exit status: `EXIT_STOPPED` if a signal ended the run before its last step.

    Raises:
      ValueError: the configuration is of another stage.
    """
    given = flags.FLAGS
    config = given.config
    processes.initialize_from(given)
    if config.stage != stage:
        program = {"aim": "train", "vq": "train_vq", "eval": "evaluate"}[config.stage]
        raise ValueError(
            f"the configuration is of stage {config.stage!r}; aim-jax {program} runs it."
        )
    if given.data:
        config.data.dir = given.data
    # The platform's task 0 need not be JAX's process 0.
    unit = platform.work_unit()
    unit.set_task_status(
        f"process_index: {jax.process_index()}, process_count: {jax.process_count()}"
    )
    unit.create_artifact(platform.ArtifactType.DIRECTORY, given.workdir, "workdir")
    state = train(config, given.workdir)
    return EXIT_STOPPED if int(state.step) < config.steps else 0
