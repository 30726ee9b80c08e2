"""What a run cost, beside what DeepSeek-V3 cost (arXiv 2412.19437, table 1: the final run, without research)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe.config import RunConfig
from moe.machine.cost import count, readable
from moe.metrics import Record, clock

V3_TOKENS, V3_HOURS, V3_DOLLARS = 14.8e12, 2.788e6, 5.576e6  # H800-hours, at 2 dollars each
V3_TOTAL, V3_ACTIVE = 671e9, 37e9
H800_PEAK = 989e12  # operations a second in bfloat16, NVIDIA's figure
CORE_HOUR, GPU_HOUR = 0.05, 2.0  # dollars: what rented cores usually cost; the rate that DeepSeek reckons with


@dataclass(frozen=True)
class Rate:
    """Of the machine: dollars an hour, and in words."""

    dollars: float
    words: str


def usual_rate(device: str, threads: int) -> Rate:
    if device == "cuda":
        return Rate(GPU_HOUR, f"${GPU_HOUR:.2f} an hour of the GPU, DeepSeek's rate")
    return Rate(CORE_HOUR * threads, f"${CORE_HOUR:.2f} an hour and core ({threads} of them), as cores are rented out")


@dataclass(frozen=True)
class Row:
    name: str
    ours: str
    v3: str


def cost_table(config: RunConfig, last: Record, rate: Rate, peak: float | None) -> Sequence[Row]:
    """last: the run's last step. peak: operations a second that its machine reaches, if known."""
    size = count(config.model, config.train.sequence_length)
    operations = last["tokens"] * size.training_flops
    seconds = max(last["seconds"], 1e-9)
    v3_operations = V3_TOKENS * 6 * V3_ACTIVE  # without attention
    v3_share = v3_operations / (V3_HOURS * 3600 * H800_PEAK)
    rows = [
        Row("parameters", f"{readable(size.total)}, {readable(size.active)} of them active for a token", "671B, 37B"),
        Row("tokens", readable(last["tokens"], "G"), "14.8T"),
        Row("operations", f"{operations:.2g} FLOP", f"{v3_operations:.2g} FLOP, attention not counted"),
        Row(
            "time",
            f"{clock(last['seconds'])}, {readable(last['tokens'] / seconds)} tokens a second",
            "2.788M H800-hours",
        ),
    ]
    if peak:
        ours = f"{100 * operations / seconds / peak:.0f} % of {peak:.2g} FLOP a second"
        rows.append(Row("utilisation", ours, f"{100 * v3_share:.0f} % of an H800's {H800_PEAK:.2g}"))
    dollars = rate.dollars * last["seconds"] / 3600
    rows.append(Row("price", f"{money(dollars)} at {rate.words}", "$5.576M at $2 an H800-hour"))
    per_billion = dollars / (last["tokens"] / 1e9)
    rows.append(Row("price of 1B tokens", money(per_billion), money(V3_DOLLARS / (V3_TOKENS / 1e9))))
    return rows


def money(dollars: float) -> str:
    if dollars >= 100:
        return f"${dollars:,.0f}"
    return f"${dollars:.2f}" if dollars >= 0.1 else f"${dollars:.2g}"


def peak_of(setup: Mapping[str, Any]) -> float | None:
    """From config.json, where training has stored it."""
    peak = setup.get("peak_flops")
    return float(peak) if isinstance(peak, int | float) and 0 < peak < 1e20 else None
