import pytest
import torch
from conftest import SMALL, build

from moe.lab.trace import reading_windows, trace


@pytest.mark.parametrize(("total", "length"), [(1, 8), (8, 8), (9, 8), (30, 8), (31, 7), (5, 1), (12, 2)])
def test_reading_windows_show_every_position_once_and_none_but_the_first_without_context(total, length):
    seen = []
    for start, first in reading_windows(total, length):
        assert start == 0 or first > 0 or length == 1
        seen += range(start + first, min(start + length, total))
    assert seen == list(range(total))


@pytest.mark.parametrize("tokens", [1, 20, 32, 70])
def test_a_trace_is_what_the_model_does(tokens):
    model = build()
    ids = torch.randint(0, 60, (tokens,)).tolist()
    found = trace(model, ids, alternatives=3, vocab_size=60)
    assert found.layers == [1, 2]
    assert found.chosen.shape == found.gates.shape == found.scores.shape == (2, tokens, 2)
    assert found.alternatives.shape == found.chances.shape == (tokens, 3)
    assert found.logprobs[0].isnan()
    begin = 0 if tokens <= 32 else (tokens - 32 + 15) // 16 * 16  # the last window's
    window = torch.tensor([ids[begin : begin + 32]])
    with torch.no_grad():
        logits = model(window)[0]
        layer = model.layers[2]
        seen = []
        handle = layer.mlp.router.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(window)
        handle.remove()
    routing = layer.mlp.router(seen[0])
    first = routing.gates[-1].argmax()
    assert found.chosen[1, -1, 0] == routing.chosen[-1, first]
    assert torch.allclose(found.gates[1, -1].sum(), routing.gates[-1].sum())
    assert torch.allclose(found.scores[1, -1], routing.scores[-1, found.chosen[1, -1]])
    if tokens > 1:
        logprobs = logits[-2].log_softmax(-1)
        assert torch.allclose(found.logprobs[-1], logprobs[ids[-1]], atol=1e-5)
        assert found.alternatives[-1].tolist() == logprobs[:60].topk(3).indices.tolist()
        assert torch.allclose(found.chances[-1], logprobs[:60].topk(3).values.exp(), atol=1e-5)


def test_a_model_without_experts_is_traced_too():
    found = trace(build(first_k_dense_replace=SMALL.num_hidden_layers), [1, 2, 3])
    assert found.layers == []
    assert found.chosen.shape == (0, 3, 2)
    assert found.logprobs.shape == (3,)


def test_a_trace_leaves_the_model_as_it_was():
    model = build(hidden_dropout=0.5).train()
    trace(model, [1, 2, 3])
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
