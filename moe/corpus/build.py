"""Text of any shape into token shards, in constant memory, on all cores.

While it is made, a prepared folder is called `NAME.partial`. A shard gets its name when it is whole and on disk, and
its header says where in the source the next one begins: a preparation that is killed at any moment goes on from there,
and ends up with the same bytes.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from moe.config import DataConfig, MoeError
from moe.corpus.bpe import train_bpe
from moe.corpus.shards import FORMAT, Corpus, CorpusError, Encoded, ShardWriter, dtype_of, finished_shards, open_corpus
from moe.corpus.sources import SPLITS, START, Advance, Source, Unit, Unreachable
from moe.corpus.streams import DATA_SETS, open_source
from moe.machine.files import write_whole
from moe.tokenizer import Tokenizer, bytes_tokenizer, gpt2_tokenizer

SHARD_TOKENS = 1 << 24  # a shard is closed behind the unit that brings it here
BPE_CHARACTERS = 1 << 24  # of the training split, from all over it, are what the tokenizer learns from


def prepare(
    config: DataConfig, out: Path | None = None, tokenizer: Tokenizer | None = None, advance: Advance = lambda *_: None
) -> Corpus:
    """Turn a source into a prepared folder, or find it prepared already.

    out: the folder to make; by default one under out/data/ named after the text and all that shapes its tokens.
    tokenizer: use this one instead of what the configuration says. The folder appears whole or not at all.
    """
    path = Path(config.source)
    if config.source not in DATA_SETS and (path / "corpus.json").exists():
        if out:
            raise CorpusError(f"{path} is prepared already: train on it as it is, or prepare the text itself anew")
        corpus = open_corpus(path)
        if tokenizer and corpus.tokenizer.hash != tokenizer.hash:
            raise CorpusError(
                f"{path}: was prepared with another tokenizer than the checkpoint's: give the text itself"
            )
        return corpus
    source = open_source(config, advance)
    kind = f"bpe{config.vocab_size}" if config.tokenizer == "bpe" else config.tokenizer
    kind = tokenizer.hash[:12] if tokenizer else kind
    shaping = {name: getattr(config, name) for name in ("val_fraction", "test_fraction", "errors", "field")}
    plan = {"format": FORMAT, "source": source.identity, "tokenizer": kind, **shaping}
    name = config.source if config.source in DATA_SETS else path.resolve().stem
    digest = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:12]
    folder = out or Path("out/data") / f"{name}-{kind}-{digest}"
    if out and out.exists():
        raise CorpusError(f"{folder} exists: choose another --out, or remove it")
    if folder.exists():
        return open_corpus(folder)
    passing = folder.with_name(f"{folder.name}.partial")
    try:
        with claimed(folder, advance):
            if not folder.exists():  # else another process has prepared the same text meanwhile
                build(passing, plan, source, lambda: tokenizer or make_tokenizer(source, config, advance), advance)
                passing.rename(folder)
    except OSError as error:
        raise CorpusError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return open_corpus(folder)


@contextmanager
def claimed(folder: Path, advance: Advance) -> Iterator[None]:
    """Only one process at a time makes a folder; others wait, and a lock dies with its process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder.parent).close()  # where nothing can be written, a lock would be waited for
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    while not lock.is_locked:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            advance("waiting for another process that prepares this text", 0, 0)
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink()  # while it is held: whoever waits notices and asks anew
        lock.release()


