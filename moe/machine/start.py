"""Where a training begins: its folder, and the configuration it has or goes on with."""

from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from moe.checkpoint import RunFolder
from moe.config import ConfigError, ModelConfig, RunConfig, TrainConfig
from moe.machine.device import DeviceError, Runtime, resolve_device
from moe.machine.stored import MODEL, CheckpointError
from moe.machine.weights import check_model
from moe.presets import ONCE

WHAT_A_STEP_IS = {f"train.{name}" for name in ("tokens_per_step", "sequence_length", "short_until", "short_parts")}
MAY_CHANGE = {"steps", "minutes", *(f"train.{item.name}" for item in fields(TrainConfig))} - WHAT_A_STEP_IS
MAY_CHANGE |= {"data.source"}  # where the text lies; that it is the same is checked


class Begun(NamedTuple):
    """What a run was begun with, and keeps."""

    config: RunConfig
    runtime: Runtime
    reasons: dict[str, str]
    identity: dict[str, Any]  # of text and tokenizer


def is_to_be_resumed(folder: RunFolder, wish: str) -> bool:
    """Whether the folder holds a run. Raises CheckpointError where that is not what `--resume` says."""
    holds = bool(folder.checkpoints())
    if holds and wish == "never":
        raise CheckpointError(f"{folder.path} holds a run: continue it with --resume auto, or choose another --out")
    if not holds and wish == "must":
        raise CheckpointError(f"--resume must: {folder.path} holds no complete checkpoint to continue from")
    return holds


def begun(folder: RunFolder, config: RunConfig) -> Begun:
    """The run in the folder, if it can be continued here with this configuration."""
    stored, runtime, identity = folder.read_setup()
    check_unchanged(stored, config, folder)  # again: another process may have begun it meanwhile
    check_model(folder.checkpoints()[-1] / MODEL, stored.model)
    try:
        resolve_device(runtime.device)
    except DeviceError:
        raise CheckpointError(
            f"{folder.path} was begun on {runtime.device}, which this machine, or this build of PyTorch, has not: "
            f"continue it there, or begin a new run from its weights with --init-from {folder.path}"
        ) from None
    reasons = dict.fromkeys(asdict(runtime), "as the run began")
    if isinstance(asked := config.train.micro_batch_size, int) and asked != runtime.micro_batch_size:
        runtime, reasons["micro_batch_size"] = replace(runtime, micro_batch_size=asked), "as asked"
    return Begun(stored, runtime, reasons, identity)


def check_unchanged(stored: RunConfig, config: RunConfig, folder: RunFolder) -> None:
    changed = [name for name in differences(stored, config) if name not in MAY_CHANGE]
    if changed:
        raise CheckpointError(
            f"{folder.path} began with another {', '.join(changed)}: continue it as it began, or choose another --out"
        )


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The dotted names of the fields in which two configurations differ."""
    found = []
    for item in fields(old):
        a, b = getattr(old, item.name), getattr(new, item.name)
        found += differences(a, b, f"{prefix}{item.name}.") if is_dataclass(a) else [f"{prefix}{item.name}"] * (a != b)
    return found


def default_folder(preset: str, new: bool) -> RunFolder:
    """The first of out/PRESET, out/PRESET-2, ... that is not in use yet; or, to continue, the last that is."""
    number = 1
    while holds_files(path_of(preset, number)):
        number += 1
    return RunFolder(path_of(preset, number if new else max(number - 1, 1)))


def path_of(preset: str, number: int) -> Path:
    return Path("out") / (preset if number == 1 else f"{preset}-{number}")


def holds_files(folder: Path) -> bool:
    """More than the hidden files of a start that came to nothing."""
    return folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())


def starting_from(model: ModelConfig, base: RunConfig) -> RunConfig:
    """The preset with another model, its windows whole and no longer than that one's context, its decay that of a text
    read once: what has been learnt should stay."""
    train, window = base.train, min(base.train.sequence_length, model.max_position_embeddings)
    whole = max(train.tokens_per_step // window, 1) * window
    train = replace(train, sequence_length=window, tokens_per_step=whole, short_until=0.0)
    return replace(base, model=model, train=train, optim=replace(base.optim, muon_weight_decay=ONCE.muon_weight_decay))


def fit_vocabulary(config: RunConfig, needed: int) -> RunConfig:
    """The model's vocabulary from the tokenizer's, rounded up as matrix products like it."""
    given, multiple = config.model.vocab_size, 64 if needed > 1024 else 8
    if 0 < given < needed:
        raise ConfigError(
            f"model.vocab_size = {given} is less than the tokenizer's {needed}: leave it at 0 to follow the tokenizer"
        )
    return replace(config, model=replace(config.model, vocab_size=given or -(-needed // multiple) * multiple))
