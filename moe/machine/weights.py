"""From a file of tensors to a model: checked by name, shape and kind before anything of that size is made."""

from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from moe.config import ConfigError, ModelConfig
from moe.machine.cost import outline
from moe.machine.device import Dtype, check_room, resolve_device
from moe.machine.stored import CheckpointError
from moe.model import Transformer

WEIGHTS = ("F32", "F16", "BF16")  # safetensors' names for what a checkpoint's tensors may be stored in
Shape = tuple[int, ...]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def load_tensors(path: Path) -> dict[str, Tensor]:
    shapes_of(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def shapes_of(path: Path) -> dict[str, Shape]:
    """Of a file's tensors, by name. Raises CheckpointError unless all are of floating point."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
            strange = [
                f"{name} is {part.get_dtype()}" for name, part in parts.items() if part.get_dtype() not in WEIGHTS
            ]
            if strange:
                raise CheckpointError(f"{path} holds no weights: {strange[0]} instead of {', '.join(WEIGHTS)}")
            return {name: tuple(part.get_shape()) for name, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from None


@torch.no_grad()
def load_model(model: nn.Module, path: Path, optional: str | None = None) -> None:
    """Copy a file's tensors into the model one at a time, in the model's dtypes. Raises CheckpointError listing what is
    missing, unexpected or of another shape, before any is copied. optional: names that begin so may be on one side
    only."""
    tensors, shapes = tensors_of(model), shapes_of(path)
    wrong = misfits(shapes, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, optional)
    if wrong:
        raise CheckpointError(f"{path} does not fit this model: {'; '.join(wrong[:5])}")
    try:
        with safe_open(path, framework="pt") as file:  # maps the file: what is not read takes no memory
            for name in (name for name in shapes if name in tensors):
                tensors[name].copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def misfits(stored: dict[str, Shape], wanted: dict[str, Shape], optional: str | None = None) -> list[str]:
    """What keeps a file's tensors from being a model's, by their shapes. optional: see load_model."""
    wrong = []
    for name in sorted(stored.keys() | wanted.keys()):
        found, shape = stored.get(name), wanted.get(name)
        if found is None or shape is None:
            if not (optional and name.startswith(optional)):
                wrong.append(f"{name} is {'missing' if found is None else 'not known'}")
        elif found != shape:
            wrong.append(f"{name} is {found} instead of {shape}")
    return wrong


def check_model(file: Path, config: ModelConfig) -> None:
    """Raises CheckpointError for a file that does not hold this model, before a model of that size is made."""
    shapes, layers = shapes_of(file), config.num_hidden_layers + config.num_nextn_predict_layers
    if layers > len(shapes):
        raise CheckpointError(
            f"{file} does not fit this model: config.json says {layers} layers, more than its tensors"
        )
    try:
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors_of(outline(config)).items()}
    except ConfigError as error:
        raise CheckpointError(f"{file} does not fit config.json: {error}") from None
    if wrong := misfits(shapes, wanted):
        raise CheckpointError(f"{file} does not fit this model: {'; '.join(wrong[:5])}")


def empty_model(config: ModelConfig, device: str, dtype: Dtype, what: object) -> Transformer:
    """A model whose numbers are still to be read, all of them. what: it is, for the message of the DeviceError that is
    raised when it does not fit."""
    if dtype not in get_args(Dtype):
        raise CheckpointError(f"dtype = {dtype} is not known: give one of {', '.join(get_args(Dtype))}, as a string")
    where = resolve_device(device)[0]
    model = outline(config).to(getattr(torch, dtype))
    check_room(sum(tensor.nbytes for tensor in tensors_of(model).values()), where, dtype, what)
    model.to_empty(device=where).tie()
    return model
