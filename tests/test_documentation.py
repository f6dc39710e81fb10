"""Checks that tests named in the documents, and messages and output quoted in them, exist."""

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flow.objectives import FlowMatching
from flow.paths import PathOptions
from models.dit import DiTOptions
from models.edm_unet import EdmUNetOptions
from models.registry import build_network
from runtime.distributed import Processes
from runtime.precision import Machine
from training.resources import estimate_memory
from training.run import TrainingOptions

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "docs/lab-notes/*.md", "tests/*.md")
    for path in ROOT.glob(pattern)
)
NAME = re.compile(r"`(?:(tests/[\w/]+\.py)(?:::(\w+))?|(test_\w+))`")
HEADING = re.compile(r"^\| promise .*?`(tests/[\w/]+\.py)`", re.MULTILINE)
OUTPUT = re.compile(r"^<!-- output -->\n```\n(.*?)^```", re.MULTILINE | re.DOTALL)
PHRASE = re.compile(r"(?<![\w./-])[a-z]+(?: [a-z]+)+(?![\w/-]|\.\w)")  # two or more words without values
QUOTE = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
OTHER_FOLDERS = frozenset(("benchmarks", "data", "saved_info", "tests"))  # without messages for users of the library


def names_of_tests(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def named_tests(text: str) -> list[tuple[str, str | None]]:
    """Pairs (file, test) named in `text`. A test name without a file belongs to the file named by its section's table."""
    found = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        heading = HEADING.search(section)
        here = heading[1] if heading else ""
        found += [(file or here, test or bare) for file, test, bare in NAME.findall(section)]
    return [(file, test or None) for file, test in found]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_that_a_document_names_exists(document):
    named = named_tests((ROOT / document).read_text(encoding="utf-8"))
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not file or not (ROOT / file).is_file() or (test and test not in names_of_tests(ROOT / file))
    ]
    assert missing == []


def test_the_promises_in_the_tests_readme_are_recognized():
    assert len(named_tests((ROOT / "tests" / "README.md").read_text(encoding="utf-8"))) > 80


def test_named_tests_finds_files_and_tests():
    text = "## One\n| promise | test in `tests/a.py` |\n| x | `test_y`, `tests/b.py::test_z`, `tests/c.py` |\n## Two\n`test_w`"
    assert named_tests(text) == [
        ("tests/a.py", None), ("tests/a.py", "test_y"), ("tests/b.py", "test_z"), ("tests/c.py", None), ("", "test_w"),
    ]  # fmt: skip


def strings(tree: ast.AST) -> Iterator[str]:
    """The strings in code, with `...` for each placeholder of an f-string. Docstrings are skipped."""
    if isinstance(tree, ast.Expr) and isinstance(tree.value, ast.Constant):
        return
    text = as_text(tree)
    if text is not None:
        yield text
    for child in ast.iter_child_nodes(tree):
        yield from strings(child)


def as_text(node: ast.AST) -> str | None:
    """The text of a string, an f-string or a sum of them; None for any other expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(as_text(part) or "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [as_text(part) for part in (node.left, node.right)]
        return None if parts == [None, None] else "".join(part or "..." for part in parts)
    return None


def messages() -> set[str]:
    """All strings in the library and its scripts."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in OTHER_FOLDERS]
    modules = [path for folder in folders if folder.name[0] != "." for path in folder.rglob("*.py")]
    paths = [*ROOT.glob("*.py"), *modules]
    return {text for path in paths for text in strings(ast.parse(path.read_text(encoding="utf-8")))}


def unknown_quotes(text: str, known: set[str]) -> list[str]:
    """The messages quoted at the start of a table row of `text` that are not part of a known string."""
    return [quote for quote in QUOTE.findall(text) if not any(quote in message for message in known)]


def test_every_message_that_troubleshooting_quotes_exists():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert len(QUOTE.findall(text)) >= 20
    assert unknown_quotes(text, messages()) == []


def test_unknown_quotes_are_found_and_docstrings_are_ignored():
    code = '''
def check(path, n):
    """The file is damaged."""
    raise ValueError(f"cannot read {path}: " f"{n} bytes are missing" + (" (see --help)" if n else "."))
'''
    text = "| message | cause |\n|---|---|\n| `...: ... bytes are missing` | x |\n| `is damaged` | x |\n| `(see --help)` | x |"
    assert unknown_quotes(text, set(strings(ast.parse(code)))) == ["is damaged"]


def unknown_phrases(text: str, known: set[str]) -> list[str]:
    """The phrases in the output blocks of `text` that are not part of a known string. The network's name adm is a value."""
    phrases = [phrase for block in OUTPUT.findall(text) for phrase in PHRASE.findall(block)]
    return [phrase for phrase in phrases if not any(phrase.replace(" adm", "") in message for message in known)]


def test_the_documents_quote_the_current_output():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    known = {text.replace("...", "") for text in messages()}
    assert sum(len(OUTPUT.findall(text)) for text in texts) >= 8
    assert [phrase for text in texts for phrase in unknown_phrases(text, known)] == []


def test_phrases_of_old_output_are_found():
    output = "samples     200 in 8.6 s, 8 evaluations each, mean hole ratio 0.2; from content.pth"
    text = f"<!-- output -->\n```\n{output}\n```\nany other text"
    assert unknown_phrases(text, {", mean hole ratio "}) == ["evaluations each"]


def test_make_runs_every_benchmark_once():
    lines = (ROOT / "Makefile").read_text().splitlines()
    named = [name for line in lines if line.startswith(("quick :=", "long :=", "gpu :=")) for name in line.split()[2:]]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))


LARGEST = re.compile(
    r"^\| (?:(\d+) GB)? ?\| ([\w/-]+)(?: \(.*?\))? \| ([\d,]+|does not fit) \| ([\d,]+) \|$", re.MULTILINE
)


@pytest.mark.slow
def test_the_batches_that_fit_a_card_follow_from_the_estimate(monkeypatch):
    """docs/gpu.md rounds down to two digits. A card of N GB has N GiB; CUDA takes 1 GB."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    rows, card = LARGEST.findall((ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")), 0
    assert len(rows) == 10
    for size, name, *shown in rows:
        card = int(size or card)
        for checkpointing, number in zip((False, True), shown, strict=True):
            found = largest_step(name, checkpointing).largest((card << 30) - 1e9)
            unit = 10 ** max(0, len(str(found)) - 2)
            assert f"{found // unit * unit or 'does not fit':{',' if found else ''}}" == number, (
                card,
                name,
                checkpointing,
            )


@cache
def largest_step(name, checkpointing):
    """The estimate of a training step in bfloat16 with latents 32 x 32 x 4 on a GPU."""
    if name == "adm":
        options = EdmUNetOptions(nf=256, ch_mult=(1, 2, 3, 4), attn_resolutions=(16, 8, 4), num_res_blocks=2)
    else:
        options = DiTOptions(num_classes=1)
    with torch.device("meta"):
        network = build_network(name, 32, replace(options, use_grad_checkpointing=checkpointing)).train()
    run = SimpleNamespace(
        network=network,
        training=TrainingOptions(batch_size=1),
        header=SimpleNamespace(dense=None, latent_shape=(4, 32, 32), model_type=name),
        machine=Machine(torch.device("cuda"), "bf16"),
        objective=FlowMatching(PathOptions()),
        processes=Processes(),
        is_sharded=False,
    )
    return estimate_memory(run)
