"""Table of a model's parameters."""

import dataclasses

import jax
from clu import parameter_overview


@dataclasses.dataclass(frozen=True)
class Row:
    """Row of the table; the fields are its columns."""

    module: str
    parameters: int
    bytes: int


def parameter_table(params: dict) -> str:
    """Format a table of the parameters and bytes of every top-level module, and their total.

    Args:
      params: nested dict of arrays, or of their shapes and dtypes.
    """
    rows = [_row(name, {name: module}) for name, module in params.items()]
    table = parameter_overview.make_table([*rows, _row("total", params)])
    *lines, total, end = table.splitlines()
    return "\n".join([*lines, lines[0], total, end])


def _row(name: str, params: dict) -> Row:
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return Row(name, int(parameter_overview.count_parameters(params)), size)
