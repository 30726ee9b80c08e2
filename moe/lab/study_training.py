"""The trainings of a study: train.py in processes of their own, and what is kept of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import moe
from moe.checkpoint import RunFolder
from moe.config import MoeError, RunConfig
from moe.lab.studies import Budget, Changes, StudyError, configure, flags
from moe.machine.cost import count
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


Trainer = Callable[[Sequence[Job], Path, Budget], list[Outcome | Diverged]]


def train(jobs: Sequence[Job], out: Path, budget: Budget) -> list[Outcome | Diverged]:
    """Train at the same time, in processes of their own, or go on, and read what came of it. By the clock all are made
    anew if one was interrupted; by steps each is continued. Their checkpoints are removed."""
    script = Path(moe.__file__).parents[1] / "train.py"
    if not script.is_file():
        raise StudyError(f"{script} is not there: a study runs it, so install from a checkout with pip install -e .")
    runs = [RunFolder(out / job.name) for job in jobs]
    left = [job for job, run in zip(jobs, runs, strict=True) if read_outcome(run, budget) is None]
    if left and not budget.steps:
        left = list(jobs)
        for run in runs:
            run.acquire()
            run.clear()
            run.release()
    further = ["--resume", "auto", "--plain", "--quiet", "--no-report"]
    commands = [[sys.executable, str(script), *job.flags(), "--out", str(out / job.name), *further] for job in left]
    ended = dict(zip((job.name for job in left), run_processes(commands), strict=True))
    return [outcome_of(job, run, budget, *ended.get(job.name, (0, ""))) for job, run in zip(jobs, runs, strict=True)]


def outcome_of(job: Job, run: RunFolder, budget: Budget, status: int, complaints: str) -> Outcome | Diverged:
    """Of a training whose process has ended with this status."""
    if status:
        said = complaints.split("\n")[-1].removeprefix("error: ") or f"exit status {status}"
        if said.startswith("step "):
            return Diverged(f"{job.name}: {said}")
        raise StudyError(f"{job.name}: {said}")
    outcome = read_outcome(run, budget)
    if outcome is None:
        raise StudyError(f"{job.name} was interrupted: the same command goes on")
    shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
    return outcome


def run_processes(commands: Sequence[list[str]]) -> list[tuple[int, str]]:
    """At the same time, each with its share of the threads; their exit statuses and what they complained of. A Ctrl-C
    or SIGTERM that ends this process has them save first."""
    share = {"OMP_NUM_THREADS": str(max(torch.get_num_threads() // len(commands), 1))} if len(commands) > 1 else {}
    processes: list[subprocess.Popen[str]] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for command in commands:
            processes.append(
                subprocess.Popen(
                    command, env=os.environ | share, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
                )
            )
        complaints = [process.communicate()[1].strip() for process in processes]
        return [(process.returncode, said) for process, said in zip(processes, complaints, strict=True)]
    except BaseException:
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate()
        raise
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
        "tokens": [record["tokens"] for record in seen],
        "seconds": [round(record["seconds"], 1) for record in seen],
        "flops": [float(f"{record['tokens'] * size.training_flops:.4g}") for record in seen],
        "val_bits_per_byte": [rounded(record["val_bits_per_byte"]) for record in seen],
    }
    machine = json.loads(run.setup.read_text("utf-8"))["hardware"]  # where it was made, which may be elsewhere
    return Outcome(data, f"{machine}, {runtime.dtype}", finals, curve)


def rounded(number: float | None) -> Any:
    return number if number is None else round(number, 5)
