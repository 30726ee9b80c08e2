"""Any bytes in, the same bytes out; and the same ids however the text is cut."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.corpus.bpe import train_bpe
from moe.tokenizer import END_OF_TEXT, SINGLE_BYTES, Tokenizer, TokenizerError, bytes_tokenizer, gpt2_tokenizer

TEXT = "the cat sat on the mat, the rat sat on the hat.\nThe end is 1234567, ça va? 日本語日本語\n" * 3
BPE = train_bpe([TEXT], 290)


@pytest.mark.parametrize("tokenizer", [BPE, bytes_tokenizer()])
@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_bytes_come_back(tokenizer, data):
    ids = tokenizer.encode_bytes(data)
    assert all(0 <= token < tokenizer.end_of_text for token in ids)
    assert tokenizer.decode_bytes(ids.tolist()) == data


def test_a_million_spaces_come_back():
    text = "a" + " " * 1_500_000 + "b"
    assert BPE.decode(BPE.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [BPE, bytes_tokenizer()])
@given(st.lists(st.sampled_from(["the cat", "", " \n", "\n", "日本", END_OF_TEXT, "x "])))
def test_documents_are_each_encoded_by_itself_with_an_end_of_text_between_them(tokenizer, texts):
    ids = tokenizer.encode_documents(texts).tolist()
    expected = [i for text in texts for i in (tokenizer.end_of_text, *tokenizer.encode(text).tolist())]
    assert ids == expected[1:]


def test_text_that_spells_the_special_token_stays_text():
    assert BPE.end_of_text not in BPE.encode(END_OF_TEXT).tolist()
    assert BPE.decode(BPE.encode(END_OF_TEXT)) == END_OF_TEXT


def test_it_compresses_and_repeats_itself():
    assert len(BPE.encode(TEXT)) < len(TEXT.encode()) / 2
    assert train_bpe([TEXT], 290) == BPE
    assert train_bpe([TEXT[:60], TEXT[60:]], 290).vocab_size == 290
    assert BPE.vocab_size == 290


def test_merges_are_the_most_frequent_pairs_worked_by_hand():
    tokenizer = train_bpe(["aab aab aab aac"], 259)
    assert tokenizer.ranks[256:] == [b"aa", b" aa"]  # aa: 4 times, then " aa" and "aab" 3 times each: smaller ids first


def test_every_merge_is_a_new_string():
    assert len(set(BPE.ranks)) == len(BPE.ranks)


def test_a_vocabulary_larger_than_the_text_can_fill_is_refused_with_the_size_that_fits():
    with pytest.raises(TokenizerError, match="261"):
        train_bpe(["aab aab aab aac aac"], 1000)
    assert train_bpe(["aab aab aab aac aac"], 261).vocab_size == 261


def test_a_character_of_several_tokens_appears_once_and_whole():
    stream = bytes_tokenizer().stream()
    assert [stream.push(byte) for byte in "né日".encode()] == ["n", "", "é", "", "", "日"]
    assert stream.push(0xE6) == ""
    assert stream.finish() == "\ufffd"


def test_saved_and_loaded_it_is_the_same(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(BPE.to_json()))
    assert Tokenizer.load(path) == BPE
    assert Tokenizer.load(path).hash == BPE.hash


def test_tokenizers_of_older_runs_are_still_known_by_their_hash():
    assert bytes_tokenizer().hash == "32741971e77fec9923947dc39852babbb1f64c683b8a614837d893d5d3be31ff"
    stored = {"format": 1, "pattern": r"[\s\S]", "ranks": [base64.b64encode(byte).decode() for byte in SINGLE_BYTES]}
    assert Tokenizer.from_json(stored | {"hash": bytes_tokenizer().hash}) == bytes_tokenizer()


@pytest.mark.parametrize("damage", [{"ranks": ["AA=="]}, {"hash": "0"}, {"ranks": 5}, {"pattern": "x"}])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(BPE.to_json() | damage))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_gpt2_without_a_network_names_the_cache_and_the_alternatives(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", lambda *_: (_ for _ in ()).throw(ConnectionError("no route")))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(TokenizerError, match=r"TIKTOKEN_CACHE_DIR.*bpe or bytes"):
        gpt2_tokenizer()
