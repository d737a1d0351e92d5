"""Shared start-up of the command-line programs: flags, recipes, one-line errors, compile cache."""

import contextlib
import functools
import inspect
import io
import os
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from logging import LogRecord
from pathlib import Path
from types import ModuleType

import jax
from absl import app, flags, logging
from clu import platform
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags

from aim_jax.configs.defaults import aim_defaults, eval_defaults, vq_defaults
from aim_jax.ops.native.build import BuildError
from aim_jax.parallel import processes
from aim_jax.sampling.config import SETTINGS
from aim_jax.training.monitor import BadStepsError
from aim_jax.utils.compiled import keep_compiled_programs
from aim_jax.utils.files import FULL, DiskFullError
from aim_jax.utils.names import printable
from aim_jax.utils.signals import (
    EXIT_LOST,
    EXIT_STOPPED,
    RESUMES,
    ctrl_c_in_one_line,
    end_with_line,
)

# Seconds that a process waits after an error before it exits, if there are several processes.
GRACE = 5.0
# Text of JAX's error where the platform of JAX_PLATFORMS is missing.
NO_BACKEND = "Unable to initialize backend"


def run(program: ModuleType, name: str, arguments: Sequence[str]) -> int:
    """Run a program of this package: parse its flags, then call its `main`.

    Args:
      program: a module whose docstring is its help. It has `define_flags()` and `main()`, or only
        `main(arguments)` if it parses its arguments itself. `POSITIONAL` names the flag that a
        first argument without a flag sets.
      name: name of the program on the command line.
      arguments: arguments of the command line, without the name.

    Returns:
      The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        # Names of files are bytes: one that is not text of the terminal's encoding is escaped.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with errors_in_one_line():
        if not hasattr(program, "define_flags"):
            return program.main(arguments) or 0
        known = set(flags.FLAGS)
        program.define_flags()
        if {"-h", "-help", "--help", "--helpshort"} & set(arguments):
            # Building a configuration may import packages that define other flags.
            names = [x for x in flags.FLAGS if x not in known and _is_ours(x)]
            print(help_text(program, [flags.FLAGS[x] for x in names]))
            return 0
        try:
            parser = functools.partial(parse, positional=getattr(program, "POSITIONAL", ""))
            app.run(lambda _: program.main(), [name, *arguments], flags_parser=parser)
        except SystemExit as stop:  # app.run always ends with it
            return stop.code if isinstance(stop.code, int) else 0
    return 0


def _is_ours(flag: str) -> bool:
    return (flags.FLAGS.find_module_defining_flag(flag) or "").startswith("aim_jax")


def help_text(program: ModuleType, own: Sequence[flags.Flag]) -> str:
    """Return the docstring of a program followed by its flags and their defaults."""
    lines = [inspect.cleandoc(program.__doc__ or ""), "", "flags:"]
    names = {str(path): name for name, path in recipes().items()}
    for flag in own:
        usage = f"  --{flag.name}"
        if isinstance(flag.parser, flags.EnumParser):
            usage += "=" + "|".join(flag.parser.enum_values)
        elif flag.boolean:
            usage = f"  --[no]{flag.name}"
        if flag.default not in (None, "", []):
            default = str(flag.default_as_str).strip("'")
            usage += f"  (default: {names.get(default, default)})"
        text = " ".join((flag.help or "").split())
        lines += [usage, textwrap.indent(textwrap.fill(text, 90), "      ")]
    return "\n".join(lines)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Exit with a one-line message after errors that a user can fix, and after Ctrl-C.

    The exit status is 1 after such an error and 130 after Ctrl-C; see `ctrl_c_in_one_line`. With
    several processes, a failed step over all processes exits with `EXIT_LOST`.
    """
    with ctrl_c_in_one_line(), _usual_errors_in_one_line():
        yield


@contextlib.contextmanager
def _usual_errors_in_one_line() -> Iterator[None]:
    logging.set_verbosity(logging.WARNING)
    # Orbax also logs the errors that it raises, with tracebacks.
    logging.get_absl_handler().addFilter(_is_not_of_orbax)
    try:
        keep_compiled_programs()
        yield
    except (ValueError, OSError, BadStepsError, BuildError) as error:
        end_if_step_failed(error)
        print(f"error: {printable(one_line(error))}", file=sys.stderr, flush=True)
        if jax.distributed.is_initialized():
            # A regular exit waits for the other processes, is aborted with them, and returns
            # another code. Processes with the same error get time to print it, for which they need
            # process 0.
            time.sleep(GRACE)
            os._exit(1)
        raise SystemExit(1) from None
    except jax.errors.JaxRuntimeError as error:
        end_if_step_failed(error)
        raise
    except (AssertionError, RuntimeError) as error:
        if not is_backend_missing(error):
            raise
        reason = (str(error) or "no such platform here").splitlines()[0].rstrip(". ")
        print(
            f"error: JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {reason}. Set it to a "
            "platform of this machine, such as cpu, or unset it.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        raise SystemExit(1) from None


def end_if_step_failed(error: Exception) -> None:
    """End the process with `EXIT_LOST` if a step over several processes failed with `error`.

    Usually communication failed because another process was lost.
    """
    if processes.is_failed_step(error):
        reason = str(error).strip().partition("\n")[0]
        # A regular exit would wait for the other processes.
        end_with_line(f"error: a step over all processes failed: {reason}; {RESUMES}", EXIT_LOST)


def one_line(error: Exception) -> str:
    """Return the message of an error; that of the system about a full disk tells what to do."""
    if isinstance(error, OSError) and error.errno in FULL:
        return str(DiskFullError(error.filename or "a file", os.strerror(error.errno)))
    return str(error)


def is_backend_missing(error: Exception) -> bool:
    """Return whether an error is JAX's for a platform that is not there.

    JAX 0.10 fails an assertion for "cuda" without its plugin.
    """
    if isinstance(error, RuntimeError):
        return NO_BACKEND in str(error)
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).name == "xla_bridge.py"


