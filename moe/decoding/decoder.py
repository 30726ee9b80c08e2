"""The model as it writes: one new token of each sequence behind a cache, in as few operations as it takes.

Notation: B sequences, L positions so far, the new ones included, D model width, H heads, E routed experts, K experts
per token. Latent attention: r = kv_lora_rank, and per head n = qk_nope_head_dim, p = qk_rope_head_dim, v = v_head_dim.
Grouped: G groups of H/G query heads, d = head_dim.

It computes what `Transformer.forward` does with a cache, but for rounding. A small model's token on a CPU is paid for
in calls: each operation takes a microsecond or more before it has computed anything, an einsum's pattern ten. So here

* there is no position axis, no statistics of the routing, no module that calls a module;
* a rotation is one product with a matrix (p, p), made for some positions ahead and shared by all layers and heads;
* a few tokens take the experts one after the other;
* a matrix that meets a few vectors is read through once before, which sounds like more work and takes a fifth less
  time;
* and where its matrices are small, on one thread. Threads that wait for each other at every product gain nothing, and
  lose milliseconds where other programs run: 12 ms a token on two busy cores became 2.4.

Weights are looked at, never copied (but for a router's and norms' that are not float32), so nothing has to be kept in
step.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.attention import Cache, GroupedQueryAttention, LatentAttention
from moe.config import ModelConfig
from moe.experts import BACKENDS, MLP, MoE, choose_backend, swiglu
from moe.layers import RMSNorm
from moe.model import Block, Transformer
from moe.rotary import rotary_table, rotate
from moe.router import TINY

AHEAD = 64  # positions that rotations are made for at a time
FEW = 16  # sequences; up to here the next two hold
FETCHED_BYTES = range(1 << 16, 1 << 19)  # a matrix of this size is read through before it meets its vectors
FETCHED_CACHE = 1 << 20  # bytes; so is what several sequences have cached in a layer, up to this size
ONE_THREAD_NUMBERS = 1 << 20  # matrices with no more numbers than this are not worth a second thread

Layer = Callable[[Tensor], Tensor]  # (B, D) -> (B, D)
Attention = Callable[[Tensor, Tensor, "Memory"], Tensor]


class Memory:
    """What was before, as the step writes and reads it: a cache, at its end. (graphs.py has one of fixed shape.)"""

    bias: Tensor | None = None  # added to the scores of what is read, (1, L)

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def put(self, layer: int, entry: Tensor) -> Tensor:
        """(B, width) -> all that there is to read, (B, L, width)."""
        place, seen = self.cache.next(layer)
        place.copy_(entry)
        return seen


class Decoder:
    """Behind what is in a cache, and into it: a token of each sequence, (B,) int64 -> the next one's logits, (B, V)
    float32."""

    def __init__(self, model: Transformer, cache: Cache) -> None:
        self.cache, self.memory, self.embedding = cache, Memory(cache), model.embed_tokens.weight
        self.turns = Turns(model.config, self.embedding.device)
        batch = len(cache.entries[0])
        self.blocks = [prepare(block, batch) for block in model.blocks()[: len(model.layers)]]
        self.norm, self.head = normalizer(model.norm, batch), matrix(model.lm_head.weight, batch)
        few = batch <= FEW and self.embedding.device.type == "cpu"
        self.one_thread, self.one_thread_head = (
            few and max(weight.shape[-2:].numel() for weight in weights) <= ONE_THREAD_NUMBERS
            for weights in (model.layers.parameters(), model.lm_head.parameters())
        )

    def __call__(self, tokens: Tensor) -> Tensor:
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if self.one_thread else threads)
            state = self.state(tokens, self.turns.at(self.cache.length), self.memory)
            torch.set_num_threads(1 if self.one_thread_head else threads)
            logits = self.head(state).float()
        finally:
            torch.set_num_threads(threads)
        self.cache.length += 1
        return logits

    def state(self, tokens: Tensor, turn: Tensor, memory: Memory) -> Tensor:
        """(B,) -> (B, D), as the head reads it."""
        x = F.embedding(tokens, self.embedding)
        for attention_norm, attention, mlp_norm, mlp in self.blocks:
            x = x + attention(attention_norm(x), turn, memory)
            x = x + mlp(mlp_norm(x))
        return self.norm(x)


def prepare(block: Block, batch: int) -> tuple[Layer, Attention, Layer, Layer]:
    own, mlp = block.self_attn, block.mlp
    attention: Attention = (
        DecodedLatent(own, block.layer, batch)
        if isinstance(own, LatentAttention)
        else DecodedGrouped(own, block.layer, batch)
    )
    before_attention, before_mlp = (
        normalizer(norm, batch) for norm in (block.input_layernorm, block.post_attention_layernorm)
    )
    return (
        before_attention,
        attention,
        before_mlp,
        DecodedMoE(mlp, batch) if isinstance(mlp, MoE) else dense(mlp, batch),
    )


class Turns:
    """Rotations as matrices: x @ turns.at(position), for x (..., p), is `rotate` at that position."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.block, self.matrices = -1, torch.empty(0)

    def at(self, position: int) -> Tensor:
        """(p, p), float32."""
        block, place = divmod(position, AHEAD)
        if block != self.block:
            self.block, self.matrices = block, self.make(block * AHEAD)
        return self.matrices[place]

    def make(self, first: int) -> Tensor:
        """(AHEAD, p, p): row i is where the rotation takes the i-th unit vector."""
        config, width = self.config, self.config.rotary_dim
        positions = torch.arange(first, first + AHEAD, device=self.device)
        table = rotary_table(positions, width, config.rope_theta, config.rope_scaling)
        unit = torch.eye(width, device=self.device).unsqueeze(1).expand(-1, AHEAD, -1)  # (p, AHEAD, p)
        return rotate(unit, table, config.rope_interleave).transpose(0, 1).contiguous()


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Rotated in float32, whatever comes in. (..., p), (p, p) -> (..., p)."""
    return x @ turn if x.dtype == turn.dtype else (x.float() @ turn).to(x.dtype)


def normalizer(norm: RMSNorm, vectors: int) -> Layer:
    """RMSNorm of so many vectors at a time, in float32. PyTorch's own is one operation on a GPU, and ten on a CPU."""
    weight, shape, eps, width = norm.weight.float(), norm.normalized_shape, norm.eps or 0.0, norm.weight.numel()
    if weight.device.type != "cpu" or norm.weight.dtype != torch.float32:
        return lambda x: F.rms_norm(x.float(), shape, weight, eps).to(x.dtype)
    zero, floor = torch.zeros(1, width), torch.tensor(eps)

    def one(x: Tensor) -> Tensor:
        flat = x.view(-1)
        return torch.addcmul(zero, x, weight, value=(torch.dot(flat, flat).item() / width + eps) ** -0.5)

    def several(x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, 2, -1, True)
        return x * torch.addcmul(floor, size, size, value=1 / width).rsqrt_() * weight

    return one if vectors == 1 else several


