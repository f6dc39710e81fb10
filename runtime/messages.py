"""Print facts, results, notes and warnings, wrapped at the terminal's width and kept clear of progress bars."""

import sys
from collections.abc import Iterable
from typing import TextIO

from tqdm import tqdm

from options import wrapped

__all__ = ["fact", "labeled", "note", "one_line", "show", "show_result", "warn"]

LABEL_WIDTH = 12  # characters; wider than the longest label, "run folder"


def show(text: str, indent: int = 4) -> None:
    """Print lines on stdout; `indent` is the extra indentation of wrapped parts."""
    _write(text, sys.stdout, indent)


def labeled(label: str, text: str) -> str:
    """Put a label of at most eleven characters before `text`, aligned with other labeled lines."""
    return f"{label:<{LABEL_WIDTH}}{text}"


def fact(label: str, text: str) -> None:
    """Print a labeled line on stdout."""
    show(labeled(label, text), LABEL_WIDTH)


def one_line(summary: str, warnings: Iterable[str] = ()) -> str:
    """Join a result's summary and warnings into one line for a log file."""
    lines = [" ".join(line.split()) for line in summary.splitlines()]
    return "; ".join([*lines, *(f"warning: {text}" for text in warnings)])


def show_result(summary: str, warnings: Iterable[str] = ()) -> None:
    """Print the warnings about a result on stderr, then its summary on stdout."""
    for text in warnings:
        warn(text)
    show(summary, LABEL_WIDTH)


def note(text: str) -> None:
    """Print a note on stderr: something that the user may not expect, but need not change."""
    _write(f"note: {text}", sys.stderr)


def warn(text: str) -> None:
    """Print a warning on stderr: something that worsens a result, or makes a run likely to fail."""
    _write(f"warning: {text}", sys.stderr)


def _write(text: str, file: TextIO, indent: int = 4) -> None:
    """Print lines, wrapped on a terminal, while progress bars are hidden."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)  # names of files may be any bytes
    tqdm.write("\n".join(wrapped(line, file, indent) for line in text.splitlines()), file=file)
    file.flush()
