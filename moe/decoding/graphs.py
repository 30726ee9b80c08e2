"""A new token in one call to the GPU: the step of decoder.py, recorded as a CUDA graph.

Notation: B sequences, L positions there is room for, p rotated numbers of a head.

A small model's step is some hundred kernels of a few microseconds each, and a CPU takes longer to launch them than a
GPU to run them. A graph is launched as a whole. What it repeats is what was recorded: the same kernels, on the same
memory, in the same shapes. So here the place to write at is a number on the GPU, and what is read is always the whole
room, of which the part not filled yet counts for nothing. A full room moves to one twice as long, as any cache does,
and is recorded anew.

Written for NVIDIA's GPUs, and tested without one: all but the recording itself.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from moe.attention import Cache
from moe.decoding.decoder import DecodedMoE, Decoder, Memory
from moe.model import Transformer

ROOM = 256  # positions at least: fewer recordings
Step = Callable[[], Tensor]


def decoder(model: Transformer, cache: Cache) -> Callable[[Tensor], Tensor]:
    """The fastest way to write behind a cache, called as Decoder is."""
    step = Decoder(model, cache)
    if step.embedding.device.type != "cuda":
        return step
    backends = {mlp.backend for *_, mlp in step.blocks if isinstance(mlp, DecodedMoE)}
    return step if any(waits(backend, step.embedding.dtype) for backend in backends) else GraphDecoder(step)


def waits(backend: str, dtype: torch.dtype) -> bool:
    """Whether a GPU's experts need to know on the CPU who was chosen: the loop, and the products that PyTorch puts in
    the place of grouped ones, which it has itself for bfloat16 from compute capability 9.0 on."""
    if backend == "grouped":
        return dtype != torch.bfloat16 or torch.cuda.get_device_capability() < (9, 0)
    return backend == "loop"


class Room(Memory):
    """A cache of fixed length, whose end is a number on the device."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        for layer, entries in enumerate(cache.entries):
            if entries.shape[1] == cache.length:
                cache.grow(layer, min(max(cache.length + 1, ROOM), cache.context))
        self.entries = cache.entries
        for entries in self.entries:
            entries[:, cache.length :].zero_()  # it will be weighed by 0, and what is not a number stays so
        self.length = self.entries[0].shape[1]
        self.places = torch.arange(self.length, device=self.entries[0].device)  # (L,)
        self.position = self.places[cache.length : cache.length + 1].clone()

    def look(self) -> None:
        """Part of the step: what lies behind the position is not there yet."""
        self.bias = torch.zeros_like(self.places, dtype=self.entries[0].dtype).unsqueeze(0)
        self.bias.masked_fill_(self.places > self.position, -torch.inf)

    def put(self, layer: int, entry: Tensor) -> Tensor:
        return self.entries[layer].index_copy_(1, self.position, entry.unsqueeze(1))


class GraphDecoder:
    """As Decoder, (B,) int64 -> (B, V) float32; and as that from the first recording on that fails."""

    def __init__(self, step: Decoder) -> None:
        self.step, self.cache = step, step.cache
        self.tokens = torch.zeros(len(self.cache.entries[0]), dtype=torch.int64, device=step.embedding.device)
        self.turn = step.turns.at(self.cache.length).clone()  # (p, p)
        self.room: Room | None = None
        self.replay: Step | None = None
        self.works = True

    def __call__(self, tokens: Tensor) -> Tensor:
        position = self.cache.length
        if self.works and (self.room is None or position == self.room.length):
            self.record()
        if self.room is None or self.replay is None:
            return self.step(tokens)
        self.tokens.copy_(tokens)
        self.turn.copy_(self.step.turns.at(position))
        self.room.position.fill_(position)
        logits = self.replay().clone()  # the next token's will lie where these do
        self.cache.length += 1
        return logits

    def record(self) -> None:
        self.room = room = Room(self.cache)

        def step() -> Tensor:
            room.look()
            return self.step.head(self.step.state(self.tokens, self.turn, room)).float()

        try:
            self.replay = recorded(step)
        except RuntimeError as error:
            self.room = self.replay = None
            self.works = False
            reason = str(error).strip().split("\n")[0][:160]
            warnings.warn(f"CUDA graphs failed here ({reason}): writing goes on without them", stacklevel=2)


def recorded(step: Step) -> Step:
    """To be called for the same again. What libraries do when they are first used is no part of a graph, so the step is
    run before, in a stream of its own, as PyTorch's documentation of CUDA graphs has it."""
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            logits = step()
    finally:
        torch.cuda.set_stream(before)  # a recording that fails does not come back to it by itself

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
