import io
import os
import sys

from runtime.messages import fact, labeled, note, one_line, show, show_result, warn
from runtime.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch):
    """Make stdout a terminal of 40 columns."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "40")
    return screen


def test_facts_are_aligned_and_results_come_after_their_warnings(capsys):
    fact("machine", "cpu, 2 threads")
    fact("run folder", "saved_info/a")
    show_result(labeled("score", "FID 3.1"), ["few samples"])
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "machine     cpu, 2 threads",
        "run folder  saved_info/a",
        "score       FID 3.1",
    ]
    assert captured.err == "warning: few samples\n"


def test_notes_and_warnings_go_to_stderr(capsys):
    note("one")
    warn("two")
    assert capsys.readouterr() == ("", "note: one\nwarning: two\n")


def test_long_lines_stay_whole_in_a_file(capsys):
    text = "word " * 100
    show(text.strip())
    assert capsys.readouterr().out == text.strip() + "\n"


def test_a_terminal_gets_wrapped_and_indented_lines(monkeypatch):
    terminal = open_terminal(monkeypatch)
    fact("data", "fashion_mnist, 60,000 training images, mirrored")
    show("  Group: one=1 two=2 three=3 four=4 five=5")
    assert terminal.getvalue().splitlines() == [
        "data        fashion_mnist, 60,000",
        "            training images, mirrored",
        "  Group: one=1 two=2 three=3 four=4",
        "      five=5",
    ]


def test_a_path_longer_than_the_terminal_stays_on_its_line(monkeypatch):
    terminal = open_terminal(monkeypatch)
    path = "/somewhere/" + "x" * 50
    fact("picture", path)
    assert terminal.getvalue() == f"picture     {path}\n"


def test_a_message_does_not_join_a_progress_bar(capsys):
    with progress_bar(total=3, desc="training") as bar:
        bar.update()
        note("fine")
    captured = capsys.readouterr()
    assert "\r" not in captured.err
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["training", "note", "training"]


def test_a_summary_becomes_one_line_of_a_log():
    summary = os.linesep.join([labeled("score", "FID 3.1"), labeled("samples", "10 in 2 s")])
    assert one_line(summary, ["few samples"]) == "score FID 3.1; samples 10 in 2 s; warning: few samples"
