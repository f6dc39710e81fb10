"""Line charts as SVG, with a description in words and a table of values. Colors come from the page's style."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from evaluation.report.curves import Panel, Point, Series

__all__ = ["COLORS", "draw_chart", "format_number", "run_legend"]

COLORS = 8  # of runs; later runs reuse them, so their tags and markers tell them apart
WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 12, 34  # margins
LINE = 12  # height of a line of text
START = 0.05  # of the steps; much higher values in it are cut off, so that the rest can be read
LOG_RATIO = 30  # positive values that differ by more than this factor get a logarithmic axis
TABLE_POINTS = 12  # per series, evenly spaced
PATHS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "M-3.2-3.2h6.4v6.4h-6.4z",
    "M0-4.4L4.2 3.2h-8.4z",
    "M0-4.6L4.6 0 0 4.6-4.6 0z",
)  # markers: circle, square, triangle, diamond


class _Axis:
    """Maps values of one axis to pixels, linearly or logarithmically."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False, room: float = 0.0) -> None:
        self.log = log
        low, high = self._place(low), self._place(high)
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        margin = room * (high - low)
        self.low, self.high = low - margin, high + margin
        if low >= 0 and not log:
            self.low = max(0.0, self.low)
        self._start, self._scale = start, (end - start) / (self.high - self.low)

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        return round(self._start + (self._place(value) - self.low) * self._scale, 1)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values in the range."""
        if not self.log:
            return _round_values(self.low, self.high, count)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [digit * 10.0**decade for decade in decades for digit in digits]
            found = [value for value in found if self.low <= math.log10(value) <= self.high]
            if len(found) <= 2 * count:
                return found
        return found[:: -(-len(found) // count)]

    def _place(self, value: float) -> float:
        return math.log10(value) if self.log else value


def draw_chart(panel: Panel, several_runs: bool, last_step: int) -> str:
    """Draw a panel as an HTML figure: title, legend, SVG, and a table of values in a closed details element.

    Args:
        panel: the curves.
        several_runs: tag each curve with the number of its run.
        last_step: where the axis of steps ends.
    """
    name = escape(f"{panel.title} ({panel.unit})" if panel.unit else panel.title)
    drawn = [series for series in panel.series if series.points]
    picture = _svg(panel, drawn, several_runs, last_step) if drawn else "<p>No value is finite.</p>"
    averaged = max(series.averaged for series in panel.series)
    notes = [f"{each.label or 'Here'}: {each.missing} values are not finite." for each in panel.series if each.missing]
    notes += [f"Each point is the mean of up to {averaged} values."] if averaged > 1 else []
    notes += [_cut_off(drawn, last_step)] if drawn else []
    source = f' <span class="metric">{escape(", ".join(panel.metrics))}</span>' if panel.metrics else ""
    legend = _legend(panel.series, several_runs)
    caption = "".join(f'<p class="note">{escape(text)}</p>' for text in notes if text)
    return (
        f'<figure class="chart"><figcaption><strong>{name}</strong>{source}</figcaption>{legend}{picture}{caption}'
        f"<details><summary>Values</summary>{_table(panel.series)}</details></figure>"
    )


def format_number(value: float) -> str:
    """A number with about four significant digits."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _svg(panel: Panel, drawn: Sequence[Series], several_runs: bool, last_step: int) -> str:
    low, high = _range(drawn, last_step)
    log = not panel.linear and low > 0 and high / low > LOG_RATIO
    x = _Axis(0, max(last_step, 1), LEFT, WIDTH - RIGHT)
    y = _Axis(low, high, HEIGHT - BOTTOM, TOP, log, room=0.05)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_describe(panel, drawn, log))}">',
        *_grid(x, y, log),
        f'<svg width="{WIDTH}" height="{HEIGHT - BOTTOM + 5}">',  # cuts off what is above the axis
        *(_draw_series(series, x, y) for series in drawn),
        "</svg>",
    ]
    if several_runs:
        parts += _tags(drawn, x, y)
    return "".join([*parts, "</svg>"])


def _range(drawn: Sequence[Series], last_step: int) -> tuple[float, float]:
    """The lowest and highest value to show, without a start that would take more than half of the axis."""
    spans = [
        (point.step > START * last_step, point.value - (point.error or 0), point.value + (point.error or 0))
        for series in drawn
        for point in series.points
    ]
    low, high = min(low for _, low, _ in spans), max(high for *_, high in spans)
    later = [high for is_later, _, high in spans if is_later]
    if later and high - low > 2 * (max(later) - low) > 0:
        return low, low + 1.25 * (max(later) - low)
    return low, high


def _cut_off(drawn: Sequence[Series], last_step: int) -> str:
    """A note if values at the start are above the axis."""
    highest, shown = max(point.value for series in drawn for point in series.points), _range(drawn, last_step)[1]
    return f"The start is cut off: its values reach {format_number(highest)}." if highest > shown else ""


def _grid(x: _Axis, y: _Axis, log: bool) -> Iterable[str]:
    for value in y.ticks(5):
        at = y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>'
        yield f'<text x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{_short(value)}</text>'
    for value in x.ticks(5):
        at = x(value)
        yield f'<line class="tick" x1="{at}" x2="{at}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>'
        yield f'<text x="{at}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_short(value)}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
    scale = "step" + (" (logarithmic values)" if log else "")
    yield f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{scale}</text>'