def build(
    folder: Path, plan: dict[str, Any], source: Source, choose_tokenizer: Callable[[], Tokenizer], advance: Advance
) -> None:
    """Fill a folder, from where an earlier attempt at the same plan was stopped. A text that turns out to be no good
    leaves nothing; one that is out of reach for now leaves its shards."""
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder, unless=plan)
    write_whole(folder / "plan.json", json.dumps(plan, indent=1).encode())
    try:
        if not (folder / "tokenizer.json").exists():
            write_whole(folder / "tokenizer.json", json.dumps(choose_tokenizer().to_json()).encode())
        write_shards(folder, source, Tokenizer.load(folder / "tokenizer.json"), advance)
        names: dict[str, list[str]] = {split: [] for split in SPLITS}
        for path, _ in finished_shards(folder):
            names[path.name.split("-")[0]].append(path.name)
        if not any(header.characters for path, header in finished_shards(folder) if path.name.startswith("train")):
            raise CorpusError("no text is left to train on: give more of it, or a smaller val-fraction")
        facts = {"format": FORMAT, "shards": names}
        write_whole(folder / "corpus.json", json.dumps(facts, indent=1).encode())
    except MoeError as error:
        if not isinstance(error, Unreachable) or not finished_shards(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def clear(folder: Path, unless: dict[str, Any]) -> None:
    """Remove what an earlier attempt has left: all of it if its plan was another, else just its unfinished files."""
    names = {path.name for path in folder.iterdir()}
    plan = folder / "plan.json"
    strange = [name for name in names if not name.startswith(".")] if not plan.exists() else []
    if strange:
        raise CorpusError(f"{folder} holds a {strange[0]} that no preparation made: choose another --out, or move it")
    try:
        same = plan.exists() and json.loads(plan.read_text("utf-8")) == unless
        finished_shards(folder)
    except (ValueError, CorpusError, RecursionError):
        same = False
    if not same:
        write_whole(plan, b"{}")  # first, lest a kill from here on leave half of it under the old plan
    for name in names - {plan.name}:
        if not same or name.startswith("."):
            (folder / name).unlink()


def write_shards(folder: Path, source: Source, tokenizer: Tokenizer, advance: Advance) -> None:
    shards = finished_shards(folder)
    position = shards[-1][1].position if shards else START
    shard: ShardWriter | None = None
    try:
        for unit, encoded in encode_all(source.units(position), tokenizer):
            if shard and (shard.split != unit.split or shard.tokens >= SHARD_TOKENS):
                shard.finish()
                shard = None
            shard = shard or ShardWriter(folder, unit.split, tokenizer)
            shard.add(encoded, unit.position)
            advance("encoding", unit.position["bytes"], source.total)
        if shard:
            shard.finish()
    finally:
        if shard:
            shard.file.close()


def encode_all(units: Iterator[Unit], tokenizer: Tokenizer) -> Iterator[tuple[Unit, Encoded]]:
    """Every unit's tokens in order, made on all cores (tokenizers work outside the interpreter's lock), a few ahead of
    what is asked for."""
    waiting: deque[tuple[Unit, Future[Encoded]]] = deque()
    with ThreadPoolExecutor(cores()) as pool:
        for unit in units:
            waiting.append((unit, pool.submit(encode, unit, tokenizer)))
            if len(waiting) > 2 * cores():
                first, encoded = waiting.popleft()
                yield first, encoded.result()
        for first, encoded in waiting:
            yield first, encoded.result()


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode(unit: Unit, tokenizer: Tokenizer) -> Encoded:
    texts = unit.read()
    ids = tokenizer.encode_documents([""] * unit.opens + texts if texts else [])
    data = ids.astype(np.dtype(dtype_of(tokenizer)).newbyteorder("<")).tobytes()
    return Encoded(data, len(ids), sum(map(len, texts)), sum(len(text.encode()) for text in texts))


def make_tokenizer(source: Source, config: DataConfig, advance: Advance) -> Tokenizer:
    if config.tokenizer == "bytes":
        return bytes_tokenizer()
    if config.tokenizer == "gpt2":
        return gpt2_tokenizer()
    return train_bpe(learning_text(source, advance), config.vocab_size)


def learning_text(source: Source, advance: Advance) -> Iterator[str]:
    """About BPE_CHARACTERS of the training split, evenly spread where its size is known, else its first ones."""
    units = (unit for unit in source.units() if unit.split == "train")
    stride = max(-(-source.train // BPE_CHARACTERS), 1)
    done, total = 0, min(source.train or BPE_CHARACTERS, BPE_CHARACTERS)
    for unit in islice(units, 0, None, stride):
        for text in unit.read():
            done += len(text)
            yield text
        advance("learning the tokenizer", done, total)
        if done >= BPE_CHARACTERS:
            return
