"""Is my curve right? The curves of the presets that run on a laptop, three seeds each, and how a run compares.

A reference is a small CSV file, two dozen rows for each seed: means over the steps since the row before and, where they
ended with one, the evaluation. A run is within the band where it lies no further from the mean of the seeds than three
standard deviations, pooled over all rows, or half a percent where that is more. `about.json` beside them says what they
were made with.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from moe.checkpoint import RunFolder
from moe.config import MoeError, RunConfig
from moe.lab.report.history import History, mean
from moe.presets import presets

ROWS = 24  # of a reference and seed, at most
WIDTH, LEAST = 3.0, 0.005  # of the band: standard deviations, and at least this part of the mean
COLUMNS = ("train_nats_per_character", "val_nats_per_character", "val_bits_per_byte", "max_vio", "grad_norm")
LENGTHS: dict[str, dict[str, Any]] = {"tiny": {}, "dense": {}, "debug": {}, "wiki": {"minutes": None, "steps": 1000}}
NO_MATTER = {"seed", "device", "dtype", "compile", "deterministic", "model.expert_backend", "data.source"}
NO_MATTER |= {f"train.{name}_interval" for name in ("eval", "save", "log")}
NO_MATTER |= {f"train.{name}" for name in ("keep_last", "keep_best", "micro_batch_size", "activation_checkpointing")}

Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Reference:
    """The curves of a preset. seeds: for each, its rows by step."""

    preset: str
    config: RunConfig  # of the runs it was made of, but for the seed
    about: Mapping[str, str]  # text: its hash; machine; torch: the version
    seeds: Sequence[Mapping[int, Mapping[str, float]]]

    def values(self, step: int, name: str) -> list[float]:
        """Of the seeds at a step, as many as have one."""
        found = (rows.get(step, {}).get(name, np.nan) for rows in self.seeds)
        return [value for value in found if not np.isnan(value)]

    @cached_property
    def steps(self) -> list[int]:
        return sorted(set().union(*self.seeds))

    @property
    def stride(self) -> int:
        return stride(self.config.steps)

    def spread(self, name: str) -> float:
        """The standard deviation between seeds, pooled over the steps, relative to the mean."""
        pooled = []
        for step in self.steps:
            if len(values := self.values(step, name)) > 1:
                pooled.append(float(np.var(values, ddof=1)) / max(float(np.mean(values)), 1e-9) ** 2)
        return float(np.sqrt(np.mean(pooled))) if pooled else 0.0

    def band(self, name: str) -> dict[int, dict[str, float]]:
        """By step: mean, low and high."""
        width, rows = max(WIDTH * self.spread(name), LEAST), {}
        for step in self.steps:
            if values := self.values(step, name):
                middle = float(np.mean(values))
                low, high = middle * (1 - width), middle * (1 + width)
                rows[step] = {"mean": middle, "low": min(low, *values), "high": max(high, *values)}
        return rows


def stride(steps: int) -> int:
    """Steps that a row of a reference stands for."""
    return next((every for every in (1, 5, 25, 100, 500) if steps <= ROWS * every), 1000)


def config_of(preset: str) -> RunConfig:
    """What the reference runs of a preset were trained with."""
    return replace(presets()[preset], **LENGTHS[preset])


@cache
def reference_of(preset: str) -> Reference | None:
    """None where a preset has none."""
    folder = files("moe.lab") / "reference"
    about = json.loads((folder / "about.json").read_text("utf-8"))
    if preset not in about:
        return None
    seeds: dict[str, dict[int, dict[str, float]]] = {}
    for row in csv.DictReader(io.StringIO((folder / f"{preset}.csv").read_text("utf-8"))):
        numbers = {name: float(row[name]) if row[name] else np.nan for name in COLUMNS}
        seeds.setdefault(row["seed"], {})[int(row["step"])] = numbers
    return Reference(preset, config_of(preset), about[preset], list(seeds.values()))


def rows_of(history: History, every: int) -> dict[int, dict[str, float]]:
    """A run's rows by step, as a reference has them: of so many steps each, the last one of what is left."""
    names = {"train_nats_per_character": "nats_per_character", "max_vio": "max_vio", "grad_norm": "grad_norm"}
    columns = {ours: history[theirs] for ours, theirs in names.items()}
    evaluated = {record["step"]: record for record in history.evaluated.records}
    rows = {}
    for begin in range(0, len(history), every):
        end = min(begin + every, len(history))
        step = history.records[end - 1]["step"]
        found = evaluated.get(step, {})
        rows[step] = {name: mean(values[begin:end]) for name, values in columns.items()}
        rows[step] |= {name: found.get(name, np.nan) for name in COLUMNS if name.startswith("val_")}
    return rows


def as_csv(preset: str, runs: Mapping[int, History]) -> str:
    """A reference's file, from the histories of seeds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["seed", "step", *COLUMNS])
    for seed, history in runs.items():
        for step, row in rows_of(history, stride(config_of(preset).steps)).items():
            writer.writerow([seed, step, *("" if np.isnan(row[name]) else f"{row[name]:.5g}" for name in COLUMNS)])
    return out.getvalue()


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """`name = ours (theirs)` for each field that decides what is learnt and is not the same."""
    found = []
    for item in fields(theirs):
        name, a, b = f"{prefix}{item.name}", getattr(ours, item.name), getattr(theirs, item.name)
        if is_dataclass(b):
            found += differences(a, b, f"{name}.")
        elif a != b and name not in NO_MATTER and not (name == "model.vocab_size" and b == 0):
            found.append(f"{name} = {a} ({b})")
    return found


def write_reference(folders: Sequence[Path]) -> Path:
    """Make these runs the reference of their preset. Raises MoeError for runs that are not alike, or not its."""
    opened = [(RunFolder(path), RunFolder(path).read_setup()) for path in folders]
    preset, text = opened[0][1][0].preset, opened[0][1][2].get("text", "")
    if preset not in LENGTHS:
        raise MoeError(f"preset {preset} needs no reference: it is one of {', '.join(LENGTHS)} that has one")
    for folder, (config, _, data) in opened:
        if changed := differences(config, config_of(preset)):
            raise MoeError(f"{folder.path} is no reference run of {preset}: {', '.join(changed)}")
        if not (history := History.read(folder.metrics)).records or history.last["step"] != config.steps:
            raise MoeError(f"{folder.path} has not come to its end")
        if data.get("text") != text:
            raise MoeError(f"{folder.path} was trained on another text than {folders[0]}")
    path = Path(__file__).parent.parent / "reference" / f"{preset}.csv"
    path.write_text(
        as_csv(preset, {config.seed: History.read(run.metrics) for run, (config, _, _) in opened}), "utf-8", newline=""
    )
    setup = json.loads(opened[0][0].setup.read_text("utf-8"))
    machine = f"{setup['hardware']}, {setup['runtime']['dtype']}"
    about = json.loads(path.with_name("about.json").read_text("utf-8"))
    about[preset] = {"text": text, "machine": machine, "torch": setup["versions"]["torch"]}
    path.with_name("about.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    return path
