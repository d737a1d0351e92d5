"""Errors of weights files, whose messages are safe to print."""

import re

# Escape sequences of terminals (ECMA-48), and further control characters except line ends.
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class WeightsError(ValueError):
    """A file of weights is damaged, hostile, or not of the expected kind.

    Names and reasons come from files and from other libraries, so the message is made printable.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    r"""Remove a terminal's escape sequences; write other control characters as in "\x07"."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", ESCAPES.sub("", text))
