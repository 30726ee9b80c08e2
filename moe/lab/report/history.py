"""What training wrote into metrics.jsonl, as columns that charts are drawn of.

Notation: N steps, M of them with the load of every expert, L MoE layers, E routed experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from moe.config import MoeError
from moe.metrics import Record, read_metrics

POINTS = 400  # of a curve: more than a screen shows
LARGEST = 1e15  # of what can be drawn


@dataclass(frozen=True)
class History:
    """The steps of a run. Raises MoeError where they do not hold what training writes."""

    records: list[Record]

    @staticmethod
    def read(path: Path) -> "History":
        """Of a run that has not been trained here, which has no such file, nothing."""
        history = History(read_metrics(path) if path.exists() else [])
        try:
            for name in ("step", "tokens", "seconds", "nats_per_character", "grad_norm", "lr_share", "max_vio"):
                history[name]
            _ = history.loads, history.evaluated
        except (KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise MoeError(f"{path} does not hold what training writes ({what})") from None
        return history

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, name: str) -> np.ndarray:
        """A field of every step, (N,) float64, nan where it has none: where a step was left out, for one."""
        return column(self.records, name)

    @property
    def last(self) -> Record:
        return self.records[-1]

    def has(self, name: str) -> bool:
        return any(record.get(name) is not None for record in self.records)

    @cached_property
    def evaluated(self) -> "History":
        """The steps after which a part of the validation split was priced, or all of it."""
        found = History([record for record in self.records if record.get("val_loss") is not None])
        for name in ("val_nats_per_character", "val_bits_per_byte", "val_tokens"):
            found[name]
        return found

    @cached_property
    def detailed(self) -> "History":
        """The steps whose load was written layer by layer."""
        return History([record for record in self.records if record.get("load_by_layer")])

    @cached_property
    def loads(self) -> np.ndarray:
        """(M, L, E) tokens that each expert got."""
        loads = np.array([record["load_by_layer"] for record in self.detailed.records], dtype=float)
        if len(loads) and (loads.ndim != 3 or not loads.size):
            raise ValueError(f"load_by_layer has the shape {loads.shape[1:]}")
        return bounded(loads, "load_by_layer") if len(loads) else np.zeros((0, 0, 0))

    def thinned(self, names: Sequence[str], points: int = POINTS) -> list[dict[str, float]]:
        """Rows of these fields, the means of neighbouring steps where there are more steps than points."""
        groups = np.array_split(np.arange(len(self)), min(points, len(self))) if len(self) else []
        columns = {name: self[name] for name in names}
        return [{name: mean(values[group]) for name, values in columns.items()} for group in groups]


def column(records: Sequence[Record], name: str) -> np.ndarray:
    """A field of every record, float64. Raises TypeError or ValueError where that cannot be drawn."""
    values = [record.get(name) for record in records]
    return bounded(np.array([np.nan if value is None else float(value) for value in values], dtype=float), name)


def bounded(values: np.ndarray, name: str) -> np.ndarray:
    if (np.abs(values) >= LARGEST).any():
        raise ValueError(f"{name} is beyond measure")
    return values


def mean(values: np.ndarray) -> float:
    """Of those that are numbers; nan of none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
