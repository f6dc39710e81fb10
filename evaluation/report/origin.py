"""Where results come from: configurations with their differences, checkpoints with their hashes, and unreadable files."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from evaluation.report.markup import card, definitions, run_card, table
from evaluation.report.run_record import RunRecord

__all__ = ["checkpoints", "configurations", "problems"]

NAMES = ("exp", "save_root", "resume", "overwrite")  # options that do not affect a run
MISSING = "-"


def configurations(runs: Sequence[RunRecord]) -> str:
    """The options in which runs differ, then all options of each run."""
    several, settings = len(runs) > 1, [_settings(run) for run in runs]
    names = list(dict.fromkeys(name for each in settings for name in each))
    differing = [
        name for name in names if len({each.get(name, MISSING) for each in settings}) > 1 and name not in NAMES
    ]
    parts = []
    if several:
        rows = [[name, *(each.get(name, MISSING) for each in settings)] for name in differing]
        head = ["Option", *(run.name for run in runs)]
        parts.append(card(table(head, rows, stacked=True) if rows else "<p>The configurations are the same.</p>"))
    if any(settings):
        rows = [[name, *(each.get(name, MISSING) for each in settings)] for name in names]
        head = ["Option", *(run.name for run in runs)] if several else ["Option", "Value"]
        summary = f"All {len(names)} options and versions"
        parts.append(card(f"<details><summary>{summary}</summary>{table(head, rows, stacked=True)}</details>"))
    return "".join(parts)


def checkpoints(runs: Sequence[RunRecord]) -> str:
    """Checkpoints with hashes of their weights, and the facts in the latest one's header."""
    cards = []
    for index, run in enumerate(runs):
        header = run.header
        if header is None:
            continue
        rows = [
            [
                each.name,
                "" if each.header.step is None else f"{each.header.step:,}",
                each.header.weights_sha256 or MISSING,
            ]
            for each in run.checkpoints
        ]
        facts = {
            "Autoencoder": header.autoencoder.id,
            "Autoencoder SHA-256": header.autoencoder.sha256 or "",
            "Encoder": f"{header.encoder.id} {header.encoder.sha256 or ''}" if header.encoder else "",
            "Training images": str(run.options.get("state of the training images") or ""),
            "Code": str(header.git or ""),
            "Versions": ", ".join(f"{name} {version}" for name, version in header.versions.items()),
            "Precision": f"{header.precision}, {'compiled' if header.compiled else 'not compiled'}",
            "Reproducible": "no: --max_minutes limited the run" if header.reproducible is False else "",
        }
        hashes = table(["Checkpoint", "Step", "SHA-256 of the weights"], rows, stacked=True)
        cards.append(run_card(index, run, hashes + "<div class='gap'></div>" + definitions(facts), len(runs) > 1))
    return "".join(cards)


def problems(runs: Sequence[RunRecord]) -> str:
    """A list of unreadable files."""
    found = [f"<li>{escape(text)}</li>" for run in runs for text in dict.fromkeys(run.problems)]
    return card(f"<ul>{''.join(found)}</ul>") if found else ""


def _settings(run: RunRecord) -> dict[str, str]:
    """Options, commit and versions of a run, as text by name."""
    versions = run.config.get("versions")
    others = {"git": run.config.get("git")} if run.config else {}
    others |= {f"version of {name}": value for name, value in versions.items()} if isinstance(versions, dict) else {}
    return {name: _text(value) for name, value in (run.options | others).items()}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value)) or MISSING
    return value if isinstance(value, str) and value else json.dumps(value) if value != "" else MISSING
