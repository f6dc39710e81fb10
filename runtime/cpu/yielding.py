"""Threads that sleep instead of spinning while other processes compete for the cores.

After each parallel loop, torch's threads wait for each other. In libgomp, the thread library of torch on Linux, an early thread
spins for several milliseconds before it sleeps. This is fast on an idle machine. When another process occupies a core, however,
the late thread may not run for as long as the early one spins, and the spinning uses up the early thread's own share of the
processor.

libgomp spins for microseconds only while it manages more threads than there are cores
(https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html). Each Python thread that runs a parallel loop gets a team of
threads of its own, so an idle second team achieves this. It can be added and removed at any time, whereas GOMP_SPINCOUNT and
OMP_WAIT_POLICY take effect only before torch is loaded and slow down an idle machine. The other teams keep their size, so
results stay bit-identical. benchmarks/busy_machine.py measures the effect.
"""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["SecondTeam", "yield_to_others"]

THREADS = Path("/proc/self/task")
PERIOD = 0.5  # seconds between two looks
# Seconds per second, summed over threads, that the process waits for a core. About 0.05 were measured on an idle machine, with
# and without spinning, and 0.4 to 1.4 with one or two busy neighbors.
BUSY, QUIET = 0.2, 0.1
CALM_LOOKS = 4  # quiet looks in a row until threads may spin again
GRAIN = 32768  # elements of an elementwise loop for each thread


class SecondTeam:
    """An idle team of threads that keeps the other teams of this process from spinning."""

    def __init__(self) -> None:
        self._release = threading.Event()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._hold, args=(ready,), name="second team", daemon=True)
        self._thread.start()
        ready.wait()

    def disband(self) -> None:
        """End the team's threads, so that the other teams may spin again."""
        self._release.set()
        self._thread.join()

    def _hold(self, ready: threading.Event) -> None:
        torch.zeros(GRAIN * torch.get_num_threads())  # a parallel loop starts the team
        ready.set()
        self._release.wait()


class _Watch:
    """Adds a second team while the process waits for cores, and removes it afterwards."""

    def __init__(self) -> None:
        self.team: SecondTeam | None = None
        self.calm = 0

    def look(self, share: float) -> None:
        """Decide after a period in which the process waited for a core for `share` seconds per second."""
        self.calm = self.calm + 1 if share < QUIET else 0
        if self.team is None and share > BUSY:
            self.team = SecondTeam()
        elif self.team and self.calm >= CALM_LOOKS:
            self.team.disband()
            self.team = None

    def run(self) -> None:
        """Look again and again, until the process has no more files or threads to look with."""
        with suppress(OSError, RuntimeError):
            then, before = time.monotonic(), seconds_without_core()
            while True:
                time.sleep(PERIOD)
                now, after = time.monotonic(), seconds_without_core()
                self.look((after - before) / (now - then))
                then, before = now, after


_lock = threading.Lock()
_watched_process = 0


def yield_to_others() -> bool:
    """Let torch's threads sleep instead of spinning whenever the process waits for cores; returns whether it can.

    A background thread looks every half second. Needs Linux, and more than half of the cores for torch's threads: with fewer,
    other processes find free cores. Repeated calls have no effect.
    """
    global _watched_process
    threads = torch.get_num_threads()
    if not THREADS.is_dir() or threads < 2 or 2 * threads - 1 <= len(os.sched_getaffinity(0)):
        return False
    with _lock:
        if _watched_process != os.getpid():  # a forked process has no background thread
            _watched_process = os.getpid()
            threading.Thread(target=_Watch().run, name="yielding", daemon=True).start()
    return True


def seconds_without_core() -> float:
    """Seconds for which the process's present threads were ready to run but had no core, according to the Linux scheduler."""
    total = 0
    for thread in THREADS.iterdir():
        try:
            total += int((thread / "schedstat").read_text().split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel does not count
            continue
    return total / 1e9
