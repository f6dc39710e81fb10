import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from command_line import leading_word, parse_options, read_arguments_file
from exits import exit_cleanly
from options import DivergedError, UsageError, as_json, make_options, option

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Sampler:
    """Sampler.

    More words.
    """

    method: str = option("euler", "the solver", choices=("euler", "heun"), common=True)
    num_steps: int = option(50, "steps, 100 % of them", minimum=1)
    cfg_scale: float | None = option(None, "guidance scale", flags=("--cfg",))
    seed: int = option(0, "seed of the noise")
    noise: float = option(0.5, "share of noise", minimum=0, maximum=1)


@dataclass(frozen=True)
class Network:
    """Network."""

    widths: tuple[int, ...] = option((16, 32), "channels", minimum=8)
    use_ema: bool = option(True, "average the weights")
    flip: bool = option(False, "mirror")
    seed: int = option(0, "seed of the weights")


def parse(*argv, **settings):
    return parse_options("A description.", [Sampler, Network], [str(word) for word in argv], **settings)


def test_defaults():
    options = parse()
    assert options[Sampler] == Sampler()
    assert options[Network] == Network()
    assert options.explicit == frozenset()


def test_values_have_the_declared_types():
    options = parse("--num_steps", 7, "--cfg", 2, "--widths", 8, 24, 64, "--method", "heun")
    assert options[Sampler] == Sampler(method="heun", num_steps=7, cfg_scale=2.0)
    assert isinstance(options[Sampler].cfg_scale, float)
    assert options[Network].widths == (8, 24, 64)
    assert options.explicit == {"num_steps", "cfg_scale", "widths", "method"}
    assert options.given == {"num_steps": 7, "cfg_scale": 2.0, "widths": (8, 24, 64), "method": "heun"}


def test_a_shared_field_is_one_flag():
    options = parse("--seed", 5)
    assert (options[Sampler].seed, options[Network].seed) == (5, 5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (True, False)),
        (["--no-use_ema", "--flip"], (False, True)),
        (["--use_ema", "false", "--flip", "true"], (False, True)),
        (["--use_ema", "No", "--flip", "1"], (False, True)),
        (["--flip", "--no-flip"], (True, False)),
    ],
)
def test_booleans(words, expected):
    network = parse(*words)[Network]
    assert (network.use_ema, network.flip) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use_ema", "maybe"], "expected true or false"),
        (["--method", "rk99"], "invalid choice"),
        (["--num_steps", "many"], "invalid int"),
        (["--num_step", "3"], "unrecognized arguments"),  # flags cannot be abbreviated
    ],
)
def test_invalid_flags_are_usage_errors(words, message):
    with pytest.raises(UsageError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_steps", "0"], "--num_steps must be at least 1, but 0 was given"),
        (["--widths", "16", "7"], r"--widths must be at least 8, but \(16, 7\) was given"),
        (["--noise", "2"], "--noise must be at most 1, but 2.0 was given"),
        (["--noise", "nan"], "--noise must be at least 0, but nan was given"),
    ],
)
def test_values_out_of_range(words, message):
    with pytest.raises(UsageError, match=message):
        parse(*words)


def test_help_names_groups_defaults_and_descriptions(capsys):
    with pytest.raises(SystemExit) as raised:
        parse("--help")
    text = capsys.readouterr().out
    assert raised.value.code == 0
    for expected in ["A description.", "Sampler:", "Network:", "steps, 100 % of them [50]", "[16 32]", "{euler,heun}"]:
        assert expected in text
    assert "More words" not in text


def test_help_lists_common_options_and_help_all_the_others(capsys, monkeypatch):
    @dataclass(frozen=True)
    class Stored:
        """Stored."""

        shown: str = option("", "recorded by the checkpoint", common=True)

    monkeypatch.setattr("command_line.FEW_OPTIONS", 8)
    texts = {}
    for flag in ("--help", "-h", "--help_all"):
        with pytest.raises(SystemExit):
            parse_options("", [Sampler, Network, Stored], [flag], rare=[Stored])
        texts[flag] = capsys.readouterr().out
    assert texts["-h"] == texts["--help"]
    assert {name for name in ("--method", "--widths", "--shown") if name in texts["--help"]} == {"--method"}
    assert "Network:" not in texts["--help"]
    assert "--help_all lists 8 more options" in texts["--help"]
    assert all(name in texts["--help_all"] for name in ("--method", "--widths", "--shown", "Network:"))


