"""Latent and grouped-query attention: with a cache and without it one result; nobody sees the future."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import build

from moe.attention import Cache
from moe.config import RopeScaling
from moe.rotary import rotary_table, rotate

PIECES = [[24], [12] + [1] * 12, [5, 7, 1, 11]]
YARN = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, mscale_all_dim=1.0)
GROUPED = {
    "one key head": {"num_key_value_heads": 1},
    "two, half-split": {"num_key_value_heads": 2, "rope_interleave": False},
    "a key head each, YaRN": {"rope_scaling": YARN},
    "norm of heads": {"num_key_value_heads": 2, "head_dim": 12, "qk_norm": "head", "rope_interleave": False},
    "norm of projections": {"num_key_value_heads": 2, "qk_norm": "projection"},
    "biases": {"num_key_value_heads": 2, "attention_bias": True, "attention_output_bias": True},
}


def grouped(kind: str = "norm of heads"):
    return build(attention="grouped", num_attention_heads=4, **GROUPED[kind])


def cached_logits(model, tokens, pieces, room=24):
    """The logits of tokens fed piece by piece into a cache that has room for so many at first."""
    cache = Cache(model.config, len(tokens), room, tokens.device, model.embed_tokens.weight.dtype)
    return torch.cat([model(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)


@pytest.mark.parametrize("q_lora_rank", [None, 10])
@pytest.mark.parametrize("v_head_dim", [8, 12, 20])
@pytest.mark.parametrize("pieces", PIECES)
@torch.no_grad()
def test_the_absorbed_form_on_the_cache_equals_the_expanded_form(q_lora_rank, v_head_dim, pieces):
    model = build(q_lora_rank=q_lora_rank, v_head_dim=v_head_dim)
    tokens = torch.randint(64, (2, 24))
    expanded = model(tokens)
    torch.testing.assert_close(
        cached_logits(model, tokens, pieces), expanded, rtol=1e-4, atol=1e-4 * expanded.abs().max()
    )


@pytest.mark.parametrize("changes", [{"rope_interleave": False}, {"rope_scaling": YARN, "attention_bias": True}])
@pytest.mark.parametrize("pieces", PIECES)
@torch.no_grad()
def test_the_two_forms_agree_on_layout_scaling_and_biases(changes, pieces):
    model = build(**changes)
    tokens = torch.randint(64, (2, 24))
    expanded = model(tokens)
    close = {"rtol": 1e-4, "atol": 1e-4 * expanded.abs().max()}
    torch.testing.assert_close(cached_logits(model, tokens, pieces), expanded, **close)


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("pieces", PIECES)
@torch.no_grad()
def test_grouped_attention_behind_a_cache_equals_it_without_one(kind, pieces):
    model = grouped(kind)
    tokens = torch.randint(64, (2, 24))
    wanted = model(tokens)
    close = {"rtol": 1e-4, "atol": 1e-5 * wanted.abs().max()}
    torch.testing.assert_close(cached_logits(model, tokens, pieces), wanted, **close)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@torch.no_grad()
def test_a_group_of_query_heads_shares_its_key_and_value_head(key_heads):
    """Against the definition, head by head and query by query."""
    model = build(attention="grouped", num_attention_heads=4, num_key_value_heads=key_heads, head_dim=6)
    layer, x = model.layers[0].self_attn, torch.randn(1, 7, 32)
    table = rotary_table(torch.arange(7), 6, 1e4)
    query, key, value = (
        projection(x)[0].unflatten(-1, (-1, 6)) for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    out = torch.zeros(7, 4, 6)
    for head in range(4):
        group = head // (4 // key_heads)
        turned_query, turned_key = rotate(query[:, head], table), rotate(key[:, group], table)
        for at in range(7):
            weights = (turned_key[: at + 1] @ turned_query[at] / 6**0.5).softmax(0)
            out[at, head] = weights @ value[: at + 1, group]
    torch.testing.assert_close(layer(x, table), layer.o_proj(out.flatten(1))[None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("key_heads", "head_dim"), [(1, None), (2, 12), (None, 6)])
def test_the_cache_holds_keys_and_values_of_the_shared_heads_alone(small, key_heads, head_dim):
    config = replace(small, attention="grouped", num_key_value_heads=key_heads, head_dim=head_dim)
    cache = Cache(config, 2, 10, torch.device("cpu"), torch.float32)
    per_head = small.hidden_size // small.num_attention_heads if head_dim is None else head_dim
    assert [layer.shape for layer in cache.entries] == [(2, 10, 2 * (key_heads or 2) * per_head)] * 3


@pytest.mark.parametrize("kind", GROUPED)
def test_every_weight_of_grouped_attention_learns(kind):
    model = grouped(kind)
    tokens = torch.randint(64, (4, 32))
    model.losses(tokens, tokens.roll(-1, 1)).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_the_cache_holds_rank_plus_rotary_numbers_per_token_and_layer(small):
    cache = Cache(small, 2, 10, torch.device("cpu"), torch.float32)
    width = small.kv_lora_rank + small.qk_rope_head_dim
    assert [layer.shape for layer in cache.entries] == [(2, 10, width)] * small.num_hidden_layers


@pytest.mark.parametrize("make", [build, grouped], ids=["latent", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pieces", [*PIECES, [1] * 24, [3, 17, 4]])
@torch.inference_mode()
def test_a_cache_that_grows_gives_the_same_logits_to_the_last_bit(make, dtype, pieces):
    model, tokens = make().to(dtype), torch.randint(64, (2, 24))
    wanted = cached_logits(model, tokens, pieces, room=24)
    for room in (0, 1, 5, 23, 32):
        assert cached_logits(model, tokens, pieces, room).equal(wanted)


def test_a_cache_doubles_when_it_is_full_and_stops_at_the_context(small):
    cache, room = Cache(small, 1, 3, torch.device("cpu"), torch.float32), []
    for position in range(small.max_position_embeddings):
        seen = cache.append(0, torch.full((1, 1, small.cache_width), float(position)))
        assert seen[0, :, 0].tolist() == list(range(position + 1))
        cache.length += 1
        room.append(cache.entries[0].shape[1])
    assert sorted(set(room)) == [3, 6, 12, 24, 32]
    assert cache.entries[1].shape[1] == 3  # each layer grows as it is written to


@pytest.mark.parametrize("make", [build, grouped], ids=["latent", "grouped"])
@torch.no_grad()
def test_a_changed_future_token_changes_no_earlier_logit(make):
    model = make()
    tokens = torch.randint(64, (1, 32))
    before = model(tokens)
    for place in (1, 15, 31):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 64
        after = model(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place])


@pytest.mark.parametrize("make", [lambda: build(v_head_dim=12), grouped], ids=["latent", "grouped"])
def test_the_bfloat16_training_path_stays_within_rounding(make):
    model = make()
    tokens, table = torch.randint(64, (2, 32)), rotary_table(torch.arange(32), model.config.rotary_dim, 1e4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.layers[0].self_attn(model.embed_tokens(tokens), table)
    exact = model.layers[0].self_attn(model.embed_tokens(tokens), table)
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


@torch.no_grad()
def test_bfloat16_decodes_grouped_attention_within_rounding():
    model, tokens = grouped().bfloat16(), torch.randint(64, (2, 24))
    cache = Cache(model.config, 2, 24, tokens.device, torch.bfloat16)
    layer, x, piece_ends = model.layers[0].self_attn, model.embed_tokens(tokens), [0, 12, 20, 24]
    pieces = []
    for start, end in pairwise(piece_ends):
        table = rotary_table(torch.arange(start, end), model.config.rotary_dim, 1e4)
        pieces.append(layer(x[:, start:end], table, cache))
        cache.length = end
    whole = layer.float()(x.float(), rotary_table(torch.arange(24), model.config.rotary_dim, 1e4))
    assert (torch.cat(pieces, 1).float() - whole).norm() < 0.03 * whole.norm()
