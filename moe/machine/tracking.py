"""Weights & Biases, imported only when asked for. Whatever goes wrong there is told once and never ends a run."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BY_LAYER = "_by_layer"
GROUPS = {  # the group of a metric that has none in its name
    "train": {"loss", "nats_per_character"},
    "balance": {"balance_loss", "z_loss", "max_vio", "entropy", "dead_experts"},
    "optim": {"grad_norm", "lr_share", "skipped"},
    "speed": {"tokens_per_second", "utilisation"},
}
MOST_BARS = 512  # that wandb draws in a histogram
FOLDER = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(.+)")  # where wandb keeps a run: its start, its id


class Wandb:
    """A run there that goes on under the same id when the run here is resumed."""

    def __init__(
        self,
        mode: str,
        folder: Path,
        config: Mapping[str, Any],
        say: Callable[[str], None],
        warn: Callable[[str], None],
        layers: Sequence[int],
        resuming: bool = False,
        quiet: bool = False,
    ) -> None:
        """layers: the numbers of the MoE layers."""
        self.warn, self.layers = warn, layers
        self.run: Any = None
        if mode != "off":
            self._attempt(lambda: self._start(mode, folder, config, resuming, quiet))
        if self.run is not None and mode == "offline":
            say(f"wandb    offline: wandb sync {Path(self.run.dir).parent} sends it")

    def _start(self, mode: str, folder: Path, config: Mapping[str, Any], resuming: bool, quiet: bool) -> None:
        import wandb

        known = former_id(folder) if resuming else None
        self.run = wandb.init(
            project="moe",
            name=folder.name,
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]
            config=dict(config),
            id=known,
            resume="allow" if known and mode == "online" else None,  # offline the id is enough
            # It would keep every frame of the display; what there is to say offline we say ourselves
            settings=wandb.Settings(console="off", silent=quiet or mode == "offline"),
        )
        self.histogram = wandb.Histogram

    def log(self, record: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        """A line of metrics. Steps that are made again after a kill are the same to the last bit, and there already."""
        if (run := self.run) is not None and record["step"] >= run.step:
            self._attempt(lambda: run.log(self._named(record, speed), step=record["step"]))

    def _named(self, record: Mapping[str, Any], speed: Mapping[str, float]) -> dict[str, Any]:
        numbers = {
            grouped(name): value for name, value in {**record, **speed}.items() if isinstance(value, int | float)
        }
        loads = record.get(f"load{BY_LAYER}", ())
        bars = {
            f"balance/layer_{layer}/load": self.histogram(np_histogram=(np.array(load), np.arange(len(load) + 1)))
            for layer, load in zip(self.layers, loads, strict=False)
            if len(load) <= MOST_BARS
        }
        return numbers | dict(layer_by_layer(record, self.layers)) | bars

    def report(self, path: Path) -> None:
        """Keep a file, if it is there, as the run's report."""
        if self.run is not None and path.exists():
            self._attempt(lambda: self._keep(path))

    def _keep(self, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"report-{self.run.id}", type="report")
        artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self) -> None:
        if (run := self.run) is not None:
            self._attempt(run.finish)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # wandb throws errors of its own, of its network's and of its process's
            self.run = None
            self.warn(f"wandb is left out from here on ({type(error).__name__}: {error}); metrics.jsonl has everything")


def former_id(folder: Path) -> str | None:
    """Of the newest run that wandb has kept in a run's folder."""
    kept = [found for path in (folder / "wandb").glob("*") if (found := FOLDER.fullmatch(path.name))]
    return max(kept, key=lambda found: found[0].removeprefix("offline-"))[1] if kept else None


def grouped(name: str) -> str:
    """A metric's name there: val/loss of val_loss, balance/max_vio of max_vio. Steps, tokens and seconds, what others
    are drawn over, have no group."""
    group, _, rest = name.partition("_")
    if group in ("val", "test"):
        return f"{group}/{rest}"
    if group == "mtp":
        return f"train/{name}"
    return next((f"{group}/{name}" for group, names in GROUPS.items() if name in names), name)


def layer_by_layer(record: Mapping[str, Any], layers: Sequence[int]) -> Iterator[tuple[str, float]]:
    """balance/layer_1/max_vio and so on."""
    for name, values in record.items():
        if name.endswith(BY_LAYER) and name != f"load{BY_LAYER}":
            for layer, value in zip(layers, values, strict=False):
                yield f"balance/layer_{layer}/{name.removesuffix(BY_LAYER)}", value
