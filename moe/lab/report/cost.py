"""What a run cost, beside what DeepSeek-V3 cost (arXiv 2412.19437, table 1: the official training alone, without the
research before it)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe.config import RunConfig
from moe.lab.report.history import History
from moe.machine.cost import count, readable
from moe.metrics import clock

V3_TOKENS, V3_ACTIVE = 14.8e12, 37e9
V3_HOURS, V3_DOLLARS = 2.664e6, 5.328e6  # of pretraining on those tokens: H800-hours, at 2 dollars each
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


def cost_table(config: RunConfig, history: History, rate: Rate, peak: float | None) -> Sequence[Row]:
    """history: with a step at least. peak: operations a second that the run's machine reaches, if known."""
    size, done = count(config.model, config.train.sequence_length), operations(config, history)
    tokens, seconds = history.last["tokens"], max(history.last["seconds"], 1e-9)
    dollars, v3 = rate.dollars * seconds / 3600, V3_TOKENS * 6 * V3_ACTIVE
    these = "of them for these tokens"
    rows = [
        Row("parameters", f"{readable(size.total)}, {readable(size.active)} of them active for a token", "671B, 37B"),
        Row("tokens", readable(tokens, "G"), "14.8T"),
        Row("operations", f"{done:.2g} FLOP", f"{v3:.2g} FLOP, attention not counted"),
        Row(
            "time",
            f"{clock(seconds)}, {tokens / seconds:,.0f} tokens a second",
            "2.788M H800-hours, 2.664M for these tokens",
        ),
        Row("price", f"{money(dollars)} at {rate.words}", f"$5.576M at $2 an H800-hour, $5.328M {these}"),
        Row("price of 1B tokens", money(dollars / (tokens / 1e9)), money(V3_DOLLARS / (V3_TOKENS / 1e9))),
    ]
    if peak:
        ours = f"{100 * done / seconds / peak:.0f} % of {readable(peak, 'G')}FLOP a second"
        share = v3 / (V3_HOURS * 3600 * H800_PEAK)
        theirs = f"{100 * share:.0f} % of an H800's {readable(H800_PEAK)}FLOP a second in bfloat16; much of it was FP8"
        rows.insert(4, Row("utilisation", ours, theirs))
    return rows


def operations(config: RunConfig, history: History) -> float:
    """Of all steps, by the windows that each had."""
    train = config.train
    costs = {parts: count(config.model, train.sequence_length // parts) for parts in {train.parts(0), train.parts(1)}}
    before = [{"step": 0, "tokens": 0, "seconds": 0.0}, *history.records[:-1]]
    budget = 60 * (config.minutes or 0)
    return sum(
        (step["tokens"] - last["tokens"])
        * costs[train.parts(last["seconds"] / budget if budget else last["step"] / config.steps)].training_flops
        for last, step in zip(before, history.records, strict=True)
    )


def money(dollars: float) -> str:
    if dollars >= 100:
        return f"${dollars:,.0f}"
    return f"${dollars:.2f}" if dollars >= 0.1 else f"${dollars:.5f}".rstrip("0")


def peak_of(setup: Mapping[str, Any]) -> float | None:
    """From config.json, where training has stored it."""
    peak = setup.get("peak_flops")
    return float(peak) if isinstance(peak, int | float) and 0 < peak < 1e20 else None
