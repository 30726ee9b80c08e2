"""Ways to damage a file, by what it is made of: JSON, lines of it, tensors, a token shard, or just bytes.

Bytes changed at random rarely get past the first check of a reader. So each way takes a file apart, changes something
inside, and puts it together again: the outside stays whole, and what lies behind it is reached.
"""

import hashlib
import json
import math
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from moe.corpus import HEADER

Damage = Callable[[bytes, Random], bytes]

DEEP = "@ nested beyond all measure @"
NUMBERS = [0, -1, 1, 2, 3, 255, 2**31, 2**32, 2**53, 2**60, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e-320]
NUMBERS += [1e308, math.nan, math.inf, -math.inf, 7, 264, 10_000, 1e18]
PATHS = ["../x", "../../config.json", "/etc/passwd", "/dev/zero", "..", ".", "a/b.bin", "C:\\x", "..\\x", "\0", "x\0y"]
WORDS = ["", "x", "\ud800", "a\nb", "\u2028", "\x1b[2J", "x" * 300, "x" * 100_000, "auto", "cuda", "none", "None", "é"]
PATTERNS = ["(", "(a|a)*b", "(?=)*", "[\\s\\S]", "\\p{L}{1,100000}", "a{99999}{99999}", "(?<=a+)b", "\\1", "^", ""]
ODD = [
    None,
    True,
    False,
    *NUMBERS,
    *PATHS,
    *WORDS,
    *PATTERNS,
    DEEP,
    [],
    {},
    [[]],
    [None],
    {"": None},
    [0, 0],
    [["a", 1]],
]
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "C64",
    "I64",
    "I32",
    "I16",
    "I8",
]
DTYPES += ["U64", "U32", "U16", "U8", "BOOL", "Q\n9", ""]
KINDS = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.complex64]
KINDS += [torch.int64, torch.int8, torch.uint8, torch.uint64, torch.bool]


# -- bytes -------------------------------------------------------------------------------------------------------------


def any_bytes(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(changed) + 1)
        end = min(len(changed), at + random.choice((1, 1, 2, 8, 64)))
        part = changed[at:end]
        choice = random.randrange(6)
        if choice == 0:
            del changed[at:]
        elif choice == 1:
            changed += random.randbytes(random.choice((1, 8, 5000)))
        else:
            new = [random.randbytes(len(part)), b"", part * 2, random.choice((b"\0", b"\xff", b"\n", b"[" * 2000))]
            changed[at:end] = new[choice - 2]
    return bytes(changed)


# -- JSON --------------------------------------------------------------------------------------------------------------


def any_json(data: bytes, random: Random) -> bytes:
    """Values replaced, removed, inserted and moved about, at random places of any depth."""
    if random.random() < 0.1:
        return any_bytes(data, random)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return any_bytes(data, random)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        document = changed(document, random)
    return written(document, random)


def written(document: Any, random: Random) -> bytes:
    try:
        text = json.dumps(document, ensure_ascii=random.random() < 0.8)
    except (ValueError, RecursionError):
        return b"["
    if DEEP in text:
        depth = random.choice((300, 100_000))
        text = text.replace(json.dumps(DEEP), "[" * depth + "]" * depth)
    return text.encode("utf-8", "surrogatepass")


def changed(document: Any, random: Random) -> Any:
    """The document with one thing in it changed."""
    if not isinstance(document, dict | list) or not document or random.random() < 0.02:
        return odd(random)
    part, key = place(document, random)
    other, moved = place(document, random)
    choice = random.randrange(8)
    if choice < 3:
        part[key] = odd(random)
    elif choice == 3:
        part[key] = json.loads(json.dumps(other[moved]))  # a copy, lest something contain itself
    elif choice == 4:
        del part[key]
    elif choice == 5 and isinstance(part, dict):
        part[random.choice((f"{key}_", key.upper(), "", "a\nb", "\ud800", "model.layers." + "9" * 5000 + ".x"))] = (
            part[key] if random.random() < 0.5 else odd(random)
        )
    elif choice == 5:
        part.insert(key, part[key])
    else:
        part[key] = nudged(part[key], random)
    return document


def odd(random: Random) -> Any:
    return deepcopy(random.choice(ODD))


def place(document: Any, random: Random) -> tuple[Any, Any]:
    """A container somewhere in the document, and a key of it; one near the root as often as one in a long list."""
    while True:
        key = random.choice(list(document)) if isinstance(document, dict) else random.randrange(len(document))
        child = document[key]
        if not isinstance(child, dict | list) or not child or random.random() < 0.2:
            return document, key
        document = child


