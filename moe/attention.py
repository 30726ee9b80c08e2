"""Who looks at whom: multi-head latent attention, grouped-query attention beside it, and the cache of either.

Notation: B sequences, S new positions, L all positions so far, H heads. Latent: r = kv_lora_rank, and per head n =
qk_nope_head_dim, p = qk_rope_head_dim, v = v_head_dim. Grouped: G groups of H/G query heads, d = head_dim.

Both say what a token must leave behind for those after it, and a cache holds just that: 80 numbers a layer in tiny,
where grouped queries would keep 128, and every head's own keys and values 256.

**Latent attention** (DeepSeek-V2, section 2.1; DeepSeek-V3, eq. 1-11). Keys and values of all heads are made from one
small latent vector per token (r numbers), plus one rotated key (p numbers) that the heads share.

    c = norm(W_c x)          k_rope = rotate(W_r x)       eq. 1, 3: these r + p numbers are cached
    k = [W_k c; k_rope]      v = W_v c                    eq. 2, 4, 5; queries likewise, of two parts: 6-9
    o = softmax(q k^T / sqrt(n + p)) v                    eq. 10

Two forms compute the same attention:

* **expanded**: make every head's keys and values from the latents, then attend as usual. Fewest operations for many
  queries: training, prefill.
* **absorbed**: multiply the query by the key matrix instead (q^T W c = (W^T q)^T c), attend over the latents
  themselves, and apply the value matrix to the attended latent. Nothing of size L*H is ever made: decoding, where
  decoding/decoder.py does the same in fewer operations for one token.

**Grouped-query attention** (GQA, arXiv 2305.13245; Llama, Qwen, OLMoE, Mixtral). The H query heads form G groups, and
each group shares one key and one value head: 2*G*d numbers are cached. G = H is the attention of the first
Transformer, G = 1 multi-query attention. With G = 2 tiny learns more in the same time, by 0.016 ± 0.005 bits per byte
(`python -m moe.lab study attention`): latent attention is the default for its cache, and for being DeepSeek-V3's.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.layers import RMSNorm
from moe.rotary import Table, rotate, softmax_magnitude

SHORT = 512  # positions up to which a CPU attends faster through the whole matrix of weights


class Cache:
    """What all positions so far leave behind in every layer: config.cache_width numbers per token and layer.

    There is room for `length` positions at first. A full layer moves to twice the room, but no more than the context
    takes: all its moves together copy less than twice what it holds in the end, and only one layer is there twice at a
    time. So the 131,072 positions of Llama 3.1, 34 GB in float32, are paid for as far as the text goes.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        shape, layers = (batch, length, config.cache_width), range(config.num_hidden_layers)
        self.entries = [torch.empty(shape, device=device, dtype=dtype) for _ in layers]
        self.context = config.max_position_embeddings
        self.length = 0  # positions filled; the model moves it once all layers have written

    def append(self, layer: int, entries: Tensor) -> Tensor:
        """Write (B, S, width) behind what is there; the whole of it back, (B, L, width)."""
        end = self.length + entries.shape[1]
        if end > self.entries[layer].shape[1]:
            self.grow(layer, end)
        self.entries[layer][:, self.length : end] = entries
        return self.entries[layer][:, :end]

    def next(self, layer: int) -> tuple[Tensor, Tensor]:
        """Where one more position is to be written, (B, width), and with it the whole, (B, L, width)."""
        if self.length == self.entries[layer].shape[1]:
            self.grow(layer, self.length + 1)
        entries = self.entries[layer]
        return entries.select(1, self.length), entries.narrow(1, 0, self.length + 1)

    def grow(self, layer: int, needed: int) -> None:
        full = self.entries[layer]
        batch, length, width = full.shape
        roomier = full.new_empty(batch, max(needed, min(2 * length, self.context)), width)
        roomier[:, : self.length] = full[:, : self.length]
        self.entries[layer] = roomier


class LatentAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.hidden_size, config.num_attention_heads
        rope, rank, bias = config.qk_rope_head_dim, config.kv_lora_rank, config.attention_bias
        # The two inner norms have eps 1e-6 whatever rms_norm_eps is, as in the released models
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(width, heads * config.query_head_dim, bias=False)  # never a bias, as published
        else:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.query_head_dim, bias=False)
        # The latent, and the rotated key that all heads share
        self.kv_a_proj_with_mqa = nn.Linear(width, rank + rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(rank, eps=1e-6)  # over the latent alone
        self.kv_b_proj = nn.Linear(rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, width, bias=config.attention_output_bias)
        self.scale = config.query_head_dim**-0.5 * softmax_magnitude(config.rope_scaling)

    def forward(self, x: Tensor, table: Table, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """x: (B, S, D) -> (B, S, D), causal. With a cache, x are the positions that follow those in it."""
        q_nope, q_rope = self.queries(x, table)
        entries = self.latents(x, table)
        past = cache.length if cache is not None else 0
        seen = cache.append(layer, entries) if cache is not None else entries
        # From the start on, the fresh entries: those in the cache are the same, but strided by the room it has
        attended = self.absorbed(q_nope, q_rope, seen) if past else self.expanded(q_nope, q_rope, entries)
        return self.o_proj(rearrange(attended, "b h s v -> b s (h v)"))

    def queries(self, x: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        config = self.config
        q = self.q_proj(x) if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = rearrange(q, "b s (h d) -> b h s d", h=config.num_attention_heads)
        q_nope, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, table, config.rope_interleave)  # (B, H, S, n), (B, H, S, p)

    def latents(self, x: Tensor, table: Table) -> Tensor:
        """What is cached of each token: its normalised latent and its rotated key. (B, S, r+p)."""
        config = self.config
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        return torch.cat((self.kv_a_layernorm(latent), rotate(k_rope, table, config.rope_interleave)), dim=-1)

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


class GroupedQueryAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, dim, bias = config.hidden_size, config.query_head_dim, config.attention_bias
        query_width, key_width = config.num_attention_heads * dim, config.key_value_heads * dim
        self.q_proj = nn.Linear(width, query_width, bias=bias)
        self.k_proj = nn.Linear(width, key_width, bias=bias)
        self.v_proj = nn.Linear(width, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, width, bias=config.attention_output_bias)
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = RMSNorm(dim if per_head else query_width, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(dim if per_head else key_width, eps=config.rms_norm_eps)
        self.scale = dim**-0.5

    def forward(self, x: Tensor, table: Table, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """x: (B, S, D) -> (B, S, D), causal. With a cache, x are the positions that follow those in it."""
        query, key, value = self.heads(x, table)
        past = cache.length if cache is not None else 0
        if cache is not None:
            entries = cache.append(layer, rearrange([key, value], "two b g s d -> b s (two g d)"))
        if past:
            key, value = rearrange(entries, "b l (two g d) -> two b g l d", two=2, g=self.config.key_value_heads)
        attended = self.behind_cache(query, key, value) if past else self.from_start(query, key, value)
        return self.o_proj(rearrange(attended, "b h s d -> b s (h d)"))

    def heads(self, x: Tensor, table: Table) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised and rotated queries (B, H, S, d) and keys, and values (B, G, S, d)."""
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.config.qk_norm == "projection":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (
            rearrange(part, "b s (h d) -> b h s d", d=self.config.query_head_dim) for part in (query, key, value)
        )
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query, table, self.config.rope_interleave), rotate(key, table, self.config.rope_interleave), value

    def from_start(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """For S = L: from the first position on. -> (B, H, S, d).

        Each query head gets a copy of its group's key and value: on a GPU only the half-precision kernels know groups
        (`enable_gqa`), and in float32 the whole (S, S) matrix of scores would be kept instead.
        """
        copies = self.config.num_attention_heads // self.config.key_value_heads
        if copies > 1:
            key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
        return attend(query, key, value, self.scale)

    def behind_cache(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """For new positions behind cached ones: the last of the L keys belong to the S queries. -> (B, H, S, d).

        The queries of a group are laid end to end as if they were positions, so nothing of the cache is copied.
        """
        new, total = query.shape[-2], key.shape[-2]
        grouped = rearrange(query, "b (g c) s d -> b g (c s) d", g=self.config.key_value_heads)
        seen = None
        if new > 1:
            seen = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
            seen = seen.repeat(grouped.shape[-2] // new, 1)
        attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=seen, scale=self.scale)
        return rearrange(attended, "b g (c s) d -> b (g c) s d", s=new)


def build_attention(config: ModelConfig) -> LatentAttention | GroupedQueryAttention:
    return LatentAttention(config) if config.attention == "latent" else GroupedQueryAttention(config)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of S queries over S keys. (B, H, S, d), (B, H, S, d), (B, H, S, v) -> (B, H, S, v)."""
    length, width = query.shape[-2], value.shape[-1]
    # There by hand: half the time of the fused kernel's backward
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and length <= SHORT:
        future = torch.full((length, length), -torch.inf, dtype=query.dtype).triu(1)
        # Autocast would copy the scores to float32; softmax sums in float32 in any case
        with torch.autocast("cpu", enabled=False):
            scores = torch.baddbmm(future, query.flatten(0, 1), key.flatten(0, 1).mT, alpha=scale)  # (B*H, S, S)
            return scores.view(*query.shape[:-1], length).softmax(-1) @ value
    if width < query.shape[-1]:  # the fused kernels want one width: zeros add nothing
        value = F.pad(value, (0, query.shape[-1] - width))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)[..., :width]
