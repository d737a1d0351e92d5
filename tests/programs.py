"""Runs the package's programs in the process of a test; one of their own takes seconds to start."""

import contextlib
import dataclasses
import io
import sys
from unittest import mock

import grain  # noqa: F401  (defines its flags once; `run` removes those of a program)
from absl import app, flags

from aim_jax.cli import main


@dataclasses.dataclass(frozen=True)
class Ended:
    """Exit status and output of a program; named as those of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments) -> Ended:
    """Runs `aim-jax ARGUMENTS`; its flags are gone afterwards.

    An error that a program would show with its traceback is raised.
    """
    arguments = [str(argument) for argument in arguments]
    app.define_help_flags()  # they are defined once in a process, and so have to stay
    known = set(flags.FLAGS)
    out, err = io.StringIO(), io.StringIO()
    command_line = mock.patch.object(sys, "argv", ["aim-jax", *arguments])
    try:
        # --config.FIELD=VALUE is looked for in sys.argv.
        with command_line, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(arguments)
    except SystemExit as end:
        status = end.code
    finally:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    return Ended(status, out.getvalue(), err.getvalue())
