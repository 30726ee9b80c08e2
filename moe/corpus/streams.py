"""Data sets by name, and which kind of source a name or a path is.

Large ones are streamed from the Hugging Face hub by the `datasets` library, an extra; a local folder of .parquet files
goes the same way.
"""

import hashlib
import json
import logging
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock

from moe.config import DataConfig
from moe.corpus.sources import (
    BLOCK,
    START,
    UNIT,
    Advance,
    Files,
    Position,
    Source,
    SourceError,
    Unit,
    Unreachable,
    find_files,
    fingerprint,
    text_of,
)
from moe.machine.files import neighbours, sync
from moe.machine.nearest import did_you_mean

T = TypeVar("T")
DOWNLOADS = Path("out/data/downloads")
HELD_OUT = 10_000_000  # bytes of a stream without a validation split of its own that become one, at most
PUBLISHED_AS = {"val": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class DataSet:
    kind: Literal["bundled", "zip", "hub"]
    home: str  # a path in this repository, an address, or a name on the hub
    licence: str
    size: str
    config: str | None = None
    sha256: str = ""  # of the unpacked text


DATA_SETS = {
    "tinyshakespeare": DataSet("bundled", "data/tinyshakespeare/input.txt", "public domain", "1.1 MB"),
    "enwik8": DataSet(
        "zip",
        "http://mattmahoney.net/dc/enwik8.zip",
        "GFDL",
        "100 MB; canonical with --val-fraction 0.05 --test-fraction 0.05",
        sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    ),
    "tinystories": DataSet("hub", "roneneldan/TinyStories", "CDLA-Sharing-1.0", "1.9 GB"),
    "fineweb-edu": DataSet("hub", "HuggingFaceFW/fineweb-edu", "ODC-By 1.0", "about 45 GB", config="sample-10BT"),
}


def open_source(config: DataConfig, advance: Advance) -> Source:
    """Find a text by its path or a data set by its name. Raises SourceError."""
    known, path = DATA_SETS.get(config.source), Path(config.source)
    if known and known.kind == "hub":
        return Stream(known.home, known.config, config)
    if known and known.kind == "bundled":
        path = Path(__file__).resolve().parent.parent.parent / known.home
    elif known:
        path = download(config.source, known, advance)
    elif not path.exists():
        nearest = did_you_mean(config.source, [*DATA_SETS, *neighbours(path)])
        advice = f"{nearest} Data sets" if nearest else "data sets"
        raise SourceError(f"{path}: no such file or folder: {advice} known by name are {', '.join(DATA_SETS)}")
    files = [(file, file.stat().st_size) for file in find_files(path)]
    if any(file.suffix == ".parquet" for file, _ in files):
        size, sha256 = sum(size for _, size in files), fingerprint(path, files, advance)
        return Stream(str(path.resolve()), None, config, size, sha256)
    return Files(path, config, advance)


def at_hand(source: str) -> bool:
    """Whether a text can be opened without a network."""
    known = DATA_SETS.get(source)
    if known is None:
        return Path(source).exists()
    return known.kind == "bundled" or (known.kind != "hub" and (DOWNLOADS / source).exists())


def download(name: str, known: DataSet, advance: Advance) -> Path:
    """A zipped text from its address, unpacked and checked; kept for the next time."""
    path = DOWNLOADS / name
    packed, passing = path.with_name(f".{name}.zip"), path.with_name(f".{name}")
    try:
        DOWNLOADS.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{name}.lock")):
            if not path.exists():
                try:
                    fetch(known.home, packed, advance)
                    if unpack(packed, name, passing) != known.sha256:
                        message = f"{known.home} is not {name}, its sha256 differs: pass a local file with --data PATH"
                        raise SourceError(message)
                    sync(passing)
                    passing.rename(path)
                finally:
                    packed.unlink(missing_ok=True)
                    passing.unlink(missing_ok=True)
    except (OSError, HTTPException, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        message = f"{known.home} could not be downloaded ({error}): pass a local file of {name} with --data PATH"
        raise Unreachable(message) from None
    return path


def fetch(address: str, path: Path, advance: Advance) -> None:
    with urllib.request.urlopen(address, timeout=60) as answer, open(path, "wb") as file:
        total = int(answer.headers.get("Content-Length") or 0)
        while block := answer.read(BLOCK):
            file.write(block)
            advance("downloading", file.tell(), total)


def unpack(packed: Path, name: str, path: Path) -> str:
    """One file of an archive, block by block; its sha256."""
    sha256 = hashlib.sha256()
    with zipfile.ZipFile(packed) as archive, archive.open(name) as text, open(path, "wb") as file:
        while block := text.read(BLOCK):
            file.write(block)
            sha256.update(block)
    return sha256.hexdigest()


class Stream:
    """Documents in the order in which the `datasets` library streams them.

    A published validation or test split is used as such. Without one, validation is the first documents of the training
    split: val_fraction of the text, but no more than HELD_OUT bytes.
    """

    def __init__(self, home: str, name: str | None, config: DataConfig, packed: int = 0, sha256: str = "") -> None:
        """A name on the hub and that of a configuration there; or a local folder, its size and sha256."""
        self.home, self.name, self.config, self.packed, self.local = home, name, config, packed, bool(sha256)
        self.total, self.train = config.max_bytes, 0
        known = [sha256 or home, name, config.max_bytes]
        self.identity = hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def units(self, position: Position = START) -> Iterator[Unit]:
        builder = self._attempt(lambda: load_builder(self.home, self.name, position.get("revision")))
        streams = self._attempt(builder.as_streaming_dataset)
        published = (builder.info.splits or {}).values()
        self.total = self.config.max_bytes or sum(split.num_bytes or 0 for split in published)
        where: Position = {
            "pass": 0,
            "taken": 0,
            "state": None,
            "revision": None if self.packed else builder.hash,
        } | position
        passes = self._passes(list(streams))
        for number, (split, name, limit) in enumerate(passes):
            if number < where["pass"]:
                continue
            if number > where["pass"]:
                same = name == passes[number - 1][1]
                where |= {"pass": number, "taken": 0, "state": where["state"] if same else None}
            stream = streams[name]
            if self.config.field in (stream.features or {}):
                stream = stream.select_columns([self.config.field])
            if where["state"]:
                self._attempt(partial(stream.load_state_dict, where["state"]))
            documents = iter(stream)
            while not limit or where["taken"] < limit:
                texts, size = self._gather(documents, min(UNIT, limit - where["taken"]) if limit else UNIT)
                if not size:
                    break
                where |= {"units": where["units"] + 1, "bytes": where["bytes"] + size, "taken": where["taken"] + size}
                where |= {"state": stream.state_dict()}
                yield Unit(split, True, partial(list, texts), dict(where))

    def _passes(self, published: list[str]) -> list[tuple[str, str, int]]:
        """Split, published split that it comes from, and how many bytes of it (0: all), in order."""
        if "train" not in published:
            raise SourceError(f"{self.home}: has no split named train; its splits are {', '.join(published)}")
        most, size = self.config.max_bytes, self.config.max_bytes or self.packed  # packed: less than the text
        shares = {"val": self.config.val_fraction, "test": self.config.test_fraction}
        before, after = [], []
        for split, share in shares.items():
            name = next((name for name in PUBLISHED_AS[split] if name in published), None)
            limit = max(int(share * size), 1)
            if name and (share or not most):
                after.append((split, name, limit if most else 0))
            elif share:
                before.append((split, "train", min(limit, HELD_OUT) if size else HELD_OUT))
        train = max(int(most * (1 - sum(shares.values()))), 1) if most else 0
        return [*before, ("train", "train", train), *after]

    def _gather(self, documents: Iterator[dict[str, Any]], enough: int) -> tuple[list[str], int]:
        """Whole documents until there are enough bytes."""
        texts, size = [], 0
        while size < enough and (document := self._attempt(lambda: next(documents, None))) is not None:
            try:
                text = text_of(document, self.config.field)
            except ValueError as error:
                raise SourceError(f"{self.home}: {error}") from None
            if text:
                texts.append(text)
                size += len(text.encode())
        return texts, size

    def _attempt(self, action: Callable[[], T]) -> T:
        """Whatever goes wrong inside the library, or on the way to the hub, in one line."""
        try:
            return action()
        except SourceError:
            raise
        except Exception as error:
            what = f"{self.home}: cannot be read ({type(error).__name__}: {first_line(error)})"
            advice = (
                ": with a network, the same command goes on where it stopped; without one, give a local copy of its "
                ".parquet files as --data FOLDER"
            )
            raise Unreachable(what + advice * (not self.local)) from None


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def load_builder(home: str, name: str | None, revision: str | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise Unreachable(f"{home}: needs the datasets library: pip install datasets") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells every attempt to reach the hub
    if Path(home).is_file():
        return datasets.load_dataset_builder("parquet", data_files=home)
    return datasets.load_dataset_builder(home, name, revision=revision)
