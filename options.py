"""Options declared once, as fields of frozen dataclasses; pydantic would check ranges, but knows neither flags nor resuming.

Every component owns one dataclass whose fields are made by `option(default, help)`; the scripts hand the classes they use
to `command_line.parse_options`, and give each component its own instance back. The first line of a class's docstring is
the title of its group in `--help`. Classes may share a field (network families do): it is one flag.
"""

import dataclasses
import errno
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

__all__ = [
    "INTERRUPTED",
    "DivergedError",
    "OnResume",
    "Options",
    "UsageError",
    "argument_type",
    "as_json",
    "check_range",
    "exit_cleanly",
    "explain",
    "group_title",
    "make_options",
    "option",
    "resume_policy",
]

T = TypeVar("T")

# Whether a run may resume with another value of an option:
#   never     the run would no longer be the one that it began as
#   on_request  with --resume; the run is then no longer the one that its first options describe
#   rounding  yes; the order of floating-point sums changes, and with it the last bits
#   freely    yes; the option decides when things are shown and saved, not what is learnt
OnResume = Literal["never", "on_request", "rounding", "freely"]

INTERRUPTED = 130  # exit code after Ctrl-C
ENVIRONMENT_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
)


class UsageError(ValueError):
    """Input that a user can mend. The message says what was expected, what came and what to do."""

    exit_code = 2


class DivergedError(UsageError):
    """A run whose numbers have gone wrong for good, though it could begin."""

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
) -> Any:
    """A dataclass field that is also a command-line flag.

    Args:
        default: value when the flag is not given.
        help: one sentence for `--help`, with the unit.
        choices: the values allowed (for tuples, of each element): the dictionary that they index, so that later entries count,
            or a sequence of names.
        flags: other spellings, such as "--attn_resolution".
        minimum: the smallest value allowed, for numbers.
        maximum: the largest.
        on_resume: whether a run may resume with another value; None: as the dataclass says, else "never".
    """
    metadata = {"help": help, "choices": choices, "flags": flags, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata={**metadata, "on_resume": on_resume})


def resume_policy(group: type, field: dataclasses.Field) -> OnResume:
    """Whether a run may resume with another value of an option: its own policy, else its dataclass's, else "never"."""
    return field.metadata["on_resume"] or getattr(group, "on_resume", "never")


@dataclasses.dataclass(frozen=True)
class Options:
    """The values of all flags, which of them the user gave, and the components that they belong to.

    `options[GroupClass]` is the instance of one component's dataclass.
    """

    values: Mapping[str, Any]
    explicit: frozenset[str]
    groups: tuple[type, ...] = ()

    def __getitem__(self, group: type[T]) -> T:
        if not any(issubclass(registered, group) for registered in self.groups):
            raise KeyError(f"{group.__name__} is not among the option groups that this script registered")
        return group(**{field.name: self.values[field.name] for field in dataclasses.fields(group)})  # type: ignore[arg-type]

    @property
    def given(self) -> dict[str, Any]:
        """The values that the user gave, on the command line or in the arguments file, by name."""
        return {name: self.values[name] for name in self.explicit}

    def describe(self, others: str) -> str:
        """The options that differ from the dataclasses' defaults, a line for each component; `others` tells of the rest.

        Values are written as an arguments file takes them.
        """
        lines, listed = [f"options ({others})"], set[str]()
        for group in self.groups:
            own = [field for field in dataclasses.fields(group) if field.name not in listed]
            listed |= {field.name for field in own}
            changed = [field.name for field in own if self.values[field.name] != field.default]
            if changed:
                lines.append(f"  {group_title(group)}: " + " ".join(f"{n}={_written(self.values[n])}" for n in changed))
        return "\n".join(lines)

    def tree(self) -> str:
        """The complete configuration: a line for each group and, indented below it, for each option; `*` marks changes."""
        lines, listed = list[str](), set[str]()
        for group in self.groups:
            own = [field for field in dataclasses.fields(group) if field.name not in listed]
            listed |= {field.name for field in own}
            width = max((len(field.name) for field in own), default=0)
            for number, field in enumerate(own):
                value = self.values[field.name]
                branch, mark = "└─" if number == len(own) - 1 else "├─", "" if value == field.default else "  *"
                lines += [group_title(group)] if not number else []
                lines.append(f"{branch} {field.name:<{width}}  {'-' if value is None else _written(value)}{mark}")
        return "\n".join(lines)

    def policies(self) -> dict[str, OnResume]:
        """Whether a run may resume with another value of each option."""
        found: dict[str, OnResume] = {}
        for group in self.groups:
            for field in dataclasses.fields(group):
                found.setdefault(field.name, resume_policy(group, field))
        return found

    def defaults(self) -> dict[str, Any]:
        """The dataclasses' defaults, by name."""
        return {field.name: field.default for group in self.groups for field in dataclasses.fields(group)}

    def completed(self, values: Mapping[str, Any]) -> "Options":
        """These options with `values` where the user gave none, as if an arguments file had held them."""
        added = {name: value for name, value in values.items() if name in self.values and name not in self.explicit}
        return dataclasses.replace(self, values={**self.values, **added}, explicit=self.explicit | added.keys())