def test_the_usage_names_positional_arguments(capsys):
    with pytest.raises(SystemExit):
        parse("--help", positional="IN OUT")
    assert "IN OUT [--args_file FILE] [flags]" in capsys.readouterr().out


def test_script_defaults_do_not_count_as_explicit(capsys):
    options = parse(defaults={"num_steps": 3})
    assert options[Sampler].num_steps == 3
    assert options.explicit == frozenset()
    assert parse("--num_steps", 4, defaults={"num_steps": 3})[Sampler].num_steps == 4
    with pytest.raises(SystemExit):
        parse("--help", defaults={"num_steps": 3})
    assert "[3]" in capsys.readouterr().out


def test_description_lists_changed_options_in_arguments_file_syntax(tmp_path):
    words = ["--cfg", 1.5, "--widths", 8, 24, "--no-use_ema", "--num_steps", 50, "--seed", 3]
    options = parse(*words)
    text = options.describe("the others: --help")
    assert text.splitlines() == [
        "changed options (the others: --help):",
        "  Sampler: cfg_scale=1.5 seed=3",
        "  Network: widths='8 24' use_ema=false",
    ]
    path = write(tmp_path, "\n".join(line.partition(": ")[2] for line in text.splitlines()[1:]))
    assert parse("--args_file", path).values == options.values
    assert parse().describe("none differs") == "all options have their defaults (none differs)"


def test_ignored_flags_print_one_note(capsys):
    options = parse("--local_rank", 0, "--num_steps", 2, ignored={"local_rank": "one process", "amp": "always on"})
    assert capsys.readouterr().err == "note: --local_rank has no effect here: one process\n"
    assert options[Sampler].num_steps == 2
    assert options.explicit == {"num_steps"}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "args.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_arguments_file(tmp_path):
    path = write(tmp_path, '# a comment\n\nMETHOD=heun  # the solver\nWIDTHS="8 16"\n USE_EMA=false\nCFG=1.5\n')
    options = parse("--args_file", path)
    assert options[Sampler] == Sampler(method="heun", cfg_scale=1.5)
    assert options[Network] == Network(widths=(8, 16), use_ema=False)
    assert options.explicit == {"method", "widths", "use_ema", "cfg_scale"}


def test_command_line_flags_override_the_arguments_file(tmp_path):
    path = write(tmp_path, "NUM_STEPS=10\nWIDTHS=8 16 32\nFLIP=true\n")
    for words in (["--args_file", path, "--num_steps", 4], ["--num_steps", 4, f"--args_file={path}"]):
        options = parse(*words, "--widths", 64, "--no-flip")
        assert options[Sampler].num_steps == 4
        assert options[Network] == Network(widths=(64,), flip=False)


def test_published_keys(tmp_path):
    path = write(tmp_path, "STEPS=1\nIMG_SIZE=2\nCFG=3\nATTN_RES=16 8\nBASE_CH=4\nBs=5\nSEED=9\n")
    names = "num_steps image_size cfg_scale attn_resolutions nf batch_size seed".split()
    fields = {name: option((1,) if name == "attn_resolutions" else 1, "") for name in names}
    assert read_arguments_file(path, fields) == (
        "--num_steps 1 --image_size 2 --cfg_scale 3 --attn_resolutions 16 8 --nf 4 --batch_size 5 --seed 9".split()
    )


def test_several_keys_may_share_a_line(tmp_path):
    path = write(tmp_path, 'METHOD=heun NUM_STEPS=0007 WIDTHS="8 16" USE_EMA=False  # four\nWIDTHS=8 24 32 CFG= 2\n')
    options = parse("--args_file", path)
    assert options[Sampler] == Sampler(method="heun", num_steps=7, cfg_scale=2.0)
    assert options[Network] == Network(widths=(8, 24, 32), use_ema=False)


def test_a_key_may_be_another_spelling_of_a_flag(tmp_path):
    fields = {"attn_resolutions": option((1,), "", flags=("--attn_resolution",))}
    path = write(tmp_path, "ATTN_RESOLUTION=16 8\n")
    assert read_arguments_file(path, fields) == ["--attn_resolutions", "16", "8"]


