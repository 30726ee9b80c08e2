"""The training step is one graph: nothing in it depends on data or waits for the device; and it computes the same."""

import pytest
import torch
from conftest import build
from torch import Tensor

from moe import model as room
from moe.model import Transformer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own, about its use of torch


def step(losses_of, model: Transformer, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(2)
    tokens = torch.randint(64, (4, 16))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = losses_of(tokens, tokens.roll(-1, 1), None, torch.tensor(0.3))
    losses.objective.backward()
    return losses.objective.detach(), losses.routing.load, [weight.grad.clone() for weight in model.parameters()]


def compare(backend: str, model: Transformer, dtype: torch.dtype) -> None:
    eager = step(model.losses, model, dtype)
    compiled = torch.compile(model.losses, backend=backend, fullgraph=True, dynamic=False)  # fullgraph: no break
    objective, load, gradients = step(compiled, model, dtype)
    rounding = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(objective, eager[0], rtol=rounding, atol=rounding)
    if dtype == torch.float32:  # near-ties may be decided otherwise in bfloat16
        assert torch.equal(load, eager[1])
    for one, other in zip(eager[2], gradients, strict=True):
        assert (one - other).norm() <= rounding * one.norm() + 1e-7


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


BOTH = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"attention": "grouped", "num_key_value_heads": 1, "qk_norm": "head"}, marks=pytest.mark.slow)],
)
def test_a_step_is_one_graph_and_equals_eager(monkeypatch, changes, dtype):
    monkeypatch.setattr(room, "LOGITS", 16 * 64)  # logits in pieces
    model = build(expert_backend="grouped", num_nextn_predict_layers=1, balance_loss="switch", **changes)
    compare("aot_eager", model, dtype)


@pytest.mark.parametrize("dtype", BOTH)
def test_a_step_that_computes_layers_again_is_one_graph_and_equals_eager(dtype):
    model = build(expert_backend="grouped", n_group=4, topk_group=2, router_z_loss=0.1)
    model.activation_checkpointing = True
    compare("aot_eager", model, dtype)


@pytest.mark.parametrize("dtype", BOTH)
def test_generated_code_equals_eager(dtype):
    compare("inductor", build(expert_backend="grouped", num_hidden_layers=1, first_k_dense_replace=0), dtype)


def test_other_loads_and_another_weight_compile_nothing_anew():
    model = build(expert_backend="grouped", num_nextn_predict_layers=1)
    compiled = torch.compile(model.losses, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for weight in (0.3, 0.1):
            tokens = torch.randint(64, (4, 16))
            compiled(tokens, tokens, None, torch.tensor(weight)).objective.backward()
            for layer in model.moe_layers():
                layer.router.expert_bias[:6] -= 10.0  # two experts get everything
