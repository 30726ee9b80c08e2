"""Text to token ids and back: byte-level BPE, run by tiktoken (`BytePairs`), or somebody else's tokenizer, run by the
`tokenizers` library (`HubTokenizer`).

Our own vocabularies hold all 256 bytes, so any text, and any sequence of bytes, can be written and comes back
unchanged. One special token, `<|endoftext|>`, stands before every document; it is the context of the first token. It is
never made from text that happens to spell it. How a vocabulary is learned from a text is in bpe.py.
"""

import base64
import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
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
        hub = isinstance(stored, dict) and stored.get("kind") == "huggingface"
        return HubTokenizer.from_json(stored) if hub else BytePairs.from_json(stored)

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
                raise
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
            complete = len(set(ranks)) == len(ranks) and set(SINGLE_BYTES) <= set(ranks)
        except (KeyError, TypeError, ValueError) as error:
            raise TokenizerError(f"not a tokenizer's file: {type(error).__name__}: {error}") from None
        if not unchanged or not complete:
            fault = "its hash differs" if complete else "it lacks bytes or repeats tokens"
            raise TokenizerError(f"the tokenizer's file is damaged: {fault}")
        return tokenizer


@dataclass(frozen=True)
class HubTokenizer(Tokenizer):
    """A tokenizer that came in a Hugging Face folder.

    document: its tokenizer.json, which alone decides the ids of a text. config: its tokenizer_config.json, which names
    the special tokens and holds the chat template. eos_ids: further ids that end what the model writes.
    """

    document: dict[str, Any] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    eos_ids: frozenset[int] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process is sent: no more than the fields."""
        return {"document": self.document, "config": self.config, "eos_ids": self.eos_ids}

    @cached_property
    def core(self) -> Any:
        """The `tokenizers.Tokenizer` that does the work. Raises TokenizerError where it refuses the document."""
        return build_core(self.document)

    @cached_property
    def rest_core(self) -> Any:
        """One that puts no space before a text."""
        parts = {name: self.document.get(name) for name in ("normalizer", "pre_tokenizer")}
        leadless = {name: without_lead(part) for name, part in parts.items()}
        return self.core if leadless == parts else build_core(self.document | leadless)

    def named(self, name: str) -> int | None:
        """The id of a special token by the name that it has in the configuration, such as eos_token."""
        token = self.config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        with rust(f"its {name}"):
            return self.core.token_to_id(content) if isinstance(content, str) else None

    @cached_property
    def end_of_text(self) -> int:
        known = [self.named("eos_token"), *sorted(self.eos_ids), self.named("bos_token")]
        found = next((token for token in known if token is not None), None)
        if found is None:
            raise TokenizerError(
                "the tokenizer has no token that ends a text: name one of its tokens as eos_token in "
                "tokenizer_config.json"
            )
        return found

    @cached_property
    def before(self) -> list[int]:
        """What the tokenizer itself puts before a text."""
        with rust("its post-processor"):
            shortest = min(self.core.get_vocab(with_added_tokens=False), key=lambda token: (len(token), token))
            encoded = self.core.encode(shortest)
        marked = zip(encoded.ids, encoded.special_tokens_mask, strict=True)
        return [token for token, _ in takewhile(lambda pair: pair[1], marked)]

    @property
    def start(self) -> int:
        bos = self.named("bos_token")
        return bos if bos in self.before else [self.end_of_text, *self.before][-1]

    @property
    def stops(self) -> frozenset[int]:
        return self.eos_ids | {self.end_of_text}

    @cached_property
    def vocab_size(self) -> int:
        return max([*self.core.get_vocab().values(), self.end_of_text]) + 1

    @cached_property
    def hash(self) -> str:
        deciding = json.dumps([self.document, self.end_of_text, self.start], sort_keys=True)
        return hashlib.sha256(deciding.encode()).hexdigest()

    def encode(self, text: str, continuing: bool = False) -> np.ndarray:
        core = self.rest_core if continuing else self.core
        with rust("the text cannot be encoded"):  # a batch, even of one: the interpreter's lock is not held meanwhile
            return np.array(core.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.uint32)

    def encode_documents(self, texts: list[str]) -> np.ndarray:
        with rust("the texts cannot be encoded"):
            encoded = self.core.encode_batch_fast(texts, add_special_tokens=False)
        return join([np.array(document.ids, dtype=np.uint32) for document in encoded], self.end_of_text)

    def encode_byte(self, byte: int) -> list[int]:
        """A vocabulary without a token for it says U+FFFD, the replacement character."""
        names = {("ByteLevel",): BYTE_LETTERS[byte], SENTENCEPIECE: f"<0x{byte:02X}>"}
        token = self.core.token_to_id(names.get(self.decoding[:3], ""))
        return self.encode("\ufffd", continuing=True).tolist() if token is None else [token]

    def prompt(self, data: bytes) -> list[int]:
        return [*self.before, *self.encode_bytes(data).tolist()] or [self.start]

    @cached_property
    def decoding(self) -> tuple[str, ...]:
        """The names of the steps from tokens to text. Raises TokenizerError where they are not known here."""
        whole = json.loads(self.core.decoder.__getstate__()) if self.core.decoder else {"decoders": []}
        steps = tuple(str(step["type"]) for step in whole.get("decoders", [whole]))
        if steps not in [(), ("ByteLevel",), ("Metaspace",), SENTENCEPIECE, (*SENTENCEPIECE, "Strip")]:
            raise TokenizerError(
                f"the tokenizer's decoder is {' + '.join(steps)}: those known here are ByteLevel, Metaspace and "
                f"{' + '.join(SENTENCEPIECE)}, with or without Strip"
            )
        return steps

    @property
    def lead(self) -> bytes:
        return b"" if self.decoding in [("ByteLevel",), SENTENCEPIECE] else b" "

    @cached_property
    def pieces(self) -> dict[int, bytes]:
        """The bytes of every token that is not special."""
        added = self.core.get_added_tokens_decoder()
        pieces = {token: self.spelled(text) for text, token in self.core.get_vocab().items() if token not in added}
        plain = {token: part.content for token, part in added.items() if not part.special}
        if self.decoding == ("ByteLevel",):  # the text of an added token is not written in byte letters
            return pieces | {token: text.encode() for token, text in plain.items()}
        return pieces | {token: self.spelled(text) for token, text in plain.items()}

    def spelled(self, text: str) -> bytes:
        """A token's text in the vocabulary, as bytes."""
        if self.decoding == ("ByteLevel",):
            known = all(letter in LETTER_BYTES for letter in text)
            return bytes(LETTER_BYTES[letter] for letter in text) if known else text.encode()
        if not self.decoding:  # words, with spaces between them
            return b" " + text.encode()
        if "ByteFallback" in self.decoding and regex.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
            return bytes([int(text[3:5], 16)])
        return text.replace(META_SPACE, " ").encode()

    def token_bytes(self, token: int) -> bytes:
        return self.pieces.get(token, b"")

    def to_json(self) -> dict[str, Any]:
        facts = {"tokenizer": self.document, "config": self.config, "stops": sorted(self.stops), "hash": self.hash}
        return {"format": 1, "kind": "huggingface"} | facts

    @staticmethod
    def from_json(stored: Any) -> "HubTokenizer":
        try:
            document, config, stops = stored["tokenizer"], stored["config"], stored["stops"]
        except (KeyError, TypeError) as error:
            raise TokenizerError(f"not a tokenizer's file: {type(error).__name__}: {error}") from None
        if not isinstance(document, dict) or not isinstance(config, dict):
            raise TokenizerError("not a tokenizer's file: its tokenizer and its config must be JSON objects")
        tokenizer = HubTokenizer(document, config, checked_ids(stops))
        if not tokenizer.pieces:
            raise TokenizerError("the tokenizer has no tokens that stand for a text")
        if tokenizer.hash != stored.get("hash"):
            raise TokenizerError("the tokenizer's file is damaged: its hash differs")
        return tokenizer


