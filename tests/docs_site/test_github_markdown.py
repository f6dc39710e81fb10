"""Tables with escaped bars look the same on GitHub and on the site."""

import pytest

from docs_site.github_markdown import as_python_markdown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"| `--a x\|y` | b \| c |", r"| `--a x|y` | b \| c |"),
        (r"Outside tables: `a\|b`", r"Outside tables: `a\|b`"),
        ("```\n| `a\\|b` |\n```\n", "```\n| `a\\|b` |\n```\n"),
        ("```\nx\n```\n| `a\\|b` |", "```\nx\n```\n| `a|b` |"),
    ],
)
def test_bars_in_the_code_of_tables(text, expected):
    assert as_python_markdown(text) == expected
