"""The code in an exported folder: complete, without this project's names, and without readers of pickles."""

import ast
import sys

from diffusers_export.package import code_files, imported_modules, relative_imports

OUTSIDE = {"PIL", "numpy", "safetensors", "scipy", "torch", "torchdiffeq", "tqdm"}


def imports_of(source: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_absolute_imports_are_of_known_packages_only():
    for name, source in code_files().items():
        for node in imports_of(source):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            if isinstance(node, ast.Import) or not node.level:
                tops = {each.partition(".")[0] for each in names}
                assert tops <= OUTSIDE | set(sys.stdlib_module_names), f"{name}: {names}"


def test_every_relative_import_exists():
    files = code_files()
    for name, source in files.items():
        lines = source.splitlines()
        for node in imports_of(source):
            if isinstance(node, ast.ImportFrom) and node.level:
                guarded = lines[node.lineno - 1].startswith("    ") and "TYPE_CHECKING" in lines[node.lineno - 2]
                place = name.split("/")[: -node.level] + str(node.module).split(".")
                path = "/".join(place)
                assert guarded or {f"{path}.py", f"{path}/__init__.py"} & set(files), f"{name}: {node.module}"


def test_nothing_reads_pickles_or_data():
    files = code_files()
    assert not [name for name in files if name.startswith(("training/", "evaluation/", "datasets_prep/formats/"))]
    for name, source in files.items():
        assert "pickle" not in source, name
        assert "torch.load(" not in source, name


def test_imports_are_found_except_those_for_type_checkers():
    source = (
        "from typing import TYPE_CHECKING\nimport torch\nfrom models.autoencoders.pixels import PixelSpace\n"
        "if TYPE_CHECKING:\n    from training.ema import Ema\ndef f():\n    from flow.solvers import (\n        solve,\n    )\n"
    )
    found = ["models", "models.autoencoders", "models.autoencoders.pixels", "flow", "flow.solvers"]
    assert imported_modules(source) == found


def test_imports_become_relative():
    source = 'from models.dit import DiT\nfrom torch import nn  # from models.dit\n"""from options import x"""\n'
    assert relative_imports(source, "a.py") == source.replace("from models.dit import", "from .models.dit import", 1)
    assert relative_imports(source, "a/b/c.py").startswith("from ...models.dit import DiT\nfrom torch import nn")
    assert (
        relative_imports("def f():\n    from options import x\n", "a/b.py") == "def f():\n    from ..options import x\n"
    )
