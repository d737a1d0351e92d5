"""The order of the rooms: each imports only those before it, and nobody's private names."""

import ast
import configparser
import importlib
import re
from pathlib import Path

import pytest

import aim_jax
from tests.conftest import ROOT

# docs/design.md draws them. A room imports rooms to its left alone, so there are no circles.
ROOMS = (
    "utils", "parallel", "ops", "models", "data", "perf", "weights", "sampling", "evaluation",
    "training", "configs", "cli",
)  # fmt: skip
MODULES = sorted((ROOT / "aim_jax").rglob("*.py")) + sorted((ROOT / "configs").glob("*.py"))


def room_of(module: str) -> str:
    """The room of a dotted module name; "" for the package's face."""
    return [*module.split("."), ""][1]


def imports_of(path: Path) -> list[tuple[str, str]]:
    """(module, name) of everything that a file imports from the package."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            pytest.fail(f"{path}: relative imports hide which room is meant")
    return [(module, name) for module, name in found if module.split(".")[0] == "aim_jax"]


def own_room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "configs" if parts[0] == "configs" else parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_earlier_rooms_and_public_names(path):
    room = own_room(path)
    if room in ("__init__", "__main__"):
        return
    for module, name in imports_of(path):
        assert not name.startswith("_") or name == "__version__", f"private: {module}.{name}"
        assert not any(part.startswith("_") for part in module.split(".")), f"private: {module}"
        target = room_of(module) or (name if name in ROOMS else "")
        if not target:
            assert name == "__version__", f"{path}: import the room, not the face ({name})"
            continue
        assert ROOMS.index(target) <= ROOMS.index(room), f"{room} imports {module} of {target}"


def test_the_top_level_of_the_package_is_the_rooms():
    entries = {path.name for path in (ROOT / "aim_jax").iterdir() if path.name != "__pycache__"}
    rest = {"__init__.py", "__main__.py", "py.typed", "bundled"}
    assert entries == {*ROOMS, *rest} - {"configs"}
    assert len(entries) <= 15


def test_the_table_of_rooms_is_what_the_code_is():
    """In docs/design.md, in the order that imports follow."""
    table = (ROOT / "docs" / "design.md").read_text().partition("## Rooms")[2].partition("## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.M)) == ROOMS


def test_every_package_is_installed():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    listed = set(parser["options"]["packages"].split())
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "aim_jax").rglob("*.py")}
    assert listed == {".".join(path.parts) for path in folders} | {"aim_jax.configs"}


def test_rooms_and_names_are_reached_from_the_package():
    for name in aim_jax.__all__:
        assert getattr(aim_jax, name) is not None
    for room in ("data", "evaluation", "models", "ops", "sampling", "training", "weights"):
        assert getattr(aim_jax, room) is importlib.import_module(f"aim_jax.{room}")
    with pytest.raises(AttributeError, match="no attribute 'paint'"):
        _ = aim_jax.paint
    assert set(aim_jax.__all__) <= set(dir(aim_jax))