def nudged(value: Any, random: Random) -> Any:
    """A value of the same type mostly, and not far off: what gets past a check of types."""
    if isinstance(value, bool) or value is None:
        return random.choice((not value, None, 0, 1))
    if isinstance(value, int | float):
        value = value if -1e300 < value < 1e300 else 1
        return random.choice((value + 1, value - 1, -value, value * 2, value / 2, value * 1000, str(value), *NUMBERS))
    if isinstance(value, str):
        return random.choice((value + random.choice(WORDS), value[: len(value) // 2], value.upper(), value * 2))
    items = list(value.items()) if isinstance(value, dict) else value
    return random.choice((items, items[::-1], items * 2, items[1:], items[: len(items) // 2], {"0": value}))


def any_lines(data: bytes, random: Random) -> bytes:
    """JSON lines: some of them damaged."""
    lines = data.split(b"\n")
    for _ in range(random.choice((1, 1, 2))):
        at = random.randrange(len(lines))
        lines[at] = any_json(lines[at], random)
    if random.random() < 0.3:
        random.shuffle(lines)
    if random.random() < 0.1:
        del lines[random.randrange(len(lines)) :]
    return b"\n".join(lines)


# -- tensors -----------------------------------------------------------------------------------------------------------


def any_tensors(data: bytes, random: Random) -> bytes:
    """A .safetensors file: half of the time a whole one, of other tensors; else one that lies about itself."""
    choice = random.random()
    if choice < 0.5:
        return other_tensors(data, random)
    if choice < 0.6:
        return any_bytes(data, random)
    length = int.from_bytes(data[:8], "little")
    text, body = data[8 : 8 + length], data[8 + length :]
    try:
        header = json.loads(text)
        entry = header[random.choice(list(header))]
        part = random.choice(("dtype", "shape", "data_offsets", "any", "length", "body"))
        if part == "dtype":
            entry["dtype"] = random.choice(DTYPES)
        elif part in ("shape", "data_offsets"):
            entry[part] = random.choice(
                ([*entry[part], 2**60], [2**60], [-1], [0, 2**62], [2**63, 2], [], entry[part][::-1])
            )
        elif part == "any":
            header = changed(header, random)
        text = written(header, random)
        length = len(text) if part != "length" else random.choice((0, 1, length + 1, 2**31, 2**60, 2**63, 2**64 - 1))
        body = random.choice((body[:-1], body + b"\0", b"", any_bytes(body, random))) if part == "body" else body
    except (ValueError, RecursionError, LookupError, TypeError):
        return any_bytes(data, random)
    return length.to_bytes(8, "little") + text + body


def other_tensors(data: bytes, random: Random) -> bytes:
    """Renamed, reshaped, of another dtype, left out, added, or with other numbers."""
    try:
        tensors = load(data)
        for _ in range(random.choice((1, 1, 2))):
            change(tensors, random)
        return save(tensors)
    except (SafetensorError, ValueError, LookupError, AttributeError, RuntimeError):
        return any_bytes(data, random)


def change(tensors: dict[str, torch.Tensor], random: Random) -> None:
    name = random.choice(list(tensors))
    tensor = tensors.pop(name)
    flat = tensor.reshape(-1)
    choice = random.randrange(6)
    if choice == 0:
        return
    if choice == 1:
        tail = random.choice(("_", "/momentum", "/step", ".weight_scale_inv", "\n", "é"))
        layer = f"model.layers.{'9' * 5000}.x"
        name = random.choice((name + tail, name.rsplit("/")[0], "", layer, "lm_head.weight", "no name/at all"))
    elif choice == 2:
        tensor = tensor.to(random.choice(KINDS))
    elif choice == 3:
        tensor = random.choice((flat, tensor[None], flat[:1], flat[:0], flat[:, None]))
    elif choice == 4:
        number = random.choice((math.nan, math.inf, -math.inf, 0.0, -1.0, 1e30))
        tensor = torch.full_like(tensor.float(), number).to(tensor.dtype)
    else:
        tensors[random.choice((f"{name}_", "model.layers.7.eh_proj.weight", "mtp.3.norm.weight"))] = tensor.clone()
    tensors[name] = tensor.contiguous()


# -- a token shard -----------------------------------------------------------------------------------------------------


def any_shard(data: bytes, random: Random) -> bytes:
    """Its header or its ids, with the sha256 of those most of the time."""
    ids = data[HEADER:]
    try:
        header = json.loads(data[:HEADER])
        if random.random() < 0.5:
            ids = any_bytes(ids, random)
            header["tokens"] = len(ids) // 2
        else:
            header = changed(header, random)
        if random.random() < 0.8:
            header["sha256"] = hashlib.sha256(ids).hexdigest()
        text = written(header, random)
    except (ValueError, RecursionError, TypeError):
        return any_bytes(data, random)
    return text[:HEADER].ljust(HEADER) + ids
