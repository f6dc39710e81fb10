"""Random command lines on sound and damaged files end with a result or with one line that says what to do."""

import ast
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import execute
from tests.fuzz.cases import Case, draw_case, read_cases, takes_long
from tests.fuzz.scripts import ROOT, SCRIPTS, declared_options

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cases run in forked processes, with Linux's limits")
# The first names __main__ for another reason, and the second serves a page until it is stopped.
NOT_SCRIPTS = {"runtime/processes/launch.py", "demo.py"}
ELSEWHERE = ("benchmarks", "docs", "tests")
SHORT, LONG = 60, 1500  # cases


def starts_alone(path):
    """Whether a module has a block for `__name__ == "__main__"`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


def test_every_script_is_fuzzed():
    paths = [path.relative_to(ROOT) for pattern in ("*.py", "*/*.py", "*/*/*.py") for path in ROOT.glob(pattern)]
    own = [path for path in paths if not path.parts[0].startswith(".") and path.parts[0] not in ELSEWHERE]
    found = {path for path in own if str(path) not in NOT_SCRIPTS and starts_alone(ROOT / path)}
    listed = {Path(name if name.endswith(".py") else name.replace(".", "/") + ".py") for name in SCRIPTS}
    assert found == listed


def test_options_are_read_from_the_scripts():
    assert all(declared_options(script) for script in SCRIPTS)
    options = {option.name: option for option in declared_options("test_flow_latent.py")}
    assert options["n_sample"].kind is int
    assert options["n_sample"].metadata["minimum"] == 1
    assert options["metrics"].many
    assert len(options) > 80


@pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_random_cases(count, tmp_path):
    # In a process of its own, because cases are forked from it: pytest's may have threads.
    command = [sys.executable, "-m", "tests.fuzz", "--cases", str(count), "--failures", str(tmp_path / "failures")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for outcome in ("success", "refused"):
        assert int(re.search(rf"(\d+) {outcome}", finished.stdout)[1]) > count // 10


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise RuntimeError('a bug')", "traceback: RuntimeError: a bug"),
        ("import sys; sys.exit(7)", "exit code 7"),
        ("import sys; sys.exit(2)", "exit code 2 without an error message"),
        ("import sys; print('error: a\\nb\\nc\\nd', file=sys.stderr); sys.exit(2)", "an error message of 4 lines"),
        ("open('model.tmp-1', 'w'); import sys; print('error: a', file=sys.stderr); sys.exit(2)", "left unfinished"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
        ("print('done')", ""),
    ],
)
def test_failures_are_recognized(body, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "run_entry", lambda script, arguments: exec(body, {}))
    (tmp_path / "materials").mkdir()
    verdict = execute.run_case(Case("datasets_prep.masks", ()), tmp_path / "materials", tmp_path / "case")
    assert verdict.reason.startswith(reason)
    assert (verdict.outcome == "failure") == bool(reason)


def test_a_case_survives_being_written(tmp_path):
    case = draw_case(
        "datasets_prep.masks", "new.png", declared_options("datasets_prep.masks"), ["a", "b/c"], random.Random(3)
    )
    (tmp_path / "cases").write_text(case.to_line() + "\n")
    assert read_cases(tmp_path / "cases") == [case]
    assert takes_long(Case("a", ("--n_sample", "10000000000")))
    assert not takes_long(Case("a", ("--n_sample", "10", "nan", "folder")))
