"""MkDocs calls these functions while it builds the site."""

import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

from docs_site.api_pages import OVERVIEW, api_navigation, api_pages
from docs_site.github_markdown import as_python_markdown
from docs_site.repository_pages import RepositoryPages

API = api_pages()
REPOSITORY = RepositoryPages(API)
SEARCHED_LAST = ("api/", "repository/", "lab-notes/")
CODE = re.compile(r"(?<=<code>)[^<]*--[^<]*(?=</code>)")
FLAG = re.compile(r"--[\w-]+")


def on_config(config: MkDocsConfig) -> None:
    """Make anchors as GitHub does, and add the modules to the navigation where mkdocs.yml has the API's first page."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    config.nav = with_api(config.nav)


def with_api(entry: Any) -> Any:
    """An entry of `nav` with the API's pages."""
    if isinstance(entry, list):
        return [with_api(item) for item in entry]
    if isinstance(entry, dict):
        return {name: with_api(item) for name, item in entry.items()}
    return api_navigation() if entry == OVERVIEW else entry


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are not in docs/."""
    for address, text in {**API, **REPOSITORY.generated()}.items():
        files.append(File.generated(config, address, content=text))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapt the links and the Markdown of a page. Searches show guides before modules, files and lab notes."""
    if page.file.src_uri.startswith(SEARCHED_LAST):
        page.meta["search"] = {"boost": 0.2}
    if page.file.generated_by is None:
        markdown = REPOSITORY.adapt(markdown, f"docs/{page.file.src_uri}")
    return as_python_markdown(markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep browsers from breaking a line within a flag."""
    return CODE.sub(lambda code: FLAG.sub(r'<span class="flag">\g<0></span>', code[0]), html)
