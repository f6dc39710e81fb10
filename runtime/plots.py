"""Plots as PNG files. They need matplotlib, which is an extra."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from options import UsageError
from runtime.files import atomic_path

__all__ = ["figure_file", "require_plots"]


def require_plots() -> None:
    """Check that matplotlib is installed, before work whose result is plotted.

    Raises:
        UsageError: it is not.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("the plot needs matplotlib: pip install matplotlib") from error


@contextmanager
def figure_file(path: Path, columns: int = 1) -> Iterator[list[Any]]:
    """Yield a row of matplotlib axes to draw on, and then write the figure atomically as PNG.

    Raises:
        UsageError: matplotlib is missing.
    """
    require_plots()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, 4.5), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    yield list(axes)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")
