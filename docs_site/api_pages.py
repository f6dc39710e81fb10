"""Pages and navigation of the API reference: one page per module, from the docstrings in its source code."""

import ast
from functools import cache
from pathlib import Path

__all__ = ["OVERVIEW", "ROOMS", "ROOT", "address_of", "api_navigation", "api_pages"]

ROOT = Path(__file__).parents[1]
OVERVIEW = "api/index.md"
ROOMS = (
    "latent_flow", "flow", "models", "training", "sampling", "tasks", "evaluation", "checkpoints", "datasets_prep", "demo_page",
    "runtime", "options", "command_line", "streams", "exits",
)  # fmt: skip


def home(room: str) -> Path:
    """The file that documents a folder or a module at the root, relative to the root."""
    return Path(room, "__init__.py") if (ROOT / room).is_dir() else Path(f"{room}.py")


@cache
def summary(module: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse((ROOT / module).read_text(encoding="utf-8")))
    assert text is not None, f"{module} has no docstring"
    return text.partition("\n")[0]


def dotted(module: Path) -> str:
    """`flow.paths` for flow/paths.py and `flow` for flow/__init__.py."""
    return ".".join(module.with_suffix("").parts).removesuffix(".__init__")


def address_of(module: Path) -> str:
    """The page of a module, relative to docs/."""
    return f"api/{module.with_suffix('').as_posix().replace('__init__', 'index')}.md"


def children(package: Path) -> list[Path]:
    """The modules and packages directly in the folder of `package`, an `__init__.py`. Commands' `__main__.py` are left out."""
    folder = ROOT / package.parent
    found = [*sorted(folder.glob("[!_]*.py")), *sorted(folder.glob("*/__init__.py"))]
    return [path.relative_to(ROOT) for path in found]


def subtree(module: Path) -> list[Path]:
    """A module, or a package and everything below it."""
    inner = children(module) if module.name == "__init__.py" else []
    return [module, *(below for child in inner for below in subtree(child))]


def table(modules: list[Path], folder: Path) -> str:
    """A table of modules, for a page in `folder`."""
    lines = ["| module | contents |", "|---|---|"]
    for module in modules:
        link = Path(address_of(module)).relative_to(folder).as_posix()
        text = summary(module).replace("|", r"\|").replace("[", r"\[")
        lines.append(f"| [`{dotted(module)}`]({link}) | {text} |")
    return "\n".join(lines) + "\n"


def api_pages() -> dict[str, str]:
    """The Markdown of all pages, by address."""
    homes = [home(room) for room in ROOMS]
    start = "Public functions and classes of each module, from their docstrings. The [guide](../python.md) has examples.\n\n"
    pages = {OVERVIEW: f"# API reference\n\n{start}{table(homes, Path('api'))}"}
    for module in (path for room in homes for path in subtree(room)):
        address = address_of(module)
        contents = table(children(module), Path(address).parent) if module.name == "__init__.py" else ""
        pages[address] = f"# `{dotted(module)}`\n\n::: {dotted(module)}\n\n{contents}"
    return pages


def api_navigation() -> list[str | dict]:
    """The entries of mkdocs.yml's `nav` for all modules."""
    return [OVERVIEW, *(entry(home(room)) for room in ROOMS)]


def entry(module: Path) -> dict:
    """A module's page, or a package's page followed by its contents."""
    if module.name == "__init__.py":
        return {module.parent.name: [address_of(module), *map(entry, children(module))]}
    return {module.stem: address_of(module)}
