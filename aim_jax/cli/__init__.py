"""Command line: `aim-jax` lists the programs, `aim-jax PROGRAM ...` runs one.

Example:
  aim-jax sample --checkpoint cifar10

`python -m aim_jax` is equivalent. The list shows the first line of each program's docstring.
"""

import ast
import atexit
import contextlib
import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from aim_jax.utils.memory import restart_with_huge_pages
from aim_jax.utils.signals import (
    EXIT_INTERRUPTED,
    ctrl_c_in_one_line,
    end_interrupted,
    sigterm_in_one_line,
)

PROGRAMS = (
    "sample",
    "complete",
    "compare",
    "demo",
    "describe",
    "train",
    "train_vq",
    "train_text_tokenizer",
    "train_folder",
    "extract_codes",
    "evaluate",
    "sweep",
    "scaling",
    "convert",
    "publish",
    "export",
    "compile",
)

# Long programs: launchers stop them by SIGTERM, and restart them.
STOPPABLE = ("train", "train_vq", "train_folder", "extract_codes")


def overview() -> str:
    """Return the list of programs that `aim-jax --help` prints."""
    width = max(map(len, PROGRAMS))
    lines = []
    for name in PROGRAMS:
        # Parsed instead of imported, because most programs import JAX.
        source = Path(__file__).with_name(f"{name}.py").read_text()
        first_line = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        lines.append(f"  {name:<{width}}  {first_line}")
    usage = "usage: aim-jax PROGRAM [flags]; aim-jax PROGRAM --help shows its flags"
    return "\n".join([usage, "", *lines, "", "example: aim-jax sample --checkpoint cifar10"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a program.

    Args:
      arguments: name and flags of the program; by default those of the command line.

    Returns:
      The exit status. After Ctrl-C, a program of the command line ends the process itself.
    """
    if arguments is not None:
        return _main(arguments)
    stoppable = "".join(sys.argv[1:2]).replace("-", "_") in STOPPABLE
    if stoppable:
        restart_with_huge_pages()
    # Registered first, this runs last. Without it, Ctrl-C in the very end of the interpreter, which
    # takes its handlers back, would end a program that has done its work as a killed one.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    status: object = EXIT_INTERRUPTED
    try:
        stopping = sigterm_in_one_line() if stoppable else contextlib.nullcontext()
        with ctrl_c_in_one_line(), stopping:
            status = _main(sys.argv[1:])
    except SystemExit as end:
        status = end.code
        if status != EXIT_INTERRUPTED:
            raise
    if status == EXIT_INTERRUPTED:
        sys.stdout.flush()
        end_interrupted()
    # The interpreter's clean-up can still be interrupted, but the work is done.
    signal.signal(signal.SIGINT, lambda *_: end_interrupted())
    return status if isinstance(status, int) else 0


def _main(arguments: Sequence[str]) -> int:
    """Run a program; see `main`."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from aim_jax import __version__

        print(f"aim_jax {__version__}")
        return 0
    name = arguments[0].replace("-", "_")
    if name not in PROGRAMS:
        print(f"error: unknown program {arguments[0]!r}.\n\n{overview()}", file=sys.stderr)
        return 2
    from aim_jax.cli import common

    program = importlib.import_module(f"aim_jax.cli.{name}")
    return common.run(program, f"aim-jax {name}", arguments[1:])
