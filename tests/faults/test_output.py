"""A script's work does not depend on its output: closed streams, ended readers, full disks and plain terminals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from exits import exit_cleanly
from options import UsageError
from streams import steady_output

ROOT = Path(__file__).parents[2]
WORK = """
import os, sys
from exits import exit_cleanly
def main():
    print("first")
    sys.stdout.flush()
    for _ in range(20_000):
        print("more \\u2514\\udcff")
    print("note", file=sys.stderr, flush=True)
    with open(sys.argv[1], "w") as file:
        file.write("saved")
    os.write(1, b"noise of a library")
    return 3
exit_cleanly(main)
"""


def run(command, tmp_path, **environment):
    shell = ["bash", "-c", command, "bash", sys.executable, WORK, str(tmp_path / "result")]
    return subprocess.run(shell, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, check=False)


@pytest.mark.parametrize(
    "redirection",
    ["| head -n 1 >/dev/null", ">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full"],
)
def test_output_that_goes_nowhere_costs_nothing(tmp_path, redirection):
    done = run(f'"$1" -c "$2" "$3" {redirection}; exit ${{PIPESTATUS[0]}}', tmp_path)
    assert done.returncode == 3, done
    assert (tmp_path / "result").read_text() == "saved"
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr
    reported = redirection == ">/dev/full"
    assert (b"warning: the output is incomplete: No space left on device" in done.stderr) == reported


def test_characters_that_a_terminal_lacks_are_escaped(tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TERM": "dumb", "COLUMNS": "0"}
    done = run('exec "$1" -c "$2" "$3"', tmp_path, **ascii_only)
    assert done.returncode == 3, done
    assert b"more \\u2514" in done.stdout
    assert (tmp_path / "result").read_text() == "saved"


def test_the_streams_are_restored(capsys):
    before = sys.stdout, sys.stderr
    with steady_output():
        print("shown")
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before

    def fail():
        raise UsageError("a mistake")

    with pytest.raises(SystemExit):
        exit_cleanly(fail)
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("shown\n", "error: a mistake\n")


def test_a_configuration_is_printed_in_any_encoding():
    done = subprocess.run(
        [sys.executable, "train_flow_latent.py", "--print_config"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"num_process_per_node" in done.stdout
