"""Who goes where: scores, choice, gates, and keeping the load even (DeepSeek-V3, section 2.1.2, eq. 12-20).

Notation: B sequences, S positions, T = B*S tokens, D model width, E routed experts, K experts per token.

    s = sigmoid(W x)                    eq. 15: a row of W (E, D) for each expert
    chosen = the K largest of s + b     eq. 16
    g = s / sum of s over the chosen    eq. 13-14, without b

A router left to itself feeds whichever experts got a lucky start, until others starve. (In tiny none dies, but the
busiest does 3.3 times an even share: MaxVio 2.34, `python -m moe.lab study balance`.) Two means work against it, both
on by default:

* the **bias** (eq. 16): after each optimizer step every expert with less than the mean load gains `bias_update_speed`
  and every one with more loses it, then all are re-centred on zero. The bias takes part in the choice only, so
  balancing by it never distorts the output. At 1e-3 DeepSeek's 1B ablation has MaxVio 0.04 where the auxiliary loss
  leaves 0.72, at a lower perplexity (arXiv 2408.15664). Alone it has 0.18 in tiny.
* the **sequence-wise balance loss** (eq. 17-20): a small term, `aux_loss_alpha` = 1e-4, against imbalance within a
  single sequence. Alone, at ten times that weight, it leaves 0.87.

Everything here is a value that is returned, never a counter hidden in the module: evaluation cannot move the balance,
accumulation and recomputation cannot count a token twice.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig

TINY = 1e-20  # keeps the gates' sum off zero when every score underflows


class Routing(NamedTuple):
    """What the router decided for T tokens."""

    chosen: Tensor  # (T, K) int64, expert indices
    gates: Tensor  # (T, K) float32, the weights of their outputs
    scores: Tensor  # (T, E) float32, affinities without the bias
    logits: Tensor  # (T, E) float32


class RoutingStats(NamedTuple):
    """What training needs to know about one layer's (or, stacked, every layer's) routing."""

    load: Tensor  # (E,) or (L, E) int64: tokens each expert received
    balance_loss: Tensor  # () or (L,) unweighted, 1 at perfect balance
    z_loss: Tensor  # () or (L,) unweighted


class Router(nn.Module):
    """Choose K experts per token and weigh them (DeepSeek-V3, eq. 12-16)."""

    expert_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(
            torch.empty(config.n_routed_experts, config.hidden_size)
        )  # (E, D), the experts' centroids
        self.register_buffer(
            "expert_bias", torch.zeros(config.n_routed_experts)
        )  # (E,) float32, moved by update_bias alone
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.config.initializer_range)
        nn.init.zeros_(self.expert_bias)

    def forward(self, x: Tensor) -> Routing:
        """x: (T, D) of any float dtype. The whole computation is float32: near-ties decide who is chosen."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # (T, E)
        scores = self.affinities(logits)
        chosen = self.select(scores.detach() + self.expert_bias)  # (T, K)
        return Routing(chosen, self.gates(scores, chosen), scores, logits)

    def affinities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)

    def gates(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """From the scores without the bias. (T, E), (T, K) -> (T, K)."""
        gates = scores.gather(-1, chosen)
        if self.config.norm_topk_prob:  # at K = 1 this makes every gate 1: train.py warns
            gates = gates / (gates.sum(-1, keepdim=True) + TINY)
        return gates * self.config.routed_scaling_factor

    def select(self, biased: Tensor) -> Tensor:
        """The K best experts of each token, of its `topk_group` best groups only. (T, E) -> (T, K)."""
        config = self.config
        if config.topk_group < config.n_group and config.topk_method != "greedy":
            grouped = biased.unflatten(-1, (config.n_group, -1))  # (T, G, E/G)
            counted = min(2 if config.topk_method == "noaux_tc" else 1, grouped.shape[-1])
            worth = grouped.topk(counted, dim=-1).values.sum(-1)  # (T, G)
            kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, worth.topk(config.topk_group).indices, True)
            biased = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(
                -2
            )  # not 0: biased scores may be negative
        return biased.topk(config.num_experts_per_tok, sorted=False).indices

    def stats(self, routing: Routing, sequences: int, global_load: Tensor | None = None) -> RoutingStats:
        """The load, and the balance terms the configuration asks for, of T = sequences * S routed tokens.

        global_load: (E,) the load of the whole global batch, for the switch loss when this is one micro-batch of
        several.
        """
        config = self.config
        load = count_load(routing.chosen, config.n_routed_experts)
        zero = routing.logits.new_zeros(())
        balance = zero
        if config.balance_loss == "sequence":
            balance = sequence_balance_loss(routing.scores.unflatten(0, (sequences, -1)), config.num_experts_per_tok)
        elif config.balance_loss == "switch":
            balance = switch_balance_loss(routing.scores, load if global_load is None else global_load)
        return RoutingStats(load, balance, router_z_loss(routing.logits) if config.router_z_loss else zero)

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """Move every bias one step towards an even load, once per optimizer step. load: (E,) tokens per expert in the
        whole global batch.

        Re-centred on zero, so that the biases cannot drift away together: a common offset would change no choice and
        eat float32's digits.
        """
        step = self.config.bias_update_speed * (load.float().mean() - load.float()).sign()
        self.expert_bias += step - step.mean()

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Module.to, but the bias stays float32: in bfloat16 a step of 1e-3 would be rounded away."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        moved = self.expert_bias
        if moved.dtype != torch.float32:
            self.expert_bias = bias.to(moved.device) if bias.device.type != "meta" else moved.float()
        return self


