"""Commands and Python blocks of the documentation."""

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
      page: path of the page from the root of the repository.
      words: the command and its arguments, without variables in front of it.
      directory: directory that a `cd` before it in the same line names, if any.
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


ALL = [command for page in PAGES for command in commands(page)]
