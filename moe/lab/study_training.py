"""One training of a study: train.py in a process of its own, and what is kept of it."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import moe
from moe.checkpoint import RunFolder
from moe.config import MoeError, RunConfig
from moe.cost import count
from moe.device import hardware
from moe.lab.studies import Budget, Changes, StudyError, configure, flags
from moe.metrics import read_metrics

Stage = Literal["sweep", "final"]


@dataclass(frozen=True)
class Job:
    """One training."""

    stage: Stage
    arm: str
    setting: int  # which of the arm's tries
    seed: int
    preset: str
    changes: Changes

    @property
    def key(self) -> tuple[str, int, int]:
        return self.arm, self.setting, self.seed

    @property
    def name(self) -> str:
        arm = re.sub(r"[^\w.]+", "-", self.arm)
        return f"sweep-{arm}-{self.setting}" if self.stage == "sweep" else f"{arm}-{self.seed}"

    def config(self) -> RunConfig:
        return configure(self.preset, self.changes)

    def flags(self) -> list[str]:
        return flags(self.preset, self.changes)


@dataclass(frozen=True)
class Outcome:
    """What is kept of a training."""

    data: Mapping[str, str]  # hashes of text and tokenizer
    machine: str
    finals: Mapping[str, float | None]
    curve: Mapping[str, list[float]] = field(default_factory=dict)  # columns


class Diverged(StudyError):
    """A training whose loss was no longer finite. A sweep may meet one."""


Trainer = Callable[[Job, Path, Budget], Outcome]


def train(job: Job, folder: Path, budget: Budget) -> Outcome:
    """Train in a process of its own, or go on, and read what came of it. By the clock a training that was interrupted
    is made anew; by steps it is continued. Its checkpoints are removed."""
    script = Path(moe.__file__).parents[1] / "train.py"
    if not script.is_file():
        raise StudyError(f"{script} is not there: a study runs it, so install from a checkout with pip install -e .")
    run = RunFolder(folder)
    if (outcome := read_outcome(run, budget)) is None:
        if not budget.steps:
            run.acquire()
            run.clear()
            run.lock.release()
        command = [sys.executable, str(script), *job.flags(), "--out", str(folder), "--resume", "auto"]
        status, complaints = run_process([*command, "--plain", "--quiet"])
        if status:
            said = complaints.split("\n")[-1].removeprefix("error: ") or f"exit status {status}"
            kind = Diverged if said.startswith("step ") else StudyError
            raise kind(f"{job.name}: {said}")
        outcome = read_outcome(run, budget)
    if outcome is None:
        raise StudyError(f"{job.name} was interrupted: the same command goes on")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return outcome


def run_process(command: list[str]) -> tuple[int, str]:
    """Its exit status and what it complained of. A Ctrl-C or SIGTERM that ends this process has that one save first."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                said = process.communicate()[1]
            except KeyboardInterrupt:
                process.terminate()
                process.communicate()
                raise
        return process.returncode, said.strip()
    finally:
        signal.signal(signal.SIGTERM, before)


def read_outcome(run: RunFolder, budget: Budget) -> Outcome | None:
    """Of a training that has come to its end; None otherwise."""
    try:
        records, (config, runtime, data) = read_metrics(run.metrics), run.read_setup()
    except MoeError:
        return None
    if not records or not budget.spent(records[-1]["step"], records[-1]["seconds"]) or "val_loss" not in records[-1]:
        return None
    size, last = count(config.model, config.train.sequence_length), records[-1]
    names = ["val_bits_per_byte", "val_nats_per_character", "test_bits_per_byte", "test_nats_per_character"]
    finals = {
        "parameters": size.total,
        "active": size.active,
        "flops_per_token": size.training_flops,
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": round(last["seconds"], 2),
        **{name: rounded(last[name]) for name in (*names, "val_max_vio", "val_dead_experts") if name in last},
    }
    seen = [record for record in records if "val_loss" in record and record["val_tokens"] == last["val_tokens"]]
    curve = {
        "step": [record["step"] for record in seen],
        "tokens": [record["tokens"] for record in seen],
        "seconds": [round(record["seconds"], 1) for record in seen],
        "flops": [float(f"{record['tokens'] * size.training_flops:.4g}") for record in seen],
        "val_bits_per_byte": [rounded(record["val_bits_per_byte"]) for record in seen],
    }
    return Outcome(data, f"{hardware(runtime.device)}, {runtime.dtype}", finals, curve)


def rounded(number: float | None) -> Any:
    return number if number is None else round(number, 5)
