"""Muon on stacks, who is optimized by what, and the schedules."""

from dataclasses import replace

import pytest
import torch
from conftest import build

from moe.config import OptimConfig
from moe.model import Transformer
from moe.optim import Average, Muon, Optimizers, lr_share, orthogonalize, sort_parameters


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 8), (2, 8, 24)])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e4])
def test_orthogonalized_matrices_have_singular_values_near_one_and_the_same_directions(shape, size):
    u, values, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(1, 0.05, values.shape[-1])
    result = orthogonalize((u * values * size) @ vt)
    assert torch.linalg.svdvals(result).sub(1).abs().max() < 0.11
    alignment = (result * (u @ vt)).sum() / (result.norm() * (u @ vt).norm())
    assert alignment > 0.99


def test_no_matrix_is_too_large_for_the_rounds_and_zero_stays_zero():
    flat, single = torch.linalg.qr(torch.randn(64, 64)).Q, torch.outer(torch.randn(8), torch.randn(64))
    for matrix in (flat * 7, single):
        assert torch.linalg.svdvals(orthogonalize(matrix[None])).max() < 1.11
    assert not orthogonalize(torch.zeros(1, 4, 6)).any()


def test_each_expert_and_each_fused_half_is_orthogonalized_by_itself():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(4, 2 * 6, 10))
    parts = [torch.nn.Parameter(part.clone()) for part in stack.detach().unflatten(1, (2, 6)).flatten(0, 1)]
    grad = torch.randn_like(stack)
    grad[1] *= 1e3  # another expert's large gradient must not drown the others
    stack.grad = grad
    for part, gradient in zip(parts, grad.unflatten(1, (2, 6)).flatten(0, 1), strict=True):
        part.grad = gradient.clone()
    for weights, fused in (([stack], 2), (parts, 1)):
        optimizer = Muon([{"params": weights, "fused": fused}], 0.95, 0.1, torch.float32)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
    torch.testing.assert_close(
        stack.detach().unflatten(1, (2, 6)).flatten(0, 1), torch.stack([p.detach() for p in parts])
    )


def test_muon_looks_ahead_decays_and_scales_tall_matrices():
    weight = torch.nn.Parameter(torch.randn(12, 3))
    optimizer = Muon([{"params": [weight]}], momentum=0.9, weight_decay=0.5, dtype=torch.float32)
    optimizer.param_groups[0]["lr"] = 0.1
    expected, momentum = weight.detach().clone(), torch.zeros(12, 3)
    for _ in range(3):
        weight.grad = torch.randn(12, 3)
        momentum = 0.9 * momentum + 0.1 * weight.grad
        direction = orthogonalize((0.1 * weight.grad + 0.9 * momentum)[None])[0]
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 2 * direction  # sqrt(12 / 3) = 2
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


def test_every_parameter_is_in_exactly_one_group(small):
    model = Transformer(replace(small, q_lora_rank=8))
    groups = sort_parameters(model)
    assert {name for name, members in groups.items() if not members} == set()
    names = {weight: name for name, weight in model.named_parameters()}
    assert [names[weight] for weight in groups["router"]] == [f"layers.{i}.mlp.router.weight" for i in (1, 2)]
    assert {names[weight] for weight in groups["embeddings"]} == {"embed_tokens.weight", "lm_head.weight"}
    optimizers = Optimizers(model, OptimConfig())
    handled = [weight for each in optimizers.both for group in each.param_groups for weight in group["params"]]
    assert len(handled) == len(set(handled)) == len(names)


def test_decay_shrinks_matrices_and_embeddings_and_never_norms_biases_or_the_router():
    model = build(attention_bias=True)
    config = OptimConfig(muon_lr=0.1, muon_weight_decay=0.5, adam_lr=0.2, adam_weight_decay=0.4, warmup=0.0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)  # so nothing but the decay moves it
    Optimizers(model, config).step(0.0)
    for name, weight in model.named_parameters():
        rate = 0.2 * 0.4 if name in ("embed_tokens.weight", "lm_head.weight") else 0.1 * 0.5
        kept = 1.0 if weight.ndim == 1 or name.endswith("router.weight") else 1 - rate
        torch.testing.assert_close(weight.detach(), before[name] * kept, msg=name)


