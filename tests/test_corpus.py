"""Text of every shape: what is prepared, what is refused, and that a kill costs nothing but time."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import TEXT
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import DataConfig, MoeError
from moe.corpus import build as corpus
from moe.corpus import prepare, sources, streams
from moe.corpus.bpe import train_bpe
from moe.corpus.shards import HEADER, CorpusError, open_corpus, read_header
from moe.corpus.sources import Files, SourceError, Unreachable
from moe.corpus.streams import DATA_SETS, DataSet
from moe.data import Batches, Cursor, TokenStream, separate_windows
from moe.machine.display import Display
from moe.tokenizer import GPT2_PATTERN, PATTERN, BytePairs, bytes_tokenizer

BYTES = {"tokenizer": "bytes"}


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def tokens_of(folder, split) -> list[int]:
    stream = TokenStream(open_corpus(folder), split)
    return stream.read(0, len(stream)).tolist()


def test_shakespeare_is_the_canonical_text_in_nanogpts_split(tmp_path):
    prepared = prepare(DataConfig(), tmp_path / "out")
    assert (prepared.characters("train"), prepared.characters("val")) == (1_003_854, 111_540)
    text = TEXT.read_text()
    assert prepared.tokenizer == train_bpe([text[:1_003_854]], 512)  # of the training split alone
    for split, part in (("train", text[:1_003_854]), ("val", text[1_003_854:])):
        ids = tokens_of(prepared.folder, split)
        assert ids[0] == prepared.tokenizer.end_of_text
        assert ids[1:] == prepared.tokenizer.encode(part).tolist()


PARTS = [
    "word",
    " ",
    "\n",
    "\r\n",
    "  \n",
    "9",
    "né",
    ",\n",
    "\t",
    "日本",
    "。",
    "'s",
    "''ll",
    "_",
    "e\u0301",
    "🙂",
    "\x85",
    "1.5",
]
LEARNED = train_bpe(["".join(PARTS) * 3 + " word né 9, word,\nword \n  \n\n日本日本 it's 's we''ll"] * 3, 290)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.lists(st.sampled_from(PARTS), max_size=60).map("".join), st.text(max_size=60)), st.integers(1, 9))
@pytest.mark.parametrize("pattern", [PATTERN, GPT2_PATTERN])
def test_a_text_cut_into_units_has_the_tokens_of_the_whole(tmp_path_factory, pattern, text, unit):
    data = text.encode("utf-8", "replace")
    path = write(tmp_path_factory.mktemp("text") / "a.txt", data or b"a")
    tokenizer = BytePairs(LEARNED.ranks, pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT", unit)
        units = list(Files(path, DataConfig(val_fraction=0.2), lambda *_: None).units())
        for split in ("train", "val"):
            pieces = [piece for unit in units if unit.split == split for piece in unit.read()]
            whole = tokenizer.encode("".join(pieces)).tolist()
            assert [i for piece in pieces for i in tokenizer.encode(piece).tolist()] == whole
        assert b"".join("".join(unit.read()).encode() for unit in units) == path.read_bytes()


def test_text_without_any_place_to_cut_is_cut_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT", 1 << 10)
    monkeypatch.setattr(sources, "LOOK_AHEAD", 1 << 7)
    text = "字" * 5_000
    source = write(tmp_path / "a.txt", text)
    prepared = prepare(DataConfig(str(source), tokenizer="bytes"), tmp_path / "out")
    assert bytes(tokens_of(prepared.folder, "train")[1:]).decode() == text[:4_500]
    assert len(list(Files(source, DataConfig(), lambda *_: None).units())) > 10


def test_a_folder_is_its_files_in_order_each_behind_an_end_of_text(tmp_path):
    write(tmp_path / "text" / "b.txt", "bbbb")
    write(tmp_path / "text" / "a.txt", "aaaaaa")
    write(tmp_path / "text" / "sub" / "c.txt", "cc")
    write(tmp_path / "text" / ".hidden", b"\xff")
    write(tmp_path / "text" / ".git" / "config", "dd")
    prepared = prepare(DataConfig(str(tmp_path / "text"), val_fraction=0.3, **BYTES), tmp_path / "out")
    end = prepared.tokenizer.end_of_text
    assert tokens_of(prepared.folder, "train") == [end, *b"aaaaaa", end, *b"bb"]
    assert tokens_of(prepared.folder, "val") == [end, *b"bb", end, *b"cc"]


@pytest.mark.parametrize(("vocab", "dtype"), [(300, "uint16"), (70_000, "uint32")])
def test_shards_carry_a_checked_header_and_as_few_bits_as_the_vocabulary_needs(tmp_path, vocab, dtype, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD_TOKENS", 5)
    monkeypatch.setattr(sources, "UNIT", 4)
    tokenizer = bytes_tokenizer()
    tokenizer = type(tokenizer)([*tokenizer.ranks, *(b"%7d" % i for i in range(vocab - 257))], r"[\s\S]")
    source = write(tmp_path / "a.txt", "ab cd ef gh ij kl mn")
    prepared = prepare(DataConfig(str(source)), tmp_path / "out", tokenizer=tokenizer)
    assert len(prepared.shards["train"]) > 1
    header = read_header(prepared.shards["train"][0][0])
    assert (header.dtype, header.tokenizer) == (dtype, tokenizer.hash)
    stream = TokenStream(prepared, "train")
    whole = stream.read(0, len(stream))
    assert bytes(whole[1:].tolist()) == b"ab cd ef gh ij kl "
    for start in range(len(stream)):  # across shard borders
        assert stream.read(start, 4).tolist() == whole[start : start + 4].tolist()


def test_a_prepared_text_is_found_again_and_a_changed_one_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = DataConfig(str(write(tmp_path / "a.txt", "some text")), **BYTES)
    first = prepare(config)
    assert prepare(config).folder == first.folder
    write(tmp_path / "a.txt", "other text")
    assert prepare(config).folder != first.folder
    assert prepare(DataConfig(str(first.folder))).folder == first.folder


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT", 1 << 14)
    monkeypatch.setattr(sources, "BLOCK", 1 << 14)

    def peak(copies: int) -> int:
        source = write(tmp_path / f"{copies}.txt", "some words that repeat again and again\n" * copies)
        tracemalloc.start()
        prepare(DataConfig(str(source), vocab_size=270), tmp_path / f"out-{copies}")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1_000)
    assert peak(100_000) < peak(5_000) + 1_000_000  # 3.9 MB of text against 0.2 MB


@pytest.mark.parametrize(
    ("data", "changes", "says"),
    [
        (None, {}, "no such file"),
        (b"", {}, "empty"),
        (b"fine \xff broken", {}, r"byte 5 \(0xff\) is not UTF-8.*--errors replace"),
        (b"cut off \xe6\x97", {}, "byte 8"),
        (b"a \xe6\x97" * 30_000 + b"z", {}, "byte 2 "),
        (b"tiny", {"vocab_size": 1000}, "too large for this text"),
    ],
)
def test_bad_text_is_refused_in_one_line_and_leaves_nothing(tmp_path, data, changes, says):
    source = tmp_path / "text.txt"
    if data is not None:
        write(source, data)
    with pytest.raises(MoeError, match=says) as caught:
        prepare(DataConfig(str(source), **changes), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ([source.name] if data is not None else [])


@pytest.mark.parametrize("unit", [7, 10, 1 << 20])
def test_undecodable_bytes_are_found_where_they_are_in_a_long_file(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(sources, "UNIT", unit)
    source = write(tmp_path / "a.txt", "日本".encode() * 9 + b"\xe6\x97x")
    with pytest.raises(SourceError, match="byte 54 "):
        prepare(DataConfig(str(source), val_fraction=0.01, **BYTES), tmp_path / "out")
    prepared = prepare(DataConfig(str(source), val_fraction=0.01, errors="replace", **BYTES), tmp_path / "out")
    assert bytes(tokens_of(prepared.folder, "train")[1:]).decode() == "日本" * 9 + "\ufffd"


def test_replaced_bytes_go_on(tmp_path):
    source = write(tmp_path / "a.txt", b"fine \xff text " * 10)
    prepared = prepare(DataConfig(str(source), errors="replace", **BYTES), tmp_path / "out")
    assert prepared.characters("train") + prepared.characters("val") == 120


def test_an_existing_folder_is_never_overwritten(tmp_path):
    source, mine = write(tmp_path / "a.txt", "text"), write(tmp_path / "out" / "mine", "precious")
    with pytest.raises(CorpusError, match="exists"):
        prepare(DataConfig(str(source), **BYTES), tmp_path / "out")
    assert mine.read_text() == "precious"


# -- splits ------------------------------------------------------------------------------------------------------------


def test_the_splits_are_exact_bytes_moved_to_whole_characters(tmp_path):
    source = write(tmp_path / "a.txt", "é" * 500)  # 1000 bytes
    config = DataConfig(str(source), val_fraction=0.05, test_fraction=0.051, **BYTES)
    prepared = prepare(config, tmp_path / "out")
    assert [prepared.bytes(split) for split in ("train", "val", "test")] == [900, 50, 50]  # not 899, 50, 51
    assert tokens_of(prepared.folder, "test") == [256, *("é" * 25).encode()]


def test_enwik8s_split_is_the_canonical_one():
    config = DataConfig(val_fraction=0.05, test_fraction=0.05)
    assert sources.split_ends(100_000_000, config) == (90_000_000, 95_000_000)


def test_without_a_test_fraction_the_test_split_is_there_and_empty(prepared):
    assert (prepared.tokens("test"), prepared.characters("test"), len(TokenStream(prepared, "test"))) == (0, 0, 0)


def test_no_more_is_read_than_wanted(tmp_path):
    source = write(tmp_path / "a.txt", "0123456789" * 100)
    first = prepare(DataConfig(str(source), max_bytes=100, **BYTES), tmp_path / "out")
    assert (first.bytes("train"), first.bytes("val")) == (90, 10)
    write(tmp_path / "a.txt", "0123456789" * 10)
    assert prepare(DataConfig(str(source), **BYTES), tmp_path / "short").hash == first.hash


def test_the_tokenizer_learns_from_all_over_the_training_split_and_from_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT", 100)
    monkeypatch.setattr(corpus, "BPE_CHARACTERS", 1_000)
    source = write(tmp_path / "a.txt", "".join(f"word{number:04d} " for number in range(1_000)))
    learned = list(corpus.learning_text(Files(source, DataConfig(), lambda *_: None), lambda *_: None))
    assert 800 < sum(map(len, learned)) <= 1_100
    numbers = [int(text.split()[0][4:]) for text in learned]
    assert numbers[0] == 0
    assert set(np.diff(numbers)) <= {99, 100, 101}
    assert 780 < numbers[-1] < 900


# -- JSON lines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 30, 1 << 20])
def test_every_line_of_json_is_a_document(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(sources, "UNIT", unit)
    texts = ["one", "", "zwölf\nlines", "\u2028", "<|endoftext|>", "last"]
    lines = [json.dumps({"id": i, "body": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    source = write(tmp_path / "a.jsonl", "\n".join(lines[:3]) + "\r\n\n" + "\n".join(lines[3:]))
    prepared = prepare(DataConfig(str(source), field="body", val_fraction=0.3, **BYTES), tmp_path / "out")
    documents = [[256, *text.encode()] for text in texts if text]
    assert tokens_of(prepared.folder, "train") == [i for document in documents[:4] for i in document]
    assert tokens_of(prepared.folder, "val") == documents[4]


def test_a_folder_may_mix_text_and_json_lines(tmp_path):
    write(tmp_path / "text" / "a.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    write(tmp_path / "text" / "b.txt", "three")
    prepared = prepare(DataConfig(str(tmp_path / "text"), val_fraction=0.01, **BYTES), tmp_path / "out")
    assert tokens_of(prepared.folder, "train") == [256, *b"one", 256, *b"two", 256, *b"thre"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{'text': 1}", "line 1002: .*property name"),
        (b'{"body": "a", "id": 1}', "line 1002: .*no field 'text'; its fields are body, id: .*--field"),
        (b'{"text": 5}', "line 1002: field 'text' is a int"),
        (b"[1]", "line 1002: .*not a list"),
        (b'{"text": "\xff"}', r"line 1002: byte 10 \(0xff\) is not UTF-8"),
        (b'{"text": "a\\ud83d"}', "line 1002: character 1 of 'text' is half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path, monkeypatch, line, says):
    monkeypatch.setattr(sources, "UNIT", 300)
    monkeypatch.setattr(sources, "BLOCK", 64)
    source = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n' * 1_000 + b"\n" + line)
    with pytest.raises(SourceError, match=r"a\.jsonl, " + says):
        prepare(DataConfig(str(source), **BYTES), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# -- a kill costs nothing but time -------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def in_small_pieces(monkeypatch):
    monkeypatch.setattr(sources, "UNIT", 1_000)
    monkeypatch.setattr(streams, "UNIT", 1_000)
    monkeypatch.setattr(corpus, "SHARD_TOKENS", 2_000)


def parquet_folder(folder: Path, validation: bool) -> Path:
    """As data sets are published: files of one split in order, several groups of rows each."""
    folder.mkdir()
    texts = [f"Story {number}, of {number % 7} words. " * (number % 5 + 1) for number in range(600)]
    for number in range(3):
        table = pa.table({"id": range(200), "text": texts[number * 200 : (number + 1) * 200]})
        pyarrow.parquet.write_table(table, folder / f"train-{number:05d}-of-00003.parquet", row_group_size=60)
    if validation:
        table = pa.table({"id": range(9), "text": [f"Unseen story {number}." for number in range(9)]})
        pyarrow.parquet.write_table(table, folder / "validation-00000-of-00001.parquet")
    return folder


@pytest.fixture(params=["text", "jsonl", "parquet", "published validation"])
def any_source(request, tmp_path) -> str:
    if request.param == "text":
        return str(write(tmp_path / "a.txt", TEXT.read_bytes()[:30_000]))
    if request.param == "jsonl":
        text = TEXT.read_text()[:30_000].split("\n\n")
        return str(write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": part}) for part in text)))
    return str(parquet_folder(tmp_path / "data", validation=request.param != "parquet"))


class Killed(BaseException):
    pass


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path, any_source, in_small_pieces, monkeypatch):
    config = DataConfig(any_source, vocab_size=300, test_fraction=0.1)
    whole = prepare(config, tmp_path / "whole")
    assert len(whole.shards["train"]) > 2
    steps = kills = 0

    def strike(stage: str, done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if stage == "encoding" and steps > 10 + kills % 3:
            raise Killed

    while not (tmp_path / "out").exists():
        steps = 0
        try:
            prepare(config, tmp_path / "out", advance=strike)
        except Killed:
            kills += 1
            assert (tmp_path / "out.partial" / "plan.json").exists()
            assert kills < 60
            monkeypatch.setattr(corpus, "cores", lambda threads=kills % 3 + 1: threads)
    assert kills > 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_what_was_begun_with_another_plan_is_not_continued(tmp_path, in_small_pieces):
    source = write(tmp_path / "a.txt", TEXT.read_bytes()[:30_000])

    def strike(stage: str, done: int, total: int) -> None:
        if stage == "encoding" and done > 20_000:
            raise Killed

    with pytest.raises(Killed):
        prepare(DataConfig(str(source), vocab_size=300), tmp_path / "out", advance=strike)
    write(tmp_path / "a.txt", TEXT.read_bytes()[:30_000].upper())
    prepared = prepare(DataConfig(str(source), **BYTES), tmp_path / "out")
    assert bytes(tokens_of(prepared.folder, "train")[1:]) == source.read_bytes()[:27_000]
    assert sorted(contents(tmp_path / "out")) == sorted(
        ["plan.json", "tokenizer.json", "corpus.json"]
        + [path.name for shards in prepared.shards.values() for path, _ in shards]
    )


def test_a_folder_that_only_looks_like_an_unfinished_one_is_not_touched(tmp_path):
    source, mine = write(tmp_path / "a.txt", "text"), write(tmp_path / "out.partial" / "mine", "precious")
    with pytest.raises(CorpusError, match="no preparation made"):
        prepare(DataConfig(str(source), **BYTES), tmp_path / "out")
    assert mine.read_text() == "precious"


def test_two_processes_that_prepare_the_same_text_make_it_once(tmp_path):
    write(tmp_path / "a.txt", TEXT.read_bytes()[:200_000])
    code = "from moe.corpus.build import *; print(prepare(DataConfig('a.txt', vocab_size=2000)).folder)"
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, env=environment()) for _ in range(2)]
    folders = {process.communicate(timeout=240)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(folders) == 1
    assert len(list((tmp_path / "out" / "data").iterdir())) == 1


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_command_goes_on_where_it_was(tmp_path, kill):
    script = Path(__file__).parent.parent / "data" / "prepare.py"
    slowly = "import sys, runpy, time; from moe.corpus import build as corpus, sources\n"
    slowly += "corpus.SHARD_TOKENS, sources.UNIT = 5_000, 5_000\n"
    slowly += "add = corpus.ShardWriter.add; corpus.ShardWriter.add = lambda *given: time.sleep(0.05) or add(*given)\n"
    slowly += f"sys.argv[0] = {str(script)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    write(tmp_path / "a.txt", TEXT.read_bytes()[:200_000])
    settings = ["a.txt", "--tokenizer", "bytes"]
    command = [sys.executable, "-c", slowly, *settings, "--out", "out"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment()
    )
    while len(list(tmp_path.glob("out.partial/train-*.bin"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(kill)
    errors = process.communicate(timeout=240)[1]
    assert errors == (
        b"" if kill == signal.SIGKILL else b"stopped: the same command goes on from the last whole shard\n"
    )
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out.partial/train-*.bin")}
    slowly = slowly.replace("0.05", "0")
    for out in ("out", "whole"):
        subprocess.run(
            [sys.executable, "-c", slowly, *settings, "--out", out],
            cwd=tmp_path,
            check=True,
            env=environment(),
            stdout=subprocess.DEVNULL,
        )
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert all((tmp_path / "out" / path.name).stat().st_mtime_ns == made for path, made in before.items())


# -- data sets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("nothing here may reach for a network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.mark.parametrize("single", [False, True])
def test_parquet_is_read_document_by_document(tmp_path, in_small_pieces, no_network, single):
    source = parquet_folder(tmp_path / "data", validation=True)
    if single:
        source = source / "train-00000-of-00003.parquet"
    prepared = prepare(DataConfig(str(source), max_bytes=0, **BYTES), tmp_path / "out")
    texts = [f"Story {number}, of {number % 7} words. " * (number % 5 + 1) for number in range(200 if single else 600)]
    unseen = [f"Unseen story {number}." for number in range(9)]
    train, val = tokens_of(prepared.folder, "train"), tokens_of(prepared.folder, "val")
    if single:  # its first documents are held out
        assert val + train == [i for text in texts for i in (256, *text.encode())]
        assert 0 < len(val) < len(train) / 5
    else:
        assert train == [i for text in texts for i in (256, *text.encode())]
        assert val == [i for text in unseen for i in (256, *text.encode())]


def test_of_a_stream_no_more_is_read_than_wanted(tmp_path, in_small_pieces, no_network):
    source = parquet_folder(tmp_path / "data", validation=False)
    config = DataConfig(str(source), val_fraction=0.2, test_fraction=0.1, max_bytes=10_000, **BYTES)
    prepared = prepare(config, tmp_path / "out")
    sizes = [prepared.bytes(split) for split in ("train", "val", "test")]
    for size, wanted in zip(sizes, (7_000, 2_000, 1_000), strict=True):
        assert wanted <= size < wanted + 150  # to the end of a document
    held_out = [tokens_of(prepared.folder, split) for split in ("val", "test", "train")]
    assert bytes(i for part in held_out for i in part if i < 256).startswith(
        b"Story 0, of 0 words. Story 1, of 1 words. Story 1"
    )


def test_a_stream_without_the_field_names_those_it_has(tmp_path, no_network):
    source = parquet_folder(tmp_path / "data", validation=False)
    with pytest.raises(SourceError, match=r"no field 'story'; its fields are id, text: .*--field"):
        prepare(DataConfig(str(source), field="story", **BYTES), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_broken_parquet_is_refused_in_one_line(tmp_path, no_network):
    with pytest.raises(SourceError, match=r"data: cannot be read \(") as caught:
        prepare(DataConfig(str(write(tmp_path / "data" / "a.parquet", "none").parent)), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_a_hub_out_of_reach_leaves_what_was_made_and_says_what_can_be_done(tmp_path, monkeypatch, in_small_pieces):
    source = parquet_folder(tmp_path / "data", validation=False)
    monkeypatch.setitem(DATA_SETS, "stories", DataSet("hub", str(source), "none", "tiny"))
    attempt, attempts = streams.Stream._attempt, 0

    def breaks(stream, action):
        nonlocal attempts
        attempts += 1
        return attempt(stream, action if attempts != 300 else lambda: 1 / 0)

    monkeypatch.setattr(streams, "HELD_OUT", 3_000)
    whole = prepare(DataConfig("stories", **BYTES), tmp_path / "whole")
    monkeypatch.setattr(streams.Stream, "_attempt", breaks)
    with pytest.raises(Unreachable, match=r"ZeroDivisionError: division by zero\).*--data FOLDER"):
        prepare(DataConfig("stories", **BYTES), tmp_path / "out")
    assert list((tmp_path / "out.partial").glob("train-*.bin"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        with pytest.raises(SourceError, match="pip install datasets"):
            prepare(DataConfig("stories", **BYTES), tmp_path / "out")
    assert list((tmp_path / "out.partial").glob("train-*.bin"))
    prepare(DataConfig("stories", **BYTES), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole.folder)


def test_a_stream_prepared_once_needs_no_network(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        DATA_SETS, "stories", DataSet("hub", str(parquet_folder(tmp_path / "hub", True)), "none", "tiny")
    )
    first = prepare(DataConfig("stories", **BYTES))
    assert first.folder.name.startswith("stories-bytes-")
    shutil.rmtree(tmp_path / "hub")
    assert prepare(DataConfig("stories", **BYTES)).folder == first.folder


def test_without_the_library_a_stream_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match="pip install datasets"):
        prepare(DataConfig("tinystories", **BYTES), tmp_path / "out")


@pytest.fixture
def zipped(tmp_path, monkeypatch):
    """A data set whose address is a local file."""
    monkeypatch.chdir(tmp_path)
    text = TEXT.read_bytes()[:5_000]
    with zipfile.ZipFile(tmp_path / "small.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small", text)
    known = DataSet("zip", (tmp_path / "small.zip").as_uri(), "none", "5 kB", sha256=hashlib.sha256(text).hexdigest())
    monkeypatch.setitem(DATA_SETS, "small", known)
    return text


def test_a_data_set_is_downloaded_once_and_checked(tmp_path, zipped):
    first = prepare(DataConfig("small", **BYTES))
    assert bytes(tokens_of(first.folder, "train")[1:]) == zipped[:4_500]
    (tmp_path / "small.zip").unlink()
    prepare(DataConfig("small", val_fraction=0.2, **BYTES))
    assert prepare(DataConfig("out/data/downloads/small", **BYTES)).hash == first.hash


@pytest.mark.parametrize("damage", ["other text", "no zip", "gone"])
def test_a_download_that_is_not_the_text_is_refused_and_removed(tmp_path, zipped, damage):
    if damage == "other text":
        with zipfile.ZipFile(tmp_path / "small.zip", "w") as archive:
            archive.writestr("small", b"another text")
    elif damage == "no zip":
        write(tmp_path / "small.zip", "<html>not found</html>")
    else:
        (tmp_path / "small.zip").unlink()
    with pytest.raises(SourceError, match=r"small.zip .*--data PATH") as caught:
        prepare(DataConfig("small", **BYTES))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out/data/downloads").iterdir() if path.suffix != ".lock"] == []


# -- progress ----------------------------------------------------------------------------------------------------------


def test_progress_counts_to_a_total_where_there_is_one(tmp_path, in_small_pieces):
    told = []
    source = write(tmp_path / "a.txt", TEXT.read_bytes()[:20_000])
    prepare(DataConfig(str(source), vocab_size=300), tmp_path / "out", advance=lambda *given: told.append(given))
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["reading", "learning the tokenizer", "encoding"]
    for stage, total in (("reading", 20_000), ("learning the tokenizer", 18_000), ("encoding", 20_000)):
        counted = [done for name, done, _ in told if name == stage]
        assert counted == sorted(counted)
        assert (counted[-1], {limit for name, _, limit in told if name == stage}) == (total, {total})
    told.clear()
    stream = str(parquet_folder(tmp_path / "data", validation=True))
    prepared = prepare(DataConfig(stream, **BYTES), tmp_path / "streamed", advance=lambda *given: told.append(given))
    assert told[-1] == ("encoding", prepared.bytes("train") + prepared.bytes("val"), 0)  # 0: nobody knows


def test_the_display_counts_megabytes_where_no_total_is_known(capsys, monkeypatch):
    display, seconds = Display(plain=True), iter(range(0, 90, 3))
    monkeypatch.setattr("moe.machine.display.time.monotonic", lambda: next(seconds))
    for done in range(0, 60_000_000, 10_000_000):
        display.advance("encoding", done, 0)
    for done in range(0, 60, 10):
        display.advance("reading", done, 50)
    said = capsys.readouterr().out.split("\n")
    assert said[-2] == "reading: 100 %"
    assert said[:2] == ["encoding: 10 MB", "encoding: 30 MB"]


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path):
    source = write(tmp_path / "a.txt", "abcdefghijklmnopqrst" * 5)
    return prepare(DataConfig(str(source), **BYTES), tmp_path / "out")


def test_a_shard_whose_header_and_size_disagree_is_refused(prepared):
    path = prepared.shards["train"][0][0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorpusError, match="but the file has"):
        open_corpus(prepared.folder)


def test_a_flipped_byte_in_a_shard_is_refused(prepared):
    path = prepared.shards["train"][0][0]
    data = bytearray(path.read_bytes())
    data[HEADER + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=f"{path.name}: is damaged, its sha256 is not the header's: prepare the text"):
        open_corpus(prepared.folder)


@pytest.mark.parametrize("change", [{"tokens": "5"}, {"dtype": "float64"}, {"tokens": -1}, {"extra": 1}, {"format": 3}])
def test_a_strange_header_is_refused(prepared, change):
    path = prepared.shards["val"][0][0]
    data = path.read_bytes()
    header = json.loads(data[:HEADER]) | change
    path.write_bytes(json.dumps(header).encode().ljust(HEADER) + data[HEADER:])
    with pytest.raises(CorpusError, match=path.name):
        open_corpus(prepared.folder)


def test_shards_of_another_tokenizer_are_refused(prepared):
    other = train_bpe(["aaaa aaaa"], 257)
    (prepared.folder / "tokenizer.json").write_text(json.dumps(other.to_json()))
    with pytest.raises(CorpusError, match="another tokenizer"):
        open_corpus(prepared.folder)


def test_ids_beyond_the_vocabulary_are_refused(prepared):
    path = prepared.shards["train"][0][0]
    data = bytearray(path.read_bytes())
    data[HEADER + 20 : HEADER + 22] = (9999).to_bytes(2, "little")
    header = json.loads(data[:HEADER]) | {"sha256": hashlib.sha256(data[HEADER:]).hexdigest()}
    path.write_bytes(json.dumps(header).encode().ljust(HEADER) + data[HEADER:])
    with pytest.raises(CorpusError, match="9999"):
        TokenStream(open_corpus(prepared.folder), "train").read(0, 50)


def test_batches_depend_on_seed_and_cursor_alone_and_an_epoch_reads_every_window_once(prepared):
    stream = TokenStream(prepared, "train")
    batches = Batches(stream, 2, 8, seed=3)
    first = [batches.next() for _ in range(12)]
    again = Batches(stream, 2, 8, seed=3)
    for _ in range(5):
        again.next()
    resumed = Batches(stream, 2, 8, seed=3, cursor=Cursor(again.cursor.epoch, again.cursor.window))
    for wanted in first[5:]:
        assert all(a.equal(b) for a, b in zip(resumed.next(), wanted, strict=True))
    assert not Batches(stream, 2, 8, seed=4).next()[0].equal(first[0][0])
    for whole, cut in zip(first[0], Batches(stream, 2, 8, seed=3).next(parts=4), strict=True):
        assert cut.shape == (8, 2)
        assert cut.view(2, 8).equal(whole)
    starts = Batches(stream, 2, 8, seed=3).starts
    assert len(set(starts)) == len(starts) == (len(stream) - 1 - min(starts)) // 8
    assert set(np.diff(sorted(starts))) == {8}
    tokens, targets = first[0]
    assert tokens[:, 1:].equal(targets[:, :-1])


def test_every_epoch_reads_each_of_its_windows_once_and_in_an_order_of_its_own(prepared):
    batches, orders = Batches(TokenStream(prepared, "train"), 1, 4, seed=3), []
    for epoch in range(3):
        tokens = [batches.next()[0][0].tolist()]
        orders.append(((batches.starts - batches.starts.min()) // 4).tolist())
        tokens += [batches.next()[0][0].tolist() for _ in batches.starts[1:]]
        assert batches.cursor == Cursor(epoch, len(batches.starts))
        assert tokens == [batches.stream.read(start, 4).tolist() for start in batches.starts]
    assert orders[0][:10] != orders[1][:10] != orders[2][:10]


def test_a_training_split_too_short_for_two_windows_is_refused(prepared):
    with pytest.raises(CorpusError, match="sequence-length"):
        Batches(TokenStream(prepared, "train"), 2, 64, seed=0)


@given(st.integers(0, 70), st.integers(1, 9), st.integers(1, 4))
def test_separate_windows_price_every_token_but_the_first_exactly_once(total, length, batch_size):
    ids = np.arange(total)
    seen = [
        (token, target)
        for tokens, targets in separate_windows(
            lambda start, count: ids[start : start + count], total, length, batch_size
        )
        for token, target in zip(tokens.flatten().tolist(), targets.flatten().tolist(), strict=True)
    ]
    assert seen == [(i, i + 1) for i in range(total - 1)]


def test_a_prepared_text_is_not_prepared_again_into_another_folder(prepared, tmp_path):
    with pytest.raises(CorpusError, match="is prepared already"):
        prepare(DataConfig(str(prepared.folder)), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_that_cannot_be_written_is_said_so_at_once(tmp_path):
    write(tmp_path / "file", "not a folder")
    for place in (tmp_path / "file" / "out", Path("/proc/out")):
        if place.parent.exists():
            with pytest.raises(CorpusError, match="cannot be written"):
                prepare(DataConfig(str(write(tmp_path / "a.txt", "text" * 9)), **BYTES), place)


def test_lines_without_any_text_are_no_text(tmp_path):
    with pytest.raises(CorpusError, match="no text"):
        prepare(DataConfig(str(write(tmp_path / "a.jsonl", "\n\n\n")), **BYTES), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("line", ["[" * 200_000, "[1, 2]", "{", "3"])
def test_a_line_that_is_no_object_is_named_with_what_is_expected(tmp_path, line):
    source = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(SourceError, match=r"line 2: .*JSON object") as caught:
        prepare(DataConfig(str(source), **BYTES), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_byte_order_mark_before_the_first_object_is_no_text(tmp_path):
    source = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + b'{"text": "abcdefgh"}\n' * 4)
    assert prepare(DataConfig(str(source), **BYTES), tmp_path / "out").characters("train") > 0
