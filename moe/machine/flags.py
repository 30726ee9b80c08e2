"""The flags of a command line, read off the dataclass or function that they fill in, and checked before it is built.

What a flag means is said once, where it is declared: by the comment behind a field, or under "Args:" in a function's
docstring. A comment of its own above a field, behind an empty line, is the heading of that field and those after it.
"""

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from moe.config import MoeError
from moe.machine.nearest import did_you_mean, instead_of

POSITIONAL = typing.get_args(tyro.conf.Positional[str])[1]
APPENDED = typing.get_args(tyro.conf.UseAppendAction[tuple[str, ...]])[1]
KINDS = {int: ("N", "a whole number"), float: ("X", "a number"), str: ("TEXT", "a text"), Path: ("PATH", "a path")}


class UsageError(MoeError):
    """A command line that says nothing known."""


@dataclass(frozen=True)
class Flag:
    """One flag, or one argument that is told by its place."""

    names: tuple[str, ...]  # what may be written, the shortest to remember first
    options: tuple[Any, ...]  # the types it may have, or values
    default: Any  # MISSING where it must be given
    text: str
    section: str = ""  # the dataclass it belongs to, by its prefix
    about: str = ""  # and what that is
    heading: str = ""  # within it
    placed: bool = False
    many: bool = False  # values
    metavar: str = ""

    @property
    def switch(self) -> bool:
        return self.options == (bool,)

    @property
    def choices(self) -> list[str]:
        literal = (typing.get_args(option) for option in self.options if typing.get_origin(option) is Literal)
        return [str(value) for values in literal for value in values]

    @property
    def opposite(self) -> str:
        """What turns a switch off: --model.no-x for --model.x."""
        path, _, last = self.names[-1].removeprefix("--").rpartition(".")
        return f"--{path}.no-{last}" if path else f"--no-{last}"

    @property
    def value(self) -> str:
        """What stands for its value on a help page."""
        kinds = [KINDS[kind][0] for kind in self.options if kind in KINDS]
        return self.metavar or "|".join(kinds + self.choices) + " ..." * self.many

    def check(self, value: str) -> None:
        """Raises UsageError for a value that this flag cannot have."""
        kinds = [kind for kind in self.options if kind in KINDS]
        if value in self.choices or any(fits(kind, value) for kind in kinds):
            return
        if not kinds:
            raise UsageError(f"{self.names[0]} {value} is not known: {instead_of(value, self.choices)}")
        wanted = [KINDS[kind][1] for kind in kinds] + self.choices
        raise UsageError(f"{self.names[0]} {value}: give {' or '.join(wanted)}")


def fits(kind: type, value: str) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True


def flags_of(what: Any, default: Any = None) -> list[Flag]:
    """The flags of a dataclass, with the defaults of an instance if there is one, or those of a function."""
    if dataclasses.is_dataclass(what):
        return list(fields_of(what, default))
    said, hints = arguments_said(inspect.getdoc(what) or ""), typing.get_type_hints(what, include_extras=True)
    found = []
    for name, parameter in inspect.signature(what).parameters.items():
        unset = parameter.default is inspect.Parameter.empty
        found.append(flag(name, hints[name], MISSING if unset else parameter.default, said.get(name, "")))
    return found


def fields_of(kind: Any, default: Any, prefix: str = "") -> Iterator[Flag]:
    hints, said = typing.get_type_hints(kind, include_extras=True), comments(kind)
    section, about = prefix.removesuffix(".").replace("_", "-"), first_sentence(inspect.getdoc(kind) or "")
    for item in dataclasses.fields(kind):
        hint, marks = unwrapped(hints[item.name])
        value = getattr(default, item.name, preset_value(item))
        if dataclasses.is_dataclass(hint):
            merged = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from fields_of(hint, value, "" if merged else f"{prefix}{item.name}.")
        else:
            heading, text = said.get(item.name, ("", ""))
            found = flag(prefix + item.name, hints[item.name], value, text)
            yield dataclasses.replace(found, section=section, about=about, heading=heading)


def preset_value(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def first_sentence(docstring: str) -> str:
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(docstring.split()))[0]


