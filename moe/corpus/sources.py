"""Where text comes from: text files, JSON lines, and data sets by name.

Every source is a sequence of **units**: deterministic slices of about a megabyte, each made without the others. So
units can be encoded on all cores at once, memory holds a few of them only, and a preparation that was killed goes on
behind the last unit it has written.

* A text file is cut where no pattern joins what stands before and after, so its units give the tokens of the whole.
* A JSON lines file is cut between lines; each line is a document.
* A data set is streamed through the `datasets` library; some consecutive documents are a unit.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import regex

from moe.config import DataConfig, MoeError

UNIT = 1 << 20  # bytes
LOOK_AHEAD = 1 << 16  # bytes in which a place to cut is looked for
FIELD = "--field (train.py: --data.field)"
REPLACE = "--errors replace (train.py: --data.errors replace)"
BLOCK = 1 << 20  # bytes read at a time where nothing is encoded
SPLITS = ("train", "val", "test")
Advance = Callable[[str, int, int], None]  # stage, done, total (0: unknown), in bytes: for a progress bar
Position = dict[str, Any]  # where in a source to go on: "units" and "bytes" behind us, and what else the source needs
START: Position = {"units": 0, "bytes": 0}

# Between a letter or digit and white space or punctuation the patterns of tokenizers have a boundary, whatever stands
# further left or right. Not before apostrophes ("don't" may be one token) and underscores.
EDGE = regex.compile(r"(?<=[\p{L}\p{N}])(?=[\s\p{P}])(?!['’_])")


class SourceError(MoeError):
    """A text that is not there, or is no text."""


class Unreachable(SourceError):
    """A source that may be there the next time."""


@dataclass(frozen=True)
class Unit:
    split: str
    opens: bool  # whether the first text begins a document; the others always do
    read: Callable[[], list[str]]
    position: Position  # behind this unit


class Source(Protocol):
    identity: str  # sha256 of the text and of the names of its files; of a streamed data set, of its name
    total: int  # bytes; 0 when unknown
    train: int  # bytes of the training split; 0 when unknown

    def units(self, position: Position = START) -> Iterator[Unit]:
        """The units from a position on, split by split."""


@dataclass(frozen=True)
class Slice:
    """Bytes `begin` to `end` of a file, both to be moved to the next place where the file may be cut."""

    split: str
    path: Path
    begin: int
    end: int
    part: range  # the file's bytes that belong to the split


class Files:
    """Text and JSON lines files in order. The first bytes are the training split, the last ones validation and test;
    a split begins on a whole character, or on a whole line."""

    def __init__(self, source: Path, config: DataConfig, advance: Advance) -> None:
        self.field, self.errors = config.field, config.errors
        sizes = [(path, path.stat().st_size) for path in find_files(source)]
        before = [0, *accumulate(size for _, size in sizes)]
        self.total = min(before[-1], config.max_bytes or before[-1])
        self.files = [(path, min(size, self.total - at)) for (path, size), at in zip(sizes, before, strict=False)]
        if not self.total:
            raise SourceError(f"{source}: " + ("the file is empty" if source.is_file() else "no text in this folder"))
        self.identity = fingerprint(source, self.files, advance, self.errors)
        self.train, val_end = split_ends(self.total, config)
        self.cuts = (0, self.train, val_end, self.total)

    def units(self, position: Position = START) -> Iterator[Unit]:
        done, count = position["bytes"], position["units"]
        for piece in islice(self._slices(), count, None):
            done, count = done + piece.end - piece.begin, count + 1
            opens = piece.begin == piece.part.start or is_json_lines(piece.path)
            yield Unit(piece.split, opens, partial(self._read, piece), {"units": count, "bytes": done})

    def _slices(self) -> Iterator[Slice]:
        for split, low, high in zip(SPLITS, self.cuts, self.cuts[1:], strict=False):
            start = 0  # of the file, in the bytes of all
            for path, size in self.files:
                begin, end = max(low - start, 0), min(high - start, size)
                start += size
                if begin >= end:
                    continue
                part = range(whole_character_or_line(path, begin), whole_character_or_line(path, end))
                for at in part[::UNIT]:
                    yield Slice(split, path, at, min(at + UNIT, part.stop), part)

    def _read(self, piece: Slice) -> list[str]:
        lines = is_json_lines(piece.path)
        move = next_line if lines else next_edge
        with open_file(piece.path) as file:
            begin, end = (move(file, at, piece.part) for at in (piece.begin, piece.end))
            file.seek(begin)
            data = file.read(end - begin)
        if lines:
            return read_json_lines(data, piece.path, begin, self.field, self.errors)
        return [data.decode("utf-8", self.errors)] if data else []


def find_files(source: Path) -> list[Path]:
    """The file, or all files in the folder that are not hidden, in order."""
    found = [source] if source.is_file() else sorted(source.rglob("*"))
    visible = (path for path in found if not any(part.startswith(".") for part in path.relative_to(source).parts))
    return [path for path in visible if path.is_file()]


def fingerprint(source: Path, files: list[tuple[Path, int]], advance: Advance, errors: str | None = None) -> str:
    """sha256 of the first bytes of some files, and of their names.

    errors: "strict" looks on the way whether text files are text, rather than hours later. Raises SourceError.
    """
    sha256, done, total = hashlib.sha256(), 0, sum(size for _, size in files)
    for path, size in files:
        sha256.update(b"\0" + os.fsencode(path.relative_to(source)) + b"\0")
        decoder = codecs.getincrementaldecoder("utf-8")()
        whole = size == path.stat().st_size
        with open_file(path) as file:
            for begin in range(0, size, BLOCK):
                block = file.read(min(BLOCK, size - begin))
                sha256.update(block)
                if errors == "strict" and not is_json_lines(path):
                    held = len(decoder.getstate()[0])
                    try:
                        decoder.decode(block, final=whole and begin + BLOCK >= size)
                    except UnicodeDecodeError as error:
                        raise not_utf8(f"{path}: byte {begin - held + error.start}", error) from None
                done += len(block)
                advance("reading", done, total)
    return sha256.hexdigest()


def split_ends(total: int, config: DataConfig) -> tuple[int, int]:
    """Where training and validation end, in bytes; exact, because 0.05 in binary is not."""
    val, test = Fraction(str(config.val_fraction)), Fraction(str(config.test_fraction))
    return int(total * (1 - val - test)), int(total * (1 - test))


def is_json_lines(path: Path) -> bool:
    return path.suffix == ".jsonl"


def open_file(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from None


def whole_character_or_line(path: Path, at: int) -> int:
    """The first place from `at` on where a character, or in JSON lines a line, begins."""
    size = path.stat().st_size
    if at in (0, size):
        return at
    with open_file(path) as file:
        return next_line(file, at, range(size)) if is_json_lines(path) else next_character(file, at)


def next_character(file: BinaryIO, at: int) -> int:
    file.seek(at)
    head = file.read(3)  # a character has three bytes at most behind its first
    return at + next((i for i, byte in enumerate(head) if byte & 0xC0 != 0x80), len(head))


def next_line(file: BinaryIO, at: int, part: range) -> int:
    if at in (part.start, part.stop):
        return at
    file.seek(at - 1)
    file.readline()
    return min(file.tell(), part.stop)


def next_edge(file: BinaryIO, at: int, part: range) -> int:
    """The first place from `at` on that no pattern joins. A text without one for LOOK_AHEAD bytes, which is no prose,
    is cut at any character."""
    if at in (part.start, part.stop):
        return at
    at = min(next_character(file, at), part.stop)
    file.seek(at)
    text = file.read(min(LOOK_AHEAD, part.stop - at)).decode("utf-8", "surrogateescape")
    if edge := EDGE.search(text):
        return at + len(text[: edge.start()].encode("utf-8", "surrogateescape"))
    return part.stop if part.stop - at <= LOOK_AHEAD else at


def read_json_lines(data: bytes, path: Path, begin: int, field: str, errors: str) -> list[str]:
    """The documents in whole lines, which stand in the file from `begin` on. Raises SourceError naming the line."""
    documents = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text = text_of(json.loads(line.decode("utf-8", errors).removeprefix("\ufeff")), field)
        except UnicodeDecodeError as error:
            raise not_utf8(f"{path}, {line_name(path, begin, number)}: byte {error.start}", error) from None
        except (ValueError, RecursionError) as error:
            what = f"{path}, {line_name(path, begin, number)}: {error}"
            raise SourceError(f"{what}; each line must be one JSON object with the text in a field") from None
        try:
            text.encode()
        except UnicodeEncodeError as error:  # "\ud83d" alone is JSON, but half a character
            if errors == "strict":
                where = f"{path}, {line_name(path, begin, number)}: character {error.start} of {field!r}"
                raise SourceError(f"{where} is half of a surrogate pair: mend it, or pass {REPLACE}") from None
            text = text.encode("utf-8", "replace").decode()
        documents.append(text)
    return [text for text in documents if text]


def text_of(document: Any, field: str) -> str:
    """Raises ValueError that says what a document has instead of a text in this field."""
    if not isinstance(document, dict):
        raise ValueError(f"a JSON object with a field {field!r} is expected, not a {type(document).__name__}")
    if field not in document:
        names = ", ".join(document) or "none at all"
        raise ValueError(f"there is no field {field!r}; its fields are {names}: name the one with the text by {FIELD}")
    if not isinstance(document[field], str):
        raise ValueError(f"field {field!r} is a {type(document[field]).__name__}, not a text: name another by {FIELD}")
    return document[field]


def line_name(path: Path, begin: int, number: int) -> str:
    """The name of the n-th line behind a place in the file; only an error is worth the counting."""
    with open_file(path) as file:
        before = sum(file.read(min(BLOCK, begin - at)).count(b"\n") for at in range(0, begin, BLOCK))
    return f"line {before + number}"


def not_utf8(where: str, error: UnicodeDecodeError) -> SourceError:
    return SourceError(
        f"{where} (0x{error.object[error.start]:02x}) is not UTF-8: mend or convert the file, or pass {REPLACE}"
    )
