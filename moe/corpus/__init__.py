"""Text of any shape into token shards: where it comes from (sources, streams), what is made of it (shards), and the
making (build). Training needs no more of it than these names."""

from moe.corpus.build import prepare
from moe.corpus.shards import HEADER, Corpus, CorpusError, open_corpus

__all__ = ["HEADER", "Corpus", "CorpusError", "open_corpus", "prepare"]
