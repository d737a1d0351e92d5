"""Commands and Python blocks of the documentation, and commands of docstrings."""

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "aim_jax" / "bundled").glob("*/README.md"),
    ]
)


class Command(NamedTuple):
    """A command of a page.

    Attributes:
      page: path of the page or module from the root of the repository.
      words: the command and its arguments, without variables in front of it.
    """

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[Command]:
    """Return the commands of a page's bash blocks, in their order."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, "&&"]:
                if word not in ("&&", "|", ";"):
                    words.append(word)
                    continue
                while words and re.match(r"[A-Z_]+=", words[0]):
                    del words[0]
                if words:
                    found.append(Command(str(page.relative_to(ROOT)), tuple(words)))
                words = []
    return found


def docstring_commands(file: Path) -> list[Command]:
    """Return the commands that a module's docstring shows as examples."""
    text = (ast.get_docstring(ast.parse(file.read_text())) or "").replace("\\\n", " ")
    prose = re.compile(r"\.( |$)")
    lines = (line.strip() for line in text.splitlines() if not prose.search(line))
    return [
        Command(str(file.relative_to(ROOT)), tuple(shlex.split(line, comments=True)))
        for line in lines
        if line.startswith(("aim-jax ", "python benchmarks/", "python launch/", "python tests/"))
    ]


MODULES = sorted(
    path
    for folder in ("aim_jax/cli", "configs", "benchmarks", "launch", "tests")
    for path in (ROOT / folder).glob("*.py")
)
ALL = [
    *(command for page in PAGES for command in commands(page)),
    *(command for module in MODULES for command in docstring_commands(module)),
]
