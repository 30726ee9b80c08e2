"""Text of any shape into token shards, in constant memory.

A prepared folder holds `tokenizer.json`, shards `train-00000.bin`, `val-00000.bin`, ... and `corpus.json`, written
last. A shard is a header of HEADER bytes (JSON, padded with spaces) and then its ids, uint16 or uint32,
little-endian. The text is read three times: to check and count it, to train the tokenizer on the training split, and
to encode it.
"""

import codecs
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe.config import ConfigError, DataConfig, MoeError, from_dict
from moe.tokenizer import Tokenizer, bytes_tokenizer, gpt2_tokenizer, train_bpe

HEADER = 4096
BLOCK = 1 << 20  # bytes read at a time
LOOK_BACK = 1 << 16  # characters in which the end of a word is looked for
SHARD_TOKENS = 1 << 27
BPE_CHARACTERS = 1 << 26  # the tokenizer learns from the first 64 Mi characters of the training split
DATA_SETS = {"tinyshakespeare": Path(__file__).resolve().parent.parent / "data" / "tinyshakespeare" / "input.txt"}

Advance = Callable[[str, int, int], None]  # stage, done, total: for a progress bar


class CorpusError(MoeError):
    """A text or a prepared folder that cannot be used."""


@dataclass(frozen=True)
class ShardHeader:
    format: int
    dtype: str
    tokens: int
    characters: int
    bytes: int
    tokenizer: str  # its hash
    sha256: str  # of the ids


@dataclass(frozen=True)
class Corpus:
    """A prepared folder, opened and checked."""

    folder: Path
    tokenizer: Tokenizer
    shards: dict[str, list[tuple[Path, ShardHeader]]]  # of "train" and "val"
    source: str  # sha256 of the text and of the names of its files

    def characters(self, split: str) -> int:
        return sum(header.characters for _, header in self.shards[split])

    def bytes(self, split: str) -> int:
        return sum(header.bytes for _, header in self.shards[split])

    def tokens(self, split: str) -> int:
        return sum(header.tokens for _, header in self.shards[split])


