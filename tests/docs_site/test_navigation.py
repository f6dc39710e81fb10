"""Every document is in the site's navigation, and every picture in the gallery with a command that exists."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PICTURE = re.compile(r"^!\[[^\]]+\]\(([^)]+)\)$", re.MULTILINE)
COMMANDS = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def settings() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def pages(entry: str | list | dict) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    for item in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from pages(item)


def commands_by_picture(gallery: str) -> dict[str, list[str]]:
    """The command lines between each picture and the next one; continued lines are joined."""
    _, *parts = PICTURE.split(gallery)
    return {
        picture: [line for block in COMMANDS.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        for picture, text in zip(parts[::2], parts[1::2], strict=True)
    }


def missing_files(command: str) -> list[str]:
    """The scripts, modules and arguments files of a command that are not in the repository."""
    words = shlex.split(command)
    if words[:2] == ["python", "-m"]:
        path = words[2].replace(".", "/")
        named = [f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py"]
    else:
        named = [words[1], *(word for word in words[2:] if word.startswith(("train_args/", "test_args/")))]
    return [name for name in named if not (ROOT / name).is_file()]


def test_every_document_is_in_the_navigation_once():
    listed = sorted(page for page in pages(settings()["nav"]) if not page.startswith(("api/", "repository/")))
    documents = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert listed == sorted(["index.md", *documents])


def test_every_page_from_outside_docs_is_a_file_of_the_repository():
    listed = [page for page in pages(settings()["nav"]) if page.startswith("repository/")]
    assert len(listed) >= 5
    assert all((ROOT / page.removeprefix("repository/").removesuffix("/index.md")).exists() for page in listed)


def test_every_picture_is_in_the_gallery_with_a_command():
    shown = commands_by_picture((DOCS / "gallery.md").read_text(encoding="utf-8"))
    pictures = [path.relative_to(DOCS).as_posix() for kind in ("png", "svg") for path in DOCS.rglob(f"*.{kind}")]
    assert sorted(shown) == sorted(pictures)
    assert [picture for picture, commands in shown.items() if not commands] == []


def test_every_command_of_the_gallery_names_files_of_the_repository():
    shown = commands_by_picture((DOCS / "gallery.md").read_text(encoding="utf-8"))
    assert [name for commands in shown.values() for command in commands for name in missing_files(command)] == []


def test_a_picture_without_command_and_a_missing_module_are_found():
    text = "![a](a.png)\n\n```\npython -m benchmarks.gone\n```\n\n![b](b.png)\n\nNo command.\n"
    assert commands_by_picture(text) == {"a.png": ["python -m benchmarks.gone"], "b.png": []}
    assert missing_files("python -m benchmarks.gone") == ["benchmarks/gone.py"]
    assert missing_files("bash run.sh train_args/gone.txt --exp x") == ["train_args/gone.txt"]


def test_the_theme_loads_no_fonts_and_the_links_are_checked():
    found = settings()
    assert found["theme"]["font"] is False
    assert "repo_url" not in found  # the theme would ask GitHub for the number of stars
    assert set(found["validation"]["links"].values()) == {"warn"}
