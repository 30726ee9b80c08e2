"""What training says of itself: one JSON line a step, a progress display, and wandb where asked for.

Notation: L MoE layers, E routed experts.
"""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import Tensor

from moe.config import MoeError
from moe.machine.files import write_whole
from moe.router import RoutingStats, collapsed_layers, dead_experts, load_entropy, max_violation

Record = dict[str, Any]
PATIENCE = 20  # steps a layer may look collapsed before the alarm


def load_record(load: Tensor | None) -> Record:
    """The state of the balance from a load (L, E): its worst layer's MaxVio and entropy, the dead experts of all."""
    if load is None:
        return {"max_vio": None, "entropy": None, "dead_experts": None}
    worst, least = max_violation(load).max().item(), load_entropy(load).min().item()
    return {"max_vio": worst, "entropy": least, "dead_experts": int(dead_experts(load).sum())}


def routing_record(routing: RoutingStats | None, detailed: bool) -> Record:
    """A step's balance; detailed, also layer by layer. `balance_loss` is the unweighted mean over the layers."""
    if routing is None:
        return {"balance_loss": None, "z_loss": None, **load_record(None)}
    load, balance, z = routing.load.cpu(), routing.balance_loss.mean().item(), routing.z_loss.mean().item()
    record = {"balance_loss": balance, "z_loss": z, **load_record(load)}
    if detailed:
        layers = {"max_vio": max_violation(load), "entropy": load_entropy(load), "dead_experts": dead_experts(load)}
        record |= {f"{name}_by_layer": values.tolist() for name, values in (layers | {"load": load}).items()}
    return record


class CollapseAlarm:
    """Notices layers whose routing has been collapsed for PATIENCE steps on end, and speaks up once for each."""

    def __init__(self, top_k: int, streaks: dict[str, int]) -> None:
        self.top_k, self.streaks = top_k, dict(streaks)

    def check(self, load: Tensor | None) -> str | None:
        """load: (L, E). A line to print, or None."""
        collapsed = (
            {}
            if load is None
            else {str(layer): self.streaks.get(str(layer), 0) + 1 for layer in collapsed_layers(load, self.top_k)}
        )
        self.streaks = collapsed
        struck = [layer for layer, streak in collapsed.items() if streak == PATIENCE]
        if not struck:
            return None
        return (
            f"ALARM: routing has collapsed in MoE layer {', '.join(struck)}: a few experts get most tokens, the others "
            "learn nothing. Raise --model.bias-update-speed or --model.aux-loss-alpha, or lower --optim.router-lr"
        )


class MetricsLog:
    """`metrics.jsonl`: one object a line, out of this process before the next step."""

    def __init__(self, path: Path, keep_steps: int = 0) -> None:
        """keep_steps: what an earlier process wrote for later steps, and a torn last line, are cut off."""
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= keep_steps] if path.exists() else []
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def write(self, record: Record) -> None:
        """A number that is not finite, which JSON has no name for, becomes null."""
        names = (name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value))
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record | dict.fromkeys(names)) + "\n")
        except OSError as error:
            raise MoeError(f"{self.path}: cannot be written: {error.strerror}") from None