def _is_not_of_orbax(record: LogRecord) -> bool:
    return "orbax" not in record.pathname


def recipes() -> dict[str, Path]:
    """Return the files of the shipped configurations, by the names that `--config` accepts."""
    root = Path(str(resources.files("aim_jax.configs")))
    return {
        file.stem: file
        for file in sorted(root.glob("*.py"))
        if "def get_config(" in file.read_text()
    }


def define_config(help: str, default: str | None = None) -> None:
    """Define `--config`, which accepts a recipe name or a file, and `--config.FIELD=VALUE`."""
    path = default and str(recipes()[default])
    config_flags.DEFINE_config_file("config", path, help)


def config_path(value: str) -> str:
    """Replace the name of a recipe in a value of `--config` by its file.

    Args:
      value: NAME or FILE, or NAME:ARGUMENT or FILE:ARGUMENT.

    Raises:
      ValueError: if it is neither a recipe nor a file.
    """
    name, colon, argument = value.partition(":")
    known = recipes()
    if name in known:
        return f"{known[name]}{colon}{argument}"
    if Path(name).is_file():
        return value
    raise ValueError(
        f"--config={value}: no such file or recipe; expected a file or one of {', '.join(known)}."
    )


def _with_config_paths(arguments: Sequence[str]) -> list[str]:
    """Replace the names of recipes in a command line by their files."""
    resolved = list(arguments)
    for i, argument in enumerate(resolved):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config") or "config" not in flags.FLAGS:
            continue
        if equals:
            resolved[i] = f"{flag}={config_path(value)}"
        elif i + 1 < len(resolved):
            resolved[i + 1] = config_path(resolved[i + 1])
    return resolved


def parse(arguments: Sequence[str], positional: str = "") -> list[str]:
    """Parse flags, as the `flags_parser` of `app.run`.

    Invalid input ends the program with status 1 and a one-line message: unknown flags or settings,
    invalid values, an error in the configuration, or arguments that are not flags.

    Args:
      arguments: name of the program, and its arguments.
      positional: name of the flag that a first argument without a flag sets; "" for none.
    """
    try:
        resolved = _with_config_paths(arguments)
        if positional and resolved[1:] and not resolved[1].startswith("-"):
            resolved[1] = f"--{positional}={resolved[1]}"
        with _warnings_off():  # of ml_collections, beside its errors
            remaining = flags.FLAGS(resolved)[1:]
        check_config()
    except Exception as error:
        message = _parse_error(error, _given_config(arguments))
        if not message:
            raise
    else:
        if not remaining:
            return list(arguments[:1])
        message = (
            f"unexpected {' '.join(remaining)!r}; separate lists with commas and no spaces "
            "(--classes cat,ship), and pass switches without values (--pngs, --nopngs)."
        )
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


@contextlib.contextmanager
def _warnings_off() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        if logging.get_verbosity() == logging.ERROR:  # a flag may have set another
            logging.set_verbosity(before)


def _given_config(arguments: Sequence[str]) -> str:
    """Return the value of `--config` on a command line, or its default; "" if there is none."""
    if "config" not in flags.FLAGS:
        return ""
    value = flags.FLAGS["config"].default or ""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, text = argument.partition("=")
        if flag in ("--config", "-config"):
            value = text if equals else following
    return value


