"""Links to files outside docs/ and code that names files lead to pages of the site."""

import json

import pytest

from docs_site.api_pages import api_pages
from docs_site.repository_pages import RepositoryPages, block, first_comment, notebook

PAGES = RepositoryPages(api_pages())


@pytest.mark.parametrize(
    ("file", "address"),
    [
        ("docs/training.md", "training.md"),
        ("README.md", "index.md"),
        ("SECURITY.md", "repository/SECURITY.md"),
        ("flow/paths.py", "api/flow/paths.md"),
        ("models/autoencoders/__init__.py", "api/models/autoencoders/index.md"),
        ("run.sh", "repository/run.sh.md"),
        ("tests/golden", "repository/tests/golden/index.md"),
        ("gone.md", None),
    ],
)
def test_address(file, address):
    assert PAGES.address(file) == address


@pytest.mark.parametrize(
    ("document", "text", "expected"),
    [
        ("docs/theory.md", "[x](../SECURITY.md#a)", "[x](repository/SECURITY.md#a)"),
        ("docs/theory.md", "[x](sampling.md#b) [y](#c)", "[x](sampling.md#b) [y](#c)"),
        ("docs/theory.md", "[x](https://arxiv.org/abs/1) [y](gone.md)", "[x](https://arxiv.org/abs/1) [y](gone.md)"),
        ("docs/lab-notes/gpu.md", "[x](../../README.md)", "[x](../index.md)"),
        ("README.md", "![x](docs/samples.png)", "![x](samples.png)"),
        ("tests/README.md", "[x](../docs/gpu.md)", "[x](../../gpu.md)"),
        ("docs/theory.md", "See `flow/paths.py`.", "See [`flow/paths.py`](api/flow/paths.md)."),
        ("docs/theory.md", "`train_args/`, `run.sh`", "[`train_args/`](repository/train_args/index.md), `run.sh`"),
        ("docs/theory.md", "[`flow/paths.py`](../flow/paths.py)", "[`flow/paths.py`](api/flow/paths.md)"),
        ("docs/theory.md", "# `flow/paths.py`", "# `flow/paths.py`"),
        ("docs/theory.md", "```\n[x](../SECURITY.md)\n```\n", "```\n[x](../SECURITY.md)\n```\n"),
    ],
)
def test_adapt(document, text, expected):
    assert PAGES.adapt(text, document) == expected


def test_pages_are_generated_for_linked_files_and_for_the_files_they_link_to():
    generated = PAGES.generated()
    assert generated["index.md"].startswith("# Latent flow matching")
    assert "[training](training.md)" in generated["index.md"]
    assert "repository/CODE_OF_CONDUCT.md" in generated  # CONTRIBUTING.md links to it
    assert "EXP=fashion_mnist_dit" in generated["repository/train_args/fashion_mnist_dit.txt.md"]
    assert "(fashion_mnist_dit.txt.md)" in generated["repository/train_args/index.md"]
    assert not any(address.startswith("api/") for address in generated)


def test_a_block_holds_fences():
    assert block("a\n````\nb\n", "text") == "`````text\na\n````\nb\n`````\n"


def test_a_notebook_shows_its_cells():
    cells = [{"cell_type": "markdown", "source": ["# T\n", "x"]}, {"cell_type": "code", "source": ["y = 1"]}]
    assert notebook(json.dumps({"cells": cells})) == "# T\nx\n\n```python\ny = 1\n```\n"


def test_first_comment(tmp_path):
    (tmp_path / "a.txt").write_text("# One | two,\n# three.\nEXP=a # no\n# later\n")
    assert first_comment(tmp_path / "a.txt") == r"One \| two, three."