def open_corpus(folder: Path) -> Corpus:
    """Open a prepared folder. Raises CorpusError where headers, sizes or hashes disagree."""
    try:
        listing = json.loads((folder / "corpus.json").read_text("utf-8"))
        names = {split: [str(name) for name in listing["shards"][split]] for split in ("train", "val")}
        source = str(listing["source"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{folder}: not a prepared folder ({type(error).__name__}: {error}): make one with data/prepare.py"
        raise CorpusError(message) from None
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    paths = {split: [folder / Path(name).name for name in names[split]] for split in names}
    shards = {split: [(path, read_header(path)) for path in paths[split]] for split in paths}
    for path, header in shards["train"] + shards["val"]:
        if header.tokenizer != tokenizer.hash:
            raise CorpusError(f"{path}: was made with another tokenizer than the folder's: prepare the text again")
    return Corpus(folder, tokenizer, shards, source)


def read_header(path: Path) -> ShardHeader:
    try:
        with open(path, "rb") as file:
            header = from_dict(ShardHeader, json.loads(file.read(HEADER)), path.name)
        size = path.stat().st_size
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise CorpusError(f"{path}: not a token shard ({error}): prepare the text again") from None
    if header.format != 1 or header.dtype not in ("uint16", "uint32") or header.tokens < 0:
        raise CorpusError(f"{path}: format {header.format} with {header.dtype} ids is not known here")
    expected = HEADER + header.tokens * np.dtype(header.dtype).itemsize
    if size != expected:
        raise CorpusError(
            f"{path}: {header.tokens} tokens, as the header says, are {expected} bytes, but the file has {size}: "
            "prepare the text again"
        )
    return header


class ShardWriter:
    """Writes one split's shards: ids as they come, the header once all is known."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer) -> None:
        self.folder, self.split, self.tokenizer = folder, split, tokenizer
        self.dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        self.names: list[str] = []
        self._open()

    def _open(self) -> None:
        self.names.append(f"{self.split}-{len(self.names):05d}.bin")
        self.file = open(self.folder / self.names[-1], "wb")  # noqa: SIM115, closed in close()
        self.file.write(b" " * HEADER)
        self.tokens = self.characters = self.bytes = 0
        self.sha256 = hashlib.sha256()

    def add(self, ids: np.ndarray, text: str) -> None:
        if self.tokens and self.tokens + len(ids) > SHARD_TOKENS:
            self.close()
            self._open()
        data = ids.astype(f"<{np.dtype(self.dtype).str[1:]}").tobytes()
        self.file.write(data)
        self.sha256.update(data)
        self.tokens += len(ids)
        self.characters += len(text)
        self.bytes += len(text.encode())

    def close(self) -> None:
        counts = (self.tokens, self.characters, self.bytes)
        header = ShardHeader(1, self.dtype, *counts, self.tokenizer.hash, self.sha256.hexdigest())
        self.file.seek(0)
        self.file.write(json.dumps(asdict(header)).encode().ljust(HEADER))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


@dataclass(frozen=True)
class Source:
    """The text of a source: its files in order, each a document, and where the validation split begins."""

    files: list[Path]
    characters: int
    bytes: int
    sha256: str
    train_characters: int
    errors: str

    def pieces(self, split: str) -> Iterator[str | None]:
        """The text of a split in pieces cut between words; None where a document, or the split, begins."""
        position = 0
        for path in self.files:
            fresh = True
            for text in read_text(path, self.errors):
                cut = min(max(self.train_characters - position, 0), len(text))
                position += len(text)
                part = text[:cut] if split == "train" else text[cut:]
                if part:
                    if fresh:
                        yield None
                    fresh = False
                    yield part


def read_text(path: Path, errors: str, sha256: Any = None) -> Iterator[str]:
    """A file's text in pieces of about a megabyte, each cut between a word and the white space after it where there
    is such a place, so that pieces are tokenized as the whole would be. Raises CorpusError where bytes are not
    UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    held, offset = "", 0
    try:
        with open(path, "rb") as file:
            while True:
                block = file.read(BLOCK)
                if sha256 is not None:
                    sha256.update(block)
                try:
                    waiting = len(decoder.getstate()[0])
                    held += decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    where = offset - waiting + error.start
                    raise CorpusError(
                        f"{path}: byte {where} (0x{error.object[error.start]:02x}) is not UTF-8: mend or convert the "
                        "file, or pass --errors replace (train.py: --data.errors replace)"
                    ) from None
                offset += len(block)
                cut = word_end(held) if block else len(held)
                if cut:
                    yield held[:cut]
                    held = held[cut:]
                if not block:
                    return
    except OSError as error:
        raise CorpusError(f"{path}: {error.strerror}") from None


def word_end(text: str) -> int:
    """The last place with a letter or digit before it and white space after it, which no pattern joins. Where there is
    none: 0, to wait for more text, or the end of a text that is long already."""
    for end in range(len(text) - 1, max(len(text) - LOOK_BACK, 0), -1):
        if text[end].isspace() and text[end - 1].isalnum():
            return end
    return len(text) if len(text) > LOOK_BACK else 0


def scan(source: Path, config: DataConfig, advance: Advance) -> Source:
    """Read all of it once: is it text, how much, which."""
    if not source.exists():
        raise CorpusError(f"{source}: no such file or folder; the data sets known by name are: {', '.join(DATA_SETS)}")
    found = [source] if source.is_file() else sorted(source.rglob("*"))
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(source).parts)]
    files = [path for path in visible if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    sha256, characters, size = hashlib.sha256(), 0, 0
    for path in files:
        sha256.update(b"\0" + os.fsencode(path.relative_to(source)) + b"\0")
        for text in read_text(path, config.errors, sha256):
            characters += len(text)
            size += len(text.encode())
            advance("reading", size, total)
    if not characters:
        raise CorpusError(f"{source}: " + ("the file is empty" if source.is_file() else "no text in this folder"))
    train = int(characters * (1 - config.val_fraction))
    return Source(files, characters, size, sha256.hexdigest(), train, config.errors)


def make_tokenizer(source: Source, config: DataConfig, advance: Advance) -> Tokenizer:
    if config.tokenizer == "bytes":
        return bytes_tokenizer()
    if config.tokenizer == "gpt2":
        return gpt2_tokenizer()

    def texts() -> Iterator[str]:
        characters, total = 0, min(source.train_characters, BPE_CHARACTERS)
        for piece in source.pieces("train"):
            if piece is not None and characters < BPE_CHARACTERS:
                characters += len(piece)
                advance("learning the tokenizer", characters, total)
                yield piece

    return train_bpe(texts(), config.vocab_size)


def prepare(
    config: DataConfig, out: Path | None = None, tokenizer: Tokenizer | None = None, advance: Advance = lambda *_: None
) -> Corpus:
    """Turn a source into a prepared folder, or find it prepared already.

    out: the folder to make; by default one under out/data/ named after the text and all that shapes its tokens.
    tokenizer: use this one instead of what the configuration says. The folder appears whole or not at all.
    """
    path = DATA_SETS.get(config.source, Path(config.source))
    if (path / "corpus.json").exists():
        corpus = open_corpus(path)
        if tokenizer and corpus.tokenizer.hash != tokenizer.hash:
            raise CorpusError(
                f"{path}: was prepared with another tokenizer than the checkpoint's: give the text itself"
            )
        return corpus
    source = scan(path, config, advance)
    kind = f"bpe{config.vocab_size}" if config.tokenizer == "bpe" else config.tokenizer
    kind = tokenizer.hash[:12] if tokenizer else kind
    shaping = json.dumps([source.sha256, kind, config.val_fraction, config.errors])
    name = config.source if config.source in DATA_SETS else path.resolve().stem
    folder = out or Path("out/data") / f"{name}-{kind}-{hashlib.sha256(shaping.encode()).hexdigest()[:12]}"
    if folder.exists():
        if out is None:
            return open_corpus(folder)
        raise CorpusError(f"{folder} exists: choose another --out, or remove it")
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        write_corpus(partial, source, tokenizer or make_tokenizer(source, config, advance), advance)
        partial.rename(folder)
    except OSError as error:
        if out is None and folder.exists():  # another process has prepared the same text meanwhile
            return open_corpus(folder)
        raise CorpusError(f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_corpus(folder)


def write_corpus(folder: Path, source: Source, tokenizer: Tokenizer, advance: Advance) -> None:
    names, done = {}, 0
    for split in ("train", "val"):
        writer = ShardWriter(folder, split, tokenizer)
        for piece in source.pieces(split):
            if piece is None:
                writer.add(np.array([tokenizer.end_of_text]), "")
            else:
                writer.add(tokenizer.encode(piece), piece)
                done += len(piece)
                advance("encoding", done, source.characters)
        writer.close()
        names[split] = writer.names
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.to_json()), "utf-8")
    facts = {
        "format": 1,
        "source": source.sha256,
        "characters": source.characters,
        "bytes": source.bytes,
        "shards": names,
    }
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1), "utf-8")
