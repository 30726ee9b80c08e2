"""Latent attention: two forms, one result; nobody sees the future."""

import pytest
import torch
from conftest import build

from moe.attention import Cache
from moe.rotary import rotary_table, rotate


def cached_logits(model, tokens, pieces):
    """The logits of tokens fed piece by piece into a cache."""
    cache = Cache(model.config, len(tokens), tokens.shape[1], tokens.device, torch.float32)
    return torch.cat([model(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)


@pytest.mark.parametrize("q_lora_rank", [None, 10])
@pytest.mark.parametrize("v_head_dim", [8, 12, 20])
@pytest.mark.parametrize("pieces", [[24], [12] + [1] * 12, [5, 7, 1, 11]])
@torch.no_grad()
def test_the_absorbed_form_on_the_cache_equals_the_expanded_form(q_lora_rank, v_head_dim, pieces):
    model = build(q_lora_rank=q_lora_rank, v_head_dim=v_head_dim)
    tokens = torch.randint(64, (2, 24))
    expanded = model(tokens)
    torch.testing.assert_close(
        cached_logits(model, tokens, pieces), expanded, rtol=1e-4, atol=1e-4 * expanded.abs().max()
    )


def test_the_cache_holds_rank_plus_rotary_numbers_per_token_and_layer(small):
    cache = Cache(small, 2, 10, torch.device("cpu"), torch.float32)
    assert cache.entries.shape == (small.num_hidden_layers, 2, 10, small.kv_lora_rank + small.qk_rope_head_dim)


@torch.no_grad()
def test_a_changed_future_token_changes_no_earlier_logit():
    model = build()
    tokens = torch.randint(64, (1, 32))
    before = model(tokens)
    for place in (1, 15, 31):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 64
        after = model(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place])


def test_rotation_turns_neighbouring_pairs_by_position_times_frequency():
    x = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    turned = rotate(x, rotary_table(torch.tensor([3]), 4, theta=100.0))
    angles = torch.tensor([3.0, 3.0 / 10])
    torch.testing.assert_close(turned, torch.stack((angles.cos(), angles.sin()), -1).view(1, 4))


def test_rotated_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 8)
    product = [
        (rotate(q, rotary_table(torch.tensor([a]), 8, 1e4)) * rotate(k, rotary_table(torch.tensor([b]), 8, 1e4))).sum()
        for a, b in ((5, 2), (105, 102))
    ]
    torch.testing.assert_close(*product, rtol=1e-4, atol=1e-5)


def test_the_bfloat16_training_path_stays_within_rounding():
    model = build(v_head_dim=12)
    tokens = torch.randint(64, (2, 32))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.layers[0].self_attn(model.embed_tokens(tokens), rotary_table(torch.arange(32), 4, 1e4))
    exact = model.layers[0].self_attn(model.embed_tokens(tokens), rotary_table(torch.arange(32), 4, 1e4))
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()
