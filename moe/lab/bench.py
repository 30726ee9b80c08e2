"""What things cost, always against something: two or more ways of doing the same, taken in turns on one machine.

A time by itself says little: other programs, clock rates and caches move it by tens of percent within seconds. So the
ways alternate, A B A B, and what is reported is the median of each over the rounds, and the median of the rounds'
ratios.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moe.config import MoeError, require
from moe.machine.device import processor
from moe.machine.peak import settle
from moe.machine.reproduce import versions

Way = Callable[[], object]
Times = Mapping[str, Sequence[float]]
WARM = 2  # rounds that do not count
FEWEST = 5  # rounds that do, however long they take


class BenchError(MoeError):
    """Something that cannot be measured here."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    shape: dict[str, Any]  # what was measured
    medians: dict[str, float]  # seconds of each way
    ratio: float
    further: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return self.shape | {"medians": self.medians, "ratio": self.ratio} | self.further


def alternate(ways: Mapping[str, Way], rounds: int, seconds: float = 60.0, device: str = "cpu") -> Times:
    """Seconds of each way in each round. Ends early, but not before 5 rounds that count, when `seconds` are over."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    began = time.perf_counter()
    for number in range(rounds + WARM):
        for name, way in ways.items():
            settle(device)
            start = time.perf_counter()
            way()
            settle(device)
            if number >= WARM:
                times[name].append(time.perf_counter() - start)
        if number + 1 >= WARM + FEWEST and time.perf_counter() - began > seconds:
            break
    return times


def check_rounds(rounds: int) -> None:
    require(rounds > 0, f"--rounds {rounds} must be greater than 0")


def medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(taken) for name, taken in times.items()}


def ratio(times: Times, name: str, base: str) -> float:
    """The median over rounds of one way's time over another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def geometric_mean(numbers: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, numbers)) / len(numbers))


def machine(device: str) -> dict[str, Any]:
    threads = torch.get_num_threads()
    if device == "cuda":
        return {"device": device, "name": torch.cuda.get_device_name(), "threads": threads}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"device": device, "name": processor(), "threads": threads, "load": load}


def copy_bandwidth(size: int, device: str, rounds: int = 20) -> float:
    """Bytes a second, read and written, of copying so many: what any program's reading is bounded by."""
    source = torch.ones(max(size, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = alternate({"copy": lambda: target.copy_(source)}, rounds, device=device)["copy"]
    return 2 * size / statistics.median(times)


def present(
    rows: Iterable[Row],
    cells: Callable[[Row], dict[str, str]],
    device: str,
    as_json: bool,
    below: Callable[[list[Row]], list[str]] = lambda rows: [],
    further: Mapping[str, str] | None = None,
) -> None:
    """Print rows as they are measured, as a table in Markdown, or all of them as one JSON object. cells: a row's
    columns. below: what is said under the table. further: versions of other packages."""
    here, used = machine(device), versions() | dict(further or {})
    done: list[Row] = []
    if not as_json:
        print(f"{here['name']}, {here['threads']} threads; {', '.join(f'{n} {v}' for n, v in used.items())}\n")
    for row in rows:
        if not as_json:
            columns = cells(row)
            if not done:
                print(line(columns) + "\n" + line(["---"] * len(columns)))
            print(line(columns.values()), flush=True)
        done.append(row)
    if as_json:
        print(json.dumps({"machine": here, "versions": used, "rows": [row.to_json() for row in done]}))
    elif notes := below(done):
        print("\n" + "\n".join(notes))


def line(parts: Iterable[str]) -> str:
    return f"| {' | '.join(parts)} |"
