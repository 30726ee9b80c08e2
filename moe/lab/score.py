"""The price of a text under a model, in nats: the language-model loss, token by token.

Notation: B windows, S positions.

Every token is priced from those before it, the first from the start-of-text token. Two ways to cut a long text into
windows:

* `separate`: windows side by side. Each token is priced once; the first of a window sees only its predecessor. What
  `val_loss` in training is.
* `overlapping`: each window begins half a window after the last, and only its second half is priced, so that every
  token but the first window's sees at least half a window, of at most 4,096 tokens: in a whole context of 131,072
  Llama 3.1's attention alone would take 34 GFLOP a token, the rest of its 8B parameters 15.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.checkpoint import Run
from moe.config import MoeError
from moe.data import IGNORE, TokenStream, separate_windows
from moe.layers import evaluating
from moe.model import LOGITS, Transformer

Windows = Literal["overlapping", "separate"]
BATCH_TOKENS = 8192
WINDOW = 4096  # the most positions of an overlapping window


class ScoreError(MoeError):
    """A text that has no price."""


@dataclass(frozen=True)
class Score:
    nats: float
    characters: int
    bytes: int
    tokens: int

    def record(self, split: str = "val") -> dict[str, float]:
        """Its figures as training's metrics name them."""
        figures = self.to_json()
        names = {"nats_per_token": "loss", "nats_per_character": "nats_per_character", "bits_per_byte": "bits_per_byte"}
        return {f"{split}_tokens": self.tokens} | {f"{split}_{name}": figures[figure] for figure, name in names.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "nats_per_character": self.nats / max(self.characters, 1),
            "bits_per_byte": self.nats / math.log(2) / max(self.bytes, 1),
            "nats_per_token": self.nats / max(self.tokens, 1),
            "characters": self.characters,
            "bytes": self.bytes,
            "tokens": self.tokens,
        }


@torch.inference_mode()
def price(
    model: Transformer, batches: Iterator[tuple[Tensor, Tensor]], autocast: Callable[[], Any]
) -> tuple[np.ndarray, Tensor | None]:
    """The price in nats of every scored target, in order, float64; and the load of the experts over all of it, (L,
    E)."""
    device, prices, load = model.embed_tokens.weight.device, [], None
    for tokens, targets in batches:
        with evaluating(model), autocast():
            hidden, routing = model.hidden_states(tokens.to(device))
            for piece, goal in model.pieces(hidden, targets.to(device)):
                losses = F.cross_entropy(model.lm_head(piece).float(), goal, ignore_index=IGNORE, reduction="none")
                prices.append(losses[goal != IGNORE].cpu().double().numpy())
        if routing is not None:
            load = routing.load if load is None else load + routing.load
    return np.concatenate(prices) if prices else np.zeros(0), load


def check_length(stream: TokenStream, length: int) -> None:
    """Raises ScoreError when a split is shorter than a window."""
    if len(stream) <= length:
        raise ScoreError(
            f"the {stream.split} split has {len(stream)} tokens, fewer than one window of {length}: give a longer "
            "text, a larger --data.val-fraction or a smaller --train.sequence-length"
        )


def evaluate(
    model: Transformer, stream: TokenStream, length: int, autocast: Callable[[], Any], limit: int = 0
) -> tuple[Score, Tensor | None]:
    """A full pass over a split, or its first `limit` tokens, in separate windows: its price, and the load of the
    experts (L, E) over all of it."""
    total = min(limit or len(stream), len(stream))
    batches = separate_windows(
        lambda start, count: stream.read(start, min(count, total - start)), total, length, batch_size(model, length)
    )
    prices, load = price(model, batches, autocast)
    corpus, split = stream.corpus, stream.split
    if total == len(stream):
        return Score(float(prices.sum()), corpus.characters(split), corpus.bytes(split), len(prices)), load
    data = corpus.tokenizer.decode_bytes(stream.read(0, total).tolist())
    characters = sum(byte & 0xC0 != 0x80 for byte in data)  # all but the continuation bytes of UTF-8
    return Score(float(prices.sum()), characters, len(data), len(prices)), load


def batch_size(model: Transformer, length: int) -> int:
    """Windows at a time: as many as a CPU likes, while their logits make one piece."""
    return max(1, min(BATCH_TOKENS, LOGITS // model.config.vocab_size) // length)


def overlapping_windows(ids: np.ndarray, length: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows half a window apart; where they stand does not depend on what comes later. Targets seen before, and what
    fills up the last window, are -100."""
    half = max(length // 2, 1)
    starts = range(0, max(len(ids) - 1 - (length - half), 1), half)
    for first in range(0, len(starts), batch_size):
        rows = []
        for start in starts[first : first + batch_size]:
            row = ids[start : start + length + 1]
            targets = np.pad(row[1:], (0, length + 1 - len(row)), constant_values=IGNORE)
            targets[: length - half if start else 0] = IGNORE
            rows.append((np.pad(row[:-1], (0, length + 1 - len(row))), targets))
        tokens, wanted = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        yield tokens, wanted


def prices_of(run: Run, data: bytes, windows: Windows = "overlapping") -> np.ndarray:
    """The price of each token of any bytes, in nats, float64."""
    ids = np.concatenate([[run.tokenizer.start], run.tokenizer.encode_bytes(data)]).astype(np.int64)
    separate = windows == "separate"
    length = run.config.train.sequence_length if separate else min(run.model.config.max_position_embeddings, WINDOW)
    rows = batch_size(run.model, length)
    batches = (
        separate_windows(lambda start, count: ids[start : start + count], len(ids), length, rows)
        if separate
        else overlapping_windows(ids, length, rows)
    )
    return price(run.model, batches, lambda: torch.autocast("cpu", enabled=False))[0]


def score(run: Run, data: bytes, windows: Windows = "overlapping") -> Score:
    """The price of any bytes. Raises ScoreError for none at all."""
    if not data:
        raise ScoreError("an empty text has no price")
    prices = prices_of(run, data, windows)
    return Score(float(prices.sum()), len(data.decode("utf-8", "surrogateescape")), len(data), len(prices))