def test_embeddings_and_norms_learn_at_one_rate_and_the_router_at_its_own():
    model = build()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)  # Adam's first step is the rate itself
    Optimizers(model, OptimConfig(adam_lr=0.01, router_lr=0.003, warmup=0.0)).step(0.0)
    for name, rate in (("lm_head.weight", 0.01), ("norm.weight", 0.01), ("layers.1.mlp.router.weight", 0.003)):
        moved = before[name] - dict(model.named_parameters())[name]
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=1e-6)


def test_adamw_takes_the_matrices_too_where_asked_and_moves_each_weight_by_its_own_rate():
    model = build()
    optimizers = Optimizers(
        model, OptimConfig(matrix_optimizer="adamw", adam_lr=0.01, muon_weight_decay=0.0, warmup=0.0)
    )
    assert not any(group["params"] for group in optimizers.muon.param_groups)
    handled = {weight for group in optimizers.adam.param_groups for weight in group["params"]}
    assert handled == set(model.parameters())
    before = model.layers[1].mlp.down_proj.detach().clone()
    tokens = torch.randint(64, (2, 16))
    model.losses(tokens, tokens).objective.backward()
    moved = model.layers[1].mlp.down_proj.grad != 0
    optimizers.step(0.0)
    change = (model.layers[1].mlp.down_proj - before).abs()[moved]  # Adam's first step is the rate itself, by sign
    torch.testing.assert_close(change, torch.full_like(change, 0.01), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("matrix_optimizer", ["muon", "adamw"])
def test_the_state_of_both_optimizers_survives_a_round_trip(matrix_optimizer):
    config = OptimConfig(matrix_optimizer=matrix_optimizer)

    def steps(model, optimizers, count):
        for _ in range(count):
            tokens = torch.randint(64, (2, 16))
            model.losses(tokens, tokens).objective.backward()
            optimizers.step(0.5)
            optimizers.zero_grad()

    one, other = build(), build()
    first, second = Optimizers(one, config), Optimizers(other, config)
    steps(one, first, 2)
    other.load_state_dict(one.state_dict())
    second.load_state({name: tensor.clone() for name, tensor in first.state()})
    for model, optimizers in ((one, first), (other, second)):
        torch.manual_seed(9)
        steps(model, optimizers, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_schedule_warms_up_stays_and_decays():
    config = OptimConfig(warmup=0.1, decay=0.5, final_lr=0.2)
    assert [lr_share(at, config) for at in (0.05, 0.1, 0.3, 0.5)] == pytest.approx([0.5, 1, 1, 1])
    assert [lr_share(at, config) for at in (0.75, 1.0)] == pytest.approx([0.6, 0.2])
    assert 0 < lr_share(0.0, config) <= 0.1


def test_the_cosine_falls_from_one_to_the_floor():
    config = OptimConfig(schedule="cosine", warmup=0.0, final_lr=0.1)
    assert [lr_share(at, config) for at in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.55, 0.1])


def test_the_average_is_the_weighted_mean_of_all_weights_there_were_and_soon_forgets_the_first():
    layer = torch.nn.Linear(1, 1, bias=False)
    average, wanted = Average(layer, 0.5), layer.weight.item()
    for step, value in enumerate([1.0, 2.0, 5.0, -3.0, 0.5, 7.0, 1.0, 4.0, 4.0, 4.0, 4.0], 1):
        torch.nn.init.constant_(layer.weight, value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * value
        with average.applied():
            assert layer.weight.item() == pytest.approx(wanted)
        assert layer.weight.item() == value


def test_an_applied_average_is_the_whole_model_and_leaves_training_as_it_was(small):
    model = build()
    average, before = Average(model, 0.9), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in model.state_dict().values():
        tensor.add_(1)
    average.update(100)
    with average.applied():
        for name, tensor in model.state_dict().items():  # expert biases too: they belong to the router's weights
            torch.testing.assert_close(tensor, before[name] + 0.1)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + 1)


def test_without_a_decay_nothing_is_averaged_or_kept():
    model = build()
    average = Average(model, 0.0)
    before = model.embed_tokens.weight.clone()
    average.update(1)
    with average.applied():
        assert torch.equal(model.embed_tokens.weight, before)
    assert list(average.state()) == []
