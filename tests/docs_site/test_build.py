"""The whole site: built without warnings and without importing torch; its files lead nowhere else and load nothing."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from mkdocs.__main__ import cli; cli()"
LOADED = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
}

pytestmark = pytest.mark.slow


class Parser(HTMLParser):
    """The links of a page, the files it loads, and its anchors."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if LOADED.get(tag) in found:
            self.loaded.append(found[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", WITHOUT_TORCH, "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def parsed(site):
    return {path: Parser(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def broken(target: str, page: Path, parsed: dict[Path, Parser]) -> bool:
    """Whether a link to a file of the site, or to an anchor there, leads nowhere."""
    address, anchor = urldefrag(target)
    path = (page.parent / unquote(address)).resolve() if address else page
    if path not in parsed:
        return not path.is_file()
    return bool(anchor) and unquote(anchor) not in parsed[path].anchors


def test_all_links_and_anchors_lead_to_pages_of_the_site(parsed):
    assert len(parsed) > 250
    found = [
        (page.name, link)
        for page, content in parsed.items()
        for link in content.links
        if page.name != "404.html" and not urlsplit(link).scheme and broken(link, page, parsed)
    ]
    assert found == []


def test_no_page_loads_anything_from_another_host(parsed):
    loaded = [target for content in parsed.values() for target in content.loaded]
    assert len(loaded) > 1000
    assert {
        target for target in loaded if urlsplit(target).netloc or urlsplit(target).scheme not in ("", "data")
    } == set()


def test_no_style_loads_anything_from_another_host(site):
    styles = list(site.rglob("*.css"))
    assert styles
    assert [
        path.name for path in styles if re.search(r"(@import|url\(['\"]?)\s*['\"]?(https?:)?//", path.read_text())
    ] == []


def test_every_page_forbids_requests_to_other_hosts(parsed):
    assert all("Content-Security-Policy" in page.read_text(encoding="utf-8") for page in parsed)


def test_the_search_works_without_a_server(site):
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index = {")


def test_options_are_documented_by_their_help(site):
    text = (site / "api" / "flow" / "paths.html").read_text(encoding="utf-8")
    assert "share of noise that remains at the data end of the path" in text