def test_quoted_values_keep_their_spaces_and_task_is_left_to_the_shell(tmp_path):
    path = write(tmp_path, 'TASK=generate\nDATADIR="my images"\n')
    assert read_arguments_file(path, {"datadir": option("data", "")}) == ["--datadir", "my images"]


def test_arguments_file_is_never_executed(tmp_path):
    path = write(tmp_path, f"METHOD=$(touch {tmp_path}/executed)\n")
    with pytest.raises(UsageError, match="invalid choice"):
        parse("--args_file", path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["args.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NUM_STEPS=1\nnum steps", r"args\.txt, line 2: expected KEY=VALUE, but found 'num steps'"),
        ("--num_steps=3", r"line 1: expected KEY=VALUE"),
        ("\nSTEPZ=3", r"line 2: unknown key STEPZ \(there is no flag --stepz\)"),
        ('METHOD="heun', r"line 1: No closing quotation"),
        ("USE_EMA=", r"line 1: USE_EMA has no value"),
        ("USE_EMA=true CFG=", r"line 1: CFG has no value"),
        ("NUM_STEPS=3 STEPZ=4", r"line 1: unknown key STEPZ"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        parse("--args_file", write(tmp_path, text))


def test_missing_arguments_file(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read the arguments file .*none\.txt"):
        parse("--args_file", tmp_path / "none.txt")


def test_as_json_of_nested_values():
    assert as_json({"a": Network(), 2: [Path("x"), (1, None)]}) == {
        "a": {"widths": [16, 32], "use_ema": True, "flip": False, "seed": 0},
        "2": ["x", [1, None]],
    }


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UsageError("no such dataset"), "error: no such dataset\n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"),
            "error: No space left on device: a/b: free some space, or choose another folder\n",
        ),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "c"), "error: No such file or directory: c\n"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(error, line, capsys):
    with pytest.raises(SystemExit) as raised:
        exit_cleanly(failing(error))
    assert raised.value.code == 2
    assert capsys.readouterr().err == line


def test_divergence_has_exit_code_3(capsys):
    with pytest.raises(SystemExit) as raised:
        exit_cleanly(failing(DivergedError("it began at step 3")))
    assert raised.value.code == 3
    assert capsys.readouterr().err == "error: it began at step 3\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_cleanly(failing(ZeroDivisionError()))
    with pytest.raises(ConnectionResetError):
        exit_cleanly(failing(ConnectionResetError(errno.ECONNRESET, "reset")))


