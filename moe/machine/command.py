"""What the wings' command lines share: subcommands, and an error as one line."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import tyro

from moe.config import MoeError


def run_commands(prog: str, commands: Mapping[str, Callable[..., Any]], description: str | None = None) -> int:
    """Run the one that the command line names; the exit status."""
    lines = "\n\n".join(filter(None, (description or "").splitlines()))  # tyro joins those without a line between
    config = (tyro.conf.FlagCreatePairsOff,)
    try:
        tyro.extras.subcommand_cli_from_dict(dict(commands), prog=prog, description=lines or None, config=config)
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


def out_of_memory(error: Exception) -> bool:
    """Of a GPU, of Python, or of PyTorch where it has no class of its own."""
    unnamed = ("DefaultCPUAllocator", "MPS backend out of memory", "bad_alloc")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(name in str(error) for name in unnamed)
