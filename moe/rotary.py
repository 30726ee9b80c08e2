"""Where a token stands: rotary position embedding (RoPE, arXiv 2104.09864), and two ways to stretch a trained context.

Notation: S positions, p numbers of a head that are rotated, so p/2 pairs; pair i turns by position * theta^(-2i/p).

A query and a key are turned by the angles of their positions, so their product depends on the distance alone. Fast
pairs (small i) tell neighbours apart; slow ones do not even turn once within the context a model was trained on, and
beyond it would meet angles they have never seen. Both scalings leave the fast pairs alone, slow the slow ones down by
`factor`, so that the longer context spans the old angles, and blend in between:

* **YaRN** (arXiv 2309.00071, section 3.2; DeepSeek-V2 and V3) blends linearly in i, between the pairs that turn
  `beta_fast` and `beta_slow` times within the original context. Attention over more keys is flatter, so YaRN sharpens
  it too: by a factor on cosines and sines, and in DeepSeek's latent attention by one on the softmax.
* **Llama 3.1** blends linearly in the number of turns, between `high_freq_factor` and `low_freq_factor` of them.
"""

import math

import torch
from torch import Tensor

from moe.config import RopeScaling

UNSCALED = RopeScaling()
Table = tuple[Tensor, Tensor]


def rotary_table(positions: Tensor, dim: int, theta: float, scaling: RopeScaling = UNSCALED) -> Table:
    """Cosines and sines, float32, for integer positions (S,) and p = dim: two tensors (S, p/2)."""
    angles = positions.float()[:, None] * frequencies(dim, theta, scaling, positions.device)
    magnitude = table_magnitude(scaling)
    if magnitude == 1:
        return angles.cos(), angles.sin()
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x: Tensor, table: Table, interleaved: bool = True) -> Tensor:
    """Turn each pair of x (B, ..., S, p) by its position's angle.

    Interleaved, as DeepSeek's weights want it, the pairs are neighbours, (x_0, x_1), (x_2, x_3), ...; half-split, as
    those of the other families, they lie half a head apart, (x_0, x_{p/2}), (x_1, x_{p/2+1}), .... The same rotation,
    but for the order of the numbers.
    """
    cos, sin = table  # (S, p/2)
    if interleaved and x.device.type == "cpu" and not torch.compiler.is_compiling():
        # A third of the time; a copy, since complex numbers cannot begin at an odd place of a larger tensor
        copy = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        pairs = torch.view_as_complex(copy.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.float().chunk(2, dim=-1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    return (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)


def frequencies(dim: int, theta: float, scaling: RopeScaling, device: torch.device) -> Tensor:
    """The angle by which each pair turns from one position to the next, (p/2,) float32."""
    even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)  # 2i
    original = theta ** (-even / dim)
    if scaling.rope_type == "default":
        return original
    kept = yarn_ramp(even / 2, dim, theta, scaling) if scaling.rope_type == "yarn" else llama3_ramp(original, scaling)
    return original * (kept + (1 - kept) / scaling.factor)


def yarn_ramp(pair: Tensor, dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """1 for the pairs that turn more than beta_fast times in the original context, 0 for those that turn less than
    beta_slow times. (p/2,)"""
    context = scaling.original_max_position_embeddings
    # Pair i turns context / (2 pi theta^(2i/p)) times; solved for i:
    first, last = (
        dim * math.log(context / (2 * math.pi * turns)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)  # there are dim / 2 pairs; DeepSeek's own bound
    return 1 - ((pair - first) / (last - first or 0.001)).clamp(0, 1)


def llama3_ramp(original: Tensor, scaling: RopeScaling) -> Tensor:
    """1 for the pairs that turn more than high_freq_factor times in the original context, 0 for those that turn less
    than low_freq_factor times. (p/2,)"""
    turns = scaling.original_max_position_embeddings * original / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """By how much queries and keys each grow when the context does by `factor` (YaRN, eq. 22)."""
    return 0.1 * weight * math.log(factor) + 1


def table_magnitude(scaling: RopeScaling) -> float:
    """The factor on cosines and sines: it reaches queries and keys, but only their rotated part."""
    if scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:  # 1 when they are equal, as in DeepSeek-V2 and V3
        return yarn_magnitude(scaling.factor, scaling.mscale) / yarn_magnitude(scaling.factor, scaling.mscale_all_dim)
    return yarn_magnitude(scaling.factor)


def softmax_magnitude(scaling: RopeScaling) -> float:
    """The factor on latent attention's scores: there the part that is not rotated must grow as well.

    For every length, as transformers does; DeepSeek's inference code has no YaRN at all where the context is no longer
    than the original one.
    """
    if scaling.rope_type != "yarn" or not scaling.mscale_all_dim:
        return 1.0
    return yarn_magnitude(scaling.factor, scaling.mscale_all_dim) ** 2
