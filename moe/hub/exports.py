"""Out: a model or a run becomes a Hugging Face folder that transformers opens with no code of its own.

The folder holds what `AutoModelForCausalLM` and `AutoTokenizer` read: `config.json`, the weights under the family's
names, sharded where they are large, the tokenizer as a `tokenizer.json`, `generation_config.json`, and a model card.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from moe.checkpoint import open_run
from moe.config import ModelConfig
from moe.hub.card import card, facts_of
from moe.hub.configs import family_of, write_config
from moe.hub.families import Family
from moe.hub.folder import HubError, read_header, read_tensor
from moe.hub.tensors import Piece, copies, pieces
from moe.hub.tokenizers import write_tokenizer
from moe.hub.writing import write_folder
from moe.machine.device import Dtype
from moe.machine.weights import check_model, tensors_of
from moe.model import Transformer
from moe.tokenizer import NoTokenizer, Tokenizer

EMBEDDING = "model.embed_tokens.weight"
SHARD_BYTES = 5_000_000_000  # as transformers cuts


class Weights(NamedTuple):
    """A model's tensors by our names: what is known of them at once, and how to get one."""

    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], Tensor]


class Form(NamedTuple):
    """How an export is stored."""

    dtype: Dtype | None  # None: each tensor as it is
    mtp: bool
    shard_bytes: int


def save(
    model: Transformer,
    tokenizer: Tokenizer | None,
    path: str | Path,
    dtype: Dtype = "float32",
    mtp: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model and its tokenizer as a Hugging Face folder.

    dtype: of the stored weights. mtp: multi-token prediction as well, as DeepSeek publishes it; transformers' models
    report it as unexpected. Raises HubError for an architecture that no family has, naming the fields, and for a folder
    that is there already.
    """
    if dtype not in get_args(Dtype):
        raise HubError(f"dtype = {dtype} is not known: give one of {', '.join(get_args(Dtype))}, as a string")
    tensors = tensors_of(model)
    weights = Weights({name: tensor.dtype for name, tensor in tensors.items()}, tensors.__getitem__)
    write(Path(path), model.config, weights, tokenizer or NoTokenizer(), Form(dtype, mtp, shard_bytes), {})


def export_run(
    run: Path, path: Path, dtype: Dtype | None = None, mtp: bool = False, shard_bytes: int = SHARD_BYTES
) -> tuple[Family, int]:
    """Write a run's checkpoint as a Hugging Face folder, tensor by tensor; which family it is, and how many
    modules of multi-token prediction were left out.

    dtype: by default what each tensor is stored in. Raises HubError as `save`, and CheckpointError for what holds no
    run.
    """
    stored = open_run(run)
    file = stored.checkpoint / "model.safetensors"
    check_model(file, stored.config.model)
    headers = read_header(file)
    dtypes = {name: header.dtype for name, header in headers.items()}
    newest = lru_cache(maxsize=1)(lambda name: read_tensor(headers[name]))  # the parts of one follow each other
    weights, form = Weights(dtypes, newest), Form(dtype, mtp, shard_bytes)
    family = write(path, stored.config.model, weights, stored.tokenizer, form, facts_of(stored))
    return family, 0 if mtp else stored.config.model.num_nextn_predict_layers


def write(
    path: Path, config: ModelConfig, weights: Weights, tokenizer: Tokenizer, form: Form, facts: Mapping[str, str]
) -> Family:
    family = family_of(config)
    check_biases(family, weights)
    config = config if form.mtp else replace(config, num_nextn_predict_layers=0)
    plan = planned(config, family)
    stored = {name: dtype_of(name, piece, family, weights, form.dtype) for name, piece in plan.items()}
    ids = special_ids(tokenizer)
    files: dict[str, Any] = {
        "generation_config.json": json.dumps(ids, indent=2).encode(),
        "README.md": card(path.absolute().name, family, config, tokenizer, facts).encode("utf-8", "replace"),
    }
    if not isinstance(tokenizer, NoTokenizer):
        files["tokenizer"] = lambda folder: write_tokenizer(tokenizer, folder, config.max_position_embeddings)
    write_folder(
        path,
        write_config(family, config) | ids | {"torch_dtype": str(stored[EMBEDDING]).removeprefix("torch.")},
        [(name, stored[name], piece.shape) for name, piece in plan.items()],
        lambda name: weights.read(plan[name].ours)[plan[name].at],
        files,
        form.shard_bytes,
    )
    return family


def planned(config: ModelConfig, family: Family) -> dict[str, Piece]:
    """What is written, by their names: every tensor, and the copies that come with multi-token prediction."""
    plan = {piece.theirs: piece for piece in pieces(config, family)}
    doubles = {copy: original for copy, original in copies(config).items() if copy != "lm_head.weight"}
    return plan | {copy: plan[original] for copy, original in doubles.items()}


def check_biases(family: Family, weights: Weights) -> None:
    """Raises HubError where a router's bias steers the choice and the family has none."""
    if family.names.bias:
        return
    steered = [name for name in weights.dtypes if name.endswith("expert_bias") and weights.read(name).any()]
    if steered:
        raise HubError(
            f"{family.name} routers have no bias, but {steered[0]} has moved: train with --model.bias-update-speed 0"
        )


def dtype_of(name: str, piece: Piece, family: Family, weights: Weights, dtype: Dtype | None) -> torch.dtype:
    """What one of their tensors is stored in: a router's bias always float32, unless it came in otherwise."""
    if dtype is None:
        return weights.dtypes[piece.ours]
    bias = family.names.bias is not None and name.endswith(family.names.bias)
    return torch.float32 if bias else getattr(torch, dtype)


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Said even where there are none: a family's own defaults would end a text at some token of another vocabulary."""
    if isinstance(tokenizer, NoTokenizer):
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    stops = sorted(tokenizer.stops, key=lambda token: token != tokenizer.end_of_text)
    eos = stops[0] if len(stops) == 1 else stops
    return {"bos_token_id": tokenizer.start, "eos_token_id": eos, "pad_token_id": tokenizer.end_of_text}
