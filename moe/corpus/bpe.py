"""Training a byte-level BPE: which pairs of neighbours become tokens, and in which order (arXiv 1508.07909 on bytes).

A word is a string with one character for each of its tokens, the character's number being the token's id: merging a
pair is then a matter of splitting the word at it.
"""

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable

import regex

from moe.tokenizer import PATTERN, SINGLE_BYTES, BytePairs, TokenizerError


def train_bpe(texts: Iterable[str], vocab_size: int) -> BytePairs:
    """Merge the most frequent pair of neighbours until the vocabulary is full.

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
    return BytePairs(ranks, PATTERN)


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
