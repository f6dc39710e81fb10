"""Standard output and error that never end a program's work.

Scripts print while they work for hours. Their output may be a pipe whose reader has ended (`| head`), a log file on a full
disk, a closed stream (`>&-`), or a terminal whose encoding lacks a character. None of these may cost the work.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

__all__ = ["steady_output"]


class _Steady:
    """A text stream that escapes characters that it cannot encode, and drops all output after a failed write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        if self.failure is None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except OSError as error:
                self._drop(error)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.failure is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._drop(error)

    def _drop(self, error: OSError) -> None:
        self.failure = error
        with suppress(OSError, ValueError):  # what is still buffered, and libraries' output, goes nowhere
            with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def steady_output() -> Iterator[None]:
    """Make sys.stdout and sys.stderr accept everything during the block.

    A log file that could not be written is reported on the other stream at the end. A reader that has ended is not.
    """
    # Otherwise the next file that is opened would get the number of a closed stream.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
        out, err = (_Steady(nowhere if stream is None else stream) for stream in before)
        sys.stdout, sys.stderr = out, err
        try:
            yield
        finally:
            for stream in (out, err):
                stream.flush()
            sys.stdout, sys.stderr = before
            if out.failure is not None and out.failure.errno != errno.EPIPE:
                err.write(f"warning: the output is incomplete: {out.failure.strerror}\n")
                err.flush()
