"""A run's folder: its files, written so that a kill at any moment leaves the last complete checkpoint, and read only
when whole.

    config.json  tokenizer.json  metrics.jsonl
    checkpoints/00000500/  model.safetensors  optimizer.safetensors  state.json  manifest.json

How a checkpoint comes to be whole is in machine/stored.py; of 218 kills at random moments none lost one
(`python tests/kills.py`). It is written beside the training, from a copy, which holds tiny up for 2 ms. An imported
model has no optimizer.safetensors: it is there to be used, and to start a training from, but not to be continued.
"""

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from moe.config import ConfigError, RunConfig, TrainConfig, require
from moe.data import Cursor
from moe.machine.device import Dtype, Runtime, hardware
from moe.machine.files import neighbours, sync, sync_folder, write_whole
from moe.machine.nearest import did_you_mean
from moe.machine.parsing import from_dict, to_dict
from moe.machine.reproduce import versions
from moe.machine.stored import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    CheckpointError,
    read_manifest,
    remove_checkpoint,
    remove_leftovers,
    verify,
    write_checkpoint,
)
from moe.machine.weights import check_model, empty_model, load_model, load_tensors, misfits
from moe.model import Transformer
from moe.optim import Average, Optimizers
from moe.tokenizer import Tokenizer

FORMAT = 2  # of config.json
NUMBERED = re.compile(r"\d{8,}")  # a checkpoint's name: its step


class VersionError(CheckpointError):
    """A run of another version of this program."""


