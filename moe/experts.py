"""The experts and the mixture (DeepSeek-V3, eq. 12): o = sum over the chosen i of g_i * Expert_i(x), plus Shared(x).

Notation: B sequences, S positions, T = B*S tokens, D model width, E routed experts, K experts per token, F expert
width.

All experts of a layer live in two stacked tensors, `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F). Three
back-ends compute the routed sum, alike but for rounding, and no token is ever dropped:

* `loop`: expert after expert, as one would explain it; the reference. For a few tokens on a CPU also the fastest, as
  it touches only the experts that were chosen (gathering their weights costs ten times as much there).
* `grouped`: sort the (token, expert) pairs by expert, run each matrix product for all experts at once, put the
  results back. For training.
* `gather`: copy each token's K weight matrices together and use batched products. For decoding a few tokens on a GPU:
  no host synchronisation.

The gate multiplies the hidden activation instead of the output: the same number, as the last product is linear, and
one (T*K, D) tensor less is kept for the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config import ModelConfig, require
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
    """Sorted dispatch: every shape is static and nothing waits for the device, so it compiles whole.

    Each (token, expert) pair gets a place; the places of an expert are a segment, whose length is rounded up to a
    multiple of `align`. A place left empty holds some token with gate 0, so it changes neither outputs nor gradients.
    """
    top_k, num_experts = chosen.shape[1], gate_up_proj.shape[0]
    experts = chosen.flatten()  # (T*K,) the expert of each pair
    pairs = torch.arange(experts.numel(), device=x.device)
    align = segment_alignment(x)
    load = count_load(chosen, num_experts)
    lengths = (load + align - 1) // align * align
    ends = lengths.cumsum(0)  # (E,)
    order = experts.argsort(stable=True)
    shift = (ends - lengths) - (load.cumsum(0) - load)  # how far rounding has moved each segment
    place = torch.empty_like(pairs).scatter_(0, order, pairs + shift[experts[order]])  # (T*K,) where each pair lies
    places = experts.numel() + num_experts * (align - 1)  # P, an upper bound that does not depend on the load
    pair = place.new_zeros(places).scatter_(0, place, pairs)  # (P,) which pair lies in each place

    rows = TakeRows.apply(x, pair // top_k, place, top_k)  # (P, D)
    weights = gates.new_zeros(places).scatter(0, place, gates.flatten())  # (P,)
    product = opaque_grouped_mm if x.dtype == torch.float32 and torch.compiler.is_compiling() else grouped_mm
    hidden = swiglu(product(rows, gate_up_proj.mT, ends.int())) * weights.unsqueeze(-1)  # (P, F)
    out = product(hidden, down_proj.mT, ends.int())  # (P, D)
    return TakeRows.apply(out, place, pair, 1).unflatten(0, (-1, top_k)).sum(1)


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


def _grouped_mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weights, ends = ctx.saved_tensors
    return opaque_grouped_mm(grad, weights.mT, ends), opaque_grouped_mm(rows.mT, grad, ends), None


opaque_grouped_mm.register_autograd(
    _grouped_mm_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def segment_alignment(x: Tensor) -> int:
    """Rows a segment is rounded up to. On a CPU in bfloat16 each new shape of a product costs oneDNN 1-2 ms, thirty
    times the product itself: multiples of 32 leave a few dozen shapes, met in the first steps (a training step of
    `tiny`: 375 ms without, 190 ms with)."""
    return 32 if x.device.type == "cpu" and x.dtype == torch.bfloat16 else 1


def gather_experts(x: Tensor, chosen: Tensor, gates: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    hidden = swiglu(torch.einsum("td,tkfd->tkf", x, gate_up_proj[chosen])) * gates.unsqueeze(-1)  # (T, K, F)
    return torch.einsum("tkf,tkdf->td", hidden, down_proj[chosen])


class TakeRows(torch.autograd.Function):
    """x[index], where every row of x is taken `copies` times and `inverse` says where to: its gradient is a gather
    and a sum.

    Autograd's own gradient of indexing is a scattered addition, slower and on CUDA in no fixed order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        taken = grad[inverse]
        return taken if ctx.copies == 1 else taken.view(-1, ctx.copies, grad.shape[-1]).sum(1), None, None, None


BACKENDS: dict[str, Backend] = {"loop": loop_experts, "grouped": grouped_experts, "gather": gather_experts}


def misfit(config: ModelConfig, dtype: torch.dtype) -> str | None:
    """Why grouped products cannot take these widths, if so: their rows must be whole 16 bytes."""
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
        self.backend: str = config.expert_backend  # train.py sets the one that it resolved
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
        # Grouped products do not follow autocast by themselves
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        name = self.backend
        if name in ("auto", self.config.expert_backend):
            name = choose_backend(self.config, device, dtype, flat.shape[0])[0]
        gates, weights = routing.gates.to(dtype), (self.gate_up_proj.to(dtype), self.down_proj.to(dtype))
        routed = BACKENDS[name](flat.to(dtype), routing.chosen, gates, *weights).view_as(x)
        out = routed if self.shared_experts is None else routed + self.shared_experts(x)
        return out, self.router.stats(routing, x.shape[0], global_load)
