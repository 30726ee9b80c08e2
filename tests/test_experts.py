"""The back-ends against a loop over tokens that one can check by eye."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import ModelConfig
from moe.experts import BACKENDS, MoE, choose_backend, swiglu


def token_by_token(x, chosen, gates, gate_up_proj, down_proj):
    rows = []
    for token in range(x.shape[0]):
        out = torch.zeros_like(x[0])
        for expert, gate in zip(chosen[token].tolist(), gates[token], strict=True):
            width = down_proj.shape[-1]
            gate_proj, up_proj = gate_up_proj[expert, :width], gate_up_proj[expert, width:]
            out = out + gate * (down_proj[expert] @ (F.silu(gate_proj @ x[token]) * (up_proj @ x[token])))
        rows.append(out)
    return torch.stack(rows)


def problem(tokens, top_k, experts, width, hidden, used, dtype=torch.float32):
    """Inputs in which only the first `used` experts are ever chosen."""
    chosen = torch.stack([torch.randperm(used)[:top_k] for _ in range(tokens)])
    shapes = (tokens, hidden), (tokens, top_k), (experts, 2 * width, hidden), (experts, hidden, width)
    x, gates, gate_up, down = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    return [x, chosen, gates, gate_up, down]


def outcome(function, inputs):
    """The output, and the gradient of every input under a fixed random weighting."""
    leaves = [part for part in inputs if part.requires_grad]
    out = function(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 6), st.integers(0, 4), st.sampled_from([4, 8, 12]))
def test_every_backend_equals_the_loop_over_tokens_forward_and_backward(name, tokens, top_k, more, idle, width):
    used = top_k + more
    inputs = problem(tokens, top_k, used + idle, width, 16, used)
    for got, wanted in zip(outcome(BACKENDS[name], inputs), outcome(token_by_token, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_bfloat16_with_its_rounded_segments_stays_within_rounding(name):
    inputs = problem(100, 2, 8, 16, 32, used=5, dtype=torch.bfloat16)
    exact = [part.detach().float().requires_grad_() if part.requires_grad else part for part in inputs]
    for got, wanted in zip(outcome(BACKENDS[name], inputs), outcome(token_by_token, exact), strict=True):
        assert (got.float() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("name", BACKENDS)
def test_experts_without_tokens_get_zero_gradients_not_none(name):
    inputs = problem(6, 2, 8, 8, 16, used=3)
    _, _, _, gate_up, down = outcome(BACKENDS[name], inputs)
    assert gate_up[:3].abs().sum() > 0
    assert gate_up[3:].eq(0).all()
    assert down[3:].eq(0).all()


def test_all_tokens_on_one_expert():
    x, _, gates, gate_up, down = problem(50, 1, 4, 8, 16, used=1)
    inputs = [x, torch.full((50, 1), 3), gates, gate_up, down]
    for name in BACKENDS:
        for got, wanted in zip(outcome(BACKENDS[name], inputs), outcome(token_by_token, inputs), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_layer_works_by_itself_and_adds_the_shared_expert(small):
    layer = MoE(small)
    x = torch.randn(2, 5, small.hidden_size)
    routing = layer.router(x.flatten(0, 1))
    weights = (layer.gate_up_proj, layer.down_proj)
    routed = token_by_token(x.flatten(0, 1), routing.chosen, routing.gates, *weights).view_as(x)
    shared = F.linear(
        swiglu(F.linear(x, layer.shared_experts.gate_up_proj.weight)), layer.shared_experts.down_proj.weight
    )
    torch.testing.assert_close(layer(x), routed + shared, rtol=1e-4, atol=1e-5)
    assert MoE(replace(small, n_shared_experts=0)).shared_experts is None


def test_the_layer_works_in_float64(small):
    layer, x = MoE(small).double(), torch.randn(4, 64, small.hidden_size, dtype=torch.float64)
    out = layer(x)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), layer.float()(x.float()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_layer_follows_autocast(small, name):
    layer = MoE(replace(small, expert_backend=name))
    x = torch.randn(2, 20, small.hidden_size)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - layer(x)).norm() < 0.03 * layer(x).norm()
    out.float().square().sum().backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in layer.parameters())


@pytest.mark.parametrize(
    ("device", "tokens", "changes", "wanted"),
    [
        ("cpu", 2048, {}, "grouped"),
        ("cuda", 2048, {}, "grouped"),
        ("cpu", 4, {}, "loop"),
        ("cuda", 4, {}, "gather"),
        ("mps", 2048, {}, "loop"),
        ("cpu", 2048, {"moe_intermediate_size": 15}, "loop"),
        ("cpu", 2048, {"expert_backend": "gather"}, "gather"),
    ],
)
def test_the_backend_follows_from_device_size_and_alignment(device, tokens, changes, wanted):
    name, reason = choose_backend(replace(ModelConfig(), **changes), device, torch.bfloat16, tokens)
    assert name == wanted
    assert reason
