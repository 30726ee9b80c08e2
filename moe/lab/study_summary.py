"""What a study's runs say: means, paired differences, and a verdict that takes some evidence.

Each arm has a mean over the seeds and its standard error. The arms are compared with the first one seed by seed, since
what a seed does to one arm it mostly does to the other too; the standard error is that of the mean of the differences.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moe.lab.studies import Study, StudyError
from moe.lab.study_runs import Results
from moe.metrics import Record

FEWEST = 5  # seeds, and
CLEAR = 3  # standard errors, that a verdict takes
Verdict = Literal["ahead", "behind", "undecided"]


@dataclass(frozen=True)
class Estimate:
    mean: float
    standard_error: float | None  # None with a single seed


@dataclass(frozen=True)
class Comparison:
    """With the first arm; lower is better."""

    difference: Estimate  # mean over the seeds of this arm's price minus the first one's
    ratio: float  # of the means
    verdict: Verdict


def estimate(values: Sequence[float]) -> Estimate:
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Estimate(statistics.fmean(values), spread)


def compare(first: Sequence[float], other: Sequence[float]) -> Comparison:
    """Values of the same seeds in the same order."""
    difference = estimate([b - a for a, b in zip(first, other, strict=True)])
    verdict: Verdict = "undecided"
    if len(first) >= FEWEST and abs(difference.mean) > CLEAR * (difference.standard_error or 0):
        verdict = "ahead" if difference.mean < 0 else "behind"
    return Comparison(difference, statistics.fmean(other) / statistics.fmean(first), verdict)


def paired(results: Results) -> tuple[list[int], dict[str, list[Record]]]:
    """The seeds that every arm has been trained with, and each arm's runs in their order."""
    arms: dict[str, dict[int, Record]] = {arm["arm"]: {} for arm in results.protocol["arms"]}
    for run in results.finals:
        arms[run["arm"]][run["seed"]] = run
    seeds = sorted(set.intersection(*(set(runs) for runs in arms.values())))
    if not seeds:
        raise StudyError(f"{results.study}: there is no seed yet with which every arm has been trained")
    return seeds, {name: [runs[seed] for seed in seeds] for name, runs in arms.items()}


def seconds_at(curve: Record, wanted: float) -> float | None:
    """When a curve first came down to this price, between its points on a straight line; None: never."""
    seconds, prices = curve["seconds"], curve["val_bits_per_byte"]
    for at, price in enumerate(prices):
        if price <= wanted:
            if at == 0:
                return seconds[0]
            share = (prices[at - 1] - wanted) / (prices[at - 1] - price)
            return seconds[at - 1] + share * (seconds[at] - seconds[at - 1])
    return None


def race(first: Sequence[Record], other: Sequence[Record]) -> dict[str, Any]:
    """How soon an arm reached the price that the first one ended with, as a share of the first one's seconds, and what
    its steps took. Seeds that never reached it count as later than any other."""
    shares = []
    for slow, fast in zip(first, other, strict=True):
        reached = seconds_at(fast["curve"], slow["curve"]["val_bits_per_byte"][-1])
        shares.append(reached / slow["finals"]["seconds"] if reached is not None else float("inf"))
    middle = statistics.median(shares)
    figures = {name: ratio_of_means(first, other, name) for name in ("step_seconds", "tokens", "flops")}
    seeds = [share if share < float("inf") else None for share in shares]
    return {"reached": middle if middle < float("inf") else None, "reached_by_seed": seeds, **figures}


def ratio_of_means(first: Sequence[Record], other: Sequence[Record], name: str) -> float:
    return statistics.fmean(map(figure(name), other)) / statistics.fmean(map(figure(name), first))


def figure(name: str) -> Any:
    """Takes a final figure out of a run, or makes it from others."""
    made = {
        "step_seconds": lambda finals: finals["seconds"] / finals["steps"],
        "flops": lambda finals: finals["tokens"] * finals["flops_per_token"],
    }
    return lambda run: made.get(name, lambda finals: finals[name])(run["finals"])


def priced_split(arms: dict[str, list[Record]]) -> str:
    """The test split where there is one."""
    runs = [run for group in arms.values() for run in group]
    return "test" if all("test_bits_per_byte" in run["finals"] for run in runs) else "val"


def summarize(results: Results, study: Study) -> dict[str, Any]:
    """All of it, for JSON."""
    seeds, arms = paired(results)
    runs = [run for group in arms.values() for run in group]
    split = priced_split(arms)
    first = next(iter(arms.values()))
    rows = []
    for name, group in arms.items():
        row: dict[str, Any] = {"arm": name, "setting": chosen(results, name), "runs": len(group)}
        for kind in ("bits_per_byte", "nats_per_character"):
            row[kind] = asdict(estimate([run["finals"][f"{split}_{kind}"] for run in group]))
        if all(run["finals"]["val_max_vio"] is not None for run in group):
            row["max_vio"] = asdict(estimate([run["finals"]["val_max_vio"] for run in group]))
            row["dead_experts"] = statistics.fmean(run["finals"]["val_dead_experts"] for run in group)
        for kind in ("parameters", "active", "steps", "tokens", "flops", "seconds", "step_seconds"):
            row[kind] = statistics.fmean(map(figure(kind), group))
        if group is not first:
            price = figure(f"{split}_bits_per_byte")
            row |= asdict(compare(list(map(price, first)), list(map(price, group))))
            row |= {"race": race(first, group)} if study.race else {}
        rows.append(row)
    return {
        "study": results.study,
        "question": study.question,
        "split": split,
        "budget": results.protocol["budget"],
        "together": results.protocol.get("together", False),
        "data": results.protocol["base"]["data"]["source"],
        "seeds": seeds,
        "machines": sorted({run["machine"] for run in runs}),
        "versions": dict(results.versions),
        "arms": rows,
    }


def chosen(results: Results, arm: str) -> dict[str, Any] | None:
    """The setting that the sweep found best for an arm, among how many, and whether it lies at the edge of those tried:
    then a better one may lie beyond."""
    tries = next(each["tries"] for each in results.protocol["arms"] if each["arm"] == arm)
    best = results.best().get(arm)
    if best is None or len(tries) < 2:
        return None
    edges = []
    for name, value in tries[best].items():
        values = {each[name] for each in tries}
        if len(values) > 1 and value in (min(values), max(values)):
            edges.append(name)
    budget = results.protocol.get("sweep", results.protocol["budget"])
    return {"best": tries[best], "tried": len(tries), "budget": budget, "at_the_edge": edges}
