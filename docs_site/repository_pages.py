"""Pages for linked files outside docs/. The same links then work on the site and on GitHub.

A Markdown file becomes a page, and the README the first page. A module of the library has its API page. Other files are shown
as code, and folders as lists. Code that names a module or an arguments file, such as `flow/paths.py`, becomes a link.
"""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from docs_site.api_pages import ROOT, address_of
from docs_site.github_markdown import change_text

__all__ = ["RepositoryPages"]

LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)\s#]+)(#[^)\s]*)?(?=\))")
NAMED = re.compile(r"(?<![\[`])`([\w./-]+)`(?![\]`])")
ARGUMENTS_FILES = ("train_args", "test_args")
LANGUAGES = {".py": "python", ".sh": "bash", ".json": "json", ".yml": "yaml", ".toml": "toml", ".cff": "yaml"}


class RepositoryPages:
    """The pages of the repository's files.

    Args:
        api: addresses of the API's pages, relative to docs/.
    """

    def __init__(self, api: Collection[str]) -> None:
        self._api = api

    def address(self, file: str) -> str | None:
        """Return the page of `file`, relative to docs/, or None if the repository has no such file or folder."""
        path = ROOT / file
        if not path.exists():
            return None
        if file.startswith("docs/"):
            return file.removeprefix("docs/")
        if file == "README.md":
            return "index.md"
        if address_of(Path(file)) in self._api:
            return address_of(Path(file))
        return f"repository/{file}" + ("/index.md" if path.is_dir() else "" if path.suffix == ".md" else ".md")

    def adapt(self, markdown: str, file: str) -> str:
        """The Markdown of a document of the repository, with the site's links."""
        own = PurePosixPath(self.address(file) or file).parent

        def link(target: str) -> str | None:
            address = self.address(target)
            return address and relpath(address, own)

        def follow(match: re.Match[str]) -> str:
            found = link(target_of(match, file))
            return match[0] if found is None else found + (match[2] or "")

        def name(match: re.Match[str]) -> str:
            found = link(match[1].rstrip("/")) if self._is_named(match[1]) else None
            return match[0] if found is None else f"[{match[0]}]({found})"

        def change(text: str) -> str:
            lines = LINK.sub(follow, text).split("\n")
            return "\n".join(line if line.startswith("#") else NAMED.sub(name, line) for line in lines)

        return change_text(markdown, change)

    def _is_named(self, file: str) -> bool:
        """Whether code that names this file becomes a link."""
        return file.startswith(ARGUMENTS_FILES) or address_of(Path(file)) in self._api

    def generated(self) -> dict[str, str]:
        """The Markdown of the pages for all files outside docs/ to which a document leads, by address."""
        documents = ["README.md", *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
        found = ["README.md", *ARGUMENTS_FILES]
        for folder in ARGUMENTS_FILES:
            found += [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / folder).glob("*.txt"))]
        for document in documents:  # grows
            for target in self._targets(document):
                address = self.address(target) or ""
                if address.startswith("repository/") and target not in found:
                    found.append(target)
                    documents += [target] * target.endswith(".md")
        return {self.address(file) or "": self.adapt(page_for(ROOT / file), file) for file in found}

    def _targets(self, document: str) -> Iterator[str]:
        """The files and folders to which a document links or which it names."""
        text = (ROOT / document).read_text(encoding="utf-8")
        yield from (target_of(match, document) for match in LINK.finditer(text))
        yield from (name.rstrip("/") for name in NAMED.findall(text) if self._is_named(name))


def target_of(match: re.Match[str], document: str) -> str:
    """The file to which a link of a document leads, relative to the repository."""
    return normpath(PurePosixPath(document).parent / match[1])


def page_for(path: Path) -> str:
    """The Markdown for a file or folder."""
    if path.is_dir():
        return folder_page(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    title = f"# `{path.relative_to(ROOT).as_posix()}`\n\n"
    return title + (notebook(text) if path.suffix == ".ipynb" else block(text, LANGUAGES.get(path.suffix, "text")))


def block(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def notebook(text: str) -> str:
    """A notebook's cells, without their outputs."""
    cells = json.loads(text)["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(block(source, "python") if kind == "code" else source for kind, source in sources)


def folder_page(path: Path) -> str:
    """A list of a folder's files. Arguments files lead to their pages and show their first comment."""
    title = f"# `{path.relative_to(ROOT).as_posix()}/`\n\n"
    names = sorted(child.name for child in path.iterdir() if not child.name.startswith("."))
    if path.name not in ARGUMENTS_FILES:
        return title + "".join(f"- `{name}`\n" for name in names)
    script = "run.sh" if path.name == "train_args" else "run_test.sh"
    rows = [f"| [`{name}`]({name}.md) | {first_comment(path / name)} |\n" for name in names]
    return f"{title}Start one with `bash {script} {path.name}/NAME.txt`.\n\n| file | |\n|---|---|\n{''.join(rows)}"


def first_comment(path: Path) -> str:
    """The comment at the start of an arguments file, as a table's cell."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).replace("|", r"\|")