def product(linear: nn.Linear, batch: int) -> Layer:
    bias = linear.bias
    return matrix(linear.weight, batch) if bias is None else lambda x: F.linear(x, linear.weight, bias)


def matrix(weight: Tensor, batch: int) -> Layer:
    """The product with a matrix, (B, n) -> (B, m)."""
    fetch = fetcher(weight, batch)

    def fetched(x: Tensor) -> Tensor:
        fetch()
        return F.linear(x, weight)

    return fetched


def fetcher(weight: Tensor, batch: int) -> Callable[[], object]:
    """Reads a matrix through, where that pays.

    BLAS's product with a few vectors goes through several rows at once, and of what is not in the core's own cache it
    gets 7 GB a second where a sum gets 37. So a sum fetches what fits into that cache, and the product finds it there:
    a token of 5M parameters in 1.40 ms instead of 1.69.
    """
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.nbytes in FETCHED_BYTES
    return weight.sum if batch <= FEW and fits else nothing


def nothing() -> None:
    pass


class DecodedLatent:
    """Latent attention in its absorbed form (see attention.py)."""

    def __init__(self, own: LatentAttention, layer: int, batch: int) -> None:
        config = own.config
        self.layer, self.scale, self.heads = layer, own.scale, config.num_attention_heads
        self.query_parts = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        self.entry_parts = (config.kv_lora_rank, config.qk_rope_head_dim)
        self.compress, self.output = product(own.kv_a_proj_with_mqa, batch), product(own.o_proj, batch)
        self.latent_norm = normalizer(own.kv_a_layernorm, batch)
        self.fetch = fetcher(own.kv_b_proj.weight, batch)
        expand = own.kv_b_proj.weight.unflatten(0, (self.heads, -1))  # (H, n + v, r)
        to_key, to_value = expand.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        self.to_key, self.to_value = to_key, to_value.mT  # (H, n, r), (H, r, v)
        self.compressed = config.q_lora_rank is not None
        if self.compressed:
            self.compress_query, self.query_norm = product(own.q_a_proj, batch), normalizer(own.q_a_layernorm, batch)
        self.to_query = product(own.q_b_proj if self.compressed else own.q_proj, batch)

    def __call__(self, x: Tensor, turn: Tensor, memory: Memory) -> Tensor:
        """x: (B, D) -> (B, D)."""
        latent, key = self.compress(x).split_with_sizes(self.entry_parts, -1)
        seen = memory.put(self.layer, torch.cat((self.latent_norm(latent), turned(key, turn)), -1))  # (B, L, r + p)
        query = self.query(x, turn)  # (B, H, r + p)
        if seen.device.type == "cpu" and len(seen) > 1 and seen.nbytes <= FETCHED_CACHE:
            seen.sum()  # see `fetcher`
        scores = torch.bmm(query, seen.mT) * self.scale  # (B, H, L)
        if memory.bias is not None:
            scores = scores + memory.bias
        weights = scores.softmax(-1, torch.float32)
        if x.dtype != torch.float32:
            weights = weights.to(x.dtype)
        attended = torch.bmm(weights, seen.narrow(-1, 0, self.entry_parts[0]))  # (B, H, r)
        values = torch.bmm(attended.transpose(0, 1), self.to_value)  # (H, B, v)
        return self.output(values.transpose(0, 1).flatten(1))

    def query(self, x: Tensor, turn: Tensor) -> Tensor:
        """As it meets what is cached. (B, D) -> (B, H, r + p)."""
        if self.compressed:
            x = self.query_norm(self.compress_query(x))
        heads = self.to_query(x).view(len(x), self.heads, -1)  # (B, H, n + p)
        nope, rope = heads.split_with_sizes(self.query_parts, -1)
        self.fetch()
        latent = torch.bmm(nope.transpose(0, 1), self.to_key).transpose(0, 1)  # (B, H, r)
        return torch.cat((latent, turned(rope, turn)), -1)


