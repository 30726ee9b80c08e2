"""Making the experiments: train.py in a process of its own, one after the other, and the figures that are kept.

A run that is there already is only read, one that was killed goes on, and one that was made otherwise is refused.
"""

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import moe
from moe.checkpoint import RunFolder
from moe.config import MoeError, RunConfig
from moe.lab.studies import Changes, configure, flags
from moe.lab.study_training import run_processes
from moe.machine.cost import count
from moe.metrics import Record, read_metrics

Trainer = Callable[[list[str]], None]  # given what follows `python train.py`


class ExperimentError(MoeError):
    """An experiment that cannot be made, or not go on."""


def train(arguments: list[str]) -> None:
    """On all cores."""
    script = Path(moe.__file__).parents[1] / "train.py"
    if not script.is_file():
        raise ExperimentError(f"{script} is not there: the experiments run it, so install with pip install -e .")
    ((status, complaints),) = run_processes([[sys.executable, str(script), *arguments]])
    if status:
        said = complaints.split("\n")[-1].removeprefix("error: ") or f"exit status {status}"
        raise ExperimentError(f"{' '.join(arguments)}: {said}")


def run_experiments(
    asked: Mapping[str, Changes],
    out: Path,
    preset: str = "tiny",
    trainer: Trainer = train,
    say: Callable[[str], None] = lambda line: None,
) -> list[Record]:
    """Make what is missing in the folder; of each its name, changes, machine, versions and figures."""
    made = []
    for number, (name, changes) in enumerate(asked.items(), 1):
        folder, config = RunFolder(out / name), configure(preset, changes)
        check_unchanged(folder, config)
        if not finished(folder, config):
            say(f"{number} of {len(asked)}  {name}")
            trainer([*flags(preset, changes), "--out", str(folder.path), "--resume", "auto", "--plain", "--quiet"])
        if not finished(folder, config):
            raise ExperimentError(f"{folder.path} was interrupted: the same command goes on")
        facts = json.loads(folder.setup.read_text("utf-8"))
        facts = {"machine": facts["hardware"], "dtype": facts["runtime"]["dtype"], "versions": facts["versions"]}
        made.append({"experiment": name, "changes": dict(changes), **facts, "figures": figures_of(folder)})
    return made


def check_unchanged(folder: RunFolder, config: RunConfig) -> None:
    """Raises ExperimentError where the folder holds another run."""
    if not folder.checkpoints():
        return
    stored = folder.read_setup()[0]
    if replace(stored, model=replace(stored.model, vocab_size=config.model.vocab_size)) != config:
        raise ExperimentError(f"{folder.path} holds a run that was made otherwise: choose another --out")


def finished(folder: RunFolder, config: RunConfig) -> bool:
    records = read_metrics(folder.metrics) if folder.checkpoints() else []
    return bool(records) and records[-1]["step"] >= config.steps


def figures_of(folder: RunFolder) -> dict[str, Any]:
    """Prices and balance over the whole validation split at the end; and of the second half of the steps, on the
    batches that were trained on: MaxVio in the worst layer, dead experts in all, and by how many that number changes
    from a step to the next; losses, the gradient's norm, seconds. None: there are no experts, or no such loss."""
    records, (config, _, _) = read_metrics(folder.metrics), folder.read_setup()
    size, last, half = count(config.model, config.train.sequence_length), records[-1], records[len(records) // 2 :]
    dead = [record["dead_experts"] for record in half if record["dead_experts"] is not None]
    seconds = [after["seconds"] - before["seconds"] for before, after in pairwise(half)]
    figures = {
        "nats_per_character": last["val_nats_per_character"],
        "max_vio": last["val_max_vio"],
        "dead_experts": last["val_dead_experts"],
        "entropy": last["val_entropy"],
        "batch_max_vio": mean([record["max_vio"] for record in half]),
        "batch_dead_experts": mean(dead),
        "change_of_dead": mean([abs(after - before) for before, after in pairwise(dead)]),
        "balance_loss": mean([record["balance_loss"] for record in half]),
        "loss": mean([record["loss"] for record in half]),
        "mtp_loss": mean([record.get("mtp_1_loss") for record in half]),
        "grad_norm": statistics.median(record["grad_norm"] for record in half),
        "step_seconds": statistics.median(seconds) if seconds else 0.0,
        "flops_per_token": size.training_flops,
        "parameters": size.total,
    }
    return {name: value if value is None or type(value) is int else round(value, 5) for name, value in figures.items()}


def mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else None