SENTENCEPIECE = ("Replace", "ByteFallback", "Fuse")
META_SPACE = "▁"  # how vocabularies of SentencePiece's kind write a space


def byte_letters() -> str:
    """The letters for the 256 bytes in byte-level vocabularies, as GPT-2 chose them: a printable byte is itself."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


BYTE_LETTERS = byte_letters()
LETTER_BYTES = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}


@contextmanager
def rust(what: str) -> Iterator[None]:
    """Whatever goes wrong inside the library, a panic included, which is no Exception, in one line."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        first = "".join(letter for letter in str(error).strip().split("\n")[0] if letter.isprintable())
        raise TokenizerError(f"{what}: {type(error).__name__}: {first}") from None


def build_core(document: dict[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` that takes a special token's name for text, and neither cuts nor pads."""
    try:
        import tokenizers
    except ImportError:
        raise TokenizerError(
            'a tokenizer from a Hugging Face folder needs the tokenizers library: pip install "moe[hub]"'
        ) from None
    with rust("the tokenizers library cannot run the tokenizer"):
        core = tokenizers.Tokenizer.from_str(json.dumps(document))
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = True
    return core


def without_lead(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space before a text."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Sequence":
        name = "normalizers" if "normalizers" in part else "pretokenizers"
        return part | {name: [without_lead(step) for step in part[name] if step.get("type") != "Prepend"]}
    if part.get("type") == "Prepend":
        return None
    changes = {"prepend_scheme": "never", "add_prefix_space": False}
    return part | {name: value for name, value in changes.items() if name in part}


def join(parts: list[np.ndarray], between: int) -> np.ndarray:
    """Arrays of ids one behind the other, an id between them."""
    pieces = [np.array([between], dtype=np.uint32)] * max(2 * len(parts) - 1, 0)
    pieces[::2] = parts
    return np.concatenate([np.zeros(0, dtype=np.uint32), *pieces])


def checked_ids(ids: Any) -> frozenset[int]:
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise TokenizerError(f"token ids are whole numbers from 0 on, not {str(ids)[:80]}")
    return frozenset(ids)


def bytes_tokenizer() -> BytePairs:
    return BytePairs(SINGLE_BYTES, r"[\s\S]")


def gpt2_tokenizer() -> BytePairs:
    """GPT-2's vocabulary, through tiktoken's download or its cache."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets any of its HTTP library's errors through
        raise TokenizerError(
            f"the gpt2 vocabulary could not be had ({type(error).__name__}): it is downloaded once; without a network, "
            "point TIKTOKEN_CACHE_DIR at a folder that holds tiktoken's copy, or use the tokenizer bpe or bytes"
        ) from None
    return BytePairs(
        gpt2.token_byte_values_by_rank() if hasattr(gpt2, "token_byte_values_by_rank") else _ranks_of(gpt2),
        GPT2_PATTERN,
    )


def _ranks_of(encoding: tiktoken.Encoding) -> list[bytes]:
    return [encoding.decode_single_token_bytes(rank) for rank in range(encoding.n_vocab - 1)]
