"""Text to token ids and back: a byte-level BPE trained here and run by tiktoken, plain bytes, or GPT-2's vocabulary.

Every vocabulary holds all 256 bytes, so any text, and any sequence of bytes, can be written and comes back unchanged.
One special token, `<|endoftext|>`, stands before every document; it is the context of the first token. It is never
made from text that happens to spell it.
"""

import base64
import codecs
import hashlib
import heapq
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tiktoken

from moe.config import MoeError

END_OF_TEXT = "<|endoftext|>"
PIECE = 1 << 16
SINGLE_BYTES = [bytes([byte]) for byte in range(256)]
# Words keep one leading space or sign, digits come in threes, punctuation keeps the line breaks behind it.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class TokenizerError(MoeError):
    """A tokenizer that cannot be trained, loaded or used here."""


@dataclass(frozen=True)
class Tokenizer:
    """`ranks[i]` are the bytes of token i; the end-of-text token comes after them."""

    ranks: list[bytes]
    pattern: str

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        ranks, specials = {token: rank for rank, token in enumerate(self.ranks)}, {END_OF_TEXT: self.end_of_text}
        return tiktoken.Encoding("moe", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=specials)

    @property
    def end_of_text(self) -> int:
        return len(self.ranks)

    @property
    def vocab_size(self) -> int:
        return len(self.ranks) + 1

    @cached_property
    def hash(self) -> str:
        """Of everything that decides which ids a text gets."""
        deciding = json.dumps([self.pattern, [token.hex() for token in self.ranks], END_OF_TEXT])
        return hashlib.sha256(deciding.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Text to ids (n,) uint32. Text that spells a special token is text."""
        if self.ranks == SINGLE_BYTES:
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a million spaces in a row are more than tiktoken's pattern matcher can take at once
            if len(text) <= PIECE:
                raise
            return np.concatenate([self.encode(text[start : start + PIECE]) for start in range(0, len(text), PIECE)])

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """The ids of several texts, an end-of-text token between them; many short ones at the speed of one long."""
        if self.ranks != SINGLE_BYTES and not any(END_OF_TEXT in text for text in texts):
            try:
                return self.encoding.encode_to_numpy(END_OF_TEXT.join(texts), allowed_special={END_OF_TEXT})
            except ValueError:
                pass  # see encode
        parts = [np.array([self.end_of_text], dtype=np.uint32)] * max(2 * len(texts) - 1, 0)
        parts[::2] = [self.encode(text) for text in texts]
        return np.concatenate([np.zeros(0, dtype=np.uint32), *parts])

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Any bytes to ids: what is UTF-8 as text, every other byte by itself."""
        text = data.decode("utf-8", errors="surrogateescape")
        pieces = [np.zeros(0, dtype=np.uint32)]
        for piece in regex.findall("[\udc80-\udcff]+|[^\udc80-\udcff]+", text):
            if "\udc80" <= piece[0] <= "\udcff":
                pieces.append(np.array([self.byte_ids[ord(letter) - 0xDC00] for letter in piece], dtype=np.uint32))
            else:
                pieces.append(self.encode(piece))
        return np.concatenate(pieces)

    @cached_property
    def byte_ids(self) -> list[int]:
        ids = {token: rank for rank, token in enumerate(self.ranks)}
        return [ids[byte] for byte in SINGLE_BYTES]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids to bytes. The end-of-text token, and ids that only pad the embedding, are nothing."""
        return b"".join(self.ranks[token] for token in ids if 0 <= token < len(self.ranks))

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> "TextStream":
        return TextStream(self)

    def to_json(self) -> dict[str, Any]:
        ranks, specials = [base64.b64encode(token).decode() for token in self.ranks], {END_OF_TEXT: self.end_of_text}
        return {"format": 1, "pattern": self.pattern, "ranks": ranks, "specials": specials, "hash": self.hash}

    @staticmethod
    def from_json(stored: Any) -> "Tokenizer":
        try:
            ranks = [base64.b64decode(token, validate=True) for token in stored["ranks"]]
            tokenizer = Tokenizer(ranks, str(stored["pattern"]))
            unchanged = tokenizer.hash == stored["hash"]
            complete = len(set(ranks)) == len(ranks) and set(SINGLE_BYTES) <= set(ranks)
        except (KeyError, TypeError, ValueError) as error:
            raise TokenizerError(f"not a tokenizer's file: {type(error).__name__}: {error}") from None
        if not unchanged or not complete:
            fault = "its hash differs" if complete else "it lacks bytes or repeats tokens"
            raise TokenizerError(f"the tokenizer's file is damaged: {fault}")
        return tokenizer

    @staticmethod
    def load(path: Path) -> "Tokenizer":
        try:
            return Tokenizer.from_json(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TokenizerError) as error:
            raise TokenizerError(f"{path}: {error}") from None


class TextStream:
    """Ids in, text out as soon as it is complete: a character of several tokens appears once, whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self.decoder.decode(self.tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        return self.decoder.decode(b"", final=True)


def bytes_tokenizer() -> Tokenizer:
    return Tokenizer(SINGLE_BYTES, r"[\s\S]")


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's vocabulary, through tiktoken's download or its cache."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets any of its HTTP library's errors through
        raise TokenizerError(
            f"the gpt2 vocabulary could not be had ({type(error).__name__}): it is downloaded once; without a network, "
            "point TIKTOKEN_CACHE_DIR at a folder that holds tiktoken's copy, or use the tokenizer bpe or bytes"
        ) from None
    return Tokenizer(
        gpt2.token_byte_values_by_rank() if hasattr(gpt2, "token_byte_values_by_rank") else _ranks_of(gpt2),
        GPT2_PATTERN,
    )


def _ranks_of(encoding: tiktoken.Encoding) -> list[bytes]:
    return [encoding.decode_single_token_bytes(rank) for rank in range(encoding.n_vocab - 1)]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (arXiv 1508.07909 on bytes): merge the most frequent pair of neighbours until the vocabulary is
    full.

    texts: pieces of the training text, cut between words. vocab_size counts the end-of-text token. Ties go to the
    smaller ids, so the same text always gives the same tokenizer. Raises TokenizerError when no pair occurs twice any
    more.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(regex.findall(PATTERN, text))
    words = [word.encode().decode("latin-1") for word in counts]  # one character for each token, so far a byte each
    weights = list(counts.values())
    ranks = list(SINGLE_BYTES)
    ids = {token: rank for rank, token in enumerate(ranks)}
    pairs = PairCounts()
    for index, word in enumerate(words):
        for left, right in itertools.pairwise(word):
            pairs.add(left + right, weights[index], index)
    while len(ranks) < vocab_size - 1:
        pair = pairs.most_frequent()
        if pair is None:
            raise TokenizerError(
                f"a vocabulary of {vocab_size} is too large for this text, whose repeated pairs make only "
                f"{len(ranks) + 1} tokens: use a vocab-size of {len(ranks) + 1}, or the tokenizer bytes"
            )
        merged = ranks[ord(pair[0])] + ranks[ord(pair[1])]
        if merged not in ids:  # two ways to spell the same bytes are one token
            ids[merged] = len(ranks)
            ranks.append(merged)
        for index in pairs.where.pop(pair):
            words[index] = pairs.merge(words[index], pair, chr(ids[merged]), weights[index], index)
    return Tokenizer(ranks, PATTERN)


class PairCounts:
    """How often each pair of neighbouring tokens occurs, and in which words; the most frequent from a heap of counts,
    stale ones skipped."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.where: defaultdict[str, list[int]] = defaultdict(list)
        self.heap: list[tuple[int, str]] = []
        self.changed: set[str] = set()

    def add(self, pair: str, weight: int, index: int) -> None:
        self.counts[pair] += weight
        self.changed.add(pair)
        if weight > 0:
            self.where[pair].append(index)

    def merge(self, word: str, pair: str, merged: str, weight: int, index: int) -> str:
        """The word with every such pair made one token. Only what stands beside them is counted anew."""
        parts = word.split(pair)
        for number, (before, after) in enumerate(itertools.pairwise(parts)):
            self.counts[pair] -= weight
            left = before[-1:] or (pair[1] if number else "")
            if left:
                self.add(left + pair[0], -weight, index)
                self.add((before[-1:] or merged) + merged, weight, index)
            if after:
                self.add(pair[1] + after[0], -weight, index)
                self.add(merged + after[0], weight, index)
        return merged.join(parts)

    def most_frequent(self) -> str | None:
        for pair in self.changed:
            if self.counts[pair] > 1:
                heapq.heappush(self.heap, (-self.counts[pair], pair))
        self.changed.clear()
        while self.heap:
            count, pair = heapq.heappop(self.heap)
            if self.counts[pair] == -count:
                return pair
        return None
