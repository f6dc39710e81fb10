"""Command-line flags and KEY=VALUE arguments files for option dataclasses.

Built on argparse, because tyro and jsonargparse cannot read the arguments files of LFM's published code.
"""

import argparse
import dataclasses
import re
import shlex
import shutil
import sys
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from option_names import PUBLISHED_KEYS, suggest
from options import Options, UsageError, argument_type, check_range, group_title, record_options, wrapped

__all__ = ["help_flags", "leading_word", "parse_options", "read_arguments_file"]

FEW_OPTIONS = 30  # scripts with at most this many options list all of them in --help

HELP = frozenset(("-h", "--help", "--help_all"))
ASSIGNMENT = re.compile(r"([A-Za-z]\w*)=(.*)", re.DOTALL)


def parse_options(
    description: str,
    groups: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
    ignored: Mapping[str, str] | None = None,
    task: str | None = None,
    positional: str = "",
    rare: Collection[type] = (),
    silent: Collection[str] = (),
    adjust: Callable[[Options], Options] = lambda options: options,
) -> Options:
    """Parse the command line into the options of `groups`.

    Args:
        description: first paragraph of `--help`.
        groups: option dataclasses, in the order `--help` lists them.
        argv: command line without the program's name; sys.argv[1:] when None.
        defaults: this script's own defaults, by option name, where they differ from the dataclass's.
        ignored: flags accepted for compatibility, each with the reason why it has no effect. Using one prints a note.
        task: the TASK that an arguments file may name; None accepts any.
        positional: the positional arguments, which the caller has already removed from `argv`, for the usage line.
        rare: groups that only `--help_all` lists, although some of their options are common in other scripts.
        silent: names of options that are accepted but not listed, because they have no effect.
        adjust: fills in defaults that depend on other options.

    Raises:
        UsageError: an unknown flag or key, a missing arguments file, or an invalid value.
        SystemExit: after `--help`, `--help_all` or `--print_config` has printed its text.
    """
    defaults, ignored = defaults or {}, ignored or {}
    words = list(sys.argv[1:] if argv is None else argv)
    parser, fields = _make_parser(description, groups, defaults, ignored, positional)
    for action in parser._actions:
        if action.dest in silent:
            action.help = argparse.SUPPRESS
    if "--help_all" not in words:
        _hide_rare_options(parser, {name: field for name, field in fields.items() if name not in silent}, rare)
    finder = _Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--args_file")
    found, words = finder.parse_known_args(words)
    if found.args_file:
        words = read_arguments_file(found.args_file, fields, ignored, task) + words
    given = vars(parser.parse_args(words))
    show_tree = given.pop("print_config", False)

    for flag, reason in ignored.items():
        if given.pop(flag, None) is not None:
            print(wrapped(f"note: --{flag} has no effect here: {reason}", sys.stderr), file=sys.stderr)
    for name, value in given.items():
        check_range(fields[name], value)
    values = {name: field.default for name, field in fields.items()} | dict(defaults) | given
    file = found.args_file or ""
    options = adjust(Options(values=values, explicit=frozenset(given), groups=tuple(groups), args_file=file))
    record_options(options)
    if show_tree:
        print(options.tree())
        raise SystemExit(0)
    return options


def help_flags(words: Iterable[str]) -> list[str]:
    """The words that are help flags."""
    return [word for word in words if word in HELP]


