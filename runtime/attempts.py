"""Work that a run can do without, such as sample grids: if it fails, the run warns and goes on."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from options import DivergedError
from runtime.files import append_line
from runtime.messages import warn

__all__ = ["FAILURES", "Attempts"]

FAILURES = "failures.log"


class Attempts:
    """Tries work that a run can do without, and warns once for each kind of work that fails.

    Args:
        folder: the run folder, whose FAILURES gets the tracebacks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reported = set[str]()

    @contextmanager
    def attempt(self, work: str, step: int) -> Iterator[None]:
        """Run the block.

        An error in it, except DivergedError, becomes a traceback in FAILURES and, the first time for this work, a warning.
        """
        try:
            yield
        except DivergedError:
            raise
        except Exception as error:
            with suppress(OSError):
                append_line(self._folder / FAILURES, f"step {step}: {work} failed\n{traceback.format_exc()}")
            if work not in self._reported:
                self._reported.add(work)
                reason = (str(error).strip().splitlines() or ["no reason given"])[0]
                warn(
                    f"step {step}: {work} failed ({type(error).__name__}: {reason}). The run continues; later failures "
                    f"of this kind are only listed, with tracebacks, in {self._folder / FAILURES}"
                )