class DecodedGrouped:
    """Grouped-query attention."""

    def __init__(self, own: GroupedQueryAttention, layer: int, batch: int) -> None:
        config = own.config
        self.layer, self.scale, self.norm = layer, own.scale, config.qk_norm
        self.groups, self.width = config.key_value_heads, config.query_head_dim
        self.projections = [product(one, batch) for one in (own.q_proj, own.k_proj, own.v_proj)]
        self.output = product(own.o_proj, batch)
        if self.norm != "none":
            per_head = self.norm == "head"
            self.query_norm = normalizer(own.q_norm, batch * config.num_attention_heads if per_head else batch)
            self.key_norm = normalizer(own.k_norm, batch * self.groups if per_head else batch)

    def __call__(self, x: Tensor, turn: Tensor, memory: Memory) -> Tensor:
        """x: (B, D) -> (B, D)."""
        query, key, value = (projection(x) for projection in self.projections)
        if self.norm == "projection":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = (part.view(len(x), -1, self.width) for part in (query, key))  # (B, H, d), (B, G, d)
        if self.norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        seen = memory.put(self.layer, torch.cat((turned(key, turn).flatten(1), value), -1))  # (B, L, 2 G d)
        keys, values = seen.unflatten(-1, (2, self.groups, self.width)).permute(2, 0, 3, 1, 4)  # (B, G, L, d) each
        query = turned(query, turn).unflatten(1, (self.groups, -1))  # (B, G, H/G, d): as if these were positions
        attended = F.scaled_dot_product_attention(query, keys, values, memory.bias, scale=self.scale)
        return self.output(attended.flatten(1))


def dense(mlp: MLP, batch: int) -> Layer:
    gate_up, down = product(mlp.gate_up_proj, batch), product(mlp.down_proj, batch)
    return lambda x: down(swiglu(gate_up(x)))


class DecodedMoE:
    def __init__(self, own: MoE, batch: int) -> None:
        self.config, self.router, self.top_k = own.config, own.router, own.config.num_experts_per_tok
        self.centroids, self.bias = own.router.weight.float(), own.router.expert_bias
        self.stacks = own.gate_up_proj, own.down_proj
        self.shared = torch.zeros_like if own.shared_experts is None else dense(own.shared_experts, batch)
        device, dtype = own.down_proj.device.type, own.down_proj.dtype
        self.backend = choose_backend(own.config, device, dtype, batch)[0]
        self.add_routed = self.add_by_backend
        if self.backend == "loop" and own.config.expert_backend == "auto":
            self.add_routed = self.add_one_by_one if batch == 1 else self.add_by_expert
            self.gate_ups, self.downs = ([matrix(one, batch) for one in stack] for stack in self.stacks)

    def __call__(self, x: Tensor) -> Tensor:
        """x: (B, D) -> (B, D)."""
        logits = F.linear(x.float(), self.centroids)  # (B, E)
        scores = self.router.affinities(logits)
        return self.add_routed(self.shared(x), x, self.router.select(scores + self.bias), scores)

    def add_one_by_one(self, out: Tensor, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        """A token alone: its experts one after the other, the gates as Router.gates has them, but as plain numbers."""
        shares = scores.gather(-1, chosen).tolist()[0]
        factor = self.config.routed_scaling_factor / ((sum(shares) + TINY) if self.config.norm_topk_prob else 1)
        for expert, share in zip(chosen.tolist()[0], shares, strict=True):
            out.add_(self.downs[expert](swiglu(self.gate_ups[expert](x))), alpha=share * factor)
        return out

    def add_by_expert(self, out: Tensor, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        """A few tokens: the pairs of token and expert sorted by expert, then expert after expert."""
        experts = chosen.flatten()  # (B K,)
        order = experts.argsort()
        load = experts.bincount(minlength=self.config.n_routed_experts).tolist()
        token = order // self.top_k
        gates = self.router.gates(scores, chosen).to(x.dtype).view(-1, 1).index_select(0, order)  # (B K, 1)
        rows = x.index_select(0, token).split(load)  # (load of each expert, D)
        parts = [
            down(swiglu(gate_up(row)))
            for gate_up, down, row in zip(self.gate_ups, self.downs, rows, strict=True)
            if len(row)
        ]
        return out.index_add_(0, token, torch.cat(parts).mul_(gates))

    def add_by_backend(self, out: Tensor, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        experts = BACKENDS[self.backend]
        return out + experts(x, chosen, self.router.gates(scores, chosen).to(x.dtype), *self.stacks)
