"""Hugging Face folders, read without trust and tensor by tensor.

    config.json  model.safetensors                                    a small model
    config.json  model.safetensors.index.json                         a large one: the index names each tensor's shard
                 model-00001-of-00003.safetensors ...

A folder comes from strangers. Nothing in it is run: pickles are refused unopened. Every header is checked against its
file when the folder is opened, and every shard against the index; a tensor's bytes are read when it is asked for, so
that memory holds no more than the tensors in use.

DeepSeek-V3 is published in FP8 (arXiv 2412.19437, section 3.3): each block of 128 x 128 weights shares one scale, kept
beside `X.weight` as `X.weight_scale_inv`. The name misleads: weights are multiplied by it.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe.config import MoeError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
JSON_BYTES = 100_000_000  # more is no configuration: the index of DeepSeek-V3, with 92,000 tensors, has 9 MB
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
PLAIN_NAME = re.compile(r"[^/\\:]+\.safetensors")  # no path: nothing that could lead out of the folder
SCALE = "_scale_inv"

FP8 = torch.float8_e4m3fn
BLOCK = (128, 128)  # DeepSeek's
READABLE = (torch.float32, torch.float16, torch.bfloat16)
SCALES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
DTYPES = {  # safetensors' names; those torch cannot hold are not among them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": FP8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class HubError(MoeError):
    """A folder that cannot be imported or exported."""


class Stored(NamedTuple):
    """Where a tensor lies, as a shard's header says."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    end: int


