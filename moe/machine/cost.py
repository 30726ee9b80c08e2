"""What a model costs: parameters, operations, memory. Counted on a model without memory, so any size is free.

Notation: D model width, H heads, E routed experts, K experts per token, F expert width, V vocabulary.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moe.attention import SHORT
from moe.config import ConfigError, ModelConfig
from moe.experts import MoE
from moe.model import LOGITS, Transformer

CONTAINER = Path("/sys/fs/cgroup/memory.max")  # the bytes that a Linux container may take


@dataclass(frozen=True)
class Size:
    """How large a model is, multi-token prediction apart, as DeepSeek counts. Active is what a token's forward pass
    multiplies with; the input embedding, a table look-up, is not."""

    total: int
    active: int
    mtp_total: int
    mtp_active: int  # shared head included, once for each depth
    attention_flops: int  # per token, forward, of scores and weighted values over the mean causal window

    @property
    def training_flops(self) -> int:
        """Per token: 2 per parameter forward, twice that backward."""
        return 3 * (2 * (self.active + self.mtp_active) + self.attention_flops)

    @property
    def training_bytes(self) -> int:
        """Of weights, gradients and momentum in float32, and the weights once more for bfloat16 products. The second
        moments that AdamW keeps of embedding and head are left out."""
        return 14 * (self.total + self.mtp_total)

    @property
    def snapshot_bytes(self) -> int:
        """Of the copy that is written while training goes on: weights and momentum."""
        return 8 * (self.total + self.mtp_total)


def outline(config: ModelConfig) -> Transformer:
    """A model without memory or numbers: its tensors' names and shapes. Raises ConfigError for impossible sizes."""
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (TypeError, RuntimeError, OverflowError) as error:
        message = str(error).split("\n")[0]
        raise ConfigError(f"no tensor has the sizes of this configuration: {message}") from None


def count(config: ModelConfig, sequence_length: int | None = None) -> Size:
    """sequence_length: that attention's operations are counted for; by default the whole context."""
    model = outline(config)
    idle = 1 - config.num_experts_per_tok / config.n_routed_experts

    def unused(part: nn.Module) -> int:
        layers = [layer for layer in part.modules() if isinstance(layer, MoE)]
        return sum(round(idle * (layer.gate_up_proj.numel() + layer.down_proj.numel())) for layer in layers)

    mtp = sum(weight.numel() for weight in model.mtp.parameters())
    total = sum(weight.numel() for weight in model.parameters()) - mtp
    embedding = 0 if config.tie_word_embeddings else model.embed_tokens.weight.numel()
    mtp_active = mtp - unused(model.mtp) + len(model.mtp) * model.lm_head.weight.numel()
    heads, window = config.num_attention_heads, sequence_length or config.max_position_embeddings
    per_pair = 2 * heads * (config.query_head_dim + config.value_head_dim)
    attention = len(model.blocks()) * per_pair * (window + 1) // 2
    return Size(total, total - unused(model.layers) - embedding, mtp, mtp_active, attention)


def activation_bytes(config: ModelConfig, sequences: int, length: int, recomputed: bool = False) -> int:
    """What the backward pass needs of so many tokens at a time, estimated: weights found by counting the tensors that
    autograd keeps in bfloat16 training; float32 takes a third more. recomputed: with activation checkpointing."""
    tokens = sequences * length
    width, layers = config.hidden_size, config.num_hidden_layers + config.num_nextn_predict_layers
    heads, experts = config.num_attention_heads, config.num_experts_per_tok if config.num_moe_layers else 0
    attention = heads * 2 * (config.query_head_dim + config.value_head_dim)
    ffn = max(config.intermediate_size, (experts + config.n_shared_experts) * config.moe_intermediate_size)
    weights = 2 * heads * length if length <= SHORT else 0  # of attention
    layer = 26 * width + 5 * attention + 8 * ffn + 4 * experts * width + weights
    kept = layer + 4 * layers * width if recomputed else layer * layers
    return tokens * kept + 10 * min(tokens * config.vocab_size, LOGITS)


def machine_bytes(device: str) -> int | None:
    """The memory there is, the GPU's or the machine's; None where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    try:
        return min(memory, int(CONTAINER.read_text("ascii")))
    except (OSError, ValueError):  # in no container, or in one without a limit: "max"
        return memory


def readable(number: float, giga: str = "B") -> str:
    """3 digits and a unit: 3.01M, 671B."""
    for unit, letter in ((1e12, "T"), (1e9, giga), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.{max(0, 3 - len(str(int(number / unit))))}f}{letter}"
    return f"{number:.0f}"
