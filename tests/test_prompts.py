"""No prompt is refused: what a tokenizer cannot hold is mended or left out, and said."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import moe
from moe.config import SampleConfig
from moe.corpus.imported import HubTokenizer
from moe.sampling import draws, mended, prompt_tokens
from moe.tokenizer import bytes_tokenizer

ANY_TEXT = st.text(st.characters())  # halves of surrogate pairs among them
LETTERS = {letter: number for number, letter in enumerate("abc dE▁")}


def imported(model, before=None, after=None) -> HubTokenizer:
    core = Tokenizer(model)
    if before:
        core.pre_tokenizer, core.decoder = before, after
    core.add_special_tokens(["<eos>"])
    return HubTokenizer(json.loads(core.to_str()), {"eos_token": "<eos>"})


TOKENIZERS = {
    "bytes": bytes_tokenizer(),
    "words without one for what is unknown": imported(models.WordLevel({"hello": 0, "world": 1}, unk_token="?")),
    "letters": imported(models.BPE(LETTERS, [])),
    "letters with spaces": imported(models.BPE(LETTERS, []), pre_tokenizers.Metaspace(), decoders.Metaspace()),
    "unigrams": imported(
        models.Unigram([("a", -1.0), ("b", -2.0), ("▁", -1.0)]), pre_tokenizers.Metaspace(), decoders.Metaspace()
    ),
    "a few bytes": imported(models.BPE(LETTERS, []), pre_tokenizers.ByteLevel(), decoders.ByteLevel()),
}


@given(ANY_TEXT)
def test_what_is_mended_can_be_written_and_only_halves_of_pairs_are_changed(text):
    data = mended(text).encode("utf-8", "surrogateescape")
    assert mended(mended(text)) == mended(text)
    if not any("\ud800" <= letter <= "\udfff" for letter in text):
        assert data == text.encode()


@given(st.binary())
def test_bytes_that_are_no_text_come_through_as_they_are(data):
    text = data.decode("utf-8", "surrogateescape")
    assert mended(text).encode("utf-8", "surrogateescape") == data


@pytest.mark.parametrize(
    ("given_", "read"), [("a\ud800b", "a\ufffdb"), ("\ud83d\ude00", "\U0001f600"), ("\ude00\ud83d", "\ufffd\ufffd")]
)
def test_a_pair_of_halves_is_its_character_and_a_half_alone_the_replacement(given_, read):
    assert mended(given_) == read


@pytest.fixture(scope="module")
def run(debug_run):
    return moe.load(debug_run)


@settings(deadline=None)
@given(text=ANY_TEXT, name=st.sampled_from(sorted(TOKENIZERS)))
def test_no_prompt_is_refused_by_any_tokenizer(run, text, name):
    notes: list[str] = []
    ids = prompt_tokens(replace(run, tokenizer=TOKENIZERS[name]), text, note=notes.append)
    assert ids.shape[1] >= 1
    assert len(notes) <= 1
    assert all(note.isprintable() for note in notes)


@settings(max_examples=25, deadline=None)
@given(text=ANY_TEXT)
def test_any_prompt_is_continued(run, text):
    written = moe.generate_text(run, text, max_new_tokens=3, seed=1)
    assert written.startswith(mended(text))


def test_words_that_are_known_stay_whole_beside_those_that_are_not():
    words = TOKENIZERS["words without one for what is unknown"].known
    pieces = imported(models.WordLevel({"hello": 0, "world": 1}, unk_token="?"), pre_tokenizers.Whitespace(), None)
    assert pieces.prompt("hello 😀 strange world hello".encode()) == [0, 1, 0]
    assert words("hello") == [0]


def test_what_is_read_otherwise_is_said_once(run):
    def notes(prompt: str, tokenizer=run.tokenizer) -> list[str]:
        said: list[str] = []
        list(draws(replace(run, tokenizer=tokenizer), prompt, SampleConfig(), 2, note=said.append))
        return said

    assert notes("ROMÉO: 😀\0\r\n\u202eשלום") == []
    assert notes("\udcff byte") == []
    assert notes("half \ud800") == ["the prompt holds what the tokenizer cannot; the model reads 'half \ufffd'"]
    assert notes("a😀b", TOKENIZERS["letters with spaces"]) == [
        "the prompt holds what the tokenizer cannot; the model reads 'ab'"
    ]


LONG = [" " * 1_000_000, "word " * 200_000, "é" * 500_000]


@pytest.mark.parametrize(
    "text", ["\0" * 10, "🤷🏽\u200d♀️", "a\r\nb\rc", "\u202eשלום", *LONG], ids=lambda text: ascii(text[:9])
)
def test_control_characters_emoji_right_to_left_and_a_megabyte_are_prompts(run, text):
    said: list[str] = []
    drawn = list(draws(run, text, SampleConfig(), 2, seed=1, note=said.append))
    assert drawn
    assert all("longer than the context" in note for note in said)