def leading_word(meaning: str, argv: Sequence[str] | None = None) -> tuple[str, list[str]]:
    """Split off the required word that precedes the flags.

    Args:
        meaning: what the word is, for the error message.
        argv: command line without the program's name; sys.argv[1:] when None.

    Returns:
        The word ("" with `--help`) and the flags.

    Raises:
        UsageError: the word is missing.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    if help_flags(words):
        return "", words
    raise UsageError(f"expected {meaning}, before any flags (see --help)")


def read_arguments_file(
    path: str | Path, fields: Mapping[str, dataclasses.Field], ignored: Iterable[str] = (), task: str | None = None
) -> list[str]:
    """Read flags from a file of KEY=VALUE lines. The lines are parsed, never executed; `#` starts a comment.

    Args:
        path: the file. A key is a flag's name in capitals or one of PUBLISHED_KEYS. Several pairs may share a line. Values
            may be quoted. Spaces separate the elements of a tuple. run.sh and run_test.sh choose the script by the key TASK.
        fields: the existing options, by name.
        ignored: further names to accept.
        task: the script's own task; None accepts any TASK.

    Raises:
        UsageError: the file is missing or for another task, or a line has no "=", an unknown key or no value.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the arguments file {path}: {error}") from error
    spellings = {flag[2:]: name for name, field in fields.items() for flag in field.metadata["flags"]}
    flags: list[str] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        for key, value in _assignments(line, where):
            name = PUBLISHED_KEYS.get(key, key.lower())
            name = spellings.get(name, name)
            if key == "TASK":
                if task not in (None, value):
                    raise UsageError(f"{where}: TASK={value} needs another script; this script's task is {task}")
                continue
            if name not in fields and name not in ignored:
                raise UsageError(f"{where}: unknown key {key} (there is no flag --{name}{suggest(name, fields)})")
            if not value:
                raise UsageError(f"{where}: {key} has no value")
            several = name in ignored or isinstance(fields[name].default, tuple)
            flags += [f"--{name}", *(value.split() if several else [value])]
    return flags


def _assignments(line: str, where: str) -> list[tuple[str, str]]:
    """The (key, value) pairs of a line. A word without "=" extends the value before it."""
    try:
        words = shlex.split(_without_comment(line))
    except ValueError as error:
        raise UsageError(f"{where}: {error}: {line!r}") from error
    pairs: list[tuple[str, str]] = []
    for word in words:
        if match := ASSIGNMENT.fullmatch(word):
            pairs.append((match[1], match[2]))
        elif pairs:
            key, value = pairs[-1]
            pairs[-1] = key, f"{value} {word}".strip()
        else:
            raise UsageError(f"{where}: expected KEY=VALUE, but found {line!r}")
    return pairs


def _without_comment(line: str) -> str:
    """The line up to a `#` that begins a word outside quotes, where bash begins a comment; `set#1` has none."""
    quote, escaped = "", False
    for position, character in enumerate(line):
        if escaped:
            escaped = False
        elif character == "\\" and quote != "'":
            escaped = True
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and (position == 0 or line[position - 1].isspace()):
            return line[:position]
    return line


