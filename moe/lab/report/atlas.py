"""What each expert is for: who comes to it, how well that can be told beforehand, and who could stand in for it.

Notation: T tokens, L MoE layers, E routed experts, K experts per token, D model width.

* **lift**: how many times more often a token is sent to an expert than tokens are on the whole; reckoned with PRIOR
  tokens more that are spread as all are, so that rare ones do not lead by chance.
* **specialisation**: the mutual information I(expert; X) between a choice and what is known of its token, X its id, its
  position in the window or the token before, as a share of the most there can be: the choice's entropy less log K, as
  K experts are chosen at a time. Counts of a limited text find some information where there is none: what is found with
  X shuffled is taken off, above and below.
* **similarity**: the mean cosine between the outputs of two experts for the same tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.data import separate_windows
from moe.experts import MoE, swiglu
from moe.lab.report.charts import similarity_chart
from moe.lab.report.words import context_of, piece_of
from moe.lab.score import batch_size
from moe.lab.trace import hooked, recorded_routing
from moe.layers import evaluating
from moe.machine.cost import count
from moe.model import Transformer
from moe.tokenizer import Tokenizer

OPERATIONS, FEWEST, MOST = 1e12, 2048, 32_768  # of the model on the text; tokens of it
PRIOR, SEEN = 10, 5  # tokens added to each count; how often a token must have come to be named
NAMED, EXAMPLES = 8, 3  # tokens of an expert, places in the text
PLACES, SHUFFLES = 16, 4  # positions are told apart by sixteenths of the window
TELLING = 0.75  # of the information there can be: where chance finds more, nothing can be told
PROBES = 128  # tokens for which outputs are compared
EXPERTS = 400  # described at most; of more, whole layers are left out
COMPARED = 16_384  # pairs of experts of all layers that are compared in a picture


@dataclass(frozen=True)
class Routed:
    """A text in separate windows, and where its tokens went."""

    ids: np.ndarray  # (T,)
    positions: np.ndarray  # (T,) in the window
    layers: list[int]
    chosen: np.ndarray  # (L, T, K)
    gates: np.ndarray  # (L, T, K)


def enough_tokens(model: Transformer) -> int:
    """Tokens that an atlas is made of: as many as a laptop reads in seconds."""
    return int(np.clip(OPERATIONS / (2 * count(model.config).active), FEWEST, MOST))


def route(model: Transformer, ids: np.ndarray, window: int) -> Routed:
    """Of a model with experts; all but the last of the ids, two at least."""
    device, found = model.embed_tokens.weight.device, []
    batches = separate_windows(
        lambda start, number: ids[start : start + number], len(ids), window, batch_size(model, window)
    )
    with torch.inference_mode(), torch.autocast(device.type, enabled=False), evaluating(model):
        for tokens, _ in batches:
            with recorded_routing(model) as routing:
                model.hidden_states(tokens.to(device))
            found.append([torch.stack(parts) for parts in map(list, zip(*routing, strict=True))][:2])
    chosen, gates = (torch.cat(parts, 1).numpy() for parts in zip(*found, strict=True))
    return Routed(ids[:-1], np.arange(len(ids) - 1) % window, model.moe_layer_numbers(mtp=False), chosen, gates)


def atlas(model: Transformer, tokenizer: Tokenizer, routed: Routed) -> list[dict[str, Any]]:
    """A page for each layer, or for some of a large model's, spread evenly."""
    experts = model.config.n_routed_experts
    number = max(min(len(routed.layers), EXPERTS // experts), 1)
    shown = np.unique(np.linspace(0, len(routed.layers) - 1, number).round().astype(int))
    alike = similarities(model, torch.from_numpy(routed.ids[:PROBES])) if experts**2 <= COMPARED else {}
    compared = set(shown[:: max(-(-len(shown) * experts**2 // COMPARED), 1)])
    pages = []
    for index in shown:
        chosen, gates, layer = routed.chosen[index], routed.gates[index], routed.layers[index]
        pages.append(
            {
                "layer": layer,
                "experts": list(describe(tokenizer, routed.ids, chosen, gates, experts)),
                "specialisation": specialisation(routed, index),
                "chart": similarity_chart(layer, alike[layer]) if alike and index in compared else None,
            }
        )
    return pages


def describe(
    tokenizer: Tokenizer, ids: np.ndarray, chosen: np.ndarray, gates: np.ndarray, experts: int
) -> Iterator[dict[str, Any]]:
    """Each expert's share of the work, the tokens it is most drawn to, and some of them in their places."""
    names, kinds, counts = np.unique(ids, return_inverse=True, return_counts=True)
    for expert in range(experts):
        mine = chosen == expert  # (T, K)
        here = mine.any(-1)  # (T,)
        share, weight = here.mean(), np.where(mine, gates, 0).sum(-1)
        got = np.bincount(kinds[here], minlength=len(names))
        lift = (got + PRIOR * share) / (counts + PRIOR) / max(share, 1e-12)
        lift[(got < SEEN) | (lift <= 1)] = 0
        best = [index for index in np.argsort(-lift, kind="stable")[:NAMED] if lift[index] > 0]
        tokens = [
            {
                "text": piece_of(tokenizer, int(names[index])),
                "lift": round(float(lift[index]), 2),
                "share": round(float(got[index] / counts[index]), 3),
                "count": int(got[index]),
            }
            for index in best
        ]
        places = [int(np.where((kinds == index) & here, weight, -1).argmax()) for index in best[:EXAMPLES]]
        yield {
            "expert": expert,
            "share": round(float(share / chosen.shape[1]), 4),
            "gate": round(float(weight[here].mean()) if here.any() else 0.0, 3),
            "tokens": tokens,
            "examples": [context_of(tokenizer, ids, place) for place in places],
        }


def specialisation(routed: Routed, index: int) -> dict[str, float]:
    """How much of the choice is told by the token, by its position, by the token before."""
    chosen, window = routed.chosen[index], int(routed.positions.max()) + 1
    places = routed.positions * PLACES // window
    follows = routed.positions > 0
    before = np.roll(routed.ids, 1)[follows]
    found = {"token": (chosen, routed.ids), "position": (chosen, places), "token before": (chosen[follows], before)}
    shares = {name: explained(*pair) for name, pair in found.items()}
    return {name: round(share, 4) for name, share in shares.items() if not np.isnan(share)}


def explained(chosen: np.ndarray, known: np.ndarray) -> float:
    """I(choice; known) over the most it could be, both less what chance would find. (T, K), (T,) -> 0 to 1; nan where
    the text is too short to tell."""
    if len(known) < 2:
        return float("nan")
    most = entropy_of(np.unique(chosen, return_counts=True)[1]) - np.log(chosen.shape[1])
    random, kinds = np.random.default_rng(0), np.unique(known, return_inverse=True)[1]
    chance = float(np.mean([information(chosen, random.permutation(kinds)) for _ in range(SHUFFLES)]))
    if most < 1e-3:  # all experts are chosen
        return 0.0
    if chance > TELLING * most:
        return float("nan")
    return min(max(information(chosen, kinds) - chance, 0.0) / (most - chance), 1.0)


def information(chosen: np.ndarray, kinds: np.ndarray) -> float:
    """Mutual information in nats of the T*K pairs of an expert and its token's kind."""
    kinds = np.repeat(kinds, chosen.shape[1])
    experts = chosen.reshape(-1)
    parts = (experts, kinds, kinds * (int(experts.max()) + 1) + experts)
    alone, known, both = (entropy_of(np.unique(part, return_counts=True)[1]) for part in parts)
    return alone + known - both


def entropy_of(counts: np.ndarray) -> float:
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def similarities(model: Transformer, ids: Tensor) -> dict[int, np.ndarray]:
    """For each layer with experts: (E, E), the mean cosine between the outputs of any two for the same tokens."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: Any) -> None:
        inputs.append(arguments[0])

    device = model.embed_tokens.weight.device
    with torch.inference_mode(), torch.autocast(device.type, enabled=False), evaluating(model):
        with hooked(model, lambda layer: layer.router.register_forward_pre_hook(keep)):
            model.hidden_states(ids[None, : model.config.max_position_embeddings].to(device))
        blocks = [block for block in model.blocks() if isinstance(block.mlp, MoE)]
        return {block.layer: cosines(block.mlp, x) for block, x in zip(blocks, inputs, strict=False)}


def cosines(layer: nn.Module, x: Tensor) -> np.ndarray:
    """x: (N, D) -> (E, E)."""
    assert isinstance(layer, MoE)
    outputs = []
    for gate_and_up, down in zip(layer.gate_up_proj, layer.down_proj, strict=True):
        out = F.linear(swiglu(F.linear(x, gate_and_up)), down).float()  # (N, D)
        outputs.append(F.normalize(out, dim=-1))
    stacked = torch.stack(outputs)  # (E, N, D)
    return (torch.einsum("end,fnd->ef", stacked, stacked) / len(x)).cpu().numpy()


def told_by(pages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the choice of an expert is told by, where that can be said."""
    return list(dict.fromkeys(name for page in pages for name in page["specialisation"]))


def in_words(pages: Sequence[Mapping[str, Any]]) -> str:
    """What the choice of an expert follows, over all layers."""
    if not pages:
        return ""
    known = [page["specialisation"] for page in pages]
    means = {name: float(np.mean([shares[name] for shares in known if name in shares])) for name in told_by(pages)}
    if not means:
        return "The text is too short to tell what the choice of an expert follows."
    shares = ", ".join(f"{100 * share:.0f} % by the {name}" for name, share in means.items())
    strongest = max(means, key=lambda name: means[name])
    if means[strongest] < 0.02:
        return f"The choice follows nothing that was looked at ({shares})."
    words = {"token": "which token it is", "position": "where it stands", "token before": "which token stood before"}
    return f"How much of the choice of an expert is told: {shares}. What decides most is {words[strongest]}."
