"""Random command lines and damages, each drawn from a seed."""

import json
import os
import random
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.damage import CHANGES, DAMAGES, ODD_NAMES
from tests.fuzz.scripts import Declared, command_of

__all__ = ["Case", "command_line", "draw_case", "read_cases", "takes_long"]

# Starting other processes, compiling, and waiting for other machines take longer than a case may; a case's limit of memory is
# too low for hundreds of threads.
NEVER_VARIED = frozenset(("compile", "num_process_per_node", "num_proc_node", "num_threads"))
USUAL = (1, 1, 2, 2, 3, 4, 8)  # integers that many options allow
INTEGERS = (0, -1, 1, 2, 3, 5, 7, 16, 100, 2**31, 2**63, 10**30)
NUMBERS = ("0", "-1", "1", "0.5", "2", "1e30", "-1e30", "1e-30", "nan", "inf", "-inf", "1e-12", "0.999999")
WORDS = ("", " ", "none", "-", ".", "/", "nowhere/file", "/proc/nowhere", "~", "\udcff", "ä☃", "a\nb", "x" * 5000, "*")
NOT_NUMBERS = ("", "text", "1e", "0x10", "1,2", "٣", "None", "1_0", "9" * 5000)
LONG = 1000  # values from here on may ask for long work
TIGHT = 1e-6


@dataclass(frozen=True)
class Case:
    """A command, and the damages to the materials before it.

    Args:
        script: a key of SCRIPTS.
        arguments: its command line.
        damages: (path, key of DAMAGES, seed) for each damage, in order.
        variables: environment variables.
    """

    script: str
    arguments: tuple[str, ...]
    damages: tuple[tuple[str, str, int], ...] = ()

    def to_line(self) -> str:
        """The case as a line of JSON."""
        return json.dumps(asdict(self))


def read_cases(path: Path) -> list[Case]:
    """The cases in a file that `Case.to_line` wrote line by line."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        Case(entry["script"], tuple(entry["arguments"]), tuple(map(tuple, entry.get("damages", ()))))
        for entry in entries
    ]


def command_line(case: Case) -> str:
    """The case as a shell command."""
    words = [word if len(word) < 200 else f"{word[:20]}...({len(word)} characters)" for word in case.arguments]
    return os.fsencode(shlex.join(["python", *command_of(case.script), *words])).decode(errors="backslashreplace")


def draw_case(script: str, command: str, options: Sequence[Declared], files: Sequence[str], rng: random.Random) -> Case:
    """Vary a command of a script in up to four options or positional words, and damage up to two files.

    Args:
        script: a key of SCRIPTS.
        command: one of its commands there.
        options: its options.
        files: all paths of the materials, relative to their folder.
        rng: source of the choices.
    """
    words = shlex.split(command)
    varied = [option for option in options if option.name not in NEVER_VARIED]
    for option in rng.choices(varied, k=rng.choice((0, 0, 0, 1, 1, 2, 3, 4))):
        words += _flag(option, files, rng)
    if rng.random() < 0.15:
        words = _misused(words, files, rng)
    used = [path for path in files if any(path == word or path.startswith(f"{word}/") for word in words if word)]
    damages = [
        (_target(used, words, rng), rng.choice([*DAMAGES, "values", "values", "values", "bytes"]), rng.getrandbits(32))
        for _ in range(rng.choice((0, 1, 1, 1, 2)) if used else 0)
    ]
    return Case(script, tuple(words), tuple(damages))


def takes_long(case: Case) -> bool:
    """Whether a number in the command line may ask for more work than a case may do."""
    for word in case.arguments:
        try:
            value = abs(float(word))
        except (ValueError, OverflowError):
            continue
        if value >= LONG or 0 < value < TIGHT:
            return True
    return False


def _target(used: list[str], words: list[str], rng: random.Random) -> str:
    """A path to damage: mostly one near the top, of which there are few, or a file of the experiment that is used."""
    own = [path for path in used if set(path.split("/")[:-1]) & set(words[1:]) and Path(path).suffix in CHANGES]
    if own and rng.random() < 0.5:
        return rng.choice(own)
    depth = rng.randrange(5)
    return rng.choice([path for path in used if path.count("/") <= depth] or used)


def _flag(option: Declared, files: Sequence[str], rng: random.Random) -> list[str]:
    name = rng.choice([f"--{option.name}", *option.metadata["flags"]])
    if option.kind is bool:
        return rng.choice(([name], [name, "true"], [name, "false"], [f"--no-{name[2:]}"], [name, "maybe"]))
    count = rng.choice((1, 2, 2, 3, 4)) if option.many else 1
    return [name, *(_value(option, files, rng) for _ in range(count))]


def _value(option: Declared, files: Sequence[str], rng: random.Random) -> str:
    if option.metadata["choices"] is not None and rng.random() < 0.9:
        return rng.choice(list(option.metadata["choices"]))
    if option.kind is int:
        draw = rng.random()
        return str(rng.choice(USUAL if draw < 0.5 else _integers(option))) if draw < 0.95 else rng.choice(NOT_NUMBERS)
    if option.kind is float:
        return rng.choice(NUMBERS) if rng.random() < 0.95 else rng.choice(NOT_NUMBERS)
    draw = rng.random()
    if draw < 0.45:
        return rng.choice(files)
    named = re.findall(r"[\w+/-]+", option.metadata["help"])  # the help of an open list names its values
    if draw < 0.8 and named:
        return rng.choice(named)
    return rng.choice((*WORDS, *ODD_NAMES))


def _integers(option: Declared) -> list[int]:
    limits: list[Any] = [option.metadata[name] for name in ("minimum", "maximum") if option.metadata[name] is not None]
    near = [int(limit) + difference for limit in limits for difference in (-1, 0, 1)]
    default = [option.default, option.default + 1] if isinstance(option.default, int) else []
    return [*INTEGERS, *near, *near, *default]


def _misused(words: list[str], files: Sequence[str], rng: random.Random) -> list[str]:
    """Drop, repeat or replace a word, wherever it stands."""
    position = rng.randrange(len(words))
    middle = rng.choice(([], [words[position]] * 2, [rng.choice(files)], [rng.choice(WORDS)], ["--unknown"], ["--"]))
    return [*words[:position], *middle, *words[position + 1 :]]
