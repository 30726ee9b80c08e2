"""Writing: prefill, decode with the cache, and the ways to draw the next token.

Notation: B sequences, S prompt positions, N new tokens, V vocabulary.

    p = softmax(logits / temperature), of which stays: the k largest (top-k); the fewest that hold this much probability
    (top-p, arXiv 1904.09751); what is at least this share of the largest (min-p, arXiv 2407.01082)

A model of 5M parameters writes 3.2 to 5.4 times as fast on a CPU as transformers (`python -m moe.lab bench decode`).
"""

import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from moe.attention import Cache
from moe.checkpoint import Run
from moe.config import MoeError, SampleConfig
from moe.decoding.graphs import decoder
from moe.layers import evaluating
from moe.model import Transformer

PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # the others are bytes


class SamplingError(MoeError):
    """A prompt or a setting that cannot be sampled from."""


def draw(logits: Tensor, config: SampleConfig, generator: torch.Generator | None = None) -> Tensor:
    """One token for each row: temperature, then top-k, top-p and min-p, then chance. (B, V) float -> (B,) int64."""
    best, likeliest = logits.max(-1)  # what is not a number counts as the largest
    if not best.isfinite().all():
        raise SamplingError("the model's outputs are not finite: its weights or its configuration are damaged")
    if config.temperature == 0:
        return likeliest
    below = logits.float() - best.float().unsqueeze(-1)  # 0 at most: nothing overflows
    logits = below / max(config.temperature, 1e-20)
    if 0 < config.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[..., -1:], -torch.inf)
    if config.top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= config.top_p  # the token that crosses the line stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -torch.inf)
    if config.min_p > 0:
        chances = logits.softmax(-1)
        logits = logits.masked_fill(chances < config.min_p * chances.amax(-1, keepdim=True), -torch.inf)
    chances = logits.softmax(-1).cpu()  # drawn on the CPU: a seed gives the same text on every device
    return torch.multinomial(chances, 1, generator=generator).squeeze(-1).to(logits.device)


class Step(NamedTuple):
    """A token more for each of B sequences."""

    tokens: Tensor  # (B,) int64
    logits: Tensor  # (B, V) what they were drawn from, before temperature and filters; the next step may write over it

    def logprobs(self) -> Tensor:
        """(B,) float32: the natural logarithm of the probability that the model gave each token."""
        return self.logits.float().log_softmax(-1).gather(-1, self.tokens[:, None])[:, 0]


def decode(
    model: Transformer,
    tokens: Tensor,
    config: SampleConfig,
    *,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    on_overflow: Callable[[str], None] | None = None,
) -> Iterator[Step]:
    """New tokens without end, one for each of the B sequences at a time. tokens: (B, S) with S > 0.

    vocab_size: V, ids from here on only pad the embedding and are never drawn. When the context is full, the newest
    half of it is kept and read again; on_overflow is told so, once.
    """
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise SamplingError(f"tokens must have the shape (B, S), with S at least 1, but are {tuple(tokens.shape)}")
    context, weight = model.config.max_position_embeddings, model.embed_tokens.weight
    half = (context + 1) // 2
    pieces, length, told = [tokens], tokens.shape[1], False  # the text, and how long it is
    cache: Cache | None = None
    step: Callable[[Tensor], Tensor] | None = None
    while True:
        if length > context:
            if on_overflow and not told:
                on_overflow(f"the text is longer than the context of {context} tokens: going on from the newest {half}")
            pieces, length, told = [torch.cat(pieces, dim=1)[:, -half:]], half, True
            cache = step = None
        with torch.inference_mode(), torch.autocast(weight.device.type, enabled=False):
            if cache is None:
                (window,) = pieces
                cache = Cache(model.config, len(window), length, weight.device, weight.dtype)
                last = model.hidden_states(window, cache)[0][:, -1]  # a prompt's other logits are never made
                logits = model.lm_head(last).float()  # (B, V)
            else:
                step = step or decoder(model, cache)
                logits = step(pieces[-1].squeeze(1))
            logits = logits[:, :vocab_size]
            new = draw(logits, config, generator)
        pieces.append(new[:, None])
        length += 1
        yield Step(new, logits)


