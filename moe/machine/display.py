"""What a training shows while it runs: a bar and a few lines that are drawn anew on a terminal, plain lines elsewhere.

Notation: L MoE layers, E routed experts.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from rich.text import Text
from torch import Tensor

from moe.metrics import clock
from moe.router import dead_experts, max_violation

BLOCKS, ASCII = " ▁▂▃▄▅▆▇█", " .:-=+*#@"  # nothing, and eight levels
WIDEST = 32  # experts of a layer that are shown one by one
MOST_LAYERS, LINE = 8, 90  # MoE layers that a terminal shows; letters of theirs in a plain line


@dataclass(frozen=True)
class Pace:
    """How fast a step was made, and what is left."""

    progress: float  # the part of the training that is done
    tokens_per_second: float
    utilisation: float  # of the peak
    seconds_left: float


class Display:
    """A progress bar on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, plain: bool = False, quiet: bool = False, log_interval: int = 50) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.live = on_terminal(self.console) and not plain and not quiet
        self.levels = BLOCKS if can_show(BLOCKS, self.console.encoding) else ASCII
        self.log_interval = log_interval
        self.bar: Bar | None = None
        self.stage, self.spoke = "", 0.0
        self.validation = ""
        self.numbers: Sequence[int] = ()
        self.layers: list[int] = []  # those that are shown, by their places
        self.rows: list[str] = []  # their lines

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
        if self.bar is not None:
            self.bar.show(done, line)
        elif time.monotonic() - self.spoke > 5:
            self.spoke = time.monotonic()
            self.say(f"{stage}: {line.strip()}")

    def start(self, name: str, total: float | None = 1.0, numbers: Sequence[int] = ()) -> None:
        """numbers: of the L MoE layers, where there will be loads to show."""
        self.close()
        self.numbers = numbers
        if self.live:
            self.bar = Bar(name, total, self.console)
            self.bar.start()

    def step(self, record: dict[str, Any], pace: Pace, load: Tensor | None) -> None:
        """A line of metrics, how fast that was, and the load (L, E) behind it, None where a step was left out."""
        if "val_loss" in record:
            self.validation = f"  val {record['val_nats_per_character']:.3f}/char"
        line = f"loss {record['loss']:.3f}{self.validation}"
        if record["max_vio"] is not None:
            line += f"  balance loss {record['balance_loss']:.3f}  MaxVio {record['max_vio']:.2f}"
            line += f"  dead {record['dead_experts']}"
        speed = f"{pace.tokens_per_second:,.0f} tok/s  MFU {100 * pace.utilisation:.1f} %"
        done, left = f"{100 * pace.progress:3.0f} %", f"ETA {clock(pace.seconds_left)}"
        regular = record["step"] % self.log_interval == 0
        if self.bar is not None:
            self.rows = self.rows if load is None else self.bars(load)
            self.bar.show(pace.progress, f"{done}  step {record['step']}  {left}", (line, speed, *self.rows))
        elif regular or "val_loss" in record:
            self.say(f"step {record['step']:>5} {done}  {line}  {speed}  {left}")
            if "val_loss" in record and load is not None:
                self.say(load_line(load, self.levels, self.numbers))

    def bars(self, load: Tensor) -> list[str]:
        """A line for each MoE layer. Of many layers, for the worst: chosen anew only when the worst is none of them."""
        (worst,) = worst_layers(load, 1)
        if worst not in self.layers:
            self.layers = worst_layers(load, MOST_LAYERS)
        few = f"  ({len(self.layers)} of {len(load)} MoE layers)" if len(load) > len(self.layers) else ""
        lines = [layer_line(self.numbers[layer], load[layer], self.levels) for layer in self.layers]
        lines[self.layers.index(worst)] += "  the worst" if len(lines) > 1 else ""
        return [*lines[:-1], lines[-1] + few]

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Bar(Progress):
    """A progress bar, and lines below it that are cut at the terminal's edge."""

    def __init__(self, name: str, total: float | None, console: Console) -> None:
        self.below: Sequence[str] = ()  # before Progress draws itself
        uncut = Column(no_wrap=True, overflow="crop")
        columns = (
            TextColumn("{task.description}", markup=False, table_column=uncut),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}", markup=False, table_column=uncut),
        )
        super().__init__(*columns, console=console)
        self.task: TaskID = self.add_task(name, total=total, line="")

    def show(self, completed: float, line: str, below: Sequence[str] = ()) -> None:
        self.below = below
        self.update(self.task, completed=completed, line=line)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from (Text(line, no_wrap=True, overflow="crop") for line in self.below)


class Eta:
    """Seconds left, evaluation and saving included, from how fast progress was since the start."""

    def __init__(self, progress: float) -> None:
        self.progress, self.began = progress, time.monotonic()

    def __call__(self, progress: float) -> float:
        made = progress - self.progress
        return (time.monotonic() - self.began) / made * max(1 - progress, 0) if made > 0 else 0.0


def on_terminal(console: Console) -> bool:
    """Whether lines can be drawn anew: FORCE_COLOR and the like make rich take any stream for a terminal."""
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


def can_show(letters: str, encoding: str) -> bool:
    try:
        letters.encode(encoding)
    except (UnicodeError, LookupError):
        return False
    return True


# -- the load of experts as a row of blocks ----------------------------------------------------------------------------


def row_of_blocks(load: Tensor, levels: str) -> str:
    """A letter for each expert: empty without a token, half as high as can be with an even share, full at twice that.
    Of more experts than are shown one by one, the profile: the busiest first, neighbours in this order taken together.
    load: (E,)."""
    shares = load.float() / load.float().mean().clamp_min(1e-20)  # 1 is even
    if len(shares) > WIDEST:
        profile = shares.sort(descending=True).values
        shares = torch.stack([part.mean() for part in profile.tensor_split(WIDEST)])
    full = len(levels) - 1
    heights = [min(max(round(share * full / 2), 1), full) if share else 0 for share in shares.tolist()]
    return f"[{''.join(levels[height] for height in heights)}]"


def layer_line(layer: int, load: Tensor, levels: str) -> str:
    dead = f"  dead {dead}" if (dead := int(dead_experts(load))) else ""
    row = f"layer {layer:<2} {row_of_blocks(load, levels)}  MaxVio {max_violation(load):.2f}{dead}"
    return row + ("  busiest first" if len(load) > WIDEST else "")


def load_line(load: Tensor, levels: str, numbers: Sequence[int]) -> str:
    """Every MoE layer's row in one line; of those that would not fit, the worst. load: (L, E)."""
    rows = [f"{layer} {row_of_blocks(each, levels)}" for layer, each in zip(numbers, load, strict=True)]
    shown = worst_layers(load, LINE // (len(rows[0]) + 2))
    which = f"the worst {len(shown)} of {len(rows)} MoE layers" if len(shown) < len(rows) else "layer"
    order = ", busiest first" if load.shape[1] > WIDEST else ""
    return f"experts{order}  {which} " + "  ".join(rows[layer] for layer in shown)


def worst_layers(load: Tensor, most: int) -> list[int]:
    """So many by MaxVio, of equal ones the first, in order."""
    return sorted(max_violation(load).argsort(descending=True, stable=True)[:most].tolist())
