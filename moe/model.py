"""The Transformer: blocks, multi-token prediction, and the loss beside its companions.

Notation: B sequences, S positions, D model width, E routed experts, V vocabulary, L MoE layers.

Decoder-only and pre-norm, as DeepSeek-V3: embedding; per layer RMSNorm, attention, RMSNorm, feed-forward (dense in
the first `first_k_dense_replace` layers, a mixture of experts after); a final norm; a head of its own unless tied.

    objective = loss + lambda / M * sum of M further tokens' losses + alpha * sum of the layers' balance losses

(DeepSeek-V3, eq. 24, 25 and 17.) Predicting further tokens is off: one more makes tiny 0.010 nats per character better
after as many steps, each a third dearer, and 0.085 bits per byte worse after as many minutes (`study mtp`).

Two means against a large memory, neither of which changes a result: a large vocabulary's logits are made piece by
piece, and with `activation_checkpointing` each layer is computed again for its gradients. What the router chose is
kept, so computing again can never choose differently, and loads are returned values that nobody adds up twice.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe.attention import Cache, build_attention
from moe.config import ConfigError, ModelConfig
from moe.data import IGNORE
from moe.experts import MLP, MoE
from moe.layers import Dropout, RMSNorm
from moe.rotary import Table, rotary_table
from moe.router import RoutingStats

OUTPUT_PROJECTIONS = ("o_proj.weight", "down_proj.weight", "down_proj")
LOGITS = 1 << 26  # made at a time: 256 MiB of float32


class Losses(NamedTuple):
    """The loss and its companions, which never mix: `loss` is the language model's alone."""

    loss: Tensor  # () mean cross-entropy in nats per token
    mtp: Tensor  # (depths,) the same of each module of multi-token prediction, unweighted
    objective: Tensor  # () what is minimised: loss, plus the weighted others, balance terms summed over layers
    routing: RoutingStats | None  # stacked over the MoE layers, multi-token prediction's last; None: no such layer

    @staticmethod
    def mean(parts: "list[Losses]") -> "Losses":
        """Of equal micro-batches, detached: their mean losses and the sum of their loads."""

        def over(name: str) -> Tensor:
            return torch.stack([getattr(part, name).detach() for part in parts])

        routing = None
        if parts[0].routing is not None:
            terms = zip(*(part.routing for part in parts if part.routing is not None), strict=True)
            load, balance, z = (torch.stack(term).detach() for term in terms)
            routing = RoutingStats(load.sum(0), balance.mean(0), z.mean(0))
        return Losses(over("loss").mean(), over("mtp").mean(0), over("objective").mean(), routing)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = build_attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        dense = config.is_dense(layer)
        self.mlp: MLP | MoE = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(
        self, x: Tensor, table: Table, cache: Cache | None = None, global_load: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), table, cache, self.layer))
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            out, stats = self.mlp.forward_with_stats(normed, global_load)
            return x + self.dropout(out), stats
        return x + self.dropout(self.mlp(normed)), None


class MTPModule(nn.Module):
    """One depth of multi-token prediction (DeepSeek-V3, section 2.2): looks one token further than the states it gets.

    Embedding and head are the main model's. The state is the normalised one that the head reads, on which the report is
    silent; the embedding comes first in what is projected, as in the released weights, while the report writes the
    other order.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, layer)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Eq. 21: what the block reads. (B, S, D) each -> (B, S, D)."""
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))


