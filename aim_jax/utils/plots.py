"""Matplotlib figures of reports; matplotlib comes with the `eval` extra."""

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from aim_jax.utils.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pyplot() -> ModuleType:
    """Import matplotlib.pyplot with the file backend Agg.

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'aim_jax[eval]'.") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def new_figure(count: int) -> "tuple[Figure, list[Axes]]":
    """Create a figure with `count` plots in a row; return the figure and its plots."""
    figure, plots = pyplot().subplots(1, count, figsize=(4 * count, 3.2), squeeze=False)
    return figure, list(plots[0])


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write the figure as PNG atomically, close it, and return the path."""
    figure.tight_layout()
    with replacing(path) as partial:
        figure.savefig(partial, dpi=100, format="png")
    pyplot().close(figure)
    return path
