"""A text as the page shows it: each token with its experts in every layer, its probability, and what else was expected.

Notation: T tokens, L MoE layers, K experts per token.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe.checkpoint import Run
from moe.lab.report.words import piece_of, pieces_of
from moe.lab.trace import trace

NUMBERS = 20_000  # of experts, gates and scores that one text may take in the page
LONGEST = 2000  # tokens of a text
ALTERNATIVES = 5


@dataclass(frozen=True)
class Text:
    name: str
    ids: list[int]  # the start of a text first, where it is one
    made: int = 0  # how many tokens at the end the model has written itself
    cut: bool = False  # there is more of it


def read(run: Run, text: Text) -> dict[str, Any]:
    """As JSON. A text that is too long for a page is cut."""
    model, tokenizer = run.model, run.tokenizer
    layers = max(len(model.moe_layers()), 1)
    fits = min(LONGEST, NUMBERS // (3 * layers * model.config.num_experts_per_tok))
    ids = text.ids[: max(fits, 2)]
    found = trace(model, ids, ALTERNATIVES, tokenizer.vocab_size)
    return {
        "name": text.name,
        "cut": text.cut or len(text.ids) > len(ids),
        "made": max(text.made - (len(text.ids) - len(ids)), 0),
        "pieces": pieces_of(tokenizer, ids),
        "layers": found.layers,
        "experts": found.chosen.tolist(),  # (L, T, K)
        "gates": rounded(found.gates),
        "scores": rounded(found.scores),
        "logprobs": [None, *found.logprobs[1:].double().numpy().round(4).tolist()],  # (T,)
        "alternatives": [
            [
                [piece_of(tokenizer, token), float(f"{chance:.3g}")]
                for token, chance in zip(tokens, chances, strict=True)
            ]
            if place
            else []
            for place, (tokens, chances) in enumerate(
                zip(found.alternatives.tolist(), found.chances.tolist(), strict=True)
            )
        ],
    }


def rounded(numbers: Tensor) -> list[Any]:
    return numbers.double().numpy().round(3).tolist()
