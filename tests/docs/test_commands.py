"""Every command of pages and docstrings is one that exists, with flags and settings that exist.

`test_snippets` runs them.
"""

import configparser
import importlib
import re

import pytest

from tests.conftest import ROOT
from tests.docs.snippets import ALL
from tests.programs import run

PROGRAMS = [c for c in ALL if c.words[0] == "aim-jax" and "..." not in c.words]
SCRIPTS = [c for c in ALL if any(re.search(r"\.(py|sh)$", word) for word in c.words[:3])]


def test_there_are_commands_to_look_at():
    assert len(PROGRAMS) > 60 and len(SCRIPTS) > 15


@pytest.mark.parametrize("command", PROGRAMS, ids=str)
def test_a_program_understands_its_command(command, picture_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(picture_folder / "train")
    name, *arguments = command.words[1:] or ["--help"]
    if name == "convert":
        options = run("convert", arguments[0], "--help").stdout
        assert {a for a in arguments if a.startswith("--")} <= set(re.findall(r"--\w+", options))
        return
    if not name.startswith("-"):
        program = importlib.import_module(f"aim_jax.cli.{name.replace('-', '_')}")
        monkeypatch.setattr(program, "main", lambda: 0)  # after its flags are parsed and checked
    done = run(name, *arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", SCRIPTS, ids=str)
def test_a_script_is_there_and_has_the_flags(command):
    number, script = next((i, w) for i, w in enumerate(command.words) if w.endswith((".py", ".sh")))
    if script == "exported/sample.py":
        script = "aim_jax/sampling/export_runner.py"
    text = (ROOT / script).read_text()
    arguments = command.words[number + 1 :]
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for flag in (word for word in own if word.startswith("--") and word != "--help"):
        assert re.search(rf"""(--|["']){flag[2:]}\b""", text), f"{script} has no {flag}"


def test_targets_and_extras_are_there():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = set(parser["options.extras_require"])
    for command in ALL:
        if command.words[0] == "make":
            assert set(command.words[1:]) <= targets, command
        for named in re.findall(r"\[([a-z,]+)\]", " ".join(command.words)):
            assert set(named.split(",")) <= extras | {"cuda12", "cuda13"}, command
