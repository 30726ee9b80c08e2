"""Multi-head latent attention (DeepSeek-V2, section 2.1; DeepSeek-V3, eq. 1-11) with its rotary embedding and its
cache.

Notation: B sequences, S new positions, L all positions so far, H heads, r = kv_lora_rank, and per head n =
qk_nope_head_dim, p = qk_rope_head_dim, v = v_head_dim.

Keys and values of all heads are made from one small latent vector per token (r numbers), plus one rotated key (p
numbers) that the heads share. Only these r + p numbers are cached. Two forms compute the same attention:

* **expanded**: make every head's keys and values from the latents, then attend as usual. Fewest operations for many
  queries: training, prefill.
* **absorbed**: multiply the query by the key matrix instead (q^T W c = (W^T q)^T c), attend over the latents
  themselves, and apply the value matrix to the attended latent. Nothing of size L*H is ever made: decoding.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from moe.config import ModelConfig


def rotary_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (arXiv 2104.09864), float32, for integer positions (S,): two tensors (S, dim/2)."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of neighbours (x_0, x_1), (x_2, x_3), ... by its position's angle: the interleaved layout. x:
    (B, ..., S, p)."""
    cos, sin = table  # (S, p/2)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """In float32 whatever comes in, back in its dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class LatentCache:
    """Room for the latents and rotated keys of `length` positions in every layer, allocated once: (r + p) numbers per
    token and layer."""

    def __init__(self, config: ModelConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.entries = torch.zeros(config.num_hidden_layers, batch, length, width, device=device, dtype=dtype)
        self.length = 0  # positions filled; the model moves it once all layers have written

    @property
    def capacity(self) -> int:
        return self.entries.shape[2]

    def append(self, layer: int, entries: Tensor) -> Tensor:
        """Write (B, S, r+p) behind what is there; the whole of it back, (B, L, r+p)."""
        end = self.length + entries.shape[1]
        self.entries[layer, :, self.length : end] = entries
        return self.entries[layer, :, :end]


class LatentAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.hidden_size, config.num_attention_heads
        nope, rope, value, rank = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            config.kv_lora_rank,
        )
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(width, heads * (nope + rope), bias=False)
        else:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(
                config.q_lora_rank, eps=1e-6
            )  # 1e-6 whatever rms_norm_eps is, as in the released models
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            width, rank + rope, bias=False
        )  # the latent, and the rotated key that all heads share
        self.kv_a_layernorm = RMSNorm(rank, eps=1e-6)  # over the latent alone
        self.kv_b_proj = nn.Linear(rank, heads * (nope + value), bias=False)
        self.o_proj = nn.Linear(heads * value, width, bias=False)
        self.scale = (nope + rope) ** -0.5

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], cache: LatentCache | None = None, layer: int = 0
    ) -> Tensor:
        """x: (B, S, D) -> (B, S, D), causal. With a cache, x are the positions that follow those in it."""
        q_nope, q_rope = self.queries(x, table)
        entries = self.latents(x, table)
        past = cache.length if cache is not None else 0
        if cache is not None:
            entries = cache.append(layer, entries)
        attended = self.absorbed(q_nope, q_rope, entries) if past else self.expanded(q_nope, q_rope, entries)
        return self.o_proj(rearrange(attended, "b h s v -> b s (h v)"))

    def queries(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        config = self.config
        q = self.q_proj(x) if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = rearrange(q, "b s (h d) -> b h s d", h=config.num_attention_heads)
        q_nope, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, table)  # (B, H, S, n), (B, H, S, p)

    def latents(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """What is cached of each token: its normalised latent and its rotated key. (B, S, r+p)."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1
        )
        return torch.cat((self.kv_a_layernorm(latent), rotate(k_rope, table)), dim=-1)

    def expanded(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor) -> Tensor:
        """For S = L: from the first position on. -> (B, H, S, v)."""
        config = self.config
        latent, k_rope = entries.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        kv = rearrange(self.kv_b_proj(latent), "b l (h d) -> b h l d", h=config.num_attention_heads)
        k_nope, value = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        query = torch.cat((q_nope, q_rope), dim=-1)
        key = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, config.num_attention_heads, -1, -1)), dim=-1)
        return attend(query, key, value, self.scale)

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor) -> Tensor:
        """For new positions behind cached ones: the last of the L entries belong to the S queries. -> (B, H, S, v)."""
        config = self.config
        latent, k_rope = entries.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        weight = rearrange(self.kv_b_proj.weight.to(q_nope.dtype), "(h d) r -> h d r", h=config.num_attention_heads)
        to_key, to_value = weight.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)  # (H, n, r), (H, v, r)
        q_latent = einsum(q_nope, to_key, "b h s n, h n r -> b h s r")
        scores = einsum(q_latent, latent, "b h s r, b l r -> b h s l") + einsum(
            q_rope, k_rope, "b h s p, b l p -> b h s l"
        )
        new, total = scores.shape[-2:]
        if new > 1:
            future = torch.ones(new, total, dtype=torch.bool, device=scores.device).triu(total - new + 1)
            scores = scores.masked_fill(future, -torch.inf)
        weights = (scores.float() * self.scale).softmax(-1).to(latent.dtype)
        return einsum(einsum(weights, latent, "b h s l, b l r -> b h s r"), to_value, "b h s r, h v r -> b h s v")


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of S queries over S keys. (B, H, S, d), (B, H, S, d), (B, H, S, v) -> (B, H, S, v)."""
    length, width = query.shape[-2], value.shape[-1]
    if (
        query.device.type == "cpu" and query.dtype == torch.bfloat16 and length <= 512
    ):  # half the time of the fused kernel's backward there
        future = torch.full((length, length), -torch.inf, dtype=query.dtype).triu(1)
        with torch.autocast(
            "cpu", enabled=False
        ):  # it would copy the scores to float32; softmax sums in float32 in any case
            return ((query * scale) @ key.mT + future).softmax(-1) @ value
    if width < query.shape[-1]:  # the fused kernels want one width: zeros add nothing
        value = F.pad(value, (0, query.shape[-1] - width))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)[..., :width]
