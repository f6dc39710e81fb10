"""Architecture rules, checked in the source code: layers, one owner per heavy dependency, thin scripts."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module may import from lower levels and from its own folder. `models` and `flow` must not import each other.
LEVELS = {
    "option_names": 0,
    "streams": 0,
    "options": 1,
    "exits": 2,
    "command_line": 2,
    "runtime": 3,
    "models": 4,
    "flow": 4,
    "datasets_prep": 5,
    "checkpoints": 6,
    "evaluation": 7,
    "sampling": 8,
    "tasks": 9,
    "training": 10,
    "diffusers_export": 11,
    "latent_flow": 12,
    "demo_page": 13,
}
AT_THE_ROOT = [
    ROOT / f"{name}.py" for name in ("streams", "option_names", "options", "exits", "command_line", "latent_flow")
]
# Modules in a library folder that count as scripts, because they are run with `python -m`.
COMMANDS = {
    "checkpoints/convert.py",
    "checkpoints/export.py",
    "datasets_prep/build_pairs.py",
    "training/posthoc_ema.py",
}
# Modules that are copied into exported folders as they are, and run without this project.
COPIED = {"diffusers_export/pipeline.py", "diffusers_export/network.py"}
OWNERS = {
    "gradio": "demo_page/page.py",
    "torchdiffeq": "flow/",
    "diffusers": "models/autoencoders/diffusers_files.py",
    "pytorch_fid": "evaluation/features/inception.py",
}


def library_files() -> list[Path]:
    paths = [*AT_THE_ROOT, *(path for name in LEVELS for path in sorted((ROOT / name).rglob("*.py")))]
    return [path for path in paths if relative(path) not in COMMANDS]


def script_files() -> list[Path]:
    scripts = [*ROOT.glob("*.py"), *(ROOT / "pytorch_fid").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    return sorted(path for path in scripts if path not in AT_THE_ROOT) + [ROOT / name for name in sorted(COMMANDS)]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(source: str, package: str) -> set[str]:
    """The dotted names imported anywhere in `source`, a module of `package` ("" for a script)."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            names.add(".".join([*parents, *([node.module] if node.module else [])]))
    return names


def imports_of(path: Path) -> set[str]:
    return imported_modules(path.read_text(encoding="utf-8"), ".".join(path.relative_to(ROOT).parts[:-1]))


def forbidden_imports(own: str, level: int, imported: set[str]) -> set[str]:
    """The names in `imported` that a module on `level` in the folder `own` must not import."""
    folders = {name: name.partition(".")[0] for name in imported}
    return {name for name, top in folders.items() if top in LEVELS and top != own and LEVELS[top] >= level}


def string_constants(source: str) -> set[str]:
    """All strings in `source` except docstrings and other bare strings."""
    tree = ast.parse(source)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in bare)
    return {node.value for node in constants if isinstance(node.value, str)}


def test_every_layer_has_modules():
    assert {relative(path).partition("/")[0].removesuffix(".py") for path in library_files()} == set(LEVELS)
    assert "train_flow_latent.py" in {path.name for path in script_files()}


@pytest.mark.parametrize("path", library_files(), ids=relative)
def test_modules_import_only_from_lower_levels(path):
    own = relative(path).partition("/")[0].removesuffix(".py")
    assert forbidden_imports(own, LEVELS[own], imports_of(path)) == set()


def test_nothing_imports_a_script():
    scripts = {path.stem for path in ROOT.glob("*.py")} - {path.stem for path in AT_THE_ROOT}
    scripts |= {name.removesuffix(".py").replace("/", ".") for name in COMMANDS}
    for path in [*library_files(), *script_files()]:
        assert not imports_of(path) & scripts, relative(path)


def test_forbidden_imports_are_found():
    source = (
        "def f():\n    from training.ema import Ema\nimport flow.paths\nfrom . import dit\nimport options, models.dit"
    )
    imported = imported_modules(source, "models")
    assert imported == {"training.ema", "flow.paths", "models", "options", "models.dit"}
    assert forbidden_imports("models", LEVELS["models"], imported) == {"training.ema", "flow.paths"}
    assert imported_modules("from ..flow import paths\nfrom .. import x", "a.models") == {"a.flow", "a"}


