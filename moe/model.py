"""The Transformer: blocks, the language-model loss beside the balance terms, and what a model costs.

Notation: B sequences, S positions, D model width, E routed experts, V vocabulary, L MoE layers.

Decoder-only and pre-norm, as DeepSeek-V3: embedding; per layer RMSNorm, attention, RMSNorm, feed-forward
(dense in the first `first_k_dense_replace` layers, a mixture of experts after); a final norm; a head of its own
unless tied.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.attention import Cache, RMSNorm, build_attention
from moe.config import ConfigError, ModelConfig
from moe.data import IGNORE
from moe.experts import MLP, MoE
from moe.rotary import Table, rotary_table
from moe.router import RoutingStats

OUTPUT_PROJECTIONS = ("o_proj.weight", "down_proj.weight", "down_proj")


class Losses(NamedTuple):
    """The loss and its companions, which never mix: `loss` is the language model's alone."""

    loss: Tensor  # () mean cross-entropy in nats per token
    objective: Tensor  # () what is minimised: loss plus the weighted balance terms, summed over layers
    routing: RoutingStats | None  # stacked over the MoE layers; None where there is none

    @staticmethod
    def mean(parts: "list[Losses]") -> "Losses":
        """Of equal micro-batches, detached: their mean losses and the sum of their loads."""
        routings = [part.routing for part in parts if part.routing is not None]
        routing = None
        if routings:
            loads, balance, z = (
                torch.stack([term.detach() for term in terms]) for terms in zip(*routings, strict=True)
            )
            routing = RoutingStats(loads.sum(0), balance.mean(0), z.mean(0))
        loss, objective = (
            torch.stack([term.detach() for term in terms]).mean()
            for terms in zip(*(part[:2] for part in parts), strict=True)
        )
        return Losses(loss, objective, routing)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = build_attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace
        self.mlp: MLP | MoE = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, x: Tensor, table: Table, cache: Cache | None = None, global_load: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), table, cache, self.layer))
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            out, stats = self.mlp.forward_with_stats(normed, global_load)
            return x + self.dropout(out), stats
        return x + self.dropout(self.mlp(normed)), None


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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.reset_parameters()

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

    def hidden_states(
        self, tokens: Tensor, cache: Cache | None = None, global_load: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, S) -> the normalised last hidden states (B, S, D), and the routing of the MoE layers."""
        past = cache.length if cache is not None else 0
        positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        config = self.config
        table = rotary_table(positions, config.rotary_dim, config.rope_theta, config.rope_scaling)
        x = self.embed_tokens(tokens)
        stats: list[RoutingStats] = []
        for block in self.blocks():
            x, routing = block(x, table, cache, None if global_load is None else global_load[len(stats)])
            if routing is not None:
                stats.append(routing)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x), RoutingStats(*map(torch.stack, zip(*stats, strict=True))) if stats else None

    def losses(self, tokens: Tensor, targets: Tensor, global_load: Tensor | None = None) -> Losses:
        """tokens, targets: (B, S) int64; targets of -100 are not scored. global_load: (L, E), see Router.stats."""
        hidden, routing = self.hidden_states(tokens, global_load=global_load)
        loss = F.cross_entropy(self.lm_head(hidden).float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        objective = loss
        if routing is not None:
            alpha = self.config.aux_loss_alpha if self.config.balance_loss != "none" else 0.0
            objective = loss + alpha * routing.balance_loss.sum() + self.config.router_z_loss * routing.z_loss.sum()
        return Losses(loss, objective, routing)

    def blocks(self) -> list[Block]:
        return list(self.layers)  # type: ignore[arg-type]

    def moe_layers(self) -> list[MoE]:
        return [block.mlp for block in self.blocks() if isinstance(block.mlp, MoE)]

    def update_expert_bias(self, load: Tensor) -> None:
        """Once per optimizer step, with the load of the whole global batch, (L, E)."""
        for layer, counts in zip(self.moe_layers(), load, strict=True):
            layer.router.update_bias(counts)


@dataclass(frozen=True)
class Size:
    """How large a model is. Active is what a token's forward pass multiplies with; the input embedding, a table
    look-up, is not."""

    total: int
    active: int
    attention_flops: int  # per token, forward, of scores and weighted values over the mean causal window

    @property
    def training_flops(self) -> int:
        """Per token: 2 per parameter forward, twice that backward."""
        return 3 * (2 * self.active + self.attention_flops)


def count(config: ModelConfig, sequence_length: int | None = None) -> Size:
    """Counted on a model without memory, so any size is free."""
    with torch.device("meta"):
        model = Transformer(config)
    total = sum(weight.numel() for weight in model.parameters())
    idle = config.n_routed_experts - config.num_experts_per_tok
    unused = sum(idle * (layer.gate_up_proj[0].numel() + layer.down_proj[0].numel()) for layer in model.moe_layers())
    embedding = 0 if config.tie_word_embeddings else model.embed_tokens.weight.numel()
    heads, window = config.num_attention_heads, sequence_length or config.max_position_embeddings
    per_pair = 2 * heads * (config.query_head_dim + config.value_head_dim)
    return Size(total, total - unused - embedding, config.num_hidden_layers * per_pair * (window + 1) // 2)
