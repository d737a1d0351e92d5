"""Errors of weights files, whose messages are safe to print."""

from aim_jax.utils.names import printable


class WeightsError(ValueError):
    """A file of weights is damaged, hostile, or not of the expected kind.

    Names and reasons come from files and from other libraries, so the message is made printable.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))
