"""The API reference has a page for every public module."""

from pathlib import Path

from docs_site.api_pages import ROOT, api_navigation, api_pages, table
from tests.docs_site.test_navigation import pages


def test_every_module_of_the_library_has_a_page_in_the_navigation():
    found = api_pages()
    assert set(pages(api_navigation())) == set(found)
    assert len(found) > 200
    assert "::: flow.paths\n" in found["api/flow/paths.md"]
    modules = [path for room in ("flow", "models", "training") for path in (ROOT / room).rglob("[!_]*.py")]
    assert all(f"api/{path.relative_to(ROOT).with_suffix('.md').as_posix()}" in found for path in modules)


def test_a_package_lists_its_modules():
    assert "| [`flow.paths`](paths.md) | Probability paths from data" in api_pages()["api/flow/index.md"]


def test_tables_escape_bars_and_brackets(monkeypatch):
    monkeypatch.setattr("docs_site.api_pages.summary", lambda module: "a | b [C]")
    assert table([Path("flow/paths.py")], Path("api")).endswith("| [`flow.paths`](flow/paths.md) | a \\| b \\[C] |\n")
