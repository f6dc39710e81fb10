"""The code inside an exported folder: the modules of this project that sampling imports, as one package.

The modules are found by walking imports, and copied with one change: `from models.dit import ...` becomes
`from ..models.dit import ...`, so that the package works under any name and from any place.
"""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

__all__ = ["code_files", "imported_modules", "relative_imports"]

ROOT = Path(__file__).resolve().parents[1]
FIRST = "diffusers_export.exported"  # all other modules are imported from here
PACKAGE_TEXT = '''"""Code that samples from this folder's network: a part of the project "latent flow matching".

Only its imports are changed.
Licensed under Apache-2.0 (LICENSE in this folder). README.md, one folder above, says how to use it.
"""
'''


@cache
def code_files(first: str = FIRST) -> Mapping[str, str]:
    """Source code by path within the package, for the module `first` and all modules that it imports."""
    sources: dict[str, str] = {}
    waiting = [first]
    while waiting:
        path = _path_of(waiting.pop())
        name = path.relative_to(ROOT).as_posix()
        if name not in sources:
            sources[name] = path.read_text(encoding="utf-8")
            waiting += imported_modules(sources[name])
    package = {name: relative_imports(source, name) for name, source in sorted(sources.items())}
    return {"__init__.py": PACKAGE_TEXT, **package}


def imported_modules(source: str) -> list[str]:
    """The modules of this project that `source` imports, with their packages; without those for type checkers only."""
    found = []
    for node in _imports(ast.parse(source)):
        module = str(node.module)
        parts = module.split(".")
        names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        packages = [".".join(parts[:count]) for count in range(1, len(parts))]
        found += [name for name in (*packages, *names) if _is_module(name)]
    return list(dict.fromkeys(found))


def relative_imports(source: str, name: str) -> str:
    """`source` with relative imports of this project's modules; `name` is its path, such as models/dit.py."""
    lines, dots = source.splitlines(keepends=True), "." * (name.count("/") + 1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level and _is_module(str(node.module)):
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {dots}{node.module} ", 1)
    return "".join(lines)


def _imports(node: ast.AST) -> Iterator[ast.ImportFrom]:
    """All `from ... import ...` below `node` that are executed."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            yield child
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _imports(child)


def _is_module(name: str) -> bool:
    return _path_of(name).is_file()


def _path_of(name: str) -> Path:
    place = ROOT.joinpath(*name.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
