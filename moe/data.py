"""Memory-mapped shards, the order in which training reads them, and the cursor that remembers the place.

Notation: B sequences, S positions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe.corpus import HEADER, Corpus, CorpusError

IGNORE = -100  # a target that is not scored


class TokenStream:
    """One split's shards as one long array of ids."""

    def __init__(self, corpus: Corpus, split: str) -> None:
        self.maps = [
            np.memmap(path, np.dtype(head.dtype), "r", HEADER, (head.tokens,))
            for path, head in corpus.shards[split]
            if head.tokens
        ]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.maps])
        self.corpus, self.split = corpus, split

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """ids[start : start + length] as int64, across shards, cut at the end. Raises CorpusError for an id outside
        the vocabulary."""
        parts, end = [], min(start + length, len(self))
        while start < end:
            index = int(np.searchsorted(self.starts, start, side="right")) - 1
            part = self.maps[index][start - self.starts[index] : end - self.starts[index]]
            parts.append(part.astype(np.int64))
            start += len(part)
        ids = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        if ids.size and ids.max() >= self.corpus.tokenizer.vocab_size:
            raise CorpusError(
                f"{self.corpus.folder}: id {ids.max()} in the {self.split} split is beyond the vocabulary: "
                "prepare the text again"
            )
        return ids


@dataclass
class Cursor:
    """How far training has read: this many windows of this epoch."""

    epoch: int = 0
    window: int = 0


class Batches:
    """Endless training batches. Each epoch cuts the split into windows from another offset and shuffles them, by seed
    and epoch number alone, so the cursor is all there is to remember."""

    def __init__(
        self, stream: TokenStream, batch_size: int, sequence_length: int, seed: int, cursor: Cursor | None = None
    ) -> None:
        if len(stream) <= 2 * sequence_length:
            raise CorpusError(
                f"the training split has {len(stream)} tokens, too few for windows of {sequence_length}: "
                "add text or lower --train.sequence-length"
            )
        self.stream, self.batch_size, self.sequence_length, self.seed = stream, batch_size, sequence_length, seed
        self.cursor = cursor or Cursor()
        self._shuffle()
        if self.cursor.window > len(self.starts):
            raise CorpusError(f"state.json: window {self.cursor.window} is beyond the {len(self.starts)} of an epoch")

    def _shuffle(self) -> None:
        rng = np.random.default_rng((self.seed, self.cursor.epoch))
        offset = int(rng.integers(self.sequence_length))
        windows = (len(self.stream) - 1 - offset) // self.sequence_length
        self.starts = offset + self.sequence_length * rng.permutation(windows)

    def next(self, device: str = "cpu", parts: int = 1) -> tuple[Tensor, Tensor]:
        """Tokens and their successors, (B, S) int64 each, or (B * parts, S / parts)."""
        rows = []
        for _ in range(self.batch_size):
            if self.cursor.window == len(self.starts):
                self.cursor = Cursor(self.cursor.epoch + 1)
                self._shuffle()
            rows.append(self.stream.read(int(self.starts[self.cursor.window]), self.sequence_length + 1))
            self.cursor.window += 1
        ids = torch.from_numpy(np.stack(rows)).to(device)
        shape = (-1, self.sequence_length // parts)
        return ids[:, :-1].reshape(shape), ids[:, 1:].reshape(shape)


def separate_windows(
    read: Callable[[int, int], np.ndarray], total: int, length: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`total` ids in windows that do not overlap: every id but the first is a target once. The last window is as short
    as what is left.

    read(start, n) gives ids. Yields tokens and targets, (up to batch_size, length) int64.
    """
    span = batch_size * length
    for start in range(0, total - 1, span):
        ids = torch.from_numpy(read(start, span + 1))
        last = len(ids) - 1
        whole = last // length * length
        for begin, end in ((0, whole), (whole, last)):
            if begin < end:
                shape = (-1, min(length, end - begin))
                yield ids[begin:end].view(shape), ids[begin + 1 : end + 1].view(shape)