@dataclass(frozen=True)
class State:
    """Where training stands, beside the tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training, evaluation and saving not counted
    epoch: int = 0
    window: int = 0
    rng: dict = field(default_factory=dict)
    balance: dict = field(default_factory=dict)  # steps each MoE layer has looked collapsed for
    skipped: int = 0  # of the last steps, how many on end were left out, being not finite
    val_loss: float | None = None  # where this step was evaluated, and it is finite
    val_tokens: int = 0  # of how much text: only prices of the same are compared

    def __post_init__(self) -> None:
        for name in ("step", "tokens", "seconds", "epoch", "window", "skipped", "val_tokens"):
            value = getattr(self, name)
            require(0 <= value < 2**63, f"state.{name} = {value} must be at least 0, and finite")
        require(
            self.val_loss is None or math.isfinite(self.val_loss), f"state.val_loss = {self.val_loss} is not finite"
        )
        for layer, steps in self.balance.items():
            require(
                type(steps) is int, f"state.balance: {layer!r} has looked collapsed for {steps!r}, no number of steps"
            )

    def progress(self, config: RunConfig) -> float:
        """The part of the training that is done, by the training clock or by steps; 1 and above: all."""
        return self.seconds / (60 * config.minutes) if config.minutes else self.step / config.steps

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.epoch, self.window)


class RunFolder:
    """The files of one run. Holds the lock on it from `acquire` to `release`, or to the end of the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = FileLock(path / ".lock")
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.saving: Future[Path] | None = None

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def setup(self) -> Path:
        return self.path / "config.json"

    def acquire(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            remove_leftovers(self.path)
            sync_folder(self.path.parent)
        except Timeout:
            message = f"{self.path} is in use by another process: wait for it, or choose another folder"
            raise CheckpointError(message) from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written: {error.strerror}") from None

    def checkpoints(self) -> list[Path]:
        """The complete ones, oldest first."""
        folders = (self.path / "checkpoints").glob("[0-9]*")
        complete = (path for path in folders if NUMBERED.fullmatch(path.name) and (path / MANIFEST).is_file())
        return sorted(complete, key=lambda path: int(path.name))

    def clear(self) -> None:
        """Remove what a start that never reached a checkpoint left behind. Raises CheckpointError for other files."""
        names = ("metrics.jsonl", "tokenizer.json", "config.json")
        strange = [name for name in ("checkpoints", *names) if (self.path / name).exists()]
        if strange:
            try:
                self.read_setup()
            except VersionError:
                raise
            except CheckpointError:
                message = f"{self.path} holds a {strange[0]} that no training run made: choose another --out"
                raise CheckpointError(message) from None
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def write_setup(
        self, config: RunConfig, runtime: Runtime, tokenizer: Tokenizer, data: dict[str, Any], peak: float | None = None
    ) -> None:
        """peak: what the device could do at most, in operations a second, for those who want to know how much of it
        was used."""
        facts = {
            "format": FORMAT,
            "config": to_dict(config),
            "runtime": asdict(runtime),
            "data": data,
            "versions": versions(),
            "hardware": hardware(runtime),
            "peak_flops": peak,
        }
        write_whole(self.setup, json.dumps(facts, indent=1).encode())
        write_whole(self.path / "tokenizer.json", json.dumps(tokenizer.to_json()).encode())

    def read_setup(self) -> tuple[RunConfig, Runtime, dict[str, Any]]:
        path = self.setup
        try:
            facts = json.loads(path.read_text("utf-8"))
            if "model_type" in facts:
                advice = "python -m moe.hub import makes a run of it"
                raise CheckpointError(f"{self.path} is a Hugging Face folder, not a run: {advice}")
            if {"config", "runtime"} <= facts.keys() and facts.get("format", 1) != FORMAT:
                revision = facts.get("versions", {}).get("git", "unknown")
                raise VersionError(
                    f"{self.path} was made by another version of this program (git {revision}): use that one, or train "
                    "anew with another --out"
                )
            config, runtime = from_dict(RunConfig, facts["config"]), from_dict(Runtime, facts["runtime"], "runtime")
            micro, sequences = runtime.micro_batch_size, config.train.sequences_per_step
            require(
                sequences % micro == 0, f"runtime.micro_batch_size = {micro} must divide a step's {sequences} sequences"
            )
            return config, runtime, dict(facts["data"])
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"{path} is no configuration of a run ({type(error).__name__}: {error})"
            raise CheckpointError(f"{what}: put the run's own back, or train anew with another --out") from None

    def check_continuable(self) -> None:
        """Raises CheckpointError when the newest checkpoint never had an optimizer: it is an imported model."""
        checkpoint = self.checkpoints()[-1]
        if OPTIMIZER not in read_manifest(checkpoint):
            raise CheckpointError(
                f"{self.path} holds an imported model, not a training run: start from it with --init-from {self.path}, "
                "and choose another --out"
            )

    def restore(self, model: Transformer, optimizers: Optimizers, average: Average) -> State:
        """The newest checkpoint into model, optimizers and average; where training stood."""
        checkpoint = self.checkpoints()[-1]
        verify(checkpoint)
        self.check_continuable()
        tensors, state = load_tensors(checkpoint / OPTIMIZER), read_state(checkpoint)
        wanted = (optimizers.shapes() if state.step > state.skipped else {}) | average.shapes()
        wrong = misfits({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted)
        wrong = wrong or [name for name in tensors if name.endswith("/step") and not tensors[name] >= 0]
        if wrong:
            raise CheckpointError(f"{checkpoint / OPTIMIZER} does not fit this model: {'; '.join(wrong[:5])}")
        with average.applied():
            load_model(model, checkpoint / MODEL)
            average.load_state(tensors)
        optimizers.load_state(tensors)
        return state

    def save(
        self,
        model: Mapping[str, Tensor],
        optimizer: Iterable[tuple[str, Tensor]] | None,
        state: State,
        keep: TrainConfig | None = None,
    ) -> Path:
        """Write a checkpoint, then remove those that need not be kept. Raises CheckpointError when the disk does not
        play along.

        model: its tensors as they are to be used, the average where there is one. optimizer: None for a model that was
        not trained here. keep: how many; by default all.
        """
        path = self.path / "checkpoints" / f"{state.step:08d}"
        try:
            if self.metrics.exists():  # no step that the checkpoint has behind it may be missing there
                sync(self.metrics)
            write_checkpoint(path, model, optimizer, asdict(state))
        except (OSError, SafetensorError) as error:
            message = f"{path} could not be saved: {error}; the checkpoint before it is untouched"
            raise CheckpointError(message) from None
        try:
            for old in self.superfluous(keep) if keep else ():
                remove_checkpoint(old)
        except OSError as error:
            raise CheckpointError(f"{path} is saved, but an older one could not be removed: {error}") from None
        return path

    def save_meanwhile(
        self, model: Mapping[str, Tensor], optimizer: Iterable[tuple[str, Tensor]], state: State, keep: TrainConfig
    ) -> None:
        """`save`, by a thread, of a copy that is made now: training goes on, and the machine's memory holds both until
        it is written. What goes wrong there is raised here the next time, or by `saved`."""
        self.saved()
        copies = [
            {name: tensor.to("cpu", copy=True) for name, tensor in dict(part).items()} for part in (model, optimizer)
        ]
        self.saving = self.writer.submit(self.save, copies[0], copies[1].items(), state, keep)

    def saved(self, patient: bool = True) -> None:
        """Wait for what is being saved; if not patient, only look whether it went wrong. Raises CheckpointError."""
        if self.saving and (patient or self.saving.done()):
            wait([self.saving])  # whatever interrupts this leaves the rest to `release`
            saving, self.saving = self.saving, None
            saving.result()

    def release(self) -> BaseException | None:
        """Give up the lock, once nothing is being written any more. What went wrong with that, if nobody has heard."""
        failed = self.saving.exception() if self.saving else None
        self.saving = None
        self.lock.release()
        return failed

    def best(self) -> dict[int, tuple[float, Path]]:
        """The lowest validation loss of the complete checkpoints, and whose it is, by the tokens that were priced."""
        best: dict[int, tuple[float, Path]] = {}
        for path in self.checkpoints():
            with suppress(CheckpointError):  # a damaged one is no reason to end a training
                state = read_state(path)
                if state.val_loss is not None:
                    best[state.val_tokens] = min(best.get(state.val_tokens, (math.inf, path)), (state.val_loss, path))
        return best

    def superfluous(self, keep: TrainConfig) -> list[Path]:
        best = [path for _, path in self.best().values()] if keep.keep_best else []
        return [path for path in self.checkpoints()[: -keep.keep_last] if path not in best]


def read_state(checkpoint: Path) -> State:
    try:
        return from_dict(State, json.loads((checkpoint / STATE).read_text("utf-8")), "state")
    except (OSError, ValueError, ConfigError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint / 'state.json'}: {error}") from None


@dataclass(frozen=True)
class Run:
    """A finished or running training, or an imported model, opened for use: `moe.load("out/NAME")`."""

    model: Transformer
    tokenizer: Tokenizer
    config: RunConfig
    checkpoint: Path


class StoredRun(NamedTuple):
    """A run as it lies on the disk: all but its tensors."""

    tokenizer: Tokenizer
    config: RunConfig
    checkpoint: Path


def newest_run(under: Path = Path("out")) -> Path:
    """The run with the newest checkpoint under a folder."""
    runs = [folder for folder in map(RunFolder, sorted(under.glob("*"))) if folder.checkpoints()]
    if not runs:
        raise CheckpointError(f"no run under {under}/ yet: train one with `python train.py`, or name its folder")
    return max(runs, key=lambda folder: folder.checkpoints()[-1].stat().st_mtime).path


def load(path: str | Path | None = None, device: str = "auto", dtype: Dtype = "float32") -> Run:
    """Open a run's newest checkpoint, in evaluation mode. path: its folder, or the folder of one of its checkpoints; by
    default the newest run's under out/. dtype: of its weights and so of all products; bfloat16 takes half the memory.
    Raises DeviceError when they do not fit."""
    stored = open_run(path)
    file, config = stored.checkpoint / MODEL, stored.config.model
    check_model(file, config)
    model = empty_model(config, device, dtype, stored.checkpoint)
    load_model(model, file)
    return Run(model.eval(), stored.tokenizer, stored.config, stored.checkpoint)


def folder_of(path: Path) -> tuple[RunFolder, Path]:
    """The run and the checkpoint that are meant by a checkpoint's folder, or by a run's: then its newest."""
    folder, place = RunFolder(path), path.absolute()
    if NUMBERED.fullmatch(place.name) and place.parent.name == "checkpoints":
        folder = RunFolder(place.parents[1])
        if (path / MANIFEST).exists():
            return folder, path
        names = ", ".join(complete.name for complete in folder.checkpoints()) or "none"
        raise CheckpointError(f"{path} is no complete checkpoint: there are {names}")
    if not (complete := folder.checkpoints()):
        if folder.setup.exists():
            folder.read_setup()  # which may know what it is instead
        runs = [other for other in neighbours(path) if RunFolder(Path(other)).checkpoints()]
        question = did_you_mean(str(path), runs)
        raise CheckpointError(f"{path} holds no run: {question or 'it has no complete checkpoint'}")
    return folder, complete[-1]


def open_run(path: str | Path | None = None) -> StoredRun:
    """A run's newest checkpoint, or the one that is named, verified, and what belongs to it. path: as of `load`."""
    folder, checkpoint = folder_of(Path(path) if path is not None else newest_run())
    verify(checkpoint)
    config, _, data = folder.read_setup()
    file = folder.path / "tokenizer.json"
    tokenizer = Tokenizer.load(file)
    if tokenizer.hash != data.get("tokenizer") or tokenizer.vocab_size > config.model.vocab_size:
        raise CheckpointError(f"{file} is not the tokenizer this run was trained with: put the run's own back")
    return StoredRun(tokenizer, config, checkpoint)
