"""Small pieces of HTML that the sections share. All text is escaped here."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from evaluation.report.chart import COLORS
from evaluation.report.run_record import RunRecord

__all__ = ["card", "definitions", "duration", "run_card", "table"]


def definitions(facts: Mapping[str, str]) -> str:
    """A list of names and values, without those whose value is empty."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v) + "</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], stacked: bool = False) -> str:
    """A table whose first column names the rows. With `stacked`, a narrow screen shows each row as a block."""
    kind = ' class="stacked"' if stacked else ""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(
            f'<td data-label="{escape(name)}">{escape(value)}</td>'
            for name, value in zip(head[1:], others, strict=True)
        )
        + "</tr>"
        for first, *others in rows
    )
    return f'<div class="scroll"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def card(content: str) -> str:
    """A box around HTML."""
    return f'<div class="card">{content}</div>'


def run_card(index: int, run: RunRecord, content: str, several: bool) -> str:
    """A box around HTML about one run, titled by the run's number and name if there are several."""
    number = f'<span class="number">{index + 1}</span>' if several else ""
    title = f"<h3>{number}{escape(run.name)}</h3>" if several else ""
    return f'<div class="card run" style="--own: var(--c{index % COLORS})">{title}{content}</div>'


def duration(seconds: float) -> str:
    """A time in hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"
