"""Style and script of the page. Neither refers to another file or to the network."""

__all__ = ["SCRIPT", "STYLE"]

# The first colors are Okabe and Ito's, which remain distinct with color-blindness, darkened or lightened to contrast with
# the background at 3:1 or more.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --text: #1c1e21; --soft: #5b6068; --line: #dcdcd8; --grid: #e9e9e5; --link: #00548c;
  --c0: #0072b2; --c1: #d55e00; --c2: #00805f; --c3: #b0568b; --c4: #9c6f00; --c5: #2d86b5; --c6: #555a61; --c7: #7a5ac2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --card: #1e2125; --text: #e9eaec; --soft: #a6acb5; --line: #363b42; --grid: #2a2e34; --link: #7cc4f5;
    --c0: #56b4e9; --c1: #f0853a; --c2: #2fbf95; --c3: #e09bc4; --c4: #e6b23c; --c5: #8fd0f5; --c6: #b8bdc5; --c7: #b29bea;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main, header > div, footer { max-width: 1180px; margin: 0 auto; padding: 0 16px; }
header { background: var(--card); border-bottom: 1px solid var(--line); padding: 22px 0 14px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 36px 0 10px; }
h3 { font-size: 1rem; margin: 18px 0 8px; overflow-wrap: anywhere; }
p { margin: 6px 0; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 12px; font-size: 0.9rem; }
nav a { padding: 4px 0; }
code { font: 0.85em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.soft, .note, .metric { color: var(--soft); font-size: 0.85rem; }
.metric { display: block; overflow-wrap: anywhere; }
.card, .chart {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; margin: 0; min-width: 0;
}
.cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); }
.run { border-left: 5px solid var(--own); }
.run h3 { margin: 0 0 6px; }
.number { color: var(--own); margin-right: 0.5em; }
dl { display: grid; grid-template-columns: fit-content(11em) 1fr; gap: 3px 14px; margin: 0; font-size: 0.92rem; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figcaption { margin-bottom: 4px; }
.chart > svg { display: block; width: 100%; height: auto; }
.chart text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.chart text.tag { font-weight: 700; }
.grid { stroke: var(--grid); }
.axis, .tick { stroke: var(--soft); }
polyline, .bar, .key path:not(.mark) { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
.mark { fill: currentColor; }
.s0 { color: var(--c0); } .s1 { color: var(--c1); } .s2 { color: var(--c2); } .s3 { color: var(--c3); }
.s4 { color: var(--c4); } .s5 { color: var(--c5); } .s6 { color: var(--c6); } .s7 { color: var(--c7); }
.chart text.t0 { fill: var(--c0); } .chart text.t1 { fill: var(--c1); } .chart text.t2 { fill: var(--c2); }
.chart text.t3 { fill: var(--c3); } .chart text.t4 { fill: var(--c4); } .chart text.t5 { fill: var(--c5); }
.chart text.t6 { fill: var(--c6); } .chart text.t7 { fill: var(--c7); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0 14px; margin: 0; padding: 0; font-size: 0.85rem; }
.runs {
  position: sticky; top: 0; z-index: 1; background: var(--page); padding: 6px 0; margin-bottom: 6px; font-size: 0.92rem;
}
.legend li { overflow-wrap: anywhere; }
.key { width: 24px; height: 14px; vertical-align: -2px; margin-right: 6px; }
details { margin-top: 6px; font-size: 0.9rem; }
summary { cursor: pointer; color: var(--link); padding: 4px 0; }
.scroll { overflow-x: auto; }
.charts + details > summary { margin-top: 8px; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 600; }
td { overflow-wrap: anywhere; }
td[data-label="Score"], td[data-label="Samples"], td[data-label="Step"] { white-space: nowrap; }
td[data-label="Metric"] { min-width: 12em; }
pre { overflow: auto; max-height: 24em; font-size: 0.8rem; }
img { max-width: 100%; height: auto; display: block; border-radius: 4px; background: #ffffff; }
.wide { overflow-x: auto; }
.wide img { min-width: 640px; }
section > * + .card, section > * + .cards { margin-top: 14px; }
.gap { height: 10px; }
.frames { display: flex; gap: 10px; overflow-x: auto; }
.frames figure { flex: 0 0 min(100%, 620px); }
.ready figure { flex: 1 1 100%; }
.ready figure:not(.shown) { display: none; }
.slider { display: none; align-items: center; gap: 12px; margin: 8px 0 14px; flex-wrap: wrap; }
.slider.usable { display: flex; }
.slider input { flex: 1 1 220px; max-width: 620px; min-height: 32px; accent-color: var(--c0); }
.slider output { min-width: 7.5em; font-variant-numeric: tabular-nums; }
footer { padding: 28px 16px 36px; color: var(--soft); font-size: 0.85rem; }
@media (max-width: 560px) {
  table.stacked thead { display: none; }
  table.stacked, table.stacked tbody, table.stacked tr, table.stacked th, table.stacked td { display: block; }
  table.stacked tr { border-bottom: 1px solid var(--line); padding: 8px 0; }
  table.stacked th, table.stacked td { border: 0; padding: 1px 0; }
  table.stacked td::before { content: attr(data-label); color: var(--soft); margin-right: 8px; }
}
@media print {
  .ready figure:not(.shown) { display: block; }
  .slider.usable { display: none; }
}
"""

# Shows the grid of one step at a time. Without scripts, the grids stay next to each other.
SCRIPT = """
for (const slider of document.querySelectorAll(".slider")) {
  const steps = JSON.parse(slider.dataset.steps);
  const input = slider.querySelector("input"), shown = slider.querySelector("output");
  const groups = [...document.querySelectorAll(".frames")];
  const show = () => {
    const step = steps[input.value];
    shown.textContent = "step " + step.toLocaleString("en-US");
    input.setAttribute("aria-valuetext", shown.textContent);
    for (const group of groups) {
      const figures = [...group.children];
      const before = figures.filter((figure) => Number(figure.dataset.step) <= step);
      const chosen = before.length ? before[before.length - 1] : figures[0];
      for (const figure of figures) figure.classList.toggle("shown", figure === chosen);
    }
  };
  groups.forEach((group) => group.classList.add("ready"));
  slider.classList.add("usable");
  input.addEventListener("input", show);
  show();
}
"""