def _parse_error(error: Exception, config: str) -> str:
    """Describe an error of parsing flags; "" for an error of this package.

    Args:
      error: The error.
      config: Value of `--config`, or "".
    """
    name = config.partition(":")[0]
    file = str(recipes().get(name, name))
    text = str(error).strip()
    # The error of a configuration comes with its traceback, as text or as an exception.
    places = [(x.filename, x.lineno) for x in traceback.extract_tb(error.__traceback__)]
    places += [(x, int(line)) for x, line in re.findall(r'File "(.+?)", line (\d+)', text)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    lines = [line for place, line in places if config and place == file]
    if isinstance(error, OSError):  # of the configuration, which ml_collections shows later
        cause = text.partition("earlier failure to load: ")[2] or text
        return f"{cause.splitlines()[0]} (in --config={config})"
    if isinstance(error, AttributeError):
        if "no attribute 'get_config'" in text:
            return f"--config={config}: the file defines no get_config()."
        text = text.strip("'").replace("\\n", ". ").replace("\\'", "")
        if not lines and error.args and isinstance(error.args[0], KeyError):
            return f"unknown setting of --config: {text}"
    own = bool(lines) or "Error whilst parsing config file" in text
    if not own and not isinstance(error, ValueError | flags.Error):
        return ""
    if config and "Flag --config must have a value other than None" in text:
        return f"--config={config}: get_config() returns None; end it with return config."
    # The first line of an error after its traceback, which it may continue.
    found = re.findall(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception)): (.*)$", text, re.MULTILINE)
    kind, cause = found[-1] if found else (type(error).__name__, text.partition("\n")[0])
    if not own:
        return cause
    if kind == "ValueError":
        return f"{cause} (in --config={config})"
    line = f", line {lines[-1]}" if lines else ""
    return f"--config={config}{line}: {kind}: {cause}"


def config_name() -> str:
    """Return the parsed `--config` without its argument; a shipped recipe has its name."""
    file = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    return {str(path): name for name, path in recipes().items()}.get(file, file)


def check_config() -> None:
    """Check that the parsed `--config`, if the program has one, is complete.

    Raises:
      ValueError: A field of the defaults is missing.
    """
    if "config" not in flags.FLAGS or flags.FLAGS["config"].value is None:
        return
    config = flags.FLAGS.config
    name = config_name()
    defaults = {"aim": aim_defaults, "vq": vq_defaults, "eval": eval_defaults}
    advice = (
        "start from aim_defaults(), vq_defaults() or eval_defaults() of aim_jax.configs.defaults"
    )
    stage = config.stage if hasattr(config, "stage") else None
    if not isinstance(config, ConfigDict) or stage not in defaults:
        raise ValueError(
            f"--config={name}: get_config() returns no configuration with a stage out of "
            f"{', '.join(defaults)}; {advice}."
        )
    expected = flatten_dict(defaults[stage]().to_dict(), sep=".")
    missing = sorted(expected.keys() - flatten_dict(config.to_dict(), sep=".").keys())
    if missing:
        raise ValueError(f"--config={name}: {', '.join(missing)} missing; {advice}.")


def define_sampling_flags() -> None:
    """Define flags for the settings that have defaults in the model; see `given_settings`."""
    for name, setting in SETTINGS.items():
        define = flags.DEFINE_integer if setting.kind is int else flags.DEFINE_float
        define(name, None, f"{setting.help} Default: that of the model.")


def given_settings(values: flags.FlagValues) -> dict:
    """Return the flags of `define_sampling_flags` as arguments of `generate`; None if not set."""
    return {name: values[name].value for name in SETTINGS}


def cores_as_devices() -> None:
    """Make each CPU core a JAX device, up to eight.

    Call this before any other use of JAX. On CPU, one program per core with its share of the images
    keeps the cores busier than one program over all of them. A number of CPU devices set by JAX's
    configuration or XLA_FLAGS takes precedence.
    """
    is_set = jax.config.jax_num_cpu_devices != -1  # type: ignore[attr-defined]
    if not is_set and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", min(8, os.cpu_count() or 1))


def numbers(name: str, texts: Sequence[str]) -> list[float]:
    """Parse the values listed by a flag of a sampling setting.

    Raises:
      ValueError: if a value is not a number of the type of the setting.
    """
    kind = SETTINGS[name].kind
    try:
        return [kind(text) for text in texts]
    except ValueError:
        raise ValueError(
            f"--{name}={','.join(texts)}: expected {'integers' if kind is int else 'numbers'} "
            "separated by commas, such as 1,2,4."
        ) from None


def start_training(train: Callable, stage: str) -> int:
    """Train with the parsed flags.

    Args:
      train: called as train(config, workdir); returns the final state.
      stage: required stage of the configuration.

    Returns:
      The exit status: `EXIT_STOPPED` if a signal ended the run before its last step, else 0.

    Raises:
      ValueError: if the configuration has another stage.
    """
    values = flags.FLAGS
    config = values.config
    name = config_name()
    processes.initialize_from(values)
    if config.stage != stage:
        program = {"aim": "train", "vq": "train_vq", "eval": "evaluate"}[config.stage]
        raise ValueError(
            f"--config={name}: the configuration has stage {config.stage!r}, expected {stage!r}; "
            f"run it with aim-jax {program}."
        )
    if values.data:
        config.data.dir = values.data
    if name in ("folder", "folder_vq"):
        from aim_jax.cli.folder import prepare  # imports the datasets

        prepare(config, Path(values.workdir), config_flags.get_override_values(values["config"]))
    # Task 0 of the platform is not always process 0 of JAX.
    unit = platform.work_unit()
    unit.set_task_status(
        f"process_index: {jax.process_index()}, process_count: {jax.process_count()}"
    )
    unit.create_artifact(platform.ArtifactType.DIRECTORY, values.workdir, "workdir")
    state = train(config, values.workdir)
    return EXIT_STOPPED if int(state.step) < config.steps else 0
