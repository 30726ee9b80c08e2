"""Kill train.py at random moments, have the same command go on, and compare with runs that nobody killed.

python tests/kills.py              200 kills
python tests/kills.py --kills 20   a look

After every kill the newest checkpoint that was there before has to be there still, or a newer one, and open; its
metrics have to reach as far. Every run that came to its end has to be, to the last bit, the one that was never killed:
weights, optimizer, average, biases, random state, place in the text, metrics. The training is so short of breath, a few
milliseconds a step and a checkpoint after each, that most kills meet it while it writes.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moe.checkpoint import RunFolder, read_state
from moe.machine.stored import verify
from moe.machine.weights import load_tensors
from moe.metrics import read_metrics

ROOT = Path(__file__).parent.parent
STEPS = 60
COMMON = (
    "--plain",
    "--quiet",
    "--no-report",
    "--steps",
    STEPS,
    "--train.save-interval",
    1,
    "--train.sequence-length",
    16,
)
COMMON += ("--tokens-per-step", 64, "--train.eval-interval", 20, "--data.tokenizer", "bytes", "--resume", "auto")
VARIANTS = {  # every part that has a state, in one of them
    "plain": (),
    "many": (
        *("--model.hidden-dropout", 0.2, "--train.micro-batch-size", 2, "--optim.ema-decay", 0.9),
        *("--model.num-nextn-predict-layers", 1, "--model.balance-loss", "switch"),
    ),
    "adamw": ("--optim.matrix-optimizer", "adamw", "--model.attention", "grouped", "--train.short-until", 0.5),
}


@dataclass
class Tally:
    kills: int = 0
    in_training: int = 0  # of them, after the first step
    runs: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.kills += other.kills
        self.in_training += other.in_training
        self.runs += other.runs
        self.faults += other.faults


def start(folder: Path, text: Path, variant: str) -> subprocess.Popen[bytes]:
    options = map(str, ("--preset", "debug", "--data", text, "--out", folder, *COMMON, *VARIANTS[variant]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train.py", *options]
    return subprocess.Popen(command, cwd=text.parent, stderr=subprocess.PIPE, env=environment)


def finish(folder: Path, text: Path, variant: str) -> None:
    process = start(folder, text, variant)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"{folder.name} does not come to its end: {said.decode().strip()}")


def newest_step(folder: Path) -> int:
    complete = RunFolder(folder).checkpoints()
    return int(complete[-1].name) if complete else 0


def steps_logged(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return len(read_metrics(metrics)) if metrics.exists() else 0


def what_a_kill_broke(folder: Path, before: int) -> Iterator[str]:
    """before: the newest step that was saved when the process was started."""
    after = newest_step(folder)
    if after < before:
        yield f"checkpoint {before} is lost, the newest is {after}"
    if after:
        checkpoint = RunFolder(folder).checkpoints()[-1]
        verify(checkpoint)
        load_tensors(checkpoint / "model.safetensors")
        steps = [record["step"] for record in read_metrics(folder / "metrics.jsonl")]
        if steps != list(range(1, len(steps) + 1)) or len(steps) < read_state(checkpoint).step:
            yield f"metrics have {len(steps)} steps, the checkpoint {after}"


def difference(one: Path, other: Path) -> str | None:
    """The first part in which two finished runs are not the same."""
    folders = [RunFolder(path) for path in (one, other)]
    ends = [folder.checkpoints()[-1] for folder in folders]
    if ends[0].name != ends[1].name:
        return f"the last step, {ends[0].name} or {ends[1].name}"
    for name in ("model.safetensors", "optimizer.safetensors"):
        tensors = [load_tensors(end / name) for end in ends]
        if tensors[0].keys() != tensors[1].keys():
            return f"the names in {name}"
        different = [key for key in tensors[0] if not torch.equal(tensors[0][key], tensors[1][key])]
        if different:
            return f"{different[0]} in {name}"
    states = [json.loads((end / "state.json").read_text()) | {"seconds": 0} for end in ends]
    if states[0] != states[1]:
        return next(f"state.json, {key}" for key in states[0] if states[0][key] != states[1].get(key))
    lines = [[record | {"seconds": 0} for record in read_metrics(folder.metrics)] for folder in folders]
    return None if lines[0] == lines[1] else "metrics.jsonl"


def kill_once(folder: Path, text: Path, variant: str, chance: random.Random, tally: Tally) -> bool:
    """Start, or go on, and kill; whether it came to its end before that."""
    before, metrics = newest_step(folder), folder / "metrics.jsonl"
    old = metrics.stat().st_ino if metrics.exists() else None

    def training() -> bool:
        """Whether this process has made a step. It begins with a new file of metrics, cut after the checkpoint."""
        return metrics.exists() and metrics.stat().st_ino != old and steps_logged(folder) > before

    process = start(folder, text, variant)
    if chance.random() < 0.1:  # anywhere, while it starts for example
        time.sleep(chance.uniform(0, 6))
    else:
        while process.poll() is None and not training():
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    if process.returncode == -signal.SIGKILL:
        tally.kills += 1
        tally.in_training += training()
        tally.faults += [f"{folder.name}: {fault}" for fault in what_a_kill_broke(folder, before)]
        return False
    if process.returncode or said:
        tally.faults.append(f"{folder.name}: exit status {process.returncode}: {said.decode().strip()}")
    return True


def one_run(folder: Path, whole: Path, text: Path, variant: str, seed: int, kills: int) -> Tally:
    """Killed again and again until it has come to its end, or so many times."""
    tally, chance = Tally(), random.Random(seed)
    while not kill_once(folder, text, variant, chance, tally):
        if tally.faults or tally.kills >= kills:
            finish(folder, text, variant)
            break
    tally.runs = 1
    if not tally.faults and (part := difference(whole, folder)):
        tally.faults.append(f"{folder.name}: is another than the uninterrupted run: {part}")
    shutil.rmtree(folder)
    return tally


def harness(kills: int, seed: int, jobs: int, text: str, variants: tuple[str, ...] = tuple(VARIANTS)) -> Tally:
    total = Tally()
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(jobs) as pool:
        source = Path(place) / "text.txt"
        source.write_text(text)
        for variant in variants:
            finish(Path(place) / variant, source, variant)
        numbers, running = itertools.count(), set[Future[Tally]]()
        while total.kills < kills or running:
            while total.kills < kills and len(running) < jobs:
                number = next(numbers)
                variant = variants[number % len(variants)]
                folder = Path(place) / f"{variant}-{number}"
                job = (folder, Path(place) / variant, source, variant, seed + number, kills - total.kills)
                running.add(pool.submit(one_run, *job))
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for tally in (future.result() for future in ended):
                total.add(tally)
                print(f"{total.kills} kills, {total.runs} runs, {len(total.faults)} faults", flush=True)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments; printed")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    args = parser.parse_args()
    print(f"seed {args.seed}")
    text = (ROOT / "data" / "tinyshakespeare" / "input.txt").read_text()[:4000]
    total = harness(args.kills, args.seed, args.jobs, text)
    for fault in total.faults:
        print(fault)
    lost = sum("lost" in fault for fault in total.faults)
    differing = sum("is another" in fault for fault in total.faults)
    print(
        f"{total.kills} kills, {total.in_training} of them while training; {lost} lost checkpoints, {differing} of "
        f"{total.runs} runs differ, {len(total.faults) - lost - differing} other faults"
    )
    return 1 if total.faults else 0


if __name__ == "__main__":
    sys.exit(main())