@pytest.mark.parametrize("dependency", OWNERS)
def test_each_heavy_dependency_is_imported_by_one_module(dependency):
    users = [
        relative(path)
        for path in [*library_files(), *script_files()]
        if path.parent.name != "benchmarks"  # the benchmarks compare with them
        and relative(path) not in COPIED
        and any(name.partition(".")[0] == dependency for name in imports_of(path))
    ]
    assert len(users) == 1, users
    assert users[0].startswith(OWNERS[dependency])


def test_pytorch_fid_is_the_pip_package():
    assert not (ROOT / "pytorch_fid" / "__init__.py").exists()
    found = importlib.util.find_spec("pytorch_fid.inception")
    assert found is not None
    assert ROOT / "pytorch_fid" not in Path(found.origin).parents
    assert Path(found.origin).parts[-3:-1] == ("site-packages", "pytorch_fid")


def test_only_runtime_precision_mentions_cuda():
    allowed = ROOT / "runtime" / "precision.py"
    for path in library_files():
        found = [text for text in string_constants(path.read_text(encoding="utf-8")) if "cuda" in text]
        assert bool(found) == (path == allowed), f"{relative(path)}: {found}"


def test_scripts_are_thin():
    for path in script_files():
        if path.parent == ROOT or relative(path) in COMMANDS:
            assert len(path.read_text(encoding="utf-8").splitlines()) < 120, relative(path)


def modules_by_folder() -> dict[str, list[Path]]:
    """The modules of each library folder."""
    found: dict[str, list[Path]] = {}
    for path in library_files():
        if path.parent != ROOT and path.name != "__init__.py":
            found.setdefault(path.parent.relative_to(ROOT).as_posix(), []).append(path)
    return found


def test_no_folder_has_more_than_20_modules():
    counts = {folder: len(paths) for folder, paths in modules_by_folder().items()}
    assert len(counts) > 10
    assert {folder: count for folder, count in counts.items() if count > 20} == {}


def functions_that_take(annotation: str, source: str) -> list[str]:
    """The functions in `source` that have an argument with this annotation."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if any(argument.annotation and ast.unparse(argument.annotation) == annotation for argument in arguments):
                found.append(node.name)
    return found


def test_few_functions_take_all_options():
    """Only scripts and the modules that set up their work take all options. Other functions take the dataclass they need."""
    taking = {
        relative(path): names
        for path in [*library_files(), *script_files()]
        if relative(path) != "options.py"
        and (names := functions_that_take("Options", path.read_text(encoding="utf-8")))
    }
    assert "run_training" in taking["training/script.py"]
    assert sum(map(len, taking.values())) <= 19, taking


def test_a_function_that_takes_all_options_is_found():
    source = "def f(a: int, options: Options): ...\nclass C:\n    def g(self, *, o: Options): ...\ndef h(o: SolverOptions): ..."
    assert functions_that_take("Options", source) == ["f", "g"]


def test_headers_are_read_by_attribute():
    for path in [*library_files(), *script_files()]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # evaluation/features/classifier.py is excluded because its header has a separate format.
            if isinstance(node, ast.Subscript) and relative(path) != "evaluation/features/classifier.py":
                assert not ast.unparse(node.value).endswith("header"), f"{relative(path)}:{node.lineno}"


@pytest.mark.parametrize(
    ("protocol", "home"), [("Autoencoder", "models/autoencoders/"), ("Features", "evaluation/features/")]
)
def test_isinstance_is_not_used_with_protocols(protocol, home):
    for path in [*library_files(), *script_files()]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                checked = ast.unparse(node.args[1])
                found = protocol in checked or "PixelSpace" in checked
                assert not found or relative(path).startswith(home), f"{relative(path)}:{node.lineno}"
