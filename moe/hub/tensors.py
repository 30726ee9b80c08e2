"""Which of a family's tensors is which part of ours.

Notation: E routed experts, F expert width, I dense width, D model width, L layers.

A family keeps gate and up projection apart and every expert by itself; here they are stacked, `gate_up_proj` (E, 2F, D)
and `down_proj` (E, D, F). A `Piece` says where in one of our tensors one of theirs lies, so a single list serves both
ways: import writes into the place, export reads from it.

Multi-token prediction lies behind the last layer, as layers L, L+1, ..., with copies of embedding and head.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.hub.families import Family, Names
from moe.hub.folder import Folder, HubError
from moe.machine.cost import outline
from moe.machine.weights import tensors_of

Place = tuple[int | slice, ...]
FUSED = ".mlp.experts.gate_up_proj"  # how transformers 5 holds the experts, and saves them if told to
MTP_NAMES = {"norm.weight": "shared_head.norm.weight"}  # of a module's own tensors, theirs
SHOWN = 8  # names in a message


class Piece(NamedTuple):
    theirs: str
    ours: str
    at: Place = ()  # where in ours; () is the whole
    shape: tuple[int, ...] = ()


def pieces(config: ModelConfig, family: Family, fused: bool = False) -> list[Piece]:
    """Every tensor of a model, in our order. fused: experts stacked as transformers 5 has them in memory."""
    tensors = tensors_of(outline(config))
    names = Names(bias=family.names.bias) if fused else family.names
    return [
        piece._replace(shape=tuple(tensor[piece.at].shape))
        for ours, tensor in tensors.items()
        for piece in pieces_of(ours, config, names, fused)
    ]


def pieces_of(ours: str, config: ModelConfig, names: Names, fused: bool) -> Iterator[Piece]:
    """Those of one of our tensors; none for a router's bias that the family has not."""
    if found := re.fullmatch(r"layers\.(\d+)\.(.*)", ours):
        prefix, part = f"model.layers.{found[1]}.", found[2]
    elif found := re.fullmatch(r"mtp\.(\d+)\.(block\.)?(.*)", ours):
        prefix, part = f"model.layers.{config.num_hidden_layers + int(found[1])}.", found[3]
        part = part if found[2] else MTP_NAMES.get(part, part)
    else:
        prefix, part = "" if ours.startswith("lm_head") else "model.", ours
    if not part.startswith("mlp."):
        yield Piece(prefix + part, ours)
        return
    part, layer = part.removeprefix("mlp."), prefix + names.layer
    if part == "router.weight":
        yield Piece(f"{layer}.{names.router}", ours)
    elif part == "router.expert_bias":
        if names.bias:
            yield Piece(f"{layer}.{names.bias}", ours)
    elif part.startswith("shared_experts."):
        width = config.n_shared_experts * config.moe_intermediate_size
        yield from matrices(f"{layer}.shared_experts", ours, names.parts, width)
    elif part.endswith(".weight"):
        yield from matrices(f"{prefix}mlp", ours, Names().parts, config.intermediate_size)
    elif fused:
        yield Piece(f"{layer}.experts.{part}", ours)
    else:
        for expert in range(config.n_routed_experts):
            yield from matrices(f"{layer}.experts.{expert}", ours, names.parts, config.moe_intermediate_size, (expert,))


def matrices(theirs: str, ours: str, parts: tuple[str, str, str], width: int, at: Place = ()) -> Iterator[Piece]:
    """Of one feed-forward of this width: gate and up projection, which are one matrix here, or the down projection."""
    gate, up, down = (f"{theirs}.{part}.weight" for part in parts)
    if "down_proj" in ours:
        yield Piece(down, ours, at)
    else:
        yield Piece(gate, ours, (*at, slice(0, width)))
        yield Piece(up, ours, (*at, slice(width, 2 * width)))


def mtp_depths(folder: Folder, layers: int) -> int:
    """How many modules of multi-token prediction a folder holds behind its last layer."""
    depths = 0
    while f"model.layers.{layers + depths}.eh_proj.weight" in folder.tensors:
        depths += 1
    return depths


def fitting_pieces(folder: Folder, config: ModelConfig, family: Family) -> list[Piece]:
    """The pieces in the form that the folder has them, all there and of the right shape. Raises HubError with the names
    of those missing, unexpected and misshapen, before any is read."""
    plan = pieces(config, family, fused=any(name.endswith(FUSED) for name in folder.tensors))
    wanted = {piece.theirs: piece.shape for piece in plan}
    doubles = copies(config)
    found = {name: tensor.shape for name, tensor in folder.tensors.items() if not needless(name, folder, config)}
    found = {name: shape for name, shape in found.items() if name not in doubles}
    problems = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": {name for name in found.keys() & wanted.keys() if found[name] != wanted[name]},
    }
    if any(problems.values()):
        raise HubError(f"{folder.path} does not hold this model: {'; '.join(described(problems, found, wanted))}")
    for double in sorted(folder.tensors.keys() & doubles.keys()):
        check_copy(folder, double, doubles[double])
    return plan


def described(problems: dict[str, set[str]], found: dict, wanted: dict) -> Iterator[str]:
    for what, names in problems.items():
        shown = [
            f"{name} {found[name]} instead of {wanted[name]}" if what == "of another shape" else name
            for name in sorted(names)[:SHOWN]
        ]
        if shown:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            yield f"{len(names)} {what}: {', '.join(shown)}{more}"


def copies(config: ModelConfig) -> dict[str, str]:
    """Names that a folder may have for a tensor that it has once already, and that one's name."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    found = {"lm_head.weight": head} if config.tie_word_embeddings else {}
    for depth in range(config.num_nextn_predict_layers):
        layer = f"model.layers.{config.num_hidden_layers + depth}"
        found[f"{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        found[f"{layer}.shared_head.head.weight"] = head
    return found


def needless(name: str, folder: Folder, config: ModelConfig) -> bool:
    """What need not be read: tables that older files keep, and multi-token prediction that is left out."""
    layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
    read = config.num_hidden_layers + config.num_nextn_predict_layers
    left_out = layer and f"{layer[0]}eh_proj.weight" in folder.tensors and int(layer[1]) >= read
    return bool(left_out) or name.endswith("rotary_emb.inv_freq")


def check_copy(folder: Folder, copy: str, original: str) -> None:
    one, other = folder.read(copy), folder.read(original)
    if one.dtype != other.dtype or not torch.equal(one, other):
        advice = "set tie_word_embeddings to false" if copy == "lm_head.weight" else "leave multi-token prediction out"
        raise HubError(f"{folder.path}: {copy} differs from {original}, which it should be a copy of: {advice}")


@torch.no_grad()
def fill(targets: dict[str, Tensor], folder: Folder, plan: Iterable[Piece]) -> None:
    """Read every piece into its place, one at a time."""
    for piece in plan:
        targets[piece.ours][piece.at].copy_(folder.read(piece.theirs))
