"""In: a Hugging Face folder becomes a model, or a run to sample from, to score, to train on and to export again.

The folder's names and shapes are compared with the model's before anything is read, and its tensors are read one at a
time, into their places.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from moe.checkpoint import RunFolder, State
from moe.config import ConfigError, ModelConfig, RunConfig, TrainConfig
from moe.hub.configs import Reading, read_config
from moe.hub.families import Family
from moe.hub.folder import Folder, HubError
from moe.hub.tensors import Piece, fill, fitting_pieces, mtp_depths
from moe.hub.tokenizers import read_tokenizer
from moe.machine.cost import outline
from moe.machine.device import Dtype, Runtime, check_room
from moe.machine.weights import empty_model, tensors_of
from moe.model import Transformer
from moe.tokenizer import NoTokenizer, Tokenizer

SIZES = ("vocab_size", "num_hidden_layers", "num_attention_heads", "n_routed_experts")
NEVER_TRAINED = Runtime(
    device="cpu", dtype="float32", compile=False, expert_backend="auto", micro_batch_size=1, threads=1
)
WINDOW = 2048  # positions that training on and scoring in separate windows take at a time, where the context has more


@dataclass(frozen=True)
class Source:
    """A folder understood: its family, the model it holds, and where each tensor goes."""

    folder: Folder
    family: Family
    config: ModelConfig
    plan: list[Piece]
    skipped: int  # modules of multi-token prediction that are there and not read

    @staticmethod
    def open(path: Path, skip_mtp: bool, reading: Reading) -> "Source":
        """Raises HubError for a folder that is broken, or that holds something else than its config.json says."""
        folder = Folder(path)
        family, config = read_config(folder.config, reading)
        depths = mtp_depths(folder, config.num_hidden_layers)
        config = replace(config, num_nextn_predict_layers=0 if skip_mtp else depths)
        check_sizes(folder, config)
        try:
            plan = fitting_pieces(folder, config, family)
        except ConfigError as error:
            raise HubError(f"{path / 'config.json'}: {error}") from None
        return Source(folder, family, config, plan, depths if skip_mtp else 0)


def check_sizes(folder: Folder, config: ModelConfig) -> None:
    """Raises HubError for sizes that the tensors of this folder cannot have, before anything is built by them."""
    numbers = sum(math.prod(tensor.shape) for tensor in folder.tensors.values())
    sizes = {name: getattr(config, name) or 0 for name in SIZES}
    sizes["n_routed_experts"] *= config.num_moe_layers
    if config.num_hidden_layers > len(folder.tensors):
        layers = f"num_hidden_layers = {config.num_hidden_layers}"
        raise HubError(f"{folder.path}: its config.json says {layers}, which is more than all its tensors hold")
    for name, size in sizes.items():
        if size * config.hidden_size > numbers:
            raise HubError(
                f"{folder.path}: its config.json says {name} = {getattr(config, name)} and hidden_size = "
                f"{config.hidden_size}, which is more than all its tensors hold: the files are not those of one model"
            )


def load(
    path: str | Path,
    device: str = "auto",
    dtype: Dtype = "float32",
    skip_mtp: bool = False,
    reading: Reading = "transformers",
) -> Transformer:
    """The model in a Hugging Face folder, in evaluation mode.

    dtype: of its weights. skip_mtp: leave multi-token prediction out. reading: where DeepSeek's own code
    computes otherwise than transformers, which of them to follow. Raises HubError for a folder that cannot be
    read, is of no known family, or does not hold what its config.json says; DeviceError when the model does not fit.
    """
    source = Source.open(Path(path), skip_mtp, reading)
    model = empty_model(source.config, device, dtype, str(path))
    targets = tensors_of(model)
    fill(targets, source.folder, source.plan)
    filled = {piece.ours for piece in source.plan}
    for name in targets.keys() - filled:  # the bias of a router that has none
        targets[name].zero_()
    return model.eval()


def import_run(
    path: Path,
    out: Path,
    dtype: Literal["stored"] | Dtype = "stored",
    skip_mtp: bool = False,
    reading: Reading = "transformers",
    tokenizer: Path | None = None,
) -> tuple[Source, Tokenizer]:
    """Make a run of a Hugging Face folder; what was understood of it, and its tokenizer.

    dtype: of the stored weights; FP8 becomes bfloat16 unless told otherwise. tokenizer: another folder to take it from.
    Raises HubError and TokenizerError for what cannot be imported, and CheckpointError for an `out` that holds a run or
    cannot be written.
    """
    source = Source.open(path, skip_mtp, reading)
    if tokenizer and not (tokenizer / "tokenizer.json").is_file():
        raise HubError(f"{tokenizer} has no tokenizer.json")
    words = words_of(tokenizer or path, source.config)
    origin = {"text": "", "tokenizer": words.hash, "imported": f"{path.resolve().name}, {source.family.name}"}
    run = RunFolder(out)
    run.acquire()
    try:
        if run.checkpoints():
            raise HubError(f"{out} holds a run: choose another folder")
        run.clear()
        plan = list(storage(source, dtype))
        check_room(sum(math.prod(shape) * kind.itemsize for _, shape, kind in plan), "cpu", dtype, path)
        tensors = {name: torch.zeros(shape, dtype=kind) for name, shape, kind in plan}
        fill(tensors, source.folder, source.plan)
        run.write_setup(run_config(source.config), NEVER_TRAINED, words, origin)
        run.save(tensors, None, State())
    finally:
        run.release()
    return source, words


def words_of(path: Path, config: ModelConfig) -> Tokenizer:
    """A folder's tokenizer, checked against the model."""
    words = read_tokenizer(path) or NoTokenizer()
    if words.vocab_size > config.vocab_size:
        what = f"{path}: its tokenizer has {words.vocab_size} tokens, the model {config.vocab_size}"
        raise HubError(f"{what}: it is another model's; name its own folder with --tokenizer")
    return words


def storage(source: Source, dtype: str) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and stored dtype of each of our tensors. Where parts of one differ, the dtype that holds both."""
    kinds: dict[str, torch.dtype] = {}
    for piece in source.plan:
        kind = source.folder.dtype_of(piece.theirs) if dtype == "stored" else getattr(torch, dtype)
        kinds[piece.ours] = torch.promote_types(kinds.get(piece.ours, kind), kind)
    for name, tensor in tensors_of(outline(source.config)).items():
        stays = dtype != "stored" and name.endswith("expert_bias")  # always float32 here
        yield name, tuple(tensor.shape), torch.float32 if stays else kinds.get(name, torch.float32)


def run_config(model: ModelConfig) -> RunConfig:
    """What a run says of itself that was never trained here: its model, and windows to be scored in."""
    window = min(model.max_position_embeddings, WINDOW)
    train = TrainConfig(tokens_per_step=window, sequence_length=window, short_until=0.0)
    return RunConfig(preset="imported", model=model, train=train)
