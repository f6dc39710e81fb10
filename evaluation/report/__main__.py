"""Write a report on one or several runs: curves, samples, scores, configuration and cost, on one HTML page.

    python -m evaluation.report saved_info/latent_flow/fashion_mnist/fashion_mnist_dit
    python -m evaluation.report RUN_A RUN_B --output comparison.html --nearest 16

RUN is the folder of a run. Missing files are no error. The page refers to nothing outside it, so it can be sent as one file.
"""

import sys
from pathlib import Path

from command_line import help_flags, parse_options
from evaluation.report.nearest import NearestOptions, find_nearest
from evaluation.report.page import ReportOptions, write_report
from exits import exit_cleanly
from options import UsageError
from runtime.messages import fact, warn
from runtime.outputs import check_file


def main() -> None:
    """Write the report, and first search for nearest training images if requested."""
    words = sys.argv[1:]
    sys.argv[0] = "python -m evaluation.report"  # --help shows it instead of this file's name
    count = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    folders, flags = words[:count], words[count:]
    if not folders and not help_flags(flags):
        raise UsageError("expected RUN [RUN ...], folders of runs, before any flags (see --help)")
    groups = (ReportOptions, NearestOptions)
    options = parse_options(str(__doc__).splitlines()[0], groups, flags, positional="RUN [RUN ...]")
    report = options[ReportOptions]
    check_file(report.output, "--output")
    if options[NearestOptions].nearest:
        for folder in folders:
            find_nearest(Path(folder), options[NearestOptions])
    runs = write_report(folders, report)
    for run in runs:
        for text in run.problems:
            warn(text)
    fact("report", f"{report.output}, {Path(report.output).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    exit_cleanly(main)
