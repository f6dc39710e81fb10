"""Rules of GitHub's Markdown that Python-Markdown lacks."""

import re
from collections.abc import Callable

__all__ = ["as_python_markdown", "change_text"]

FENCE = re.compile(r"^( *)(```+|~~~+)[^\n]*\n.*?^\1\2[ \t]*$\n?", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<![`\\])(`+)(?!`)(.+?)(?<!`)\1(?!`)")


def change_text(markdown: str, change: Callable[[str], str]) -> str:
    """Apply `change` to each part of a document between its fenced code blocks."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def as_python_markdown(markdown: str) -> str:
    """The same document for Python-Markdown: no backslash before a bar in a table's code."""
    return change_text(markdown, _without_backslashes)


def _without_backslashes(text: str) -> str:
    lines = text.split("\n")
    return "\n".join(
        CODE.sub(lambda code: code[0].replace(r"\|", "|"), line) if line.startswith("|") else line for line in lines
    )
