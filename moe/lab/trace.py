"""What a model does with a text, token by token: the experts of every MoE layer, and what it expected to read.

Notation: T tokens of the text, L MoE layers, E routed experts, K experts per token, A alternatives, V vocabulary.

A token's experts are those that work on it as an input; its probability is what the tokens before it made expected.
A text longer than the context is read in windows half a window apart, as `score` reads it, and each token is looked at
where more of the text stands before it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe.experts import MoE
from moe.layers import evaluating
from moe.model import Transformer
from moe.router import Routing

WINDOW = 4096  # the most positions that are read at a time


@dataclass(frozen=True)
class Trace:
    """On the CPU, float32 but for what counts."""

    tokens: list[int]  # the T ids
    layers: list[int]  # the numbers of the L layers that have experts, from 0
    chosen: Tensor  # (L, T, K) int64, the experts, the one with the largest gate first
    gates: Tensor  # (L, T, K)
    scores: Tensor  # (L, T, K), the affinities of the chosen, without the bias
    logprobs: Tensor  # (T,) natural logarithms; of the first token, before which there is nothing, nan
    alternatives: Tensor  # (T, A) int64, the likeliest tokens in this one's place, the likeliest first
    chances: Tensor  # (T, A), their probabilities; nan for the first token


def trace(model: Transformer, ids: Sequence[int], alternatives: int = 5, vocab_size: int | None = None) -> Trace:
    """ids: T of them, at least one; what begins a text comes first. vocab_size: ids from here on only pad the
    embedding and are no alternatives."""
    length = min(model.config.max_position_embeddings, WINDOW)
    device, text = model.embed_tokens.weight.device, torch.tensor(ids, dtype=torch.int64)
    count = min(alternatives, vocab_size or model.config.vocab_size)
    routings, prices = [], []
    with torch.inference_mode(), torch.autocast(device.type, enabled=False), evaluating(model):
        for start, first in reading_windows(len(ids), length):
            window = text[start : start + length].to(device)
            with recorded_routing(model) as routing:
                hidden, _ = model.hidden_states(window[None])
            following = text[start + 1 : start + length + 1].to(device)
            routings.append([torch.stack(parts)[:, first:] for parts in map(list, zip(*routing, strict=True))])
            prices.append(priced(model, hidden[0, first : len(following)], following[first:], count, vocab_size))
    nothing = (torch.full((1,), torch.nan), torch.zeros(1, count, dtype=torch.int64), torch.full((1, count), torch.nan))
    joined = [torch.cat(parts) for parts in zip(nothing, *prices, strict=True)]
    layers = model.moe_layer_numbers(mtp=False)
    if not layers:
        none = torch.zeros(0, len(ids), model.config.num_experts_per_tok)
        return Trace(list(ids), layers, none.long(), none, none, *joined)
    return Trace(list(ids), layers, *(torch.cat(parts, dim=1) for parts in zip(*routings, strict=True)), *joined)


def reading_windows(total: int, length: int) -> Iterator[tuple[int, int]]:
    """(where a window starts, how many of its positions belong to the one before it), half a window apart."""
    half, start = max(length // 2, 1), 0
    yield start, 0
    while start + length < total:
        start += half
        yield start, length - half


@contextmanager
def recorded_routing(model: Transformer) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """While inside, each router's (chosen, gates, scores of the chosen), (T, K) each, in the order of the layers."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(_: nn.Module, __: Any, routing: Routing) -> None:
        gates, order = routing.gates.sort(dim=-1, descending=True)
        chosen = routing.chosen.gather(-1, order)
        seen.append((chosen.cpu(), gates.cpu(), routing.scores.gather(-1, chosen).cpu()))

    with hooked(model, lambda layer: layer.router.register_forward_hook(record)):
        yield seen


@contextmanager
def hooked(model: Transformer, hook: Callable[[MoE], Any]) -> Iterator[None]:
    """With a hook in each MoE layer, which goes again at the end."""
    handles = [hook(layer) for layer in model.moe_layers()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def priced(
    model: Transformer, hidden: Tensor, following: Tensor, count: int, vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden: (N, D), following: (N,) -> the log-probabilities of those (N,), and the likeliest tokens with their
    probabilities, (N, A) each."""
    found = []
    for piece, goal in model.pieces(hidden[None], following[None]):
        logprobs = model.lm_head(piece).float().log_softmax(-1)  # (R, V)
        best = logprobs[:, :vocab_size].topk(count)
        found.append((logprobs.gather(-1, goal[:, None])[:, 0], best.indices, best.values.exp()))
    logprobs, indices, chances = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    return logprobs, indices, chances