def _make_parser(
    description: str,
    groups: Sequence[type],
    defaults: Mapping[str, Any],
    ignored: Iterable[str],
    positional: str,
) -> tuple[argparse.ArgumentParser, dict[str, dataclasses.Field]]:
    parser = _Parser(
        usage=f"%(prog)s {positional + ' ' if positional else ''}[--args_file FILE] [flags]",
        description=description,
        epilog="Pass a switch --x as --x, --x true, --x false or --no-x. Brackets show defaults.",
        allow_abbrev=False,
        add_help=False,
        formatter_class=_HelpFormatter,
    )
    script = parser.add_argument_group("This script")
    script.add_argument("-h", "--help", action="help", help="list the common options and exit")
    script.add_argument("--help_all", action="help", help="list all options and exit")
    script.add_argument(
        "--args_file",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="read flags from KEY=VALUE lines; flags on the command line take precedence",
    )
    script.add_argument(
        "--print_config",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the complete configuration and exit",
    )
    fields = _add_groups(parser, groups, defaults)
    for flag in ignored:
        parser.add_argument(f"--{flag}", nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser, fields


def _hide_rare_options(
    parser: argparse.ArgumentParser, fields: Mapping[str, dataclasses.Field], rare: Collection[type]
) -> None:
    """Keep only the common options in the parser's help, if there are more options than fit on a screen."""
    if len(fields) <= FEW_OPTIONS:
        return
    hidden = {field.name for group in rare for field in dataclasses.fields(group)}
    for action in parser._actions:
        if action.dest in fields and (action.dest in hidden or not fields[action.dest].metadata["common"]):
            action.help = argparse.SUPPRESS
            hidden.add(action.dest)
    parser.epilog = f"{parser.epilog} --help_all lists {len(hidden & fields.keys())} more options."


def _add_groups(
    parser: argparse.ArgumentParser, groups: Sequence[type], defaults: Mapping[str, Any]
) -> dict[str, dataclasses.Field]:
    fields: dict[str, dataclasses.Field] = {}
    for group in groups:
        section = parser.add_argument_group(group_title(group))
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            if field.name in fields:
                continue  # two network families share it
            fields[field.name] = field
            default = defaults.get(field.name, field.default)
            _add_flag(section, field, hints[field.name], default)
    return fields


def _add_flag(section: Any, field: dataclasses.Field, hint: Any, default: Any) -> None:
    kind, many = argument_type(hint)
    names = [f"--{field.name}", *field.metadata["flags"]]
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    shown = ("on" if default else "off") if kind is bool else shown
    shown = field.metadata["shown"] or shown
    choices = field.metadata["choices"] and tuple(field.metadata["choices"])
    listed = f"; choices: {', '.join(choices)}" if many and choices else ""
    explained = field.metadata["help"] + listed + ("" if default in (None, "", ()) else f" [{shown}]")
    common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": explained.replace("%", "%%")}
    if kind is bool:
        section.add_argument(*names, action=_BooleanAction, **common)
    elif many:
        metavar = kind.__name__.upper()
        section.add_argument(
            *names, type=kind, nargs="+", action=_TupleAction, choices=choices, metavar=metavar, **common
        )
    else:
        section.add_argument(
            *names,
            type=_worded(kind, field.metadata["words"]),
            choices=choices,
            metavar=None if choices else kind.__name__.upper(),
            **common,
        )


def _worded(kind: type, words: Mapping[str, float]) -> Callable[[str], Any]:
    """A converter to `kind` that also accepts the words of an option."""
    if not words:
        return kind

    def convert(text: str) -> Any:
        return words[text] if text in words else kind(text)

    convert.__name__ = f"{kind.__name__} or {', '.join(words)}"  # argparse names it in its messages
    return convert


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        unknown = re.search(r"unrecognized arguments: --([\w-]+)", message)
        known = [name[2:] for name in self._option_string_actions if name.startswith("--")]
        raise UsageError(f"{message}{suggest(unknown[1], known) if unknown else ''} (see --help)")


class _HelpFormatter(argparse.HelpFormatter):
    """Formats help as wide as the terminal, up to 118 columns, with one spelling of a switch instead of three."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size((118, 24)).columns, 118)
        super().__init__(prog, max_help_position=32 if width > 100 else 24, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, _BooleanAction):
            return action.option_strings[0]
        return super()._format_action_invocation(action)


class _TupleAction(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        setattr(namespace, self.dest, tuple(values))


class _BooleanAction(argparse.Action):
    """Accepts `--flag`, `--flag true|false` and `--no-flag`."""

    words: typing.ClassVar = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

    def __init__(self, option_strings, dest, **arguments):  # type: ignore[no-untyped-def]
        negative = [f"--no-{name[2:]}" for name in option_strings if not name.startswith("--no_")]
        super().__init__([*option_strings, *negative], dest, nargs="?", metavar="BOOL", **arguments)

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        value = True if values is None else self.words.get(str(values).lower())
        if value is None:
            parser.error(f"argument {option_string}: expected true or false, but {values!r} was given")
        setattr(namespace, self.dest, value != (option_string or "").startswith("--no-"))