@pytest.mark.parametrize(("value", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_scripts_return_value_is_its_exit_code(value, code):
    with pytest.raises(SystemExit) as raised:
        exit_cleanly(lambda: value)
    assert raised.value.code == code


def test_a_word_before_the_flags(monkeypatch):
    assert leading_word("a file", ["out.png", "--size", "8"]) == ("out.png", ["--size", "8"])
    monkeypatch.setattr("sys.argv", ["script", "folder"])
    assert leading_word("a folder") == ("folder", [])
    assert leading_word("a file", ["--help"]) == ("", ["--help"])
    for words in ([], ["--size", "8"]):
        with pytest.raises(UsageError, match="expected a file, before any flags"):
            leading_word("a file", words)


@dataclass(frozen=True)
class Unregistered:
    """Unregistered."""

    seed: int = option(0, "has the name of another's option")


@dataclass(frozen=True)
class LargeNetwork(Network):
    """Large network."""

    depth: int = option(12, "blocks")


def test_a_group_that_was_not_registered_is_refused():
    """All fields of this group have values, but they belong to another group."""
    with pytest.raises(KeyError, match="Unregistered is not among the option groups"):
        parse()[Unregistered]
    with pytest.raises(KeyError, match="LargeNetwork"):
        parse()[LargeNetwork]


def test_the_base_of_a_registered_group_is_registered():
    options = parse_options("", [LargeNetwork], ["--widths", "64"])
    assert options[Network] == Network(widths=(64,))


def test_choices_are_read_from_the_dictionary_at_parsing():
    kinds = {"one": 1}

    @dataclass(frozen=True)
    class Kind:
        """Kind."""

        kind: str = option("one", "which", choices=kinds)

    with pytest.raises(UsageError, match="invalid choice: 'two'"):
        parse_options("", [Kind], ["--kind", "two"])
    kinds["two"] = 2
    assert parse_options("", [Kind], ["--kind", "two"])[Kind].kind == "two"


def test_resume_policy_is_the_fields_or_the_groups_or_never():
    @dataclass(frozen=True)
    class Shown:
        """Shown."""

        on_resume: ClassVar = "freely"
        grid: int = option(8, "samples")
        scale: float = option(1.0, "factor", on_resume="on_request")

    options = parse_options("", [Shown, Network], [])
    assert options.policies() == {
        "grid": "freely", "scale": "on_request", "widths": "never", "use_ema": "never", "flip": "never", "seed": "never",
    }  # fmt: skip
    assert options.defaults()["grid"] == 8


def test_the_complete_configuration_is_one_tree(capsys):
    with pytest.raises(SystemExit) as raised:
        parse("--num_steps", 7, "--widths", 8, 24, "--flip", "--print_config")
    assert raised.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        "Sampler",
        "├─ method     euler",
        "├─ num_steps  7  *",
        "├─ cfg_scale  -",
        "├─ seed       0",
        "└─ noise      0.5",
        "Network",
        "├─ widths   '8 24'  *",
        "├─ use_ema  true",
        "└─ flip     true  *",
    ]


def test_make_options_converts_values():
    made = make_options(Sampler, {"num_steps": 7, "cfg_scale": 2, "method": "heun"})
    assert made == Sampler(method="heun", num_steps=7, cfg_scale=2.0)
    assert isinstance(made.cfg_scale, float)
    assert make_options(Network, {"widths": [8, 16]}).widths == (8, 16)
    assert make_options(Sampler, {"cfg_scale": None}).cfg_scale is None


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        (Sampler, {"steps": 7}, "unknown option steps: expected one of method, num_steps"),
        (Sampler, {"num_steps": 0}, "--num_steps must be at least 1, but 0 was given"),
        (Sampler, {"num_steps": 7.5}, "num_steps: expected int, but 7.5 was given"),
        (Sampler, {"num_steps": True}, "num_steps: expected int, but True was given"),
        (Sampler, {"noise": 2}, "--noise must be at most 1"),
        (Sampler, {"method": "rk"}, "--method rk: expected one of euler, heun"),
        (Network, {"widths": 8}, "widths: expected a list of int, but 8 was given"),
        (Network, {"widths": [8, "x"]}, "widths: expected a list of int"),
        (Network, {"use_ema": "yes"}, "use_ema: expected bool, but 'yes' was given"),
    ],
)
def test_values_that_are_no_options_are_refused(group, values, message):
    with pytest.raises(UsageError, match=message):
        make_options(group, values)


@pytest.mark.parametrize(
    ("flag", "suggested"),
    [
        ("--cfg_scal", "; did you mean --cfg_scale? "),
        ("--num-steps", "; did you mean --num_steps? "),
        ("--num_sampling_steps", "; did you mean --num_steps? "),  # DiT's and SiT's name
        ("--learning_rate", " "),  # --lr is not an option here
        ("--zzz", " "),
    ],
)
def test_an_unknown_option_is_likened_to_a_known_one(flag, suggested):
    with pytest.raises(UsageError) as raised:
        parse(flag, 3)
    assert str(raised.value) == f"unrecognized arguments: {flag} 3{suggested}(see --help)"


def test_an_unknown_key_is_likened_to_a_known_one(tmp_path):
    with pytest.raises(
        UsageError, match=r"unknown key NUM_STEP \(there is no flag --num_step; did you mean --num_steps\?\)"
    ):
        parse("--args_file", write(tmp_path, "NUM_STEP=3"))


def test_a_default_that_depends_on_others_is_described(capsys):
    @dataclass(frozen=True)
    class Derived:
        """Derived."""

        channels: int = option(4, "channels", shown="the data's")

    for words, text in (["--help"], "channels [the data's]"), (["--print_config"], "channels  the data's\n"):
        with pytest.raises(SystemExit):
            parse_options("", [Derived], words)
        assert text in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse_options("", [Derived], ["--channels", "4", "--print_config"])
    assert "channels  4\n" in capsys.readouterr().out


def test_silent_options_are_accepted_but_not_listed(capsys):
    assert parse("--seed", 3, silent={"seed"})[Sampler].seed == 3
    with pytest.raises(SystemExit):
        parse("--help_all", silent={"seed"})
    text = capsys.readouterr().out
    assert "--num_steps" in text
    assert "--seed" not in text


def test_a_broken_pipe_elsewhere_is_not_hidden():
    def fail() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        exit_cleanly(fail)