def flag(name: str, hint: Any, default: Any, text: str) -> Flag:
    hint, marks = unwrapped(hint)
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = tuple(option for option in typing.get_args(hint) if option is not type(None)) if union else (hint,)
    several = typing.get_origin(hint) is tuple
    options = typing.get_args(hint)[:1] if several else options
    many = several and APPENDED not in marks  # what is appended is given one at a time
    aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
    metavar = next((mark.metavar for mark in marks if getattr(mark, "metavar", None)), "")
    if POSITIONAL in marks:
        return Flag((name,), options, default, text, placed=True, many=many, metavar=metavar or name.upper())
    return Flag((*aliases, "--" + name.replace("_", "-")), options, default, text, many=many, metavar=metavar)


def unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its annotations, and those."""
    if typing.get_origin(hint) is not Annotated:
        return hint, ()
    bare, *marks = typing.get_args(hint)
    inner, further = unwrapped(bare)
    return inner, (*marks, *further)


@cache
def comments(kind: type) -> dict[str, tuple[str, str]]:
    """(heading, text) of every field of a dataclass."""
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except OSError:  # a program without its sources still runs
        return {}
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    said = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found: dict[str, tuple[str, str]] = {}
    heading = ""
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno - 1  # the line above, counted from 1
            above = first
            while lines[above - 1].strip().startswith("#"):
                above -= 1
            if not lines[above - 1].strip() or not found:
                heading = " ".join(said[line] for line in range(above + 1, first + 1))
            behind = [said[line] for line in range(node.lineno, (node.end_lineno or node.lineno) + 1) if line in said]
            found[node.target.id] = heading, " ".join(behind)
    return found


def arguments_said(docstring: str) -> dict[str, str]:
    """What stands under "Args:", by name."""
    _, _, part = docstring.partition("\nArgs:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", part, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def checked(arguments: Sequence[str], flags: Sequence[Flag], usage: str) -> list[str]:
    """The arguments, each flag in its own spelling and joined to its value. Raises UsageError in the words of what was
    given: a flag that is not known, a value that it cannot have, too many or too few."""
    known = {name: flag for flag in flags if not flag.placed for name in flag.names}
    known |= {flag.opposite: flag for flag in known.values() if flag.switch}
    out, placed, left = [], [], list(arguments)
    while left:
        given = left.pop(0)
        name, equals, value = spelled(given).partition("=")
        if not is_flag(given):
            placed.append(given)
        elif name not in known:
            meant = did_you_mean(name, known) or f"{usage} --help lists what is"
            raise UsageError(f"{name} is not known: {meant}")
        elif known[name].switch:
            if equals:
                raise UsageError(f"{name} takes no value, but is given {value!r}")
            out.append(name)
        elif known[name].many and not equals:
            values = [left.pop(0) for _ in range(until_flag(left))]
            for each in values:
                known[name].check(each)
            out += [name, *values]
        else:
            if not equals and (not left or spelled(left[0]).partition("=")[0] in known):
                raise UsageError(f"{name} needs a value: {name} {known[name].value}")
            value = value if equals else left.pop(0)
            known[name].check(value)
            out.append(f"{name}={value}")
    return [*check_placed(placed, [flag for flag in flags if flag.placed], usage), *out]


def check_placed(given: list[str], wanted: list[Flag], usage: str) -> list[str]:
    if len(given) > len(wanted) and not any(flag.many for flag in wanted):
        raise UsageError(f"{given[len(wanted)]!r} is one argument too many: {usage} --help says what may be given")
    if missing := [flag.metavar for flag in wanted[len(given) :] if flag.default is MISSING]:
        whole = " ".join([usage, *(flag.metavar for flag in wanted)])
        raise UsageError(f"{' and '.join(missing)} must be given: {whole}")
    return given


def is_flag(argument: str) -> bool:
    return argument.startswith("-") and argument != "-" and not fits(float, argument)


def until_flag(arguments: list[str]) -> int:
    return next((at for at, argument in enumerate(arguments) if is_flag(argument)), len(arguments))


def spelled(argument: str) -> str:
    """--init_from=a_b is --init-from=a_b."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def build(what: Callable[..., Any], arguments: Sequence[str], default: Any = None) -> Any:
    """What the arguments describe. Raises UsageError for what tyro, in words of its own, refuses."""
    said, start = io.StringIO(), {} if default is None else {"default": default}
    with redirect_stdout(said), redirect_stderr(said):
        try:
            return tyro.cli(what, args=list(arguments), **start)
        except SystemExit:
            words = re.sub(r"[^\S ]|[\u2500-\u257f]", " ", said.getvalue()).split()
            raise UsageError(" ".join(words)) from None
