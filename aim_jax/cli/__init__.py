"""Command line: `aim-jax` lists the programs, `aim-jax PROGRAM ...` runs one.

Example:
  aim-jax sample --checkpoint cifar10

`python -m aim_jax` is equivalent. The list shows the first line of each program's docstring.
"""

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = (
    "sample",
    "complete",
    "compare",
    "demo",
    "describe",
    "train",
    "train_vq",
    "extract_codes",
    "evaluate",
    "sweep",
    "scaling",
    "convert",
    "publish",
    "export",
    "compile",
)


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
      The exit status.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
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
