"""Writes the report: one HTML file that refers to nothing outside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

from evaluation.report.cost import costs
from evaluation.report.origin import checkpoints, configurations, problems
from evaluation.report.run_record import RunRecord, read_runs
from evaluation.report.scores import scores
from evaluation.report.sections import curves, grids, nearest, overview, reconstructions
from evaluation.report.style import SCRIPT, STYLE
from options import option
from runtime.files import atomic_path

__all__ = ["ReportOptions", "write_report"]

# A browser loads nothing from outside the page, even if a name in a run's files could smuggle in a reference.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class ReportOptions:
    """Report."""

    output: str = option("report.html", "HTML file to write")
    grids: int = option(16, "sample grids to show per run", minimum=1)
    watts: float = option(
        0.0, "power of the machine, for the energy; 0: assume 10 W per CPU thread or 500 W per accelerator", minimum=0
    )


def write_report(folders: Sequence[str | Path], options: ReportOptions) -> list[RunRecord]:
    """Write the report on run folders to `options.output`. The same files give the same bytes.

    Returns:
        What was read.

    Raises:
        UsageError: a folder is not a run's.
        OSError: the report cannot be written.
    """
    runs = read_runs(folders)
    page = _page(runs, options)
    with atomic_path(options.output) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return runs


def _page(runs: Sequence[RunRecord], options: ReportOptions) -> str:
    sections: dict[str, Callable[[Sequence[RunRecord]], str]] = {
        "Overview": overview,
        "Curves": curves,
        "Samples during training": partial(grids, most=options.grids),
        "Scores": scores,
        "Reconstructions": reconstructions,
        "Nearest training images": nearest,
        "Cost": partial(costs, watts=options.watts),
        "Configuration": configurations,
        "Checkpoints": checkpoints,
        "Not readable": problems,  # last, because reading the pictures adds to it
    }
    written = {name: content for name, write in sections.items() if (content := write(runs))}
    anchors = {name: name.lower().replace(" ", "-") for name in written}
    title = escape(f"Report: {runs[0].name}" if len(runs) == 1 else f"Comparison of {len(runs)} runs")
    names = "" if len(runs) == 1 else f'<p class="soft">{escape(", ".join(run.name for run in runs))}</p>'
    links = "".join(f'<a href="#{anchors[name]}">{escape(name)}</a>' for name in written)
    body = "".join(
        f'<section aria-labelledby="{anchors[name]}"><h2 id="{anchors[name]}">{escape(name)}</h2>{content}</section>'
        for name, content in written.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f"<header><div><h1>{title}</h1>{names}<nav aria-label='Sections'>{links}</nav></div></header>"
        f"<main>{body}</main><footer>Written by python -m evaluation.report.</footer><script>{SCRIPT}</script></body></html>\n"
    )