def read_metrics(path: Path) -> list[Record]:
    """The lines of a metrics file, without a torn last one. Raises MoeError for any other damage."""
    records: list[Record] = []
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise MoeError(f"{path}: {error}") from None
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line break is torn, or nothing
        try:
            records.append(checked(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise MoeError(f"{path}, line {number}: not a metrics line ({type(error).__name__}: {error})") from None
    return records


def checked(record: Any) -> Record:
    """A line, if it counts a step and holds numbers, lists of them and nulls. Raises TypeError or KeyError."""
    if type(record["step"]) is not int or record["step"] < 0:
        raise TypeError("step is no whole number")
    if strange := [name for name, value in record.items() if not numeric(value)]:
        raise TypeError(f"{strange[0]} is no number")
    return record


def numeric(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(numeric, value))
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)


def best_before(records: list[Record]) -> Record | None:
    """The evaluation that was best, where training on made it worse by more than a hundredth. Only those that read the
    same part of the validation split are compared: the part of which the latest was not the only one."""
    evaluated = [record for record in records if record.get("val_loss") is not None]
    times = Counter(record["val_tokens"] for record in evaluated)
    compared = [record for record in evaluated if times[record["val_tokens"]] > 1]
    alike = [record for record in compared if record["val_tokens"] == compared[-1]["val_tokens"]]
    best = min(alike, key=lambda record: record["val_loss"], default=None)
    return best if best and alike[-1]["val_loss"] > 1.01 * best["val_loss"] else None


class Display:
    """A progress bar on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, plain: bool = False, quiet: bool = False, log_interval: int = 50) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal and not plain and not quiet
        self.log_interval = log_interval
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.stage, self.spoke = "", 0.0
        self.validation = ""

    def say(self, message: str) -> None:
        self.console.print(message, markup=False)

    def warn(self, message: str) -> None:
        """Never silenced; above the progress bar where there is one, otherwise on the error stream."""
        if self.bar:
            self.bar.console.print(message, style="bold yellow", markup=False)
        else:
            print(message, file=sys.stderr, flush=True)

    def advance(self, stage: str, done: int, total: int) -> None:
        """A long job before training: its stage, so far, of how much (0: unknown, then so far is in bytes). Plain lines
        appear every 5 seconds only."""
        if stage != self.stage:
            self.start(stage, total or None)
            self.stage, self.spoke = stage, time.monotonic()
        line = f"{100 * done // total:>3} %" if total else f"{done / 1e6:,.0f} MB"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, line=line)
        elif time.monotonic() - self.spoke > 5:
            self.spoke = time.monotonic()
            self.say(f"{stage}: {line.strip()}")

    def start(self, name: str, total: float | None = 1.0) -> None:
        self.close()
        if self.live:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[line]}"))
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(name, total=total, line="")

    def step(self, record: Record, progress: float, tokens_per_second: float, seconds_left: float) -> None:
        if "val_loss" in record:
            self.validation = f"  val {record['val_nats_per_character']:.3f}/char"
        line = f"loss {record['loss']:.3f}{self.validation}"
        if record["max_vio"] is not None:
            line += f"  balance loss {record['balance_loss']:.3f}  MaxVio {record['max_vio']:.2f}"
            line += f"  dead {record['dead_experts']}"
        line += f"  {tokens_per_second:,.0f} tok/s  ETA {clock(seconds_left)}"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=progress, line=f"{100 * progress:>3.0f} %  {line}")
        elif record["step"] % self.log_interval == 0 or "val_loss" in record:
            self.say(f"step {record['step']:>5} {100 * progress:3.0f} %  {line}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Eta:
    """Seconds left, evaluation and saving included, from how fast progress was since the start."""

    def __init__(self, progress: float) -> None:
        self.progress, self.began = progress, time.monotonic()

    def __call__(self, progress: float) -> float:
        made = progress - self.progress
        return (time.monotonic() - self.began) / made * max(1 - progress, 0) if made > 0 else 0.0


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Wandb:
    """Weights & Biases, imported only when asked for. Whatever goes wrong there is told once and never ends a run."""

    def __init__(self, mode: str, folder: Path, config: dict[str, Any], warn: Callable[[str], None]) -> None:
        self.warn = warn
        self.run: Any = None
        if mode != "off":
            self._attempt(lambda: self._start(mode, folder, config))

    def _start(self, mode: str, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        self.run = wandb.init(project="moe", name=folder.name, dir=str(folder), mode=mode, config=config)  # type: ignore[arg-type]

    def log(self, record: Record) -> None:
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        if (run := self.run) is not None:
            self._attempt(lambda: run.log(numbers, step=record["step"]))

    def close(self) -> None:
        if (run := self.run) is not None:
            self._attempt(run.finish)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # wandb throws errors of its own, of its network's and of its process's
            self.run = None
            self.warn(f"wandb is left out from here on ({type(error).__name__}: {error}); metrics.jsonl has everything")
