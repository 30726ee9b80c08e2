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
            history.check()
        except (KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise MoeError(f"{path} does not hold what training writes ({what})") from None
        return history

    def check(self) -> None:
        """Raises KeyError, TypeError or ValueError for what cannot be drawn."""
        for name in (
            "nats_per_character",
            "grad_norm",
            "lr_share",
            "balance_loss",
            "max_vio",
            "dead_experts",
            "skipped",
        ):
            self[name]
        if np.isnan(self.loads).any():
            raise ValueError("load_by_layer holds no loads")
        if not ((self["step"] >= 0) & (self["tokens"] > 0) & (self["seconds"] >= 0)).all():
            raise ValueError("steps, tokens and seconds must be counted")
        for name in ("val_nats_per_character", "val_bits_per_byte", "val_tokens"):
            if np.isnan(self.evaluated[name]).any():
                raise ValueError(f"{name} is missing")
        _ = self["dead_experts"], self.evaluated["val_max_vio"], self.evaluated["val_dead_experts"]
        for name in ("max_vio", "entropy", "dead_experts"):
            if self.by_layer(name).shape != self.loads.shape[:2]:
                raise ValueError(f"{name}_by_layer is not of the layers that have loads")

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
        return History([record for record in self.records if record.get("val_loss") is not None])

    @cached_property
    def detailed(self) -> "History":
        """The steps whose load was written layer by layer."""
        return History([record for record in self.records if record.get("load_by_layer") is not None])

    @cached_property
    def loads(self) -> np.ndarray:
        """(M, L, E) tokens that each expert got."""
        return table(self.detailed.records, "load_by_layer", 3)

    def by_layer(self, name: str) -> np.ndarray:
        """(M, L) of a field that is written layer by layer."""
        return table(self.detailed.records, f"{name}_by_layer", 2)

    def thinned(self, names: Sequence[str], points: int = POINTS) -> list[dict[str, float]]:
        """Rows of these fields, the means of neighbouring steps where there are more steps than points."""
        groups = np.array_split(np.arange(len(self)), min(points, len(self))) if len(self) else []
        columns = {name: self[name] for name in names}
        return [{name: mean(values[group]) for name, values in columns.items()} for group in groups]


def column(records: Sequence[Record], name: str) -> np.ndarray:
    """A field of every record, float64. Raises TypeError or ValueError where that cannot be drawn."""
    values = [record.get(name) for record in records]
    return bounded(np.array([np.nan if value is None else float(value) for value in values], dtype=float))


def table(records: Sequence[Record], name: str, dimensions: int) -> np.ndarray:
    """A field of every record that is a table itself, float64."""
    if not records:
        return np.zeros((0,) * dimensions)
    values = np.array([record[name] for record in records], dtype=float)
    if values.ndim != dimensions or not values.size:
        raise ValueError(f"{name} has the shape {values.shape[1:]}")
    return bounded(values)


def bounded(values: np.ndarray) -> np.ndarray:
    """What is beyond measure is not drawn."""
    return np.where(np.abs(values) < LARGEST, values, np.nan)


def mean(values: np.ndarray) -> float:
    """Of those that are numbers; nan of none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