def argument_type(hint: Any) -> tuple[type, bool]:
    """(scalar type, whether a tuple of them) of an annotation such as `int | None` or `tuple[int, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(item for item in typing.get_args(hint) if item is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def check_range(field: dataclasses.Field, value: Any) -> None:
    """Refuse numbers below the option's minimum or above its maximum, and names that are no choice.

    Raises:
        UsageError: such a value.
    """
    lowest, highest, choices = (field.metadata[name] for name in ("minimum", "maximum", "choices"))
    for item in value if isinstance(value, tuple) else (value,):
        # "not at least" where "less" would let nan pass
        if lowest is not None and not item >= lowest:
            raise UsageError(f"--{field.name} must be at least {lowest}, but {value} was given")
        if highest is not None and not item <= highest:
            raise UsageError(f"--{field.name} must be at most {highest}, but {value} was given")
        if choices is not None and item not in choices:
            raise UsageError(f"--{field.name} {item}: expected one of {', '.join(choices)}")


def make_options(group: type[T], values: Mapping[str, Any]) -> T:
    """An instance of an option dataclass from Python values by name, checked as the command line checks its words.

    Lists become tuples, and whole numbers become floats where a float is due.

    Raises:
        UsageError: a name that is no option of `group`, or a value of another type, out of range or no choice.
    """
    known = {field.name: field for field in dataclasses.fields(group)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise UsageError(f"unknown option {', '.join(unknown)}: expected some of {', '.join(known)}")
    hints = typing.get_type_hints(group)
    return group(**{name: _checked(known[name], hints[name], value) for name, value in values.items()})


def _checked(field: dataclasses.Field, hint: Any, value: Any) -> Any:
    kind, many = argument_type(hint)
    if value is None and type(None) in typing.get_args(hint):
        return None
    items = tuple(value) if many and isinstance(value, list | tuple) else (value,)
    items = tuple(float(item) if kind is float and type(item) is int else item for item in items)
    if any(type(item) is not kind for item in items) or (many and not isinstance(value, list | tuple)):
        expected = f"several of {kind.__name__}" if many else kind.__name__
        raise UsageError(f"{field.name}: expected {expected}, but {value!r} was given")
    checked = items if many else items[0]
    check_range(field, checked)
    return checked


def as_json(value: Any) -> Any:
    """`value` (a dataclass, mapping, sequence or scalar) in JSON's types, so that a round trip compares equal.

    A dataclass whose JSON has other entries than its fields defines `to_json()`.
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


class Explanation(NamedTuple):
    """How a script ends after an error that is not the program's: its exit code, and the line on stderr."""

    exit_code: int
    line: str


def explain(error: BaseException) -> Explanation | None:
    """The explanation of an error that is not the program's; None for a defect, which needs its traceback."""
    if isinstance(error, UsageError):
        return Explanation(error.exit_code, f"error: {error}")
    if isinstance(error, KeyboardInterrupt):
        return Explanation(INTERRUPTED, "interrupted")
    if isinstance(error, OSError) and error.errno in ENVIRONMENT_ERRORS:
        return Explanation(2, f"error: {error.strerror}: {error.filename or 'while writing'}")
    return None


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Run a script's main function; a user's error becomes one line on stderr and exit code 2, a diverged run 3."""
    try:
        sys.exit(main() or 0)
    except (Exception, KeyboardInterrupt) as error:
        if (reason := explain(error)) is None:
            raise
        print(reason.line, file=sys.stderr)
        sys.exit(reason.exit_code)


def group_title(group: type) -> str:
    """What a dataclass of options is called in `--help`."""
    return (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")


def _written(value: Any) -> str:
    """A value as an arguments file takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return shlex.quote(" ".join(map(str, value)) if isinstance(value, tuple) else str(value))
