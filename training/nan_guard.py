"""Numbers gone wrong: steps that were skipped, losses that leap, and the end of a run whose every step is skipped."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

from options import DivergedError
from runtime.messages import warn
from training.data import first_images
from training.metrics_log import MetricsLog
from training.run import TrainingRun
from training.state import TrainingState
from training.state_file import CONTENT

__all__ = ["LossHistory", "NanGuard"]

SPIKE = 3.0  # times the running median
REMEMBERED, NEEDED = 21, 5  # losses of intervals, for the median
LISTED_STEPS, LISTED_IMAGES = 10, 8  # at most, of an interval and of a batch


class LossHistory:
    """The losses of the last intervals, and whether a new one leaps out of them.

    Args:
        past: losses of earlier intervals.
    """

    def __init__(self, past: Iterable[float] = ()) -> None:
        self._recent = deque(past, maxlen=REMEMBERED)

    def leap(self, loss: float) -> float | None:
        """The median of the last losses if `loss` is more than SPIKE times that, else None; the loss is remembered."""
        median = statistics.median(self._recent) if len(self._recent) >= NEEDED else math.inf
        self._recent.append(loss)
        return median if loss > SPIKE * median else None


class NanGuard:
    """Looks, once in an interval of the log, at what the steps have left on the device.

    Args:
        run: the run.
        state: its network, whose steps count what they skip.
        log: where the main process records it.
        last_step: of the run.
    """

    def __init__(self, run: TrainingRun, state: TrainingState, log: MetricsLog | None, last_step: int) -> None:
        self._run = run
        self._state = state
        self._log = log
        self._last_step = last_step
        self._course = LossHistory(log.past("train", "loss") if log else ())

    def report_loss(self, loss: float) -> None:
        """Record an interval's mean loss if it leaps."""
        median = self._course.leap(loss)
        if median is not None and self._log:
            self._log.write(self._state.step, "spike", {"loss": loss, "median": median})
            warn(f"step {self._state.step}: the loss rose to {loss:.4g} from a median of {median:.4g}")

    def report_skipped(self) -> None:
        """Record the steps that were skipped since the last call.

        Raises:
            DivergedError: so many in a row that the run is lost.
        """
        skipped = self._state.take_skipped()
        if skipped and self._log:
            listed = {step: self._images(step) for step in skipped[:LISTED_STEPS]}
            for step, images in listed.items():  # under the step of now: a run that goes on from before will know again
                self._log.write(self._state.step, "skipped", {"skipped_step": step, "indices": images})
            scaled = self._run.machine.precision == "fp16"
            warn(
                f"skipped {len(skipped)} steps without a finite gradient, the first at step {skipped[0]} with images "
                f"{_written(listed[skipped[0]])}"
                + (" (in fp16 a few are normal, until the loss scale fits)" if scaled else "")
            )
        limit = self._run.training.max_bad_steps
        if limit:
            length, first_loss = self._state.streak.tolist()
            if length >= limit:
                raise DivergedError(self._diagnosis(int(length), first_loss))

    def _images(self, step: int) -> list[int]:
        """The first images of the whole batch of a step, counted from 1 on."""
        whole = self._run.training.batch_size * self._run.processes.count
        return first_images(self._run.training.seed, step - 1, len(self._run.source), whole, LISTED_IMAGES)

    def _diagnosis(self, length: int, loss: float) -> str:
        first = self._state.step - length + 1
        rate = self._run.training.rate_at(first - 1, self._last_step)
        kept = (self._run.folder / CONTENT).exists()
        content = f"{CONTENT} is from before them" if kept else f"no {CONTENT} was saved before them"
        precision = self._run.machine.precision
        return (
            f"the last {length} steps had no finite gradient, so they changed nothing (--max_bad_steps "
            f"{self._run.training.max_bad_steps}). It began at step {first}: learning rate {rate:.4g}, loss {loss:.4g}, "
            f"precision {precision}, images {_written(self._images(first))}; {content}. Go on with --resume and a smaller "
            "--lr, a --grad_clip (1, say) or --precision fp32; if the data are to blame, metrics.jsonl lists what was "
            'skipped (kind "skipped")'
        )


def _written(images: list[int]) -> str:
    return ", ".join(map(str, images)) + (", ..." if len(images) == LISTED_IMAGES else "")
