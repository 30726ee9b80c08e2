"""Tokens as they can be shown: pieces of text, whatever bytes they are."""

import codecs
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe.tokenizer import Tokenizer

AROUND = 12  # tokens of context on each side


def piece_of(tokenizer: Tokenizer, token: int) -> str:
    """A token by itself; bytes that are no text alone as \\xe2."""
    data = tokenizer.token_bytes(token)
    return data.decode("utf-8", "backslashreplace") if data else special(tokenizer, token)


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's piece of the text. A character of several tokens appears with its last; those before it show their
    bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    pieces = []
    for token in ids:
        data = tokenizer.token_bytes(token)
        piece = decoder.decode(data)
        pieces.append(piece or piece_of(tokenizer, token))
    return pieces


def special(tokenizer: Tokenizer, token: int) -> str:
    """A token without text, by its name."""
    return "⟨end of text⟩" if token == tokenizer.end_of_text else f"⟨{token}⟩"


def context_of(tokenizer: Tokenizer, ids: np.ndarray, place: int) -> dict[str, Any]:
    """A token of a text with what stands around it."""
    before, after = ids[max(place - AROUND, 0) : place], ids[place + 1 : place + 1 + AROUND]
    around = [tokenizer.decode(map(int, part), continuing=True) for part in (before, after)]
    return {"before": around[0], "token": piece_of(tokenizer, int(ids[place])), "after": around[1]}
