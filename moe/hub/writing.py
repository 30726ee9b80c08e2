"""Hugging Face folders, written whole or not at all, and one shard at a time.

What is written lies beside the folder under a passing name until all of it is on the disk.
"""

import glob
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moe.hub.folder import CONFIG, INDEX, SINGLE, HubError
from moe.machine.files import sync, sync_folder


class Planned(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    path: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    files: Mapping[str, bytes | Callable[[Path], object]],
    shard_bytes: int,
) -> None:
    """Write a model so that the folder is there whole or not at all.

    tensors: name, dtype to store and shape of each, in the order of the shards.
    read: makes one of them; called once for each, in that order; its result is cast to the dtype and copied.
    files: what else belongs there: a file's content by its name, or a function that writes into the folder it is given.
    shard_bytes: where the next shard begins; a larger tensor gets one of its own. Memory holds one shard.

    Raises HubError if `path` is there already, before any work, and if it cannot be written, as which an OSError of
    `read` and of the functions counts. What else they raise passes through. Nothing is left behind in any case.
    """
    with whole_or_nothing(path) as passing:
        write_files(passing, {CONFIG: json.dumps(config, indent=2).encode(), **files})
        write_weights(passing, [Planned(*tensor) for tensor in tensors], read, shard_bytes)


@contextmanager
def whole_or_nothing(path: Path) -> Iterator[Path]:
    """A folder to fill beside `path`; synced and renamed at the end, removed by a failure. Raises HubError."""
    path = path.absolute()
    passing = path.with_name(f".{path.name}.{os.getpid()}")
    new_parents = [parent for parent in path.parents if not os.path.exists(parent)]
    try:
        refuse_existing(path)
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
            if not is_running(leftover.suffix[1:]):
                shutil.rmtree(leftover, ignore_errors=True)
        passing.mkdir(parents=True)
        yield passing
        sync_all(passing)
        if path.exists():  # empty, and perhaps somebody's current folder: filled, not replaced
            for file in sorted(passing.iterdir(), key=lambda file: file.name == CONFIG):
                file.rename(path / file.name)
            sync_folder(path)
        else:
            passing.rename(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise HubError(f"{path} could not be written: {error}; nothing is left of it") from None
    finally:
        shutil.rmtree(passing, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):
                parent.rmdir()  # unless it holds the folder


def is_running(number: str) -> bool:
    """Whether what lies under this number may be somebody's work still. Our own number is of a process before us."""
    if not number.isdecimal() or os.name != "posix":
        return True
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return int(number) != os.getpid()


def refuse_existing(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()) or (path.is_dir() and any(path.iterdir())):
        raise HubError(f"{path} is there already and not an empty folder: choose another")


def write_files(folder: Path, files: Mapping[str, bytes | Callable[[Path], object]]) -> None:
    for name, content in files.items():
        if callable(content):
            content(folder)
        else:
            (folder / name).write_bytes(content)


def write_weights(folder: Path, tensors: list[Planned], read: Callable[[str], Tensor], shard_bytes: int) -> None:
    shards = into_shards(tensors, shard_bytes)
    if len(shards) == 1:
        write_shard(folder / SINGLE, shards[0], read)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(file, shard, read)
        weight_map |= {tensor.name: file.name for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.size for tensor in tensors)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), "utf-8")


def into_shards(tensors: list[Planned], shard_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    return shards


def write_shard(file: Path, tensors: list[Planned], read: Callable[[str], Tensor]) -> None:
    save_file({tensor.name: made(tensor, read(tensor.name)) for tensor in tensors}, file, metadata={"format": "pt"})


def made(planned: Planned, tensor: Tensor) -> Tensor:
    """A copy in the planned dtype: safetensors takes no tensors that share memory, as tied weights do, or have gaps."""
    if tensor.shape != planned.shape:
        raise HubError(f"{planned.name} came out as {tuple(tensor.shape)} instead of {planned.shape}")
    return torch.empty(planned.shape, dtype=planned.dtype).copy_(tensor.detach())


def sync_all(folder: Path) -> None:
    """A folder and all that is in it; as readable as its configuration, where safetensors makes files private."""
    for path in folder.rglob("*"):
        shutil.copymode(folder / CONFIG, path)
        if path.is_dir():
            sync_folder(path)
        else:
            sync(path)
    sync_folder(folder)