def generate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Continue tokens (B, S) to exactly (B, S + max_new_tokens); with `stop`, to where every sequence has produced
    that token.

    temperature 0 is greedy. A sequence that stopped is filled up with `stop`.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    config = SampleConfig(temperature, top_k, top_p, min_p)
    steps = decode(model, tokens, config, generator=generator, vocab_size=vocab_size, on_overflow=to_stderr)
    out, stopped = [tokens], torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    with evaluating(model):
        for _ in range(max_new_tokens):
            new = next(steps).tokens
            if stop is not None:
                new = new.masked_fill(stopped, stop)
                stopped |= new == stop
            out.append(new[:, None])
            if stop is not None and bool(stopped.all()):
                break
    return torch.cat(out, dim=1)


class Drawn(NamedTuple):
    """A token of one of several samples."""

    sample: int
    token: int
    logprob: float | None  # of the model's own distribution, see Step.logprobs; None where it was not asked for
    ends: bool  # it is one that stops this sample, and no part of the text


def draws(
    run: Run,
    prompt: str,
    config: SampleConfig,
    max_new_tokens: int,
    num_samples: int = 1,
    seed: int | None = None,
    note: Callable[[str], None] | None = None,
    logprobs: bool = False,
) -> Iterator[Drawn]:
    """The tokens of several samples as they are made, as one batch, each up to the token that stops it. note is told of
    a prompt that the model does not read as it was given, and of an overflow."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    start = prompt_tokens(run, prompt, num_samples, note)
    steps = decode(run.model, start, config, generator=generator, vocab_size=run.tokenizer.vocab_size, on_overflow=note)
    going = list(range(num_samples))
    for step in islice(steps, max_new_tokens):
        tokens, prices = step.tokens.tolist(), step.logprobs().tolist() if logprobs else [None] * num_samples
        drawn = [Drawn(row, tokens[row], prices[row], tokens[row] in run.tokenizer.stops) for row in going]
        yield from drawn
        going = [each.sample for each in drawn if not each.ends]
        if not going:
            return


def sample(
    run: Run,
    prompt: str,
    config: SampleConfig,
    max_new_tokens: int,
    num_samples: int = 1,
    seed: int | None = None,
    note: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, int]]:
    """(sample, token) as they are made, several samples as one batch; each ends before a token that stops it."""
    for drawn in draws(run, prompt, config, max_new_tokens, num_samples, seed, note):
        if not drawn.ends:
            yield drawn.sample, drawn.token


def generate_text(
    run: Run,
    prompt: str = "",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
) -> str:
    """The prompt and what the run's model makes of it, up to an end of text."""
    config = SampleConfig(temperature, top_k, top_p, min_p)
    new = [token for _, token in sample(run, prompt, config, max_new_tokens, seed=seed)]
    return mended(prompt) + run.tokenizer.decode(new, continuing=bool(prompt))


def prompt_tokens(run: Run, prompt: str, copies: int = 1, note: Callable[[str], None] | None = None) -> Tensor:
    """What begins a text and the prompt, `copies` times: (copies, S) int64 on the model's device. No prompt is refused;
    note is told where the model reads another text than was given."""
    data = mended(prompt).encode("utf-8", "surrogateescape")
    ids = run.tokenizer.prompt(data)
    read = run.tokenizer.decode_bytes(ids)
    if note and (HALF.search(PAIR.sub("", prompt)) or read.strip() != data.strip()):
        note(f"the prompt holds what the tokenizer cannot; the model reads {shortened(read.decode(errors='replace'))}")
    return torch.tensor(ids, device=run.model.embed_tokens.weight.device).expand(copies, -1)


def mended(text: str) -> str:
    """A text that can be written as bytes: both halves of a surrogate pair as the character that they stand for, a half
    by itself as U+FFFD. What a byte that is no UTF-8 was read as stays (Python's surrogateescape)."""
    whole = PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
    return HALF.sub("\ufffd", whole)


def shortened(text: str, longest: int = 100) -> str:
    return repr(text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}")


def to_stderr(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)
