"""Text to token ids and back: byte-level BPE, run by tiktoken. What an imported model brings instead is in
corpus/imported.py.

Our own vocabularies hold all 256 bytes, so any text, and any sequence of bytes, can be written and comes back
unchanged. One special token, `<|endoftext|>`, stands before every document; it is the context of the first token. It is
never made from text that happens to spell it. How a vocabulary is learned from a text is in corpus/bpe.py. With tiny's
512 tokens one stands for 2.04 characters of Shakespeare: less than half the positions that single bytes would take.
"""

import base64
import codecs
import hashlib
import json
from abc import ABC, abstractmethod
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
BYTES_PATTERN = r"[\s\S]"
KNOWN_PATTERNS = (PATTERN, GPT2_PATTERN, BYTES_PATTERN)


class TokenizerError(MoeError):
    """A tokenizer that cannot be trained, loaded or used here."""


class Tokenizer(ABC):
    """What the rest of the project asks of a tokenizer.

    Where the parameter `continuing` is true, a text or its ids go on from others: tokenizers of SentencePiece's kind
    then put no space before the first word, and take none away.
    """

    @property
    def lead(self) -> bytes:
        """What decoding takes away from the very beginning of a text."""
        return b""

    @property
    @abstractmethod
    def end_of_text(self) -> int:
        """The id that stands between documents."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The largest id, special ones included, and one more."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """Of everything that decides which ids a text gets."""

    @property
    def start(self) -> int:
        """The id that begins a text: the context of its first token."""
        return self.end_of_text

    @property
    def stops(self) -> frozenset[int]:
        """The ids that end a text which the model writes."""
        return frozenset([self.end_of_text])

    @abstractmethod
    def encode(self, text: str, continuing: bool = False) -> np.ndarray:
        """Text to ids (n,) uint32. Text that spells a special token is text."""

    @abstractmethod
    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """The ids of several texts, an end-of-text token between them."""

    @abstractmethod
    def encode_byte(self, byte: int) -> list[int]:
        """The ids of a byte that is no part of a text."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """What a token stands for: nothing where it is special, or only pads the embedding."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]: ...

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Any bytes to ids: what is UTF-8 as text, every other byte by itself."""
        text = data.decode("utf-8", errors="surrogateescape")
        pieces = [np.zeros(0, dtype=np.uint32)]
        for match in regex.finditer("[\udc80-\udcff]+|[^\udc80-\udcff]+", text):
            piece = match.group()
            if "\udc80" <= piece[0] <= "\udcff":
                ids = [token for letter in piece for token in self.encode_byte(ord(letter) - 0xDC00)]
                pieces.append(np.array(ids, dtype=np.uint32))
            else:
                pieces.append(self.encode(piece, continuing=match.start() > 0))
        return np.concatenate(pieces)

    def prompt(self, data: bytes) -> list[int]:
        """What the model sees of a prompt, never nothing: the start of the text, and its ids."""
        return [self.start, *self.encode_bytes(data).tolist()]

    def decode_bytes(self, ids: Iterable[int], continuing: bool = False) -> bytes:
        data = b"".join(map(self.token_bytes, ids))
        return data if continuing else data.removeprefix(self.lead)

    def decode(self, ids: Iterable[int], continuing: bool = False) -> str:
        return self.decode_bytes(ids, continuing).decode("utf-8", errors="replace")

    def stream(self, continuing: bool = False) -> "TextStream":
        return TextStream(self, continuing)

    @staticmethod
    def from_json(stored: Any) -> "Tokenizer":
        """The tokenizer that `to_json` has described. Raises TokenizerError."""
        kind = stored.get("kind") if isinstance(stored, dict) else None
        if kind == "none":
            return NoTokenizer()
        if kind == "huggingface":
            from moe.corpus.imported import HubTokenizer  # the room below this one

            return HubTokenizer.from_json(stored)
        return BytePairs.from_json(stored)

    @staticmethod
    def load(path: Path) -> "Tokenizer":
        try:
            return Tokenizer.from_json(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, RecursionError, TokenizerError) as error:
            raise TokenizerError(f"{path}: {error}") from None


class TextStream:
    """Ids in, text out as soon as it is complete: a character of several tokens appears once, whole."""

    def __init__(self, tokenizer: Tokenizer, continuing: bool = False) -> None:
        self.tokenizer, self.lead = tokenizer, b"" if continuing else tokenizer.lead
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        data = self.tokenizer.token_bytes(token)
        if data:
            data, self.lead = data.removeprefix(self.lead), b""
        return self.decoder.decode(data)

    def finish(self) -> str:
        return self.decoder.decode(b"", final=True)


@dataclass(frozen=True)
class BytePairs(Tokenizer):
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
        deciding = json.dumps([self.pattern, [token.hex() for token in self.ranks], END_OF_TEXT])
        return hashlib.sha256(deciding.encode()).hexdigest()

    def encode(self, text: str, continuing: bool = False) -> np.ndarray:
        if self.ranks == SINGLE_BYTES:
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a million spaces in a row are more than tiktoken's pattern matcher can take at once
            if len(text) <= PIECE:
                raise TokenizerError("the tokenizer's pattern cannot be matched with this text") from None
            return np.concatenate([self.encode(text[start : start + PIECE]) for start in range(0, len(text), PIECE)])

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        """Many short texts at the speed of one long."""
        if self.ranks != SINGLE_BYTES and not any(END_OF_TEXT in text for text in texts):
            try:
                return self.encoding.encode_to_numpy(END_OF_TEXT.join(texts), allowed_special={END_OF_TEXT})
            except ValueError:
                pass  # see encode
        return join([self.encode(text) for text in texts], self.end_of_text)

    def encode_byte(self, byte: int) -> list[int]:
        return [self.byte_ids[byte]]

    @cached_property
    def byte_ids(self) -> list[int]:
        ids = {token: rank for rank, token in enumerate(self.ranks)}
        return [ids[byte] for byte in SINGLE_BYTES]

    def token_bytes(self, token: int) -> bytes:
        return self.ranks[token] if 0 <= token < len(self.ranks) else b""

    def to_json(self) -> dict[str, Any]:
        ranks, specials = [base64.b64encode(token).decode() for token in self.ranks], {END_OF_TEXT: self.end_of_text}
        return {"format": 1, "pattern": self.pattern, "ranks": ranks, "specials": specials, "hash": self.hash}

    @staticmethod
    def from_json(stored: Any) -> "BytePairs":
        try:
            ranks = [base64.b64decode(token, validate=True) for token in stored["ranks"]]
            tokenizer = BytePairs(ranks, str(stored["pattern"]))
            unchanged = tokenizer.hash == stored["hash"]
            complete = len(set(ranks)) == len(ranks) and set(SINGLE_BYTES) <= set(ranks) and b"" not in ranks
        except (KeyError, TypeError, ValueError) as error:
            raise TokenizerError(f"not a tokenizer's file: {type(error).__name__}: {error}") from None
        if not unchanged or not complete:
            fault = "its hash differs" if complete else "it lacks bytes or repeats tokens"
            raise TokenizerError(f"the tokenizer's file is damaged: {fault}")
        if tokenizer.pattern not in KNOWN_PATTERNS:  # others may never end, or end tiktoken
            raise TokenizerError("the tokenizer's file is damaged: its pattern is none of those that are made here")
        return tokenizer


class NoTokenizer(Tokenizer):
    """Of a model that was imported without one: it neither reads nor writes text."""

    end_of_text = vocab_size = 0
    hash = "none"

    def refuse(self, *_: Any, **__: Any) -> Any:
        raise TokenizerError("this model was imported without a tokenizer: import it again with --tokenizer FOLDER")

    encode = encode_documents = encode_byte = token_bytes = refuse

    def to_json(self) -> dict[str, Any]:
        return {"format": 1, "kind": "none"}


def join(parts: list[np.ndarray], between: int) -> np.ndarray:
    """Arrays of ids one behind the other, an id between them."""
    pieces = [np.array([between], dtype=np.uint32)] * max(2 * len(parts) - 1, 0)
    pieces[::2] = parts
    return np.concatenate([np.zeros(0, dtype=np.uint32), *pieces])


def bytes_tokenizer() -> BytePairs:
    return BytePairs(SINGLE_BYTES, BYTES_PATTERN)


def gpt2_tokenizer() -> BytePairs:
    """GPT-2's vocabulary, through tiktoken's download or its cache."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets any of its HTTP library's errors through
        raise TokenizerError(
            f"the gpt2 vocabulary could not be had ({type(error).__name__}): it is downloaded once; without a network, "
            "point TIKTOKEN_CACHE_DIR at a folder that holds tiktoken's copy, or use the tokenizer bpe or bytes"
        ) from None
    return BytePairs([gpt2.decode_single_token_bytes(rank) for rank in range(gpt2.n_vocab - 1)], GPT2_PATTERN)
