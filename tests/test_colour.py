"""A text by experts: every token on its expert's colour, the text itself unharmed."""

import io
import re
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, build
from hypothesis import given
from hypothesis import strategies as st

from moe.config import MoeError
from moe.lab import colour
from moe.lab.colour import RESET, Paper, coloured, luminance, palette, pieces, seen, visible
from moe.lab.trace import trace
from moe.tokenizer import bytes_tokenizer

WORDS, MODEL = bytes_tokenizer(), {"vocab_size": 264}
COLOURS = [13, 216, 2**24]
ESCAPE = re.compile("\x1b\\[[0-9;]*m")


@pytest.fixture
def model():
    return build(**MODEL).eval()


def ids_of(text: str | bytes) -> list[int]:
    return WORDS.prompt(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("layer", [1, 2, None])
def test_each_token_has_the_colour_of_the_expert_with_the_largest_gate(model, layer):
    ids = ids_of("To be, or not to be: that is the question")  # longer than the context
    found = trace(model, ids)
    experts = found.chosen[found.layers.index(layer or 2), 1:, 0].tolist()
    assert found.gates[0, :, 0].ge(found.gates[0, :, 1]).all()
    text = coloured(model, WORDS, ids, layer, Paper()).split("\n\n")[0]
    assert text == "".join(f"{chr(token)}/{expert}" for token, expert in zip(ids[1:], experts, strict=True))
    paper = Paper(2**24)
    painted = coloured(model, WORDS, ids, layer, paper).split("\n\n")[0]
    assert painted == "".join(paper.paint(chr(token), expert) for token, expert in zip(ids[1:], experts, strict=True))


def test_the_legend_counts_every_token_of_the_text(model):
    ids = ids_of("a" * 50)
    listed = coloured(model, WORDS, ids, 1, Paper()).split("\n\n")[1]
    assert listed.startswith("largest gate in layer 1, share of the tokens\n")
    counts = torch.bincount(trace(model, ids).chosen[0, 1:, 0], minlength=8)
    assert dict(re.findall(r"(\d+): (\d+)%", listed)) == {
        str(expert): f"{count / 50:.0%}".rstrip("%") for expert, count in enumerate(counts.tolist()) if count
    }


@pytest.mark.parametrize("colours", [0, *COLOURS])
def test_a_legend_keeps_to_the_width(colours):
    text = colour.legend(list(range(256)), 3, Paper(colours, 60))
    assert all(len(ESCAPE.sub("", line)) < 60 for line in text.split("\n"))
    assert len(re.findall("0%", text)) == 256


@given(st.binary(max_size=60))
def test_without_its_colours_a_text_is_what_the_tokens_say(data):
    whole = "".join(text for text, _ in pieces(WORDS, ids_of(data)))
    assert whole == data.decode("utf-8", "replace")
    painted = "".join(colour.painted(text, at % 5, Paper(216)) for text, at in pieces(WORDS, ids_of(data)))
    assert ESCAPE.sub("", painted) == " \n".join(map(visible, whole.split("\n")))


@given(st.text(st.characters(codec="utf-8")))
def test_nothing_but_colours_moves_the_terminal(text):
    painted = colour.painted(text, 3, Paper(216))
    assert not [letter for letter in ESCAPE.sub("", painted) if letter != "\n" and not colour.shown(letter)]
    assert painted.count("\x1b") == 2 * painted.count(RESET)
    for line in painted.split("\n"):  # no colour goes on at a line's end
        assert not line or line.endswith(RESET)


def test_control_characters_are_spelled_out_and_brackets_are_text():
    assert visible("a\x1b[31mb\r\t\x07\x9b\u202e[red]\u200d") == "a\\x1b[31mb\\r\\t\\x07\\x9b\\u202e[red]\u200d"


def test_a_character_of_several_tokens_is_whole_and_belongs_to_the_last(model):
    found = pieces(WORDS, ids_of("aé😀"))
    assert found == [("a", 1), ("é", 3), ("😀", 7)]
    assert pieces(WORDS, ids_of(b"a\xf0\x9f")) == [("a", 1), ("\ufffd", 3)]


@pytest.mark.parametrize("colours", COLOURS)
def test_letters_are_clear_on_every_colour(colours):
    for _, rgb in palette(colours):
        white = luminance(rgb) < 0.179
        contrast = 1.05 / (luminance(rgb) + 0.05) if white else (luminance(rgb) + 0.05) / 0.05
        assert contrast >= 4.5  # WCAG 2, level AA


@pytest.mark.parametrize(
    ("colours", "experts", "apart"),
    [(13, 8, 0.15), (216, 8, 0.25), (216, 64, 0.05), (2**24, 8, 0.2), (2**24, 256, 0.02)],
)
def test_experts_have_colours_that_can_be_told_apart(colours, experts, apart):
    places = torch.tensor([seen(rgb).tolist() for _, rgb in palette(colours)[:experts]])
    distances = torch.cdist(places, places) + torch.eye(len(places))
    assert len(places) == experts
    assert distances.min() > apart
    assert len({code for code, _ in palette(colours)[:experts]}) == experts


def test_any_number_of_experts_has_colours(model):
    for colours in COLOURS:
        assert Paper(colours).paint("a", 1000).endswith(f"ma{RESET}")


def test_a_layer_without_experts_is_refused_by_those_that_have_some(model):
    with pytest.raises(MoeError, match="layer 0 has no experts: 1, 2 have"):
        coloured(model, WORDS, [1], 0, Paper())
    dense = build(replace(SMALL, first_k_dense_replace=3), **MODEL)
    with pytest.raises(MoeError, match="this model has no experts"):
        coloured(dense, WORDS, [1], None, Paper())


@pytest.mark.parametrize(
    ("settings", "colours"),
    [
        ({}, 0),
        ({"FORCE_COLOR": "1", "TERM": "xterm"}, 13),
        ({"FORCE_COLOR": "1", "TERM": "xterm-256color"}, 216),
        ({"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm"}, 2**24),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, 0),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm"}, 0),
    ],
)
def test_a_pipe_has_no_colours_unless_they_are_forced(monkeypatch, settings, colours):
    for name in ("FORCE_COLOR", "NO_COLOR", "COLORTERM", "TERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert Paper.of(io.StringIO()).colours == colours


def test_shares_are_listed_layer_by_layer_and_only_the_busiest_of_many(model):
    found = trace(model, ids_of("a" * 20))
    text = colour.shares(found, 8, 80)
    assert [line.split()[1] for line in text.split("\n") if line.startswith("layer")] == ["1", "2"]
    assert sum(int(share) for share in re.findall(r"(\d+)%", text)) in range(190, 211)
    many = replace(found, chosen=torch.arange(42).reshape(1, 21, 2), layers=[1])
    assert "and 26 more; 22 got nothing" in " ".join(colour.shares(many, 64, 80).split())
