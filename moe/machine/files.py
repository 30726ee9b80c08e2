"""Files that are whole or not there: written beside, synced, renamed."""

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file in one step: the old content or the new one, never a part. Raises OSError naming the file."""
    passing = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(passing, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(passing, path)
        sync_folder(path.parent)
    except OSError as error:
        passing.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def neighbours(path: Path) -> list[str]:
    """What lies where something is sought and not found, as paths that can be given instead."""
    with suppress(OSError, ValueError):
        return [str(path.with_name(other.name)) for other in path.parent.iterdir() if not other.name.startswith(".")]
    return []


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        sync(path)
