"""Question: which command lines and files end a script with anything but a result or a one-line error?

    python -m tests.fuzz [--minutes 1 | --cases N] [--seed 0] [--only SCRIPT ...] [--replay FILE]

Runs every entry script with random options on small files, some of them damaged, each case in a forked process. A failure is a
traceback, an unknown exit code, a message of many lines, an unfinished file, or no end. Failing cases are written to
--failures, which --replay runs again. Exits with code 1 after a failure. Linux only.
"""

import argparse
import math
import sys
from pathlib import Path

from tests.fuzz.campaign import Limit, replay, run_campaign
from tests.fuzz.scripts import SCRIPTS


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="duration [1]")
    parser.add_argument("--cases", type=int, help="number of random cases instead of a duration")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases [0]")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, help="scripts to run [all]")
    parser.add_argument("--failures", type=Path, default=Path("fuzz_failures.jsonl"), help="file for the failing cases")
    parser.add_argument("--replay", type=Path, help="run the cases in this file instead, and print their stderr")
    options = parser.parse_args()
    if options.replay:
        return replay(options.replay)
    limit = Limit(60 * options.minutes) if options.cases is None else Limit(math.inf, options.cases)
    return run_campaign(limit, options.seed, options.only or list(SCRIPTS), options.failures)


if __name__ == "__main__":
    sys.exit(main())
