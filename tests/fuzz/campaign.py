"""Builds the materials once, runs cases until the time is over, and counts and records the outcomes."""

import itertools
import os
import random
import shlex
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import diffusers  # noqa: F401
import lmdb  # noqa: F401
import skimage.metrics  # noqa: F401
import torch
import torch.utils.tensorboard
from tqdm import tqdm

from datasets_prep import idx
from evaluation.features.registry import FEATURES
from models.dit import DIT_SIZES
from tests.fake_features import MeanColors
from tests.fuzz.cases import Case, command_line, draw_case, read_cases
from tests.fuzz.execute import Verdict, call_in_fork, remove, run_case
from tests.fuzz.materials import SETUP, write_materials
from tests.fuzz.scripts import SCRIPTS, declared_options, run_entry

__all__ = ["Limit", "paths_below", "plain_cases", "random_cases", "replay", "run_campaign", "workshop"]


class Colors(MeanColors):
    """Mean colors; gray images count as colored ones, as for Inception."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return super().features(images.expand(-1, 3, -1, -1))


@contextmanager
def workshop() -> Iterator[Path]:
    """A folder with `materials`, in a process in which cases can run: one thread, no hub or download, and small networks."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # a thread, which a forked process would lack
    root = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    with (
        mock.patch.dict(os.environ, settings | {"HOME": str(root / "home")}),
        # Published networks, and a machine's own copy of Fashion-MNIST, would take most of the time.
        mock.patch.dict(FEATURES, {"inception": Colors}),
        mock.patch.dict(DIT_SIZES, {"Mi": (24, 1, 3)}),
        mock.patch.object(idx, "Path", _below_the_root),
    ):
        try:
            _build(root / "materials")
            yield root
        finally:
            remove(root)


def _below_the_root(*parts: str | Path) -> Path:
    return Path("nowhere") if parts == ("/",) else Path(*parts)


def _build(materials: Path) -> None:
    """Write the materials.

    Raises:
        RuntimeError: one of the commands fails that every case varies.
    """
    materials.mkdir()
    write_materials(materials)
    for script, number, flags in SETUP:
        words = shlex.split(f"{SCRIPTS[script][number]} {flags}")
        code, stderr, *_ = call_in_fork(lambda script=script, words=words: run_entry(script, words), materials)
        if code:
            raise RuntimeError(f"{command_line(Case(script, tuple(words)))} failed:\n{stderr}")
    run = materials / "saved" / "latent_flow" / "folder" / "run"
    shutil.copy(next(run.glob("model_*.safetensors")), materials / "guide.safetensors")


def paths_below(materials: Path) -> list[str]:
    """Every file and folder of the materials, relative to them."""
    return sorted(str(path.relative_to(materials)) for path in materials.rglob("*"))


def plain_cases(scripts: list[str]) -> Iterator[Case]:
    """The scripts' commands as they are."""
    return (Case(script, tuple(shlex.split(command))) for script in scripts for command in SCRIPTS[script])


def random_cases(seed: int, scripts: list[str], materials: Path) -> Iterator[Case]:
    """Cases without end, of each command of each script in turn."""
    options, files = {script: declared_options(script) for script in scripts}, paths_below(materials)
    for number in itertools.count():
        for script in scripts:
            for command in SCRIPTS[script]:
                yield draw_case(
                    script, command, options[script], files, random.Random(f"{seed} {number} {script} {command}")
                )


class Limit(NamedTuple):
    """How long a campaign goes on: for some seconds, or, if `cases` is given, for that many random cases."""

    seconds: float
    cases: int | None = None


def run_campaign(limit: Limit, seed: int, scripts: list[str], failures: Path) -> int:
    """Run cases, print a summary, and write the failing ones to `failures`; returns the exit code.

    A campaign of some time begins with the scripts' commands as they are.
    """
    failures.unlink(missing_ok=True)
    started, counts = time.monotonic(), Counter[str]()
    with workshop() as root:
        drawn = random_cases(seed, scripts, root / "materials")
        drawn = (
            itertools.chain(plain_cases(scripts), drawn)
            if limit.cases is None
            else itertools.islice(drawn, limit.cases)
        )
        for outcome in _outcomes(limit, drawn, root, failures):
            counts[outcome] += 1
    listed = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    minutes = (time.monotonic() - started) / 60
    print(f"{counts.total()} cases of {len(scripts)} scripts in {minutes:.1f} minutes: {listed}")
    if counts["failure"]:
        print(f"run the failures again with: python -m tests.fuzz --replay {failures}")
    return int(counts["failure"] > 0)


def _outcomes(limit: Limit, drawn: Iterator[Case], root: Path, failures: Path) -> Iterator[str]:
    """Run cases within the limit, and yield their outcomes."""
    total, unit = (limit.seconds, "s") if limit.cases is None else (limit.cases, "case")
    started, failed = time.monotonic(), 0
    with tqdm(total=round(total), unit=unit, desc="fuzzing", mininterval=10) as bar:
        for number, case in enumerate(drawn, start=1):
            verdict = run_case(case, root / "materials", root / "case")
            if verdict.outcome == "failure":
                failed += 1
                _record(failures, case, verdict)
            passed = time.monotonic() - started
            bar.update(min(bar.total, int(passed) if limit.cases is None else number) - bar.n)
            bar.set_postfix(cases=number, failures=failed, refresh=False)
            yield verdict.outcome
            if passed > limit.seconds:
                return


def replay(path: Path) -> int:
    """Run the cases of a file again and print what they print; returns the exit code."""
    failed = 0
    with workshop() as root:
        for case in read_cases(path):
            verdict = run_case(case, root / "materials", root / "case")
            failed += verdict.outcome == "failure"
            print(f"$ {command_line(case)}\n  damages: {list(case.damages)}")
            print(f"  {verdict.outcome} {verdict.reason}\n{verdict.stderr.encode(errors='backslashreplace').decode()}")
    print(f"{failed} failures")
    return int(failed > 0)


def _record(failures: Path, case: Case, verdict: Verdict) -> None:
    with failures.open("a", encoding="utf-8") as file:
        file.write(case.to_line() + "\n")
    tqdm.write(f"{verdict.reason}\n    {command_line(case)}\n    damages: {list(case.damages)}")
