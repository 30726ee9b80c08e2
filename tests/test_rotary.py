"""Rotary embedding: transformers' own tables, two layouts of one rotation, products that know distances alone."""

import math

import pytest
import torch

from moe.config import ModelConfig, RopeScaling
from moe.hub.configs import write_rope
from moe.rotary import frequencies, rotary_table, rotate, softmax_magnitude, table_magnitude

YARN = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=64)
DEEPSEEK = RopeScaling("yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
LLAMA = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=8192)
SCALINGS = {
    "default": RopeScaling(),
    "yarn": YARN,
    "yarn, not truncated": RopeScaling("yarn", 8.0, 128, truncate=False),
    "yarn, other limits": RopeScaling("yarn", 16.0, 2048, beta_fast=16.0, beta_slow=2.0),
    "yarn, one mscale alone": RopeScaling("yarn", 4.0, 64, mscale=0.5),
    "yarn, the other alone": RopeScaling("yarn", 4.0, 64, mscale_all_dim=0.5),
    "yarn, unequal mscale": RopeScaling("yarn", 40.0, 4096, mscale=0.707, mscale_all_dim=1.3),
    "yarn, attention_factor": RopeScaling("yarn", 4.0, 64, mscale=0.7, mscale_all_dim=1.3, attention_factor=0.75),
    "yarn, no two limits": RopeScaling("yarn", 4.0, 64, beta_fast=1.0, beta_slow=1.0, truncate=False),
    "yarn, a context of 4": RopeScaling("yarn", 4.0, 4),
    "yarn, more turns than pairs": RopeScaling("yarn", 2.0, 1_000_000, beta_fast=10_000.0),
    "deepseek-v3": DEEPSEEK,
    "llama 3.1": LLAMA,
    "llama 3.2, small": RopeScaling("llama3", 32.0, 128, low_freq_factor=2.0, high_freq_factor=16.0),
}


def transformers_rotary(dim: int, theta: float, scaling: RopeScaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = write_rope(ModelConfig(rope_theta=theta, rope_scaling=scaling))
    return LlamaRotaryEmbedding(LlamaConfig(hidden_size=dim, num_attention_heads=1, **rope))


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize(("dim", "theta"), [(8, 100.0), (32, 1e4), (64, 5e5), (128, 1e6)])
def test_frequencies_and_magnitude_are_those_of_transformers(dim, theta, scaling):
    theirs = transformers_rotary(dim, theta, scaling)
    ours = frequencies(dim, theta, scaling, torch.device("cpu"))
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=1e-6, atol=0)
    assert table_magnitude(scaling) == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_tables_are_those_of_transformers(scaling):
    positions = torch.arange(1000)
    theirs = transformers_rotary(32, 1e4, scaling)(torch.zeros(()), positions[None])
    for ours, wanted in zip(rotary_table(positions, 32, 1e4, scaling), theirs, strict=True):
        assert ours.dtype == torch.float32
        # An angle of 1000 is rounded to 6e-5; theirs has every column twice, for both halves of a head
        torch.testing.assert_close(torch.cat((ours, ours), -1), wanted[0], rtol=0, atol=2e-4)


def test_rotation_turns_neighbouring_pairs_by_position_times_frequency():
    x = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    turned = rotate(x, rotary_table(torch.tensor([3]), 4, theta=100.0))
    angles = torch.tensor([3.0, 3.0 / 10])
    torch.testing.assert_close(turned, torch.stack((angles.cos(), angles.sin()), -1).view(1, 4))


def test_half_split_is_the_interleaved_rotation_in_another_order():
    x, table = torch.randn(2, 3, 5, 8), rotary_table(torch.arange(5), 8, 100.0)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # the first of every pair, then the second of every pair
    torch.testing.assert_close(rotate(x, table)[..., order], rotate(x[..., order], table, interleaved=False))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("scaling", [RopeScaling(), YARN, LLAMA], ids=["default", "yarn", "llama3"])
def test_rotated_products_depend_on_the_distance_alone(interleaved, scaling):
    q, k = torch.randn(2, 1, 16)

    def product(query_at: int, key_at: int) -> torch.Tensor:
        tables = (rotary_table(torch.tensor([at]), 16, 1e4, scaling) for at in (query_at, key_at))
        turned = [rotate(x, table, interleaved) for x, table in zip((q, k), tables, strict=True)]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(5, 2), product(105, 102), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(product(5, 2), product(5, 3), rtol=1e-3)


@pytest.mark.parametrize("scaling", [YARN, LLAMA], ids=["yarn", "llama3"])
def test_scaling_keeps_the_fast_pairs_and_slows_the_slow_ones_by_the_factor(scaling):
    plain, scaled = (frequencies(128, 1e6, each, torch.device("cpu")) for each in (RopeScaling(), scaling))
    slower = plain / scaled
    assert slower[0] == 1
    assert slower[-1] == pytest.approx(scaling.factor)
    assert (slower.diff() >= -1e-5).all()


def test_softmax_corrections_of_the_released_deepseek_models_worked_by_hand():
    assert softmax_magnitude(RopeScaling()) == softmax_magnitude(LLAMA) == softmax_magnitude(YARN) == 1
    assert softmax_magnitude(DEEPSEEK) == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert softmax_magnitude(DEEPSEEK) == pytest.approx(1.87385, rel=1e-5)
    v2 = RopeScaling("yarn", 40.0, 4096, mscale=0.707, mscale_all_dim=0.707)
    assert softmax_magnitude(v2) == pytest.approx(1.58963, rel=1e-5)
    assert table_magnitude(DEEPSEEK) == table_magnitude(v2) == 1


def test_the_table_compiles_without_a_graph_break():
    whole = torch.compile(rotary_table, fullgraph=True, backend="eager")
    for scaling in (RopeScaling(), YARN, LLAMA):
        compiled, plain = (table(torch.arange(9), 16, 1e4, scaling) for table in (whole, rotary_table))
        assert torch.stack(compiled).equal(torch.stack(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_that_begins_at_an_odd_place_is_rotated_as_well(dtype):
    entry, table = torch.randn(1, 1, 9, dtype=dtype), rotary_table(torch.tensor([3]), 4, 100.0)
    assert rotate(entry[..., 5:], table).equal(rotate(entry[..., 5:].clone(), table))
