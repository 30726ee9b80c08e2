"""Text of every shape: what is prepared, what is refused, and that nothing half-written stays."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXT
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import corpus as rooms
from moe.config import DataConfig
from moe.corpus import HEADER, CorpusError, open_corpus, prepare, read_header, read_text
from moe.data import Batches, Cursor, TokenStream, separate_windows
from moe.tokenizer import bytes_tokenizer, train_bpe

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


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["word", " ", "\n", "\r\n", "  \n", "9", "né", ",\n", "\t", "日本"]), max_size=60))
def test_a_text_read_in_small_pieces_is_tokenized_as_the_whole(tmp_path_factory, parts):
    text = "".join(parts)
    path = write(tmp_path_factory.mktemp("text") / "a.txt", text)
    tokenizer = train_bpe(["word né 9, word,\nword \n  \n\n\r\n\r\n word word né né"] * 3, 270)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms, "BLOCK", 8)
        pieces = list(read_text(path, "strict"))
    assert "".join(pieces) == text
    if all(len(piece) < 100 for piece in pieces):
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text).tolist()


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
    monkeypatch.setattr(rooms, "SHARD_TOKENS", 5)
    monkeypatch.setattr(rooms, "BLOCK", 4)
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
    monkeypatch.setattr(rooms, "BLOCK", 1 << 14)

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
    with pytest.raises(CorpusError.__mro__[1], match=says) as caught:
        prepare(DataConfig(str(source), **changes), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ([source.name] if data is not None else [])


def test_undecodable_bytes_are_found_where_they_are_in_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms, "BLOCK", 10)
    source = write(tmp_path / "a.txt", "日本".encode() * 9 + b"\xe6\x97x")
    with pytest.raises(CorpusError, match="byte 54 "):
        list(read_text(source, "strict"))
    assert "".join(read_text(source, "replace")) == "日本" * 9 + "\ufffdx"


def test_replaced_bytes_go_on(tmp_path):
    source = write(tmp_path / "a.txt", b"fine \xff text " * 10)
    prepared = prepare(DataConfig(str(source), errors="replace", **BYTES), tmp_path / "out")
    assert prepared.characters("train") + prepared.characters("val") == 120


def test_an_existing_folder_is_never_overwritten(tmp_path):
    source, mine = write(tmp_path / "a.txt", "text"), write(tmp_path / "out" / "mine", "precious")
    with pytest.raises(CorpusError, match="exists"):
        prepare(DataConfig(str(source), **BYTES), tmp_path / "out")
    assert mine.read_text() == "precious"


@pytest.fixture
def prepared(tmp_path):
    source = write(tmp_path / "a.txt", "abcdefghijklmnopqrst" * 5)
    return prepare(DataConfig(str(source), **BYTES), tmp_path / "out")


def test_a_shard_whose_header_and_size_disagree_is_refused(prepared):
    path = prepared.shards["train"][0][0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorpusError, match="but the file has"):
        open_corpus(prepared.folder)


@pytest.mark.parametrize("change", [{"tokens": "5"}, {"dtype": "float64"}, {"tokens": -1}, {"extra": 1}, {"format": 2}])
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
    path.write_bytes(data)
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
    starts = Batches(stream, 2, 8, seed=3).starts
    assert len(set(starts)) == len(starts) == (len(stream) - 1 - min(starts)) // 8
    assert set(np.diff(sorted(starts))) == {8}
    tokens, targets = first[0]
    assert tokens[:, 1:].equal(targets[:, :-1])


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
        if target != -100
    ]
    assert seen == [(i, i + 1) for i in range(total - 1)]
