"""Help pages for people: what a command does, its flags with their defaults, and examples, as wide as the terminal.

Plain text without colours or frames, so that it reads the same in a pipe, a pager, and a bug report.
"""

import inspect
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

from moe.machine.flags import Flag

HELP = ("-h", "--help", "--help-all")
NARROWEST, WIDEST, LEFT = 60, 100, 30  # columns of a page, and of what stands before the explanations
KEPT = "\N{NO-BREAK SPACE}"  # where no line may end
Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Manual:
    """What a help page says beside its flags.

    text: what the command does; its lines that begin with "python" are examples, two spaces before what each is for.
    groups: the everyday flags under their titles; further ones whose names have no dot come last. lists: further rows,
    by their titles.
    """

    usage: str
    text: str
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lists: Mapping[str, Rows] = field(default_factory=dict)

    def page(self, flags: Sequence[Flag], everything: bool = False) -> str:
        width = min(max(shutil.get_terminal_size((80, 24)).columns, NARROWEST), WIDEST)
        lines = self.text.strip().splitlines()
        examples = [example(line) for line in lines if line.startswith("python ")]
        about = "\n".join(line for line in lines if not line.startswith("python ")).split("\n\n")
        placed = [flag for flag in flags if flag.placed]
        usage = ["usage:", self.usage, *map(place, placed), "[--FLAG VALUE ...]" if len(flags) > len(placed) else ""]
        parts = [wrapped(" ".join(usage), width)]
        parts += [wrapped(paragraph, width) for paragraph in about if paragraph.strip()]
        parts += self.everyday(flags, width)
        parts += self.all_fields(flags, width) if everything else self.pointers(flags, width)
        parts += [titled(title, rows, width, min(LEFT, widest(rows) + 4)) for title, rows in self.lists.items()]
        if examples:
            parts.append(titled("Examples", examples, width, room_beside(examples, width)))
        return "\n\n".join(parts)

    def everyday(self, flags: Sequence[Flag], width: int) -> list[str]:
        """Those without a dot in their first name, in their groups."""
        known = {flag.names[0]: flag for flag in flags if flag.placed or "." not in flag.names[0]}
        groups = {title: [known.pop(name) for name in names if name in known] for title, names in self.groups.items()}
        groups["More" if groups else "Flags"] = list(known.values())
        return [titled(title, [row(flag) for flag in group], width) for title, group in groups.items() if group]

    def pointers(self, flags: Sequence[Flag], width: int) -> list[str]:
        """Where the rest is to be found, if there is a rest."""
        rows = {f"--{flag.section}.FIELD": flag.about for flag in flags if flag.section}
        count = sum(bool(flag.section) for flag in flags)
        title = f"Any other field by its dotted name ({self.usage} --help-all shows all {count})"
        return [titled(title, list(rows.items()), width)] if rows else []

    def all_fields(self, flags: Sequence[Flag], width: int) -> list[str]:
        """The dotted flags by section and heading."""
        found: dict[tuple[str, str], dict[str, list[tuple[str, str]]]] = {}
        for flag in flags:
            if flag.section:
                headings = found.setdefault((flag.section, flag.about), {})
                headings.setdefault(flag.heading, []).append(row(flag, dotted=True))
        parts = []
        for (section, about), headings in found.items():
            parts.append(wrapped(f"--{section}.FIELD: {about}", width))
            parts += [titled(heading, rows, width) for heading, rows in headings.items()]
        return parts


def example(line: str) -> tuple[str, str]:
    command, _, purpose = line.partition("  ")
    return command, purpose.strip()


def row(flag: Flag, dotted: bool = False) -> tuple[str, str]:
    """A flag, and what there is to say of it."""
    if flag.placed:
        return flag.metavar, explained(flag)
    names = sorted(flag.names, key=lambda name: "." not in name) if dotted else flag.names
    shown = ", ".join(names if dotted else (name for name in names if "." not in name))
    return f"{shown} {flag.value}".rstrip(), explained(flag)


def explained(flag: Flag) -> str:
    """What a flag means, and its default; where that is nothing, the meaning says what happens instead."""
    default = flag.default
    if default is True:
        return f"{flag.text} (default: on; {flag.opposite})".strip()
    if default is None or default is MISSING or default is False or default in ("", ()):
        return flag.text
    values = default if isinstance(default, tuple) else (default,)
    shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return f"{flag.text} (default:{KEPT}{shown})".strip()


def place(flag: Flag) -> str:
    return flag.metavar if flag.default is MISSING else f"[{flag.metavar}]"


def titled(title: str, rows: Rows, width: int, left: int = LEFT) -> str:
    return "\n".join(filter(None, (wrapped(title, width), two_columns(rows, width, left))))


def two_columns(rows: Rows, width: int, left: int = LEFT) -> str:
    """Each name with its text beside it; below it where there is no room."""
    lines: list[str] = []
    left = min(left, 2 * width // 5) if left == LEFT else left
    for name, text in rows:
        beside = len(name) + 4 <= left
        first = f"  {name}".ljust(left) if beside else " " * left
        lines += [] if beside else [f"  {name}"]
        lines += [wrapped(text, width, " " * left, first)] if text else [first.rstrip()] * beside
    return "\n".join(lines)


def widest(rows: Rows) -> int:
    return max(len(name) for name, _ in rows)


def room_beside(rows: Rows, width: int) -> int:
    """The columns for names beside which every text is a single line; a few where there are none such."""
    left = widest(rows) + 4
    return left if left + max(len(text) for _, text in rows) < width else 6


def wrapped(text: str, width: int, indent: str = "", first: str | None = None) -> str:
    """A paragraph in lines of so many columns, the first one behind `first`."""
    start = indent if first is None else first
    fill = {"break_long_words": False, "break_on_hyphens": False}
    text = re.sub(r"[ \n]+", " ", text).strip(" ")
    lines = textwrap.fill(text, width - 1, initial_indent=start, subsequent_indent=indent, **fill)  # type: ignore[arg-type]
    return lines.replace(KEPT, " ")


def about(what: Any) -> str:
    """What a command does, before its arguments: its docstring's first part, or the commands within it."""
    if isinstance(what, Mapping):
        return f"one of {', '.join(what)}"
    return (inspect.getdoc(what) or "").partition("\n\nArgs:\n")[0]


def help_if_asked(arguments: Sequence[str], manual: Manual, flags: Sequence[Flag]) -> None:
    """Print the page that is asked for, and end the program there."""
    if asked := [argument for argument in arguments if argument in HELP]:
        print(manual.page(flags, everything="--help-all" in asked))
        raise SystemExit(0)


def without_help(arguments: Sequence[str]) -> list[str]:
    return [argument for argument in arguments if argument not in HELP]
