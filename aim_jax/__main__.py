"""`python -m aim_jax` lists the programs; `python -m aim_jax PROGRAM ...` runs one.

Example:
  python -m aim_jax sample --checkpoint cifar10
"""

import ast
import runpy
import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[1] / "launch"


def programs() -> dict[str, str]:
    """What each program does, by its name; empty where the package is not in a checkout."""
    found = {}
    for file in sorted(LAUNCH.glob("*.py")):
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        found[file.stem] = docstring.partition("\n")[0]
    return found


def overview() -> str:
    """The text of --help."""
    found = programs()
    if not found:
        return (
            "The programs are in the directory launch/ of the repository, which a package that was "
            "installed without a checkout lacks. In Python:\n\n"
            '  import aim_jax\n  images = aim_jax.generate(aim_jax.load_pretrained("cifar10"), '
            "labels=[3, 5, 8]).images"
        )
    width = max(map(len, found))
    lines = [f"  {name:<{width}}  {text}" for name, text in found.items()]
    usage = "usage: python -m aim_jax PROGRAM [options]; PROGRAM --help tells more"
    return "\n".join(
        [usage, "", *lines, "", "example: python -m aim_jax sample --checkpoint cifar10"]
    )


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    name, *rest = argv
    if name not in programs():
        print(f"error: no program {name!r}.\n\n{overview()}", file=sys.stderr)
        return 2
    sys.argv = [f"python -m aim_jax {name}", *rest]
    runpy.run_path(str(LAUNCH / f"{name}.py"), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