def _draw_series(series: Series, x: _Axis, y: _Axis) -> str:
    color, shape = f"s{series.run % COLORS}", PATHS[series.run % len(PATHS)]
    parts = []
    if series.joined and len(series.points) > 1:
        line = " ".join(f"{x(point.step)},{y(point.value)}" for point in series.points)
        parts.append(f'<polyline class="{color}" points="{line}"/>')
    for point in series.points if series.marked else ():
        at, middle = x(point.step), y(point.value)
        if point.error is not None:
            low, high = y(point.value - point.error), y(point.value + point.error)
            parts.append(f'<path class="bar {color}" d="M{at} {low}V{high}M{at - 4} {low}h8M{at - 4} {high}h8"/>')
        hint = escape(f"{series.label or 'value'}: {_with_error(point)} at step {point.step:,.0f}")
        parts.append(
            f'<path class="mark {color}" transform="translate({at} {middle})" d="{shape}"><title>{hint}</title></path>'
        )
    return "".join(parts)


def _tags(drawn: Sequence[Series], x: _Axis, y: _Axis) -> Iterable[str]:
    """The number of each run at the end of its last curve, moved where they would overlap."""
    last = {series.run: series.points[-1] for series in drawn}
    lefts = {run: x(point.step) + 6 for run, point in last.items()}
    heights = {run: min(y(point.value), HEIGHT - BOTTOM - 4) for run, point in last.items()}
    for direction in (-1, 1):  # first up from the axis, then down from the top
        done: list[int] = []
        for run in sorted(heights, key=lambda run: direction * heights[run]):
            bounds = [heights[other] + direction * LINE for other in done if abs(lefts[other] - lefts[run]) < LINE]
            heights[run] = min([heights[run], *bounds]) if direction < 0 else max([heights[run], TOP, *bounds])
            done.append(run)
    for run, height in heights.items():
        yield f'<text class="tag t{run % COLORS}" x="{lefts[run]}" y="{height + 4:.1f}">{run + 1}</text>'


def _legend(series: Sequence[Series], several_runs: bool) -> str:
    """Explains lines and markers, if runs may have several curves. `run_legend` names the runs."""
    kinds = {each.kind: each for each in reversed(series) if each.kind}
    items = []
    for kind, each in reversed(kinds.items()):
        color = "soft" if several_runs else f"s{each.run % COLORS}"
        items.append(f"<li>{_key(color, each.joined, 0 if several_runs else each.run, each.marked)}{escape(kind)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


def run_legend(names: Sequence[str]) -> str:
    """The color, marker and number of each run."""
    items = [
        f'<li>{_key(f"s{run % COLORS}", True, run, True)}<b class="s{run % COLORS}">{run + 1}</b> {escape(name)}</li>'
        for run, name in enumerate(names)
    ]
    return f'<ul class="legend runs">{"".join(items)}</ul>'


def _key(color: str, line: bool, marker: int, marked: bool) -> str:
    parts = f'<path class="{color}" d="M1 7h22"/>' if line else ""
    if marked:
        shape = PATHS[marker % len(PATHS)]
        parts += f'<path class="mark {color}" transform="translate(12 7)" d="{shape}"/>'
    return f'<svg class="key" viewBox="0 0 24 14" aria-hidden="true">{parts}</svg>'


def _describe(panel: Panel, drawn: Sequence[Series], log: bool) -> str:
    """Describes the chart in words."""
    texts = []
    for series in drawn:
        first, last = series.points[0], series.points[-1]
        lowest, highest = (choose(series.points, key=lambda point: point.value) for choose in (min, max))
        name = f"{series.label}: " if series.label else ""
        if len(series.points) == 1:
            texts.append(f"{name}{_with_error(first)} at step {first.step:,.0f}")
            continue
        texts.append(
            f"{name}from {_with_error(first)} at step {first.step:,.0f} to {_with_error(last)} at step {last.step:,.0f}, "
            f"lowest {format_number(lowest.value)} at step {lowest.step:,.0f}, "
            f"highest {format_number(highest.value)} at step {highest.step:,.0f}"
        )
    scale = ", on a logarithmic axis" if log else ""
    return f"{panel.title} over training steps{scale}. {'. '.join(texts)}."


def _table(series: Sequence[Series]) -> str:
    """A table of evenly spaced points of all curves."""
    steps: set[float] = set()
    for each in series:
        count = min(TABLE_POINTS, len(each.points))
        steps |= {each.points[number * (len(each.points) - 1) // max(1, count - 1)].step for number in range(count)}
    columns = [{point.step: point for point in each.points} for each in series]
    head = "".join(f'<th scope="col">{escape(each.label or "value")}</th>' for each in series)
    rows = "".join(
        f'<tr><th scope="row">{step:,.0f}</th>'
        + "".join(f"<td>{_with_error(column[step]) if step in column else '-'}</td>" for column in columns)
        + "</tr>"
        for step in sorted(steps)
    )
    top = f'<thead><tr><th scope="col">step</th>{head}</tr></thead>'
    return f'<div class="scroll"><table>{top}<tbody>{rows}</tbody></table></div>'


def _with_error(point: Point) -> str:
    text = format_number(point.value)
    return text if point.error is None else f"{text} ± {point.error:.2g}"


def _round_values(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between `low` and `high`, at most about `count`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9)
    return [number * width for number in range(first, last + 1)]


def _short(value: float) -> str:
    """A tick's label of at most about six characters."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.6g}"