class Folder:
    """The tensors of a Hugging Face folder by name, each read when it is asked for.

    path: the folder; files in it may be links, as in a download cache.
    config: config.json.
    tensors: all that the shards hold, without the scales of quantised weights.
    quantised: the names of the FP8 weights.

    Raises HubError for a folder that is incomplete, damaged, inconsistent, pickled, or quantised otherwise.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise HubError(f"{path} is no folder: give one with a {CONFIG} and .safetensors files")
        if not os.path.isfile(path / CONFIG):
            raise HubError(f"{path} has no {CONFIG}: give a folder as transformers' save_pretrained writes it")
        self.path = path
        self.config = read_object(path / CONFIG)
        stored = list_tensors(path)
        self.tensors = {name: tensor for name, tensor in stored.items() if not name.endswith(SCALE)}
        self.quantised = frozenset(name for name, tensor in self.tensors.items() if tensor.dtype == FP8)
        self._scales = {name: tensor for name, tensor in stored.items() if name.endswith(SCALE)}
        self._block = block_size(path / CONFIG, self.config.get("quantization_config"))
        self._check_scales()

    def read(self, name: str) -> Tensor:
        """A tensor's own copy on the CPU, in the dtype it is stored in; FP8 in float32, multiplied by its scales.
        Raises HubError for names and dtypes that cannot be read, and for scales that are not finite."""
        stored = self._readable(name)
        if name not in self.quantised:
            return read_tensor(stored)
        scales = read_tensor(self._scales[name + SCALE]).float()
        if not scales.isfinite().all():
            file = self._scales[name + SCALE].file
            raise HubError(f"{file}: {name + SCALE} holds scales that are not finite: download the file again")
        return dequantise(read_tensor(stored), scales, self._block)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which to keep what `read` returns: for FP8 bfloat16, in which such models are computed, although
        `read` gives the float32 products; for all else the stored one. Raises HubError where `read` would."""
        stored = self._readable(name)
        return torch.bfloat16 if name in self.quantised else stored.dtype

    def _readable(self, name: str) -> Stored:
        if name not in self.tensors:
            raise HubError(f"{self.path} has no tensor {name}: its files are not those that its {CONFIG} describes")
        stored = self.tensors[name]
        if stored.dtype not in READABLE and name not in self.quantised:
            what = f"{stored.file}: {name} is stored as {stored.dtype}"
            raise HubError(f"{what}: convert it to float32, float16 or bfloat16, the weights that can be read")
        if 0 in stored.shape:  # costs a file nothing, and may claim rows without end
            raise HubError(f"{stored.file}: {name} is empty, of shape {stored.shape}: download the folder again")
        return stored

    def _check_scales(self) -> None:
        """Every FP8 weight has the scales of its blocks, and all scales have an FP8 weight."""
        if self.config.get("quantization_config") is None and (self.quantised or self._scales):
            what = f"{self.path} holds FP8 weights or scales"
            raise HubError(f"{what}, but its {CONFIG} has no quantization_config: download the folder again")
        for name in sorted(self.quantised):
            self._check_scales_of(name)
        if strays := sorted(self._scales.keys() - {name + SCALE for name in self.quantised}):
            file = self._scales[strays[0]].file
            raise HubError(f"{file}: {strays[0]} scales no FP8 weight: download the folder again")

    def _check_scales_of(self, name: str) -> None:
        weight, scales = self.tensors[name], self._scales.get(name + SCALE)
        if scales is None:
            raise HubError(f"{weight.file}: {name} is FP8 but has no {name + SCALE}: download the folder again")
        if len(weight.shape) != 2:
            raise HubError(f"{weight.file}: {name} is FP8 of shape {weight.shape}: only matrices have blocks")
        shape = tuple(-(-size // side) for size, side in zip(weight.shape, self._block, strict=True))
        if scales.shape != shape or scales.dtype not in SCALES:
            found = f"{name + SCALE} is {scales.dtype} of shape {scales.shape}"
            raise HubError(f"{scales.file}: {found} instead of float32 of {shape}, for blocks of {self._block}")


def read_object(file: Path) -> dict[str, Any]:
    """A file that must hold a JSON object. Raises HubError."""
    try:
        if file.stat().st_size > JSON_BYTES:
            raise HubError(f"{file} has more than {JSON_BYTES} bytes: it is no file of a model, download it again")
        found = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise HubError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise HubError(f"{file} is not JSON ({error}): download it again") from None
    if not isinstance(found, dict):
        raise HubError(f"{file} holds a JSON {type(found).__name__} instead of an object: download it again")
    return found


def list_tensors(path: Path) -> dict[str, Stored]:
    """All that a folder's headers list. Raises HubError."""
    if os.path.isfile(path / SINGLE):  # before an index, as transformers does
        return read_header(path / SINGLE)
    if os.path.isfile(path / INDEX):
        return read_shards(path, read_index(path / INDEX))
    if pickles := sorted(file for pattern in PICKLES for file in path.glob(pattern)):
        raise HubError(
            f"{pickles[0]} is a pickle, which can run code when it is opened, and the folder has no {SINGLE}: "
            "where you trust it, convert it with transformers' save_pretrained(..., safe_serialization=True)"
        )
    raise HubError(f"{path} has neither {SINGLE} nor {INDEX}: download the folder whole")


def read_index(file: Path) -> dict[str, str]:
    """The shard of each tensor. Raises HubError unless every shard is a file in the index's own folder."""
    weight_map = read_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise HubError(f"{file} has no weight_map of tensor names to file names: download it again")
    for shard in sorted(set(weight_map.values())):
        if not PLAIN_NAME.fullmatch(shard):
            raise HubError(f"{file} names the shard {shard!r}: only .safetensors files of the same folder are opened")
        if not os.path.isfile(file.parent / shard):
            raise HubError(f"{file} names {shard}, which is missing: download the folder whole")
    return weight_map


def read_shards(path: Path, weight_map: Mapping[str, str]) -> dict[str, Stored]:
    """The tensors of all shards. Raises HubError unless they are exactly those of the index, each once."""
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(weight_map.values())):
        header = read_header(path / shard)
        if twice := sorted(header.keys() & tensors.keys()):
            first = tensors[twice[0]].file.name
            raise HubError(f"{path}: {twice[0]} is in {first} and in {shard}: download the folder again")
        tensors |= header
    holders = {name: stored.file.name for name, stored in tensors.items()}
    for name in sorted(holders.keys() | weight_map.keys()):
        holder, listed = holders.get(name, "no shard"), weight_map.get(name, "no shard")
        if holder != listed:
            what = f"{path / INDEX} puts {name} in {listed}, but {holder} holds it"
            raise HubError(f"{what}: the files are of two versions, download them again")
    return tensors


def read_header(file: Path) -> dict[str, Stored]:
    """What one .safetensors file holds. Raises HubError."""
    try:
        with safe_open(file, framework="pt"):  # refuses what does not fit: the JSON, sizes, offsets, the file's length
            pass
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except OSError as error:
        raise HubError(f"{file} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        raise HubError(f"{file} is damaged ({error}): download it again") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise HubError(f"{file}: {name} is stored as {entry['dtype']}: convert it to float32, float16 or bfloat16")
    return {name: located(file, entry, 8 + length) for name, entry in header.items()}


def located(file: Path, entry: dict[str, Any], data: int) -> Stored:
    """One entry of a header; its offsets count from `data`."""
    start, end = (data + offset for offset in entry["data_offsets"])
    return Stored(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start, end)


def read_tensor(stored: Stored) -> Tensor:
    """A tensor's bytes as they are stored. Read rather than mapped: a mapping would hold pages of the whole shard, and
    kill the process if the file were cut short under it. Raises HubError."""
    data = torch.empty(stored.end - stored.start, dtype=torch.uint8)
    try:
        with open(stored.file, "rb") as opened:
            opened.seek(stored.start)
            read = opened.readinto(data.numpy().data)
    except OSError as error:
        raise HubError(f"{stored.file} cannot be read: {error.strerror}") from None
    if read != len(data):
        raise HubError(f"{stored.file} was cut short after it had been opened: download it again")
    return data.view(stored.dtype).view(stored.shape)


def block_size(file: Path, settings: Any) -> tuple[int, int]:
    """Rows and columns of FP8 weights that share a scale. settings: quantization_config, or None. Raises HubError for
    every other way to quantise."""
    if settings is None:
        return BLOCK
    if not isinstance(settings, dict):
        what = f"{file}: quantization_config is {settings!r} instead of an object"
        raise HubError(f"{what}: take the model's checkpoint that is not quantised")
    method = settings.get("quant_method")
    if method != "fp8":
        what = f"{file}: quantization_config has quant_method {method!r}, of which only fp8 can be read"
        raise HubError(f"{what}: take the model's checkpoint that is not quantised")
    if (fmt := settings.get("fmt", "e4m3")) != "e4m3":
        what = f"{file}: quantization_config has fmt {fmt!r}, of which only e4m3 can be read"
        raise HubError(f"{what}: take the model's checkpoint that is not quantised")
    block = settings.get("weight_block_size", list(BLOCK))
    if not isinstance(block, list) or len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        what = f"{file}: quantization_config has weight_block_size {block!r} instead of two positive integers"
        raise HubError(f"{what}: take the model's checkpoint that is not quantised")
    return block[0], block[1]


def dequantise(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """(M, N) float8 times its blocks' scales, (ceil(M / rows), ceil(N / columns)) float32. Returns (M, N) float32."""
    product = weight.float()
    rows, columns = (min(side, size) for side, size in zip(block, weight.shape, strict=True))
    block_of = torch.arange(weight.shape[1]) // columns  # (N,)
    for row in range(0, len(product), rows):  # a band at a time, so that the scales are never spread out whole
        product[row : row + rows] *= scales[row // rows][block_of]
    return product
