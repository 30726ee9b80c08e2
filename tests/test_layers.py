"""Normalisation and dropout: what they compute, and in which number format."""

import pytest
import torch

from moe.layers import Dropout, RMSNorm


def test_a_norm_divides_by_the_root_mean_square_in_float32_and_hands_on_the_dtype_of_products():
    norm, x = RMSNorm(6, eps=1e-3), 3 * torch.randn(2, 5, 6)
    torch.nn.init.normal_(norm.weight)
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).equal(norm(x).bfloat16())
        torch.testing.assert_close(norm(x), wanted.bfloat16(), rtol=0.01, atol=0.01)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(dtype, share):
    torch.manual_seed(0)
    out = Dropout(share)(torch.ones(1000, 99, dtype=dtype))
    assert (out == 0).float().mean().item() == pytest.approx(share, abs=0.01)
    assert out.float().mean().item() == pytest.approx(1, abs=0.02)
    assert len(out.unique()) == 2


def test_dropout_is_drawn_afresh_from_the_seed_and_passes_gradients_where_it_keeps():
    layer, x = Dropout(0.3), torch.randn(7, 13, requires_grad=True)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert layer(x).equal(first)
    assert not first.equal(second)
    first.sum().backward()
    torch.testing.assert_close(x.grad, first.detach() / x.detach())


def test_dropout_does_nothing_in_evaluation_or_with_no_share():
    x = torch.randn(4, 4)
    assert Dropout(0.5).eval()(x).equal(x)
    assert Dropout(0.0)(x).equal(x)


def test_every_share_drops_something_and_keeps_something():
    for share in (0.001, 0.999):
        out = Dropout(share)(torch.ones(100_000))
        assert 0 < (out == 0).sum() < out.numel()
