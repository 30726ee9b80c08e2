"""The tokenizer that came with an imported model, run by the `tokenizers` library.

Two kinds of vocabulary are known. *Byte-level* ones (Llama 3, Qwen, DeepSeek, OLMoE) write every byte as a letter, and
so can write anything. Those of *SentencePiece's* kind (Mixtral, Llama 2) hold characters, "▁" for a space, and tokens
such as <0x0A> for bytes that no character covers; they put a space before a text's first word, and decoding takes it
away again.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
import regex

from moe.tokenizer import Tokenizer, TokenizerError, join

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
            "a tokenizer from a Hugging Face folder needs the tokenizers library: pip install tokenizers"
        ) from None
    model = document.get("model")
    if isinstance(model, dict) and model.get("continuing_subword_prefix"):  # and where merges lack it, Rust aborts
        raise TokenizerError("its continuing_subword_prefix is not known here: no published family has one")
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
        try:
            ids = self.encode_bytes(data).tolist()
        except TokenizerError:  # a vocabulary that has neither bytes nor a token for what it does not know
            ids = self.known(data.decode("utf-8", "replace"))
        return [*self.before, *ids] or [self.start]

    def known(self, text: str, continuing: bool = False) -> list[int]:
        """The ids of what the vocabulary can hold of a text, by halves, between words where there are several."""
        try:
            return self.encode(text, continuing).tolist()
        except TokenizerError:
            if len(text) < 2:
                return []
            middle = len(text) // 2
            spaces = [at for at in (text.rfind(" ", 1, middle + 1), text.find(" ", middle + 1)) if at > 0]
            cut = min(spaces, key=lambda at: abs(at - middle), default=middle)
            return self.known(text[:cut], continuing) + self.known(text[cut:], True)

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


def checked_ids(ids: Any) -> frozenset[int]:
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise TokenizerError(f"token ids are whole numbers from 0 to 2**31 - 1, not {str(ids)[:80]}")
    return frozenset(ids)
