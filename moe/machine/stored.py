"""A checkpoint on the disk: a folder that is whole or does not exist.

It is written beside the others under a passing name; its files are synced, then the manifest with their sizes and
sha256, then the folder is renamed. One without a manifest does not exist. Nothing is pickled.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moe.config import MoeError
from moe.machine.files import sync, sync_folder, write_whole

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
PLAIN_NAME = re.compile(r"\w+\.(json|safetensors)")  # no path: nothing that could lead out of the folder
PASSING = re.compile(r"\.\d{8,}\.\d+(\.old)?")  # the names of a checkpoint that is not there yet, or no longer
PASSING_FILE = re.compile(r"\.(config\.json|tokenizer\.json|metrics\.jsonl)\.\d+")  # and those of write_whole


class CheckpointError(MoeError):
    """A run's folder that cannot be read, written or continued."""


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checkpoint(
    path: Path, model: Mapping[str, Tensor], optimizer: Iterable[tuple[str, Tensor]] | None, state: dict[str, Any]
) -> None:
    """Write a checkpoint. optimizer: None for a model that was not trained here. Raises OSError or SafetensorError; the
    checkpoints that were there are untouched then."""
    if (path / MANIFEST).exists():
        raise FileExistsError(errno.EEXIST, "there is one already", str(path))
    passing = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        passing.mkdir(parents=True)
        save_file(dict(model), passing / MODEL)
        if optimizer is not None:
            save_file(dict(optimizer), passing / OPTIMIZER)
        (passing / STATE).write_text(json.dumps(state), "utf-8")
        files = {}
        for file in sorted(passing.iterdir()):
            sync(file)
            files[file.name] = {"size": file.stat().st_size, "sha256": sha256_of(file)}
        write_whole(passing / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1).encode())
        shutil.rmtree(path, ignore_errors=True)  # what has no manifest is none
        passing.rename(path)
        sync_folder(path.parent)
        sync_folder(path.parent.parent)
    except (OSError, SafetensorError):
        shutil.rmtree(passing, ignore_errors=True)
        raise


def remove_leftovers(run: Path) -> None:
    """Those of a process that was killed while it wrote or removed something in this run's folder."""
    for path in (run / "checkpoints").glob(".*"):
        if PASSING.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    for path in run.glob(".*"):
        if PASSING_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def remove_checkpoint(path: Path) -> None:
    """Its name first, so that half a checkpoint neither counts as one nor stays."""
    if path.exists():
        passing = path.rename(path.with_name(f".{path.name}.{os.getpid()}.old"))
        sync_folder(path.parent)
        shutil.rmtree(passing)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Size and sha256 of each file, by its name."""
    try:
        return dict(json.loads((checkpoint / MANIFEST).read_text("utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST}: {error}") from None


def verify(checkpoint: Path) -> None:
    """Raises CheckpointError unless every file is what the manifest says, model and state among them."""
    files = read_manifest(checkpoint)
    try:
        for name in sorted({MODEL, STATE, *files}):
            if not PLAIN_NAME.fullmatch(name):
                raise CheckpointError(f"{checkpoint / MANIFEST} names {name!r}, which is no file of a checkpoint")
            path, expected = checkpoint / name, files[name]
            if path.stat().st_size != expected["size"] or sha256_of(path) != expected["sha256"]:
                raise CheckpointError(
                    f"{path} is damaged, its size or sha256 is not the manifest's: remove the folder to use an older"
                )
    except (OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None
