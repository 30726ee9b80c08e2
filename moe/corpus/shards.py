"""The prepared folder: its format, how it is opened and checked, how shards are written.

A prepared folder holds `tokenizer.json`, shards `train-00000.bin`, `val-00000.bin`, ..., `plan.json`, which says what
they were made from, and `corpus.json`, written last. A shard is a header of HEADER bytes (JSON, padded with spaces) and
then its ids, uint16 or uint32, little-endian.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moe.config import ConfigError, MoeError, require
from moe.corpus.sources import SPLITS, START, Position
from moe.machine.files import sync_folder
from moe.machine.parsing import from_dict
from moe.tokenizer import Tokenizer

FORMAT = 2
HEADER = 4096
PLAIN_NAME = re.compile(r"\w+-\d+\.bin")  # no path: nothing that could lead out of the folder


class CorpusError(MoeError):
    """A prepared folder that cannot be made or used."""


@dataclass(frozen=True)
class ShardHeader:
    format: int
    dtype: str
    tokens: int
    characters: int
    bytes: int
    tokenizer: str  # its hash
    sha256: str  # of the ids
    position: dict  # in the source, behind this shard

    def __post_init__(self) -> None:
        place = [self.position.get(name) for name in START]
        place += [self.position.get(name, 0) for name in ("pass", "taken")]  # of a stream's
        for count in (self.tokens, self.characters, self.bytes, *place):
            require(type(count) is int and 0 <= count < 2**60, f"{count!r} counts nothing")
        require(self.tokens == 0 or self.characters > 0, f"characters = {self.characters} of {self.tokens} tokens")


Shards = list[tuple[Path, ShardHeader]]


@dataclass(frozen=True)
class Corpus:
    """A prepared folder, opened and checked."""

    folder: Path
    tokenizer: Tokenizer
    shards: dict[str, Shards]  # of "train", "val" and "test"

    @property
    def hash(self) -> str:
        """Of all ids, split by split."""
        listed = {split: [header.sha256 for _, header in shards] for split, shards in self.shards.items()}
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def characters(self, split: str) -> int:
        return sum(header.characters for _, header in self.shards[split])

    def bytes(self, split: str) -> int:
        return sum(header.bytes for _, header in self.shards[split])

    def tokens(self, split: str) -> int:
        return sum(header.tokens for _, header in self.shards[split])


def open_corpus(folder: Path) -> Corpus:
    """Open a prepared folder. Raises CorpusError where headers, sizes, sha256 or the tokenizer's hashes disagree."""
    try:
        listing = json.loads((folder / "corpus.json").read_text("utf-8"))
        names = {split: [str(name) for name in listing["shards"][split]] for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        message = f"{folder}: not a prepared folder ({type(error).__name__}: {error}): make one with data/prepare.py"
        raise CorpusError(message) from None
    if strange := [name for split in SPLITS for name in names[split] if not PLAIN_NAME.fullmatch(name)]:
        raise CorpusError(f"{folder / 'corpus.json'} names {strange[0]!r}, which is no shard: prepare the text again")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    shards = {split: [(folder / name, read_header(folder / name)) for name in names[split]] for split in SPLITS}
    for path, header in (shard for split in SPLITS for shard in shards[split]):
        if header.tokenizer != tokenizer.hash:
            raise CorpusError(f"{path}: was made with another tokenizer than the folder's: prepare the text again")
        if header.sha256 != sha256_of_ids(path):
            raise CorpusError(f"{path}: is damaged, its sha256 is not the header's: prepare the text again")
    if not sum(header.tokens for _, header in shards["train"]):
        raise CorpusError(f"{folder}: there is no text to train on: prepare it again")
    return Corpus(folder, tokenizer, shards)


def sha256_of_ids(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(HEADER)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror}") from None


def read_header(path: Path) -> ShardHeader:
    try:
        with open(path, "rb") as file:
            header = from_dict(ShardHeader, json.loads(file.read(HEADER)), path.name)
        size = path.stat().st_size
    except (OSError, ValueError, ConfigError, RecursionError) as error:
        raise CorpusError(f"{path}: not a token shard ({error}): prepare the text again") from None
    if header.format != FORMAT or header.dtype not in ("uint16", "uint32"):
        raise CorpusError(f"{path}: format {header.format} with {header.dtype} ids is not known here")
    expected = HEADER + header.tokens * np.dtype(header.dtype).itemsize
    if size != expected:
        raise CorpusError(
            f"{path}: {header.tokens} tokens, as the header says, are {expected} bytes, but the file has {size}: "
            "prepare the text again"
        )
    return header


def finished_shards(folder: Path) -> Shards:
    """In the order in which they were written."""
    shards = [(path, read_header(path)) for split in SPLITS for path in sorted(folder.glob(f"{split}-*.bin"))]
    return sorted(shards, key=lambda shard: shard[1].position["units"])


@dataclass(frozen=True)
class Encoded:
    ids: bytes
    tokens: int
    characters: int
    bytes: int


class ShardWriter:
    """A shard under way, under a passing name: ids as they come, the header once all is known, then its own name."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer) -> None:
        self.split, self.tokenizer = split, tokenizer
        self.path = folder / f"{split}-{len(list(folder.glob(f'{split}-*.bin'))):05d}.bin"
        self.passing = self.path.with_name(f".{self.path.name}")
        self.file = open(self.passing, "wb")  # noqa: SIM115, closed in finish()
        self.file.write(b" " * HEADER)
        self.tokens = self.characters = self.bytes = 0
        self.sha256 = hashlib.sha256()
        self.position = START

    def add(self, encoded: Encoded, position: Position) -> None:
        self.file.write(encoded.ids)
        self.sha256.update(encoded.ids)
        self.tokens += encoded.tokens
        self.characters += encoded.characters
        self.bytes += encoded.bytes
        self.position = position

    def finish(self) -> None:
        counts = (self.tokens, self.characters, self.bytes)
        known = (self.tokenizer.hash, self.sha256.hexdigest(), self.position)
        header = json.dumps(asdict(ShardHeader(FORMAT, dtype_of(self.tokenizer), *counts, *known))).encode()
        if len(header) > HEADER:
            raise CorpusError(f"{self.path}: the source's position does not fit into a shard's header")
        self.file.seek(0)
        self.file.write(header.ljust(HEADER))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.passing.rename(self.path)
        sync_folder(self.path.parent)


def dtype_of(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