def count_load(chosen: Tensor, experts: int) -> Tensor:
    """Tokens per expert, (T, K) -> (E,) int64, without a host synchronisation (bincount has one on CUDA)."""
    flat = chosen.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=chosen.device).scatter_add_(0, flat, torch.ones_like(flat))


def sequence_balance_loss(scores: Tensor, top_k: int) -> Tensor:
    """DeepSeek-V3, eq. 17-20: sum_i f_i P_i within each sequence, averaged over sequences. scores: (B, S, E) -> ().

    f_i counts how often expert i is among the K best by the bare scores, as the paper writes it: no bias, no groups.
    """
    experts = scores.shape[-1]
    best = scores.detach().topk(top_k, sorted=False).indices  # (B, S, K)
    counts = torch.zeros_like(scores[:, 0]).scatter_add_(
        -1, best.flatten(1), torch.ones_like(best.flatten(1), dtype=scores.dtype)
    )
    frequency = counts * experts / (top_k * scores.shape[1])  # (B, E), 1 each when even
    share = (scores / (scores.sum(-1, keepdim=True) + TINY)).mean(1)  # (B, E), sums to 1
    return (frequency * share).sum(-1).mean()


def switch_balance_loss(scores: Tensor, load: Tensor) -> Tensor:
    """Switch Transformer, eq. 4 (GShard for K > 1): E * sum_i f_i P_i over the batch. scores: (T, E), load: (E,) ->
    ().

    f comes from the load of the whole global batch; P is linear in the tokens, so micro-batches average to the large
    batch's loss exactly.
    """
    frequency = load.float() / load.sum()  # (E,), sums to 1: divided by K as well
    share = (scores / (scores.sum(-1, keepdim=True) + TINY)).mean(0)  # (E,)
    return scores.shape[-1] * (frequency * share).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """ST-MoE, eq. 5: the mean squared log-sum-exp of the logits, which keeps them small. (T, E) -> ()."""
    return logits.logsumexp(-1).square().mean()


def max_violation(load: Tensor) -> Tensor:
    """MaxVio (arXiv 2408.15664, eq. 4): how far the busiest expert lies above the mean load, in means. (..., E) ->
    (...). 0 is even; E/K - 1 is collapse."""
    mean = load.float().mean(-1).clamp_min(TINY)
    return load.float().amax(-1) / mean - 1


def load_entropy(load: Tensor) -> Tensor:
    """Entropy of the load over its largest value, log E. (..., E) -> (...). 1 is even; 0: a single expert does
    everything."""
    share = load.float() / load.float().sum(-1, keepdim=True).clamp_min(TINY)
    return torch.special.entr(share).sum(-1) / torch.tensor(float(load.shape[-1])).log().clamp_min(TINY)


def dead_experts(load: Tensor) -> Tensor:
    """How many experts received no token. (..., E) -> (...) int64."""
    return (load == 0).sum(-1)


def collapsed_layers(load: Tensor, top_k: int) -> list[int]:
    """Layers in which half the experts or more are dead, or the busiest does over 80 % of the most it could. load:
    (L, E)."""
    experts = load.shape[-1]
    if experts <= top_k:
        return []
    starving = dead_experts(load) * 2 >= experts
    flooded = max_violation(load) > 0.8 * (experts / top_k - 1)
    tokens = load.sum(-1)
    return (((starving & (tokens >= 8 * experts)) | flooded) & (tokens > 0)).nonzero().flatten().tolist()