class Transformer(nn.Module):
    """`model(tokens)`: (B, S) int64 -> logits (B, S, V) float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size == 0:
            raise ConfigError(
                "vocab_size = 0 stands for the tokenizer's size, which only train.py knows: give a number"
            )
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        depths = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        self.mtp = nn.ModuleList(MTPModule(config, layer) for layer in depths)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        self.activation_checkpointing = False  # train.py sets what its configuration says
        self.reset_parameters()

    def tie(self) -> None:
        """Make the head's weights the embedding's, if so configured; again after `to_empty`, which parts them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def reset_parameters(self) -> None:
        """Normal(0, initializer_range); what writes to the residual stream is smaller by sqrt(2 * layers), so that
        depth adds no variance."""
        std = self.config.initializer_range
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                output = name.endswith(OUTPUT_PROJECTIONS)
                nn.init.normal_(weight, std=std / math.sqrt(2 * self.config.num_hidden_layers) if output else std)
            elif name.endswith(".bias"):
                nn.init.zeros_(weight)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """With a cache, tokens are those that follow the cached ones, and are added to it."""
        return self.lm_head(self.hidden_states(tokens, cache)[0]).float()

    def hidden_states(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, RoutingStats | None]:
        """(B, S) -> the normalised last hidden states (B, S, D), and the routing of the MoE layers."""
        x, stats = self.run(self.layers, self.embed_tokens(tokens), self.rotary_table(tokens, cache), cache=cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x), stack(stats)

    def losses(
        self, tokens: Tensor, targets: Tensor, global_load: Tensor | None = None, mtp_weight: Tensor | float = 0.0
    ) -> Losses:
        """tokens, targets: (B, S) int64; targets of -100 are not scored. global_load: (L, E), see Router.stats.
        mtp_weight: of the mean loss of multi-token prediction in the objective."""
        loads = None if global_load is None else iter(global_load.unbind())
        table = self.rotary_table(tokens)
        x, stats = self.run(self.layers, self.embed_tokens(tokens), table, loads)
        hidden = self.norm(x)
        loss = self.cross_entropy(hidden, targets)
        further = []
        for depth, module in enumerate(self.mtp_modules(), 1):  # from t_0 ... t_{i+depth}, predict t_{i+depth+1}
            x = module.join(self.embed_tokens(tokens[:, depth:]), hidden[:, :-1])
            x, more = self.run([module.block], x, (table[0][:-depth], table[1][:-depth]), loads)
            hidden, stats = module.norm(x), stats + more
            further.append(self.cross_entropy(hidden, targets[:, depth:]))
        mtp = torch.stack(further) if further else loss.new_zeros(0)
        objective, routing = loss + mtp_weight * mtp.mean() if further else loss, stack(stats)
        if routing is not None:
            alpha = self.config.aux_loss_alpha if self.config.balance_loss != "none" else 0.0
            objective = (
                objective + alpha * routing.balance_loss.sum() + self.config.router_z_loss * routing.z_loss.sum()
            )
        return Losses(loss, mtp, objective, routing)

    def run(
        self,
        blocks: Iterable[nn.Module],
        x: Tensor,
        table: Table,
        loads: Iterator[Tensor] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, list[RoutingStats]]:
        """x (B, S, D) behind some blocks, and the routing of those with experts. loads: (E,) of the global batch, for
        each of them."""
        stats = []
        for block in blocks:
            load = next(loads) if loads is not None and isinstance(block.mlp, MoE) else None
            if self.activation_checkpointing and cache is None and torch.is_grad_enabled():
                keep = partial(create_selective_checkpoint_contexts, keep_choice)
                x, routing = checkpoint(block, x, table, None, load, use_reentrant=False, context_fn=keep)
            else:
                x, routing = block(x, table, cache, load)
            if routing is not None:
                stats.append(routing)
        return x, stats

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean over the scored targets. Where the logits would be large they are made piece by piece, and again for
        their gradients, so that never more than LOGITS of them exist. (B, S, D), (B, S) -> ()."""
        pieces = self.pieces(hidden, targets)
        if len(pieces) == 1:
            return F.cross_entropy(self.lm_head(pieces[0][0]).float(), pieces[0][1], ignore_index=IGNORE)
        total = hidden.new_zeros((), dtype=torch.float32)
        for piece, goal in pieces:
            total = total + checkpoint(self._summed_loss, piece, goal, use_reentrant=False)
        return total / (targets != IGNORE).sum()

    def pieces(self, hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        """So many positions at a time, R of them, that no more than LOGITS logits are made of them. (B, S, D), (B, S)
        -> (R, D) and (R,) each."""
        rows = max(1, LOGITS // self.config.vocab_size)
        return list(zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True))

    def _summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(hidden).float(), targets, ignore_index=IGNORE, reduction="sum")

    def rotary_table(self, tokens: Tensor, cache: Cache | None = None) -> Table:
        past = cache.length if cache is not None else 0
        positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        config = self.config
        return rotary_table(positions, config.rotary_dim, config.rope_theta, config.rope_scaling)

    def blocks(self) -> list[Block]:
        """Those of the main model, then those of multi-token prediction."""
        return [*self.layers, *(module.block for module in self.mtp_modules())]

    def mtp_modules(self) -> list[MTPModule]:
        return list(self.mtp)  # type: ignore[arg-type]

    def moe_layers(self) -> list[MoE]:
        return [block.mlp for block in self.blocks() if isinstance(block.mlp, MoE)]

    def moe_layer_numbers(self, mtp: bool = True) -> list[int]:
        """Their places among all layers, from 0; of multi-token prediction, behind the last, too."""
        blocks = self.blocks() if mtp else self.blocks()[: self.config.num_hidden_layers]
        return [block.layer for block in blocks if isinstance(block.mlp, MoE)]

    def update_expert_bias(self, load: Tensor) -> None:
        """Once per optimizer step, with the load of the whole global batch, (L, E)."""
        for layer, counts in zip(self.moe_layers(), load, strict=True):
            layer.router.update_bias(counts)


def stack(stats: list[RoutingStats]) -> RoutingStats | None:
    return RoutingStats(*map(torch.stack, zip(*stats, strict=True))) if stats else None


def keep_choice(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """What is kept where activations are computed again: the choice of the router. Scores that differ in their last
    bit could choose differently, and gradients would then flow through experts that never ran."""
    chosen = operation == torch.ops.aten.topk.default
    return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE
