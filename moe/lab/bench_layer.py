"""A mixture of experts against a dense layer that does the same work: forward and backward, alternately.

Notation: D model width, T tokens, E routed experts, K experts per token, F expert width.

A token runs through K routed experts and one shared expert of width F, so the dense SwiGLU beside it has (K+1)*F: the
same matrix products in number of operations. What the mixture takes longer is what routing costs, and that many small
products are slower than few large ones. Parameters are float32, products in bfloat16 through autocast; gradients are
added up, as those of micro-batches are.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from moe.config import ModelConfig
from moe.experts import MLP, MoE, choose_backend
from moe.lab.bench import Row, alternate, check_rounds, geometric_mean, medians, present, ratio
from moe.machine.device import Dtype, resolve_device, reuse_memory
from moe.machine.peak import settle

LENGTH = 256  # tokens of a sequence
PRODUCTS = ("mm", "linear", "gemm", "cutlass", "xmma", "nvjet")  # in the names of operations and kernels
MOVES = ("index", "gather", "scatter", "sort", "embedding")
POINTWISE = ("silu", "mul", "copy", "convert", "elementwise", "fused", "::add", "::cat")


@dataclass(frozen=True)
class Cell:
    width: int  # D
    tokens: int  # T
    experts: int  # E
    chosen: int  # K

    @property
    def expert_width(self) -> int:
        """F: a layer's usual 4*D over the experts that a token meets, in whole 64s."""
        return max(64, round(4 * self.width / (self.chosen + 1) / 64) * 64)

    @property
    def active_width(self) -> int:
        """Of all experts that a token meets, the shared one included."""
        return (self.chosen + 1) * self.expert_width


CELLS = (Cell(384, 2048, 8, 2), Cell(384, 2048, 16, 2), Cell(384, 4096, 16, 2), Cell(768, 4096, 8, 2))
FINE = (Cell(384, 4096, 64, 8), Cell(768, 4096, 64, 8))


@dataclass(frozen=True)
class LayerBench:
    """A mixture of experts against a dense layer of the same active width, forward and backward."""

    backend: Literal["auto", "loop", "grouped", "gather", "all"] = "auto"  # all: loop and grouped
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["both"] | Dtype = "both"
    fine: bool = False  # 8 of 64 experts as well
    compile: bool = False  # each once more, compiled
    profile: bool = False  # say where the time goes instead: products, pointwise operations, routing
    rounds: int = 15
    json: bool = False  # print one JSON object

    def main(self) -> None:
        check_rounds(self.rounds)
        device = resolve_device(self.device)[0]
        if device == "cpu":
            reuse_memory()
        compare = profiled if self.profile else compared
        present(self.measure(compare, device), shares if self.profile else cells, device, self.json, self.below)

    def measure(self, compare: Callable[..., Row], device: str) -> Iterator[Row]:
        dtypes = ("float32", "bfloat16") if self.dtype == "both" else (self.dtype,)
        backends = ("loop", "grouped") if self.backend == "all" else (self.backend,)
        for backend in backends:
            for compiled in (False, True)[: 1 + self.compile]:
                for dtype in dtypes:
                    for cell in CELLS + FINE * self.fine:
                        torch.compiler.reset()  # or what was compiled for other shapes counts against a limit
                        yield compare(cell, backend, dtype, device, compiled, self.rounds)

    def below(self, rows: list[Row]) -> list[str]:
        counted: dict[str, list[float]] = {}
        for row in rows:
            if row.further.get("counted"):
                counted.setdefault(row.shape["backend"], []).append(row.ratio)
        return [f"geometric mean, {name}: {geometric_mean(ratios):.3f}" for name, ratios in counted.items()]


def layers(cell: Cell, backend: Any, device: str) -> tuple[MoE, MLP]:
    """The mixture, and the dense layer of its active width."""
    config = ModelConfig(
        hidden_size=cell.width,
        n_routed_experts=cell.experts,
        num_experts_per_tok=cell.chosen,
        n_shared_experts=1,
        moe_intermediate_size=cell.expert_width,
        expert_backend=backend,
    )
    torch.manual_seed(0)
    return MoE(config).to(device), MLP(cell.width, cell.active_width).to(device)


def passes(layer: Callable[[Tensor], Any], cell: Cell, dtype: str, device: str) -> Callable[[], None]:
    """Forward and backward, of the input as well, and of the balance loss where the layer has one."""
    sequences, length = max(cell.tokens // LENGTH, 1), min(cell.tokens, LENGTH)
    x = torch.randn(sequences, length, cell.width, device=device, requires_grad=True)
    grad = torch.randn_like(x)

    def both() -> None:
        with autocast(dtype, device):
            y = layer(x)
        y, losses = (y[0], [y[1].balance_loss]) if isinstance(y, tuple) else (y, [])
        torch.autograd.backward([y, *losses], [grad.to(y.dtype), *map(torch.ones_like, losses)])

    return both


def autocast(dtype: str, device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def shape_of(cell: Cell, backend: str, dtype: str, device: str, compiled: bool, config: ModelConfig) -> dict[str, Any]:
    resolved = choose_backend(config, device, getattr(torch, dtype), cell.tokens)[0]
    return {
        "width": cell.width,
        "tokens": cell.tokens,
        "experts": cell.experts,
        "chosen": cell.chosen,
        "expert_width": cell.expert_width,
        "dense_width": cell.active_width,
        "dtype": dtype,
        "backend": resolved,
        "compiled": compiled,
    }


def compiled_as(wanted: bool, layer: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return torch.compile(layer, dynamic=False) if wanted else layer


def compared(cell: Cell, backend: str, dtype: str, device: str, compiled: bool, rounds: int) -> Row:
    mixture, dense = layers(cell, backend, device)
    shape = shape_of(cell, backend, dtype, device, compiled, mixture.config)
    ways = {}
    for name, layer in (("moe", mixture.forward_with_stats), ("dense", dense)):
        ways[name] = passes(compiled_as(compiled, layer), cell, dtype, device)
    times = alternate(ways, rounds, device=device)
    counted = cell in CELLS and not compiled
    return Row(shape, medians(times), ratio(times, "moe", "dense"), {"counted": counted})


def profiled(cell: Cell, backend: str, dtype: str, device: str, compiled: bool, rounds: int) -> Row:
    """ratio: the part of the mixture's time that is neither a matrix product nor pointwise."""
    mixture = layers(cell, backend, device)[0]
    shape = shape_of(cell, backend, dtype, device, compiled, mixture.config)
    both = passes(compiled_as(compiled, mixture.forward_with_stats), cell, dtype, device)
    for _ in range(2):
        both()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as seen:
        for _ in range(min(rounds, 3)):
            both()
        settle(device)
    taken = {"products": 0.0, "pointwise": 0.0, "routing": 0.0}
    for event in seen.key_averages():
        if device == "cuda" and event.device_type != DeviceType.CUDA:
            continue  # an operation's time there is that of the kernels it launched, which are events of their own
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        taken[kind_of(event.key)] += spent * 1e-6 / min(rounds, 3)
    return Row(shape, taken, taken["routing"] / sum(taken.values()))


def kind_of(operation: str) -> str:
    """What an operation's time counts as. routing: scores, sorting, moving rows, and all else."""
    name = operation.lower()
    if any(part in name for part in PRODUCTS):
        return "products"
    moves = any(part in name for part in MOVES)
    return "pointwise" if not moves and any(part in name for part in POINTWISE) else "routing"


def named(row: Row) -> dict[str, str]:
    shape = row.shape
    return {
        "D": str(shape["width"]),
        "T": str(shape["tokens"]),
        "E/K": f"{shape['experts']}/{shape['chosen']}",
        "F": str(shape["expert_width"]),
        "dtype": shape["dtype"],
        "experts": shape["backend"] + ", compiled" * shape["compiled"],
    }


def cells(row: Row) -> dict[str, str]:
    times = {f"{name}, ms": f"{seconds * 1e3:.1f}" for name, seconds in row.medians.items()}
    return named(row) | times | {"ratio": f"{row.ratio:.2f}"}


def shares(row: Row) -> dict[str, str]:
    whole = sum(row.medians.values())
    return named(row) | {name: f"{seconds / whole:.0%}" for name, seconds in row.medians.items()}
