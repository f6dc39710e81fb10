"""Checks that every test named in the documents exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"`(?:(tests/[\w/]+\.py)(?:::(\w+))?|(test_\w+))`")
HEADING = re.compile(
    r"^\| promise .*?`(tests/[\w/]+\.py)`|^Tests without a file are in `(tests/[\w/]+\.py)`", re.MULTILINE
)


def names_of_tests(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def named_tests(text: str) -> list[tuple[str, str | None]]:
    """Pairs (file, test) named in `text`. A test name without a file belongs to the file named by its section."""
    found = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        heading = HEADING.search(section)
        here = next(filter(None, heading.groups())) if heading else ""
        found += [(file or here, test or bare) for file, test, bare in NAME.findall(section)]
    return [(file, test or None) for file, test in found]


@pytest.mark.parametrize("document", ["SECURITY.md", "docs/reliability.md"])
def test_every_test_that_a_document_names_exists(document):
    named = named_tests((ROOT / document).read_text(encoding="utf-8"))
    assert len(named) > 15
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not file or not (ROOT / file).is_file() or (test and test not in names_of_tests(ROOT / file))
    ]
    assert missing == []


def test_named_tests_finds_files_and_tests():
    text = "## One\n| promise | test in `tests/a.py` |\n| x | `test_y`, `tests/b.py::test_z`, `tests/c.py` |\n## Two\n`test_w`"
    assert named_tests(text) == [
        ("tests/a.py", None), ("tests/a.py", "test_y"), ("tests/b.py", "test_z"), ("tests/c.py", None), ("", "test_w"),
    ]  # fmt: skip


def test_make_runs_every_benchmark_once():
    lines = (ROOT / "Makefile").read_text().splitlines()
    named = [name for line in lines if line.startswith(("quick :=", "long :=")) for name in line.split()[2:]]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))
