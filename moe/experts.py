"""The experts and the mixture.

Notation: B sequences, S positions, T = B*S tokens, D model width, E routed experts, K experts per token, F expert
width.

    Expert(x) = W_down (silu(W_gate x) * W_up x)                             SwiGLU (arXiv 2002.05202)
    o = sum over the chosen i of g_i * Expert_i(x), plus Shared(x)           DeepSeek-V3, eq. 12

Shared experts hold what every token needs: with one more routed expert in its place, DeepSeekMoE's loss rises from
1.808 to 2.414 (arXiv 2401.06066, section 4.5). Trained so, tiny is as good, as far as five seeds can tell.

All experts of a layer live in two stacked tensors, `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F). Three
back-ends compute the routed sum, alike but for rounding, and no token is ever dropped:

* `loop`: expert after expert, as one would explain it; the reference. For a few tokens on a CPU also the fastest, as
  it touches only the experts that were chosen (gathering their weights costs ten times as much there).
* `grouped`: sort the (token, expert) pairs by expert, run each matrix product for all experts at once, put the
  results back. For training: 1.17 times the time of a dense layer as wide as what is chosen (`bench layer`).
* `gather`: copy each token's K weight matrices together and use batched products. For decoding a few tokens on a GPU:
  no host synchronisation.

The gate multiplies the hidden activation instead of the output: the same number, as the last product is linear, and
one (T*K, D) tensor less is kept for the backward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe.config import ModelConfig, require
from moe.layers import product_dtype
from moe.router import Router, RoutingStats, count_load

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
FEW_PAIRS = 64  # (token, expert) pairs; up to here decoding's back-ends are ahead


def swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class MLP(nn.Module):
    """A dense SwiGLU feed-forward: the first layers, and the shared experts (n of them are one of n times the
    width)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


def loop_experts(x: Tensor, chosen: Tensor, gates: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """x (T, D), chosen and gates (T, K), weights (E, 2F, D) and (E, D, F) -> (T, D). So for every back-end."""
    out = torch.zeros_like(x)
    up_projections, down_projections = gate_up_proj.unbind(0), down_proj.unbind(0)
    for expert in chosen.unique().tolist():
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        hidden = swiglu(F.linear(x[token], up_projections[expert])) * gates[token, slot].unsqueeze(-1)
        out = out.index_add(0, token, F.linear(hidden, down_projections[expert]))
    return out


def grouped_experts(x: Tensor, chosen: Tensor, gates: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Sorted dispatch: every shape is static, so it compiles whole. Nothing waits for a GPU whose grouped products are
    its own: in bfloat16 from compute capability 9.0 on."""
    return GroupedExperts.apply(x, gates, gate_up_proj, down_proj, chosen)


class Dispatch(NamedTuple):
    """Where the (token, expert) pairs lie once they are sorted by expert, in P places."""

    token: Tensor  # (P,) int64, whose row lies in each place
    place: Tensor  # (T, K) int64, where each pair lies
    ends: Tensor  # (E,) int32, the places at which the experts' segments end


def sort_by_expert(chosen: Tensor, num_experts: int, align: int) -> Dispatch:
    """The places of an expert are a segment, whose length is rounded up to a multiple of `align`. What holds no pair
    holds token 0; those behind the last segment are not computed. P does not depend on the load."""
    experts = chosen.flatten()  # (T*K,) the expert of each pair
    pairs = torch.arange(experts.numel(), device=chosen.device)
    load = count_load(chosen, num_experts)
    lengths = (load + align - 1) // align * align
    ends = lengths.cumsum(0)  # (E,)
    order = experts.argsort(stable=True)
    shift = (ends - lengths) - (load.cumsum(0) - load)  # how far rounding has moved each segment
    place = torch.empty_like(pairs).scatter_(0, order, pairs + shift[experts[order]])  # (T*K,)
    places = experts.numel() + num_experts * (align - 1)
    token = place.new_zeros(places).scatter_(0, place, pairs // chosen.shape[1])
    return Dispatch(token, place.view_as(chosen), ends.int())


class GroupedExperts(torch.autograd.Function):
    """The routed sum, its gradients written out: each of the four times that rows move between tokens and places is
    one gather. Autograd's own gradients of the same steps are scattered additions, slower and on CUDA in no fixed
    order.

    A place that holds no pair has gate 0, so it adds nothing to any gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, gate_up_proj: Tensor, down_proj: Tensor, chosen: Tensor) -> Tensor:
        token, place, ends = sort_by_expert(chosen, len(gate_up_proj), segment_alignment(x))
        weights = gates.new_zeros(len(token)).scatter_(0, place.flatten(), gates.flatten()).unsqueeze(-1)  # (P, 1)
        rows = x.index_select(0, token)  # (P, D)
        gate, up = (gate_and_up := product(rows, gate_up_proj.mT, ends)).chunk(2, dim=-1)  # (P, F) each
        activation = F.silu(gate)
        out = product(activation * up * weights, down_proj.mT, ends)  # (P, D)
        ctx.save_for_backward(rows, gate_and_up, activation, weights, gate_up_proj, down_proj, token, place, ends)
        return sum_rows(out, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        rows, gate_and_up, activation, weights, gate_up_proj, down_proj, token, place, ends = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        hidden = activation * up  # (P, F), without the gate's weight
        grad_out = grad.index_select(0, token)  # (P, D)
        grad_weighted = product(grad_out, down_proj, ends)  # (P, F)
        grad_down_proj = product(grad_out.mT, hidden * weights, ends)  # (E, D, F)
        grad_gates = (grad_weighted * hidden).sum(-1)[place]  # (T, K)
        grad_hidden = grad_weighted * weights
        grad_gate = torch.ops.aten.silu_backward(grad_hidden * up, gate)
        grad_gate_and_up = torch.cat((grad_gate, grad_hidden * activation), dim=-1)  # (P, 2F)
        grad_gate_up_proj = product(grad_gate_and_up.mT, rows, ends)  # (E, 2F, D)
        grad_x = sum_rows(product(grad_gate_and_up, gate_up_proj, ends), place)
        return grad_x, grad_gates, grad_gate_up_proj, grad_down_proj, None


def sum_rows(rows: Tensor, place: Tensor) -> Tensor:
    """The sum of each token's K rows. (P, D), (T, K) -> (T, D)."""
    return F.embedding_bag(place, rows, mode="sum")


def product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    compiled = rows.dtype == torch.float32 and torch.compiler.is_compiling()
    return opaque_grouped_mm(rows, weights, ends) if compiled else grouped_mm(rows, weights, ends)


def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Each segment of rows times its expert's matrix. (P, m), (E, m, n), (E,) int32 -> (P, n). With rows (m, P) and
    weights (P, n), each expert's product over its segment: (E, m, n)."""
    return F.grouped_mm(rows, weights, offs=ends)


@torch.library.custom_op("moe::grouped_mm", mutates_args=())
def opaque_grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The same as one operation that torch.compile does not look into: it knows grouped products in bfloat16 alone."""
    return grouped_mm(rows, weights, ends)


@opaque_grouped_mm.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    experts = () if weights.ndim == 3 else ends.shape
    return rows.new_empty(*experts, rows.shape[0], weights.shape[-1])


def segment_alignment(x: Tensor) -> int:
    """Rows a segment is rounded up to. On a CPU in bfloat16 each new shape of a product costs oneDNN 1-2 ms, thirty
    times the product itself: multiples of 32 leave a few dozen shapes, met in the first steps (a training step of
    2,048 tokens with 16 experts a layer: 375 ms without, 190 ms with)."""
    return 32 if x.device.type == "cpu" and x.dtype == torch.bfloat16 else 1


def gather_experts(x: Tensor, chosen: Tensor, gates: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    hidden = swiglu(torch.einsum("td,tkfd->tkf", x, gate_up_proj[chosen])) * gates.unsqueeze(-1)  # (T, K, F)
    return torch.einsum("tkf,tkdf->td", hidden, down_proj[chosen])


BACKENDS: dict[str, Backend] = {"loop": loop_experts, "grouped": grouped_experts, "gather": gather_experts}


def misfit(config: ModelConfig, dtype: torch.dtype) -> str | None:
    """Why grouped products cannot take these numbers, if so: their rows must be whole 16 bytes."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"there are no grouped products in {dtype}"
    numbers, widths = 16 // dtype.itemsize, (config.hidden_size, config.moe_intermediate_size)
    if all(width % numbers == 0 for width in widths):
        return None
    return (
        f"grouped products in {dtype} need hidden_size = {widths[0]} and moe_intermediate_size = {widths[1]} to be "
        f"multiples of {numbers}"
    )


def choose_backend(config: ModelConfig, device: str, dtype: torch.dtype, tokens: int) -> tuple[str, str]:
    """The back-end for this many tokens, and why: by capability and size alone, never by timing."""
    unfit = misfit(config, dtype)
    if config.expert_backend != "auto":
        require(config.expert_backend != "grouped" or not unfit, f"expert_backend = grouped: {unfit}")
        return config.expert_backend, "as asked"
    if tokens * config.num_experts_per_tok <= FEW_PAIRS:
        if device == "cuda":
            return "gather", "few tokens on a GPU"
        return "loop", f"few tokens on {device}: only the chosen experts are touched"
    if unfit:
        return "loop", unfit
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "loop", "grouped products need compute capability 8.0"
    if device not in ("cpu", "cuda"):
        return "loop", f"grouped products are untested on {device}"
    return "grouped", f"{tokens} tokens: one product for all experts"


class MoE(nn.Module):
    """A mixture-of-experts feed-forward layer, usable by itself: `layer(x)`, (B, S, D) -> (B, S, D).

    In a training loop of your own call `y, stats = layer.forward_with_stats(x)`, add `config.aux_loss_alpha *
    stats.balance_loss` to the loss and, once per optimizer step, call `layer.router.update_bias(stats.load)` with the
    load of the whole batch.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backend: str | None = None  # training sets the one it has resolved; None: chosen for each batch
        self.router = Router(config)
        self.gate_up_proj = nn.Parameter(
            torch.empty(config.n_routed_experts, 2 * config.moe_intermediate_size, config.hidden_size)
        )
        self.down_proj = nn.Parameter(
            torch.empty(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size)
        )
        self.shared_experts = (
            MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
            if config.n_shared_experts
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(weight, std=self.config.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_with_stats(x)[0]

    def forward_with_stats(self, x: Tensor, global_load: Tensor | None = None) -> tuple[Tensor, RoutingStats]:
        flat = x.flatten(0, 1)  # (T, D)
        routing = self.router(flat)
        device = x.device.type
        dtype = product_dtype(x)  # grouped products do not follow autocast by themselves
        name = self.backend or choose_backend(self.config, device, dtype, flat.shape[0])[0]
        rows, gates = flat.to(dtype), routing.gates.to(dtype)
        out = BACKENDS[name](rows, routing.chosen, gates, self.gate_up_proj.to(dtype), self.down_proj.to(dtype))
        if self.shared_experts is not None:
            out = out + self.shared_experts(rows)
        out = out.view_as(x)
        return out, self.router.stats(routing, x.shape[0], global_load)
