"""Figures of reports; matplotlib comes with the extra `eval`."""

import os
from pathlib import Path


def pyplot():
    """matplotlib.pyplot, drawing into files.

    Raises:
      ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install -e '.[eval]'.") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def new_figure(count: int):
    """A figure with `count` plots in a row, and the plots."""
    figure, plots = pyplot().subplots(1, count, figsize=(4 * count, 3.2), squeeze=False)
    return figure, list(plots[0])


def save_figure(figure, path: Path) -> Path:
    """Writes a PNG to a temporary name, then renames it."""
    figure.tight_layout()
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=100, format="png")
    pyplot().close(figure)
    os.replace(partial, path)
    return path
