"""Options, each declared once as a field of a frozen dataclass.

Each component has a dataclass whose fields are created by `option(default, help)`. A script passes the classes it needs to
`command_line.parse_options` and gives each component its own instance. The first line of a class's docstring is the title
of its group in `--help`. Classes may share a field, as network families do; the field is then a single flag.

Pydantic is not used, because it checks ranges but does not handle flags or the rules for resuming a run.
"""

import dataclasses
import shlex
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

__all__ = [
    "DivergedError",
    "OnResume",
    "Options",
    "UsageError",
    "argument_type",
    "as_json",
    "check_range",
    "group_title",
    "make_options",
    "option",
    "record_options",
    "recorded_options",
    "resume_policy",
    "wrapped",
]

T = TypeVar("T")

# Whether a run may resume with another value of an option:
#   never       no: it would be a different run
#   on_request  only with --resume: the run then differs from what its first options describe
#   rounding    yes: only the order of floating-point sums changes, so results differ in the last bits
#   freely      yes: the option affects what is printed, sampled or saved, not what the network learns
OnResume = Literal["never", "on_request", "rounding", "freely"]

LARGEST_INTEGER = 2**63 - 1  # because integers end in 64-bit tensors


class UsageError(ValueError):
    """Invalid input. The message says what was expected, what was given and what to do."""

    exit_code = 2


class DivergedError(UsageError):
    """A training run that produces non-finite values and does not recover."""

    exit_code = 3


def option(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] | None = None,
    flags: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    on_resume: OnResume | None = None,
    common: bool = False,
    shown: str = "",
    words: Mapping[str, float] | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag.

    Args:
        default: value when the flag is not given.
        help: one sentence for `--help`, with the unit.
        choices: the allowed values, or for a tuple the allowed elements: a sequence of names, or a dictionary whose keys are
            the names. Keys added to the dictionary later are allowed too.
        flags: alternative spellings, such as "--attn_resolution".
        minimum: the smallest allowed number.
        maximum: the largest allowed number.
        on_resume: whether a run may resume with another value; None: the dataclass's policy, else "never".
        common: most users need it, so `--help` lists it; `--help_all` lists the others too.
        shown: what `--help` and `--print_config` print as the default, if other options determine the value that is used.
        words: numbers that can also be given as a word, such as {"auto": 0.0}.
    """
    metadata: dict[str, Any] = {
        "help": help,
        "choices": choices,
        "flags": flags,
        "minimum": minimum,
        "maximum": maximum,
    }
    metadata |= {"on_resume": on_resume, "common": common, "shown": shown, "words": words or {}}
    return dataclasses.field(default=default, metadata=metadata)


def resume_policy(group: type, field: dataclasses.Field) -> OnResume:
    """The option's own resume policy, else its dataclass's, else "never"."""
    return field.metadata["on_resume"] or getattr(group, "on_resume", "never")


@dataclasses.dataclass(frozen=True)
class Options:
    """The values of all flags; `options[GroupClass]` is one component's dataclass.

    Args:
        values: all values, by name.
        explicit: the names of the options given on the command line or in the arguments file.
        groups: the registered dataclasses.
        args_file: the arguments file, or "" without one.
    """

    values: Mapping[str, Any]
    explicit: frozenset[str]
    groups: tuple[type, ...] = ()
    args_file: str = ""

    def __getitem__(self, group: type[T]) -> T:
        if not any(issubclass(registered, group) for registered in self.groups):
            raise KeyError(f"{group.__name__} is not among the option groups that this script registered")
        return group(**{field.name: self.values[field.name] for field in dataclasses.fields(group)})  # type: ignore[arg-type]

    @property
    def given(self) -> dict[str, Any]:
        """The values given on the command line or in the arguments file, by name."""
        return {name: self.values[name] for name in self.explicit}

    def describe(self, others: str) -> str:
        """The options that differ from the dataclasses' defaults, one line per component.

        Values are written in the syntax of an arguments file.

        Args:
            others: where to find the other options, for the first line.
        """
        lines, listed = list[str](), set[str]()
        for group in self.groups:
            own = [field for field in dataclasses.fields(group) if field.name not in listed]
            listed |= {field.name for field in own}
            changed = [field.name for field in own if self.values[field.name] != field.default]
            if changed:
                lines.append(f"  {group_title(group)}: " + " ".join(f"{n}={_written(self.values[n])}" for n in changed))
        first = f"changed options ({others}):" if lines else f"all options have their defaults ({others})"
        return "\n".join([first, *lines])

    def tree(self) -> str:
        """The complete configuration as a tree of groups and options; `*` marks values that differ from the default."""
        lines, listed = list[str](), set[str]()
        for group in self.groups:
            own = [field for field in dataclasses.fields(group) if field.name not in listed]
            listed |= {field.name for field in own}
            width = max((len(field.name) for field in own), default=0)
            for number, field in enumerate(own):
                value = self.values[field.name]
                branch, mark = "└─" if number == len(own) - 1 else "├─", "" if value == field.default else "  *"
                lines += [group_title(group)] if not number else []
                text = "-" if value is None else _written(value)
                if field.name not in self.explicit and field.metadata["shown"]:
                    text = field.metadata["shown"]
                lines.append(f"{branch} {field.name:<{width}}  {text}{mark}")
        return "\n".join(lines)

    def written(self, name: str) -> str:
        """An option's value in the syntax of an arguments file, which is also the shell's."""
        return _written(self.values[name])

    def policies(self) -> dict[str, OnResume]:
        """The resume policy of each option, by name."""
        found: dict[str, OnResume] = {}
        for group in self.groups:
            for field in dataclasses.fields(group):
                found.setdefault(field.name, resume_policy(group, field))
        return found

    def defaults(self) -> dict[str, Any]:
        """The dataclasses' defaults, by name."""
        return {field.name: field.default for group in self.groups for field in dataclasses.fields(group)}

    def completed(self, values: Mapping[str, Any]) -> "Options":
        """These options, with `values` for those the user left out, as if an arguments file had set them."""
        added = {name: value for name, value in values.items() if name in self.values and name not in self.explicit}
        return dataclasses.replace(self, values={**self.values, **added}, explicit=self.explicit | added.keys())


