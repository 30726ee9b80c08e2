"""What training keeps of itself, one JSON line a step, and the alarm when routing collapses.

Notation: L MoE layers, E routed experts.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

    def __init__(self, top_k: int, streaks: dict[str, int], layers: Sequence[int]) -> None:
        """streaks: by the place among the MoE layers. layers: their numbers."""
        self.top_k, self.streaks, self.layers = top_k, dict(streaks), layers

    def check(self, load: Tensor | None) -> str | None:
        """load: (L, E). A line to print, or None."""
        collapsed = (
            {}
            if load is None
            else {str(layer): self.streaks.get(str(layer), 0) + 1 for layer in collapsed_layers(load, self.top_k)}
        )
        self.streaks = collapsed
        struck = [str(self.layers[int(layer)]) for layer, streak in collapsed.items() if streak == PATIENCE]
        if not struck:
            return None
        return (
            f"ALARM: routing has collapsed in layer {', '.join(struck)}: a few experts get most tokens, the others "
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
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
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


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
