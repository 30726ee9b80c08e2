"""Tokens as they can be shown: pieces of text, whatever bytes they are."""

import codecs
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe.tokenizer import Tokenizer

AROUND = 12  # tokens of context on each side
SPECIAL = "⟨special⟩"  # a token without text


def piece_of(tokenizer: Tokenizer, token: int) -> str:
    """A token by itself; bytes that are no text alone as \\xe2."""
    data = tokenizer.token_bytes(token)
    return data.decode("utf-8", "backslashreplace") if data else SPECIAL


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's piece of the text. A character of several tokens appears with its last; those before it show their
    bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    pieces = []
    for token in ids:
        data = tokenizer.token_bytes(token)
        piece = decoder.decode(data)
        pieces.append(piece or (data.decode("utf-8", "backslashreplace") if data else SPECIAL))
    return pieces


def context_of(tokenizer: Tokenizer, ids: np.ndarray, place: int) -> dict[str, Any]:
    """A token of a text with what stands around it."""
    before, after = ids[max(place - AROUND, 0) : place], ids[place + 1 : place + 1 + AROUND]
    around = [tokenizer.decode(map(int, part), continuing=True) for part in (before, after)]
    return {"before": around[0], "token": piece_of(tokenizer, int(ids[place])), "after": around[1]}
