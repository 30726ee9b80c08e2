"""What the command lines share: help, commands within a command, and an error as one line."""

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch

from moe.config import MoeError
from moe.machine.flags import UsageError, build, checked, flags_of
from moe.machine.help import HELP, Manual, about, help_if_asked
from moe.machine.nearest import instead_of

Commands = Mapping[str, Any]  # functions and dataclasses to be filled in and run, or further commands, by their names


def print_anything() -> None:
    """What standard output's encoding cannot hold, a path's byte or a sample's letter, is replaced and ends nothing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def read_arguments(what: Callable[..., Any], manual: Manual, arguments: Sequence[str]) -> Any:
    """What the command line describes, or the help page that it asks for. Raises UsageError."""
    flags = flags_of(what)
    help_if_asked(arguments, manual, flags)
    return build(what, checked(arguments, flags, manual.usage))


def run_commands(prog: str, commands: Commands, description: str | None = None) -> int:
    """Run the one that the command line names; the exit status."""
    print_anything()
    try:
        find_command(prog, commands, description or "", sys.argv[1:])()
    except (MoeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print("error: out of memory: take less at a time, a smaller model, or --dtype bfloat16", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def find_command(prog: str, commands: Commands, text: str, arguments: Sequence[str]) -> Callable[[], Any]:
    """What is to be run, its arguments filled in. Raises UsageError."""
    name, *rest = arguments or [""]
    if name in HELP:
        rows = [(each, about(what)) for each, what in commands.items()]
        help_if_asked([name], Manual(f"{prog} COMMAND", text, lists={f"Commands ({prog} COMMAND --help)": rows}), [])
    if not name:
        raise UsageError(f"which command? There are {', '.join(commands)}; {prog} --help says what they do")
    if name not in commands:
        raise UsageError(f"command {name} is not known: {instead_of(name, commands)}")
    what, prog = commands[name], f"{prog} {name}"
    if isinstance(what, Mapping):
        return find_command(prog, what, "", rest)
    filled = read_arguments(deferred(what), Manual(prog, about(what)), rest)
    return filled if callable(filled) else filled.main


def deferred(what: Callable[..., Any]) -> Callable[..., Any]:
    """A function that takes its arguments and is called later; a dataclass is that by itself."""
    if isinstance(what, type):
        return what

    @wraps(what)
    def take(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return partial(what, *args, **kwargs)

    return take


def out_of_memory(error: Exception) -> bool:
    """Of a GPU, of Python, or of PyTorch where it has no class of its own."""
    unnamed = ("DefaultCPUAllocator", "MPS backend out of memory", "bad_alloc")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(name in str(error) for name in unnamed)
