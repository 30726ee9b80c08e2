"""Writing: prefill, decode with the cache, and the ways to draw the next token.

Notation: B sequences, S prompt positions, N new tokens, V vocabulary.
"""

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moe.attention import Cache
from moe.checkpoint import Run
from moe.config import MoeError, SampleConfig
from moe.decoding.graphs import decoder
from moe.layers import evaluating
from moe.model import Transformer


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


def decode(
    model: Transformer,
    tokens: Tensor,
    config: SampleConfig,
    *,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    on_overflow: Callable[[str], None] | None = None,
) -> Iterator[Tensor]:
    """New tokens without end, one for each of the B sequences at a time, (B,) int64. tokens: (B, S) with S > 0.

    vocab_size: ids from here on only pad the embedding and are never drawn. When the context is full, the newest half
    of it is kept and read again; on_overflow is told so, once.
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
            new = draw(logits[:, :vocab_size], config, generator)
        pieces.append(new[:, None])
        length += 1
        yield new


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
    new_tokens = decode(model, tokens, config, generator=generator, vocab_size=vocab_size, on_overflow=to_stderr)
    out, stopped = [tokens], torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    with evaluating(model):
        for _ in range(max_new_tokens):
            new = next(new_tokens)
            if stop is not None:
                new = new.masked_fill(stopped, stop)
                stopped |= new == stop
            out.append(new[:, None])
            if stop is not None and bool(stopped.all()):
                break
    return torch.cat(out, dim=1)


def sample(
    run: Run,
    prompt: str,
    config: SampleConfig,
    max_new_tokens: int,
    num_samples: int = 1,
    seed: int | None = None,
    on_overflow: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, int]]:
    """(sample, token) as they are made, several samples as one batch; each ends before a token that stops it."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    start = prompt_tokens(run, prompt, num_samples)
    new_tokens = decode(
        run.model, start, config, generator=generator, vocab_size=run.tokenizer.vocab_size, on_overflow=on_overflow
    )
    going = set(range(num_samples))
    for _ in range(max_new_tokens):
        row_tokens = next(new_tokens).tolist()
        going -= {row for row in going if row_tokens[row] in run.tokenizer.stops}
        if not going:
            return
        yield from ((row, row_tokens[row]) for row in sorted(going))


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
    return prompt + run.tokenizer.decode(new, continuing=bool(prompt))


def prompt_tokens(run: Run, prompt: str, copies: int = 1) -> Tensor:
    """What begins a text and the prompt, `copies` times: (copies, S) int64 on the model's device."""
    try:
        data = prompt.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise SamplingError(f"character {error.start} of the prompt is half of a surrogate pair: mend it") from None
    ids = run.tokenizer.prompt(data)
    return torch.tensor(ids, device=run.model.embed_tokens.weight.device).expand(copies, -1)


def to_stderr(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)