_RECORDED: list[Options] = []  # the running script's options, for advice after an error; at most one entry


def record_options(options: Options) -> None:
    """Record the options of the script that this process runs."""
    _RECORDED[:] = [options]


def recorded_options() -> Options | None:
    """The options of the script that this process runs; None before they are parsed."""
    return _RECORDED[0] if _RECORDED else None


def argument_type(hint: Any) -> tuple[type, bool]:
    """The scalar type of an annotation such as `int | None` or `tuple[int, ...]`, and whether it is a tuple."""
    if isinstance(hint, types.UnionType):
        hint = next(item for item in typing.get_args(hint) if item is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def check_range(field: dataclasses.Field, value: Any) -> None:
    """Check a value against the option's minimum, maximum and choices.

    Raises:
        UsageError: the value, or an element of the tuple, is out of range or not among the choices.
    """
    lowest, highest, choices = (field.metadata[name] for name in ("minimum", "maximum", "choices"))
    for item in value if isinstance(value, tuple) else (value,):
        # `not item >= lowest` also rejects nan, which `item < lowest` would accept.
        if type(item) is int and not -LARGEST_INTEGER <= item <= LARGEST_INTEGER:
            digits = len(str(abs(item)))
            raise UsageError(f"--{field.name}: expected an integer of 64 bits, but {digits} digits were given")
        if lowest is not None and not item >= lowest:
            raise UsageError(f"--{field.name} must be at least {lowest}, but {value} was given")
        if highest is not None and not item <= highest:
            raise UsageError(f"--{field.name} must be at most {highest}, but {value} was given")
        if choices is not None and item not in choices:
            raise UsageError(f"--{field.name} {item}: expected one of {', '.join(choices)}")


def make_options(group: type[T], values: Mapping[str, Any]) -> T:
    """An instance of an option dataclass from Python values, with the same checks as on the command line.

    Lists become tuples, and integers become floats for options of type float.

    Raises:
        UsageError: a name is not an option of `group`, or a value has the wrong type, is out of range or is not a choice.
    """
    known = {field.name: field for field in dataclasses.fields(group)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise UsageError(f"unknown option {', '.join(unknown)}: expected one of {', '.join(known)}")
    hints = typing.get_type_hints(group)
    return group(**{name: _checked(known[name], hints[name], value) for name, value in values.items()})


def _checked(field: dataclasses.Field, hint: Any, value: Any) -> Any:
    kind, many = argument_type(hint)
    if value is None and type(None) in typing.get_args(hint):
        return None
    items = tuple(value) if many and isinstance(value, list | tuple) else (value,)
    items = tuple(field.metadata["words"].get(item, item) if isinstance(item, str) else item for item in items)
    items = tuple(float(item) if kind is float and type(item) is int else item for item in items)
    if any(type(item) is not kind for item in items) or (many and not isinstance(value, list | tuple)):
        expected = f"a list of {kind.__name__}" if many else kind.__name__
        raise UsageError(f"{field.name}: expected {expected}, but {value!r} was given")
    checked = items if many else items[0]
    check_range(field, checked)
    return checked


def as_json(value: Any) -> Any:
    """Convert a dataclass, mapping, sequence or scalar to JSON types, so that a round trip compares equal.

    A dataclass whose JSON entries differ from its fields defines `to_json()`.
    """
    if hasattr(value, "to_json"):
        return as_json(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def wrapped(line: str, file: TextIO, indent: int = 4) -> str:
    """Wrap a line at the width of the terminal that it is printed on; other files get it unchanged.

    Continuation lines are indented by `indent` more than the line. Paths and flags stay whole.
    """
    columns, margin = shutil.get_terminal_size().columns, " " * (len(line) - len(line.lstrip()) + indent)
    longest = max(map(len, line.split()), default=0)
    if not file.isatty() or longest > columns - len(margin):  # the terminal wraps a path longer than a line
        return line
    return textwrap.fill(line, columns, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False)


def group_title(group: type) -> str:
    """The title of an option dataclass in `--help`."""
    return (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")


def _written(value: Any) -> str:
    """A value in the syntax of an arguments file."""
    if isinstance(value, bool):
        return str(value).lower()
    return shlex.quote(" ".join(map(str, value)) if isinstance(value, tuple) else str(value))
