"""What is promised of the choice, the gates and the balance."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import ModelConfig
from moe.metrics import PATIENCE, CollapseAlarm, load_record, routing_record
from moe.model import Transformer
from moe.router import (
    Router,
    RoutingStats,
    collapsed_layers,
    count_load,
    dead_experts,
    load_entropy,
    max_violation,
    router_z_loss,
    sequence_balance_loss,
    switch_balance_loss,
)


def by_hand(scores, bias, config: ModelConfig):
    """DeepSeek's choice and gates for one token, in plain Python."""
    experts, per_group = len(scores), len(scores) // config.n_group
    biased = [score + offset for score, offset in zip(scores, bias, strict=True)]
    groups = [range(group * per_group, (group + 1) * per_group) for group in range(config.n_group)]
    counted = {"noaux_tc": 2, "group_limited_greedy": 1, "greedy": 0}[config.topk_method]
    worth = [sum(sorted((biased[i] for i in group), reverse=True)[:counted]) for group in groups]
    kept = sorted(range(config.n_group), key=lambda group: -worth[group])[: config.topk_group]
    kept = kept if counted else range(config.n_group)
    allowed = [i for i in range(experts) if i // per_group in kept]
    chosen = sorted(allowed, key=lambda i: -biased[i])[: config.num_experts_per_tok]
    gates = [scores[i] for i in chosen]
    total = sum(gates) if config.norm_topk_prob else 1.0
    return {i: gate / total * config.routed_scaling_factor for i, gate in zip(chosen, gates, strict=True)}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(8, 1, 1), (8, 2, 1), (8, 4, 2), (12, 3, 2), (6, 6, 3)]),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([1.0, 2.5]),
    st.sampled_from(["sigmoid", "softmax"]),
    st.sampled_from(["noaux_tc", "group_limited_greedy", "greedy"]),
    st.integers(0, 1000),
)
def test_choice_and_gates_are_those_worked_by_hand(shape, top_k, normalized, scale, scoring, method, seed):
    experts, groups, kept = shape
    config = ModelConfig(
        hidden_size=5,
        n_routed_experts=experts,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=min(top_k, kept * experts // groups),
        norm_topk_prob=normalized,
        routed_scaling_factor=scale,
        scoring_func=scoring,
        topk_method=method,
        initializer_range=1.0,
    )
    torch.manual_seed(seed)
    router = Router(config)
    router.expert_bias.uniform_(-2, 2)  # negative ones too: a group mask of 0 would let the masked win
    x = torch.randn(20, 5)
    routing = router(x)
    logits = x @ router.weight.detach().T
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    for token in range(20):
        wanted = by_hand(scores[token].tolist(), router.expert_bias.tolist(), config)
        got = dict(zip(routing.chosen[token].tolist(), routing.gates[token].tolist(), strict=True))
        assert got == pytest.approx(wanted, rel=1e-5)


def test_a_group_is_worth_its_two_best_experts_in_v3_and_its_best_alone_in_v2():
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5]])
    config = ModelConfig(hidden_size=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
    for method, wanted in (("noaux_tc", [2, 3]), ("group_limited_greedy", [0, 1]), ("greedy", [0, 2])):
        assert sorted(Router(replace(config, topk_method=method)).select(scores)[0].tolist()) == wanted


def test_the_group_mask_holds_when_every_biased_score_is_negative():
    config = ModelConfig(hidden_size=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
    chosen = Router(config).select(torch.tensor([[-9.0, -9.5, -1.0, -8.0]]))
    assert sorted(chosen[0].tolist()) == [2, 3]


def test_bias_moves_the_choice_but_never_the_gate(small):
    router = Router(replace(small, norm_topk_prob=False))
    x = torch.randn(200, small.hidden_size)
    before = router(x)
    router.expert_bias[3] = 10.0
    after = router(x)
    assert (after.chosen == 3).any(-1).all()
    assert not (before.chosen == 3).any(-1).all()
    torch.testing.assert_close(after.gates, before.scores.gather(1, after.chosen))


def test_the_router_computes_in_float32_whatever_autocast_is_about(small):
    router, x = Router(small), torch.randn(50, small.hidden_size)
    with torch.autocast("cpu", torch.bfloat16):
        under = router(x)
    assert all(ours.equal(plain) for ours, plain in zip(under, router(x), strict=True))


@pytest.mark.parametrize("bias", [-50.0, 50.0])
def test_gates_stay_finite_when_every_score_underflows_under_any_bias(small, bias):
    router = Router(small)
    router.expert_bias[:4] = bias
    with torch.no_grad():
        router.weight.fill_(-1.0)
    routing = router(torch.full((3, small.hidden_size), 100.0))  # sigmoid(-3200) is 0 in float32
    assert routing.scores.eq(0).all()
    assert routing.gates.isfinite().all()


def test_equal_scores_choose_distinct_experts(small):
    router = Router(small)
    with torch.no_grad():
        router.weight.zero_()
    chosen = router(torch.randn(10, small.hidden_size)).chosen
    assert (chosen[:, 0] != chosen[:, 1]).all()


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("backend", ["loop", "grouped", "gather"])
def test_the_language_model_loss_reaches_the_router_for_every_k(small, top_k, backend):
    config = replace(small, num_experts_per_tok=top_k, norm_topk_prob=top_k > 1, expert_backend=backend)
    model = Transformer(config)
    tokens = torch.randint(64, (2, 16))
    model.losses(tokens, tokens.roll(-1, 1)).loss.backward()
    for layer in model.moe_layers():
        assert layer.router.weight.grad.norm() > 1e-5


def test_with_one_expert_and_normalised_gates_the_router_learns_nothing_and_the_config_says_so(small):
    config = replace(small, num_experts_per_tok=1)
    assert config.router_learns_nothing
    assert not small.router_learns_nothing
    model = Transformer(config)
    tokens = torch.randint(64, (2, 16))
    model.losses(tokens, tokens).loss.backward()
    assert model.moe_layers()[0].router.weight.grad.norm() < 1e-6


def test_each_step_moves_every_bias_towards_an_even_load_and_keeps_their_mean_at_zero(small):
    router = Router(replace(small, n_routed_experts=4, bias_update_speed=0.5))
    router.update_bias(torch.tensor([10, 0, 5, 5]))
    torch.testing.assert_close(router.expert_bias, torch.tensor([-0.5, 0.5, 0.0, 0.0]))
    router.update_bias(torch.tensor([9, 1, 1, 1]))
    torch.testing.assert_close(router.expert_bias, torch.tensor([-1.25, 0.75, 0.25, 0.25]))
    assert abs(router.expert_bias.mean().item()) < 1e-6


def test_the_bias_is_a_stored_float32_buffer_that_no_cast_and_no_evaluation_changes(small):
    model = Transformer(small)
    router = model.moe_layers()[0].router
    router.expert_bias.copy_(torch.arange(8) * 1e-3 + 1)
    before = router.expert_bias.clone()
    model.eval()
    model.losses(torch.randint(64, (2, 16)), torch.randint(64, (2, 16)))
    model.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.expert_bias.dtype == torch.float32
    assert torch.equal(router.expert_bias, before)
    assert "layers.1.mlp.router.expert_bias" in model.state_dict()


def test_load_counts_every_choice_once():
    chosen = torch.tensor([[0, 2], [2, 3], [2, 0]])
    assert count_load(chosen, 5).tolist() == [2, 0, 3, 1, 0]


def test_the_load_counts_what_was_chosen_within_the_groups_that_were_kept(small):
    router = Router(replace(small, n_group=4, topk_group=1))
    routing = router(torch.randn(40, small.hidden_size))
    assert router.stats(routing, 2).load.equal(routing.chosen.flatten().bincount(minlength=8))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3))
def test_balance_losses_are_one_at_perfect_balance(blocks, top_k):
    experts = 4
    rows = torch.eye(experts) * 0.9 + 0.05
    rows = sum(rows.roll(shift, 1) * (1 - 0.2 * shift) for shift in range(top_k))  # K neighbours lead in each row
    scores = rows.repeat(blocks, 1)[None]  # every expert leads equally often
    assert sequence_balance_loss(scores, top_k).item() == pytest.approx(1.0, abs=1e-5)
    load = torch.full((experts,), blocks * top_k)
    assert switch_balance_loss(scores[0], load).item() == pytest.approx(1.0, abs=1e-5)


def test_the_sequence_balance_loss_of_two_tokens_worked_by_hand():
    # Three experts, K = 2. Token 1 chooses 0 and 1, token 2 chooses 0 and 2; f = 3/(2*2) * counts (2, 1, 1).
    scores = torch.tensor([[[0.6, 0.3, 0.1], [0.8, 0.2, 0.6]]])
    share = [(0.6 + 0.5) / 2, (0.3 + 0.125) / 2, (0.1 + 0.375) / 2]
    wanted = 1.5 * share[0] + 0.75 * share[1] + 0.75 * share[2]
    assert sequence_balance_loss(scores, 2).item() == pytest.approx(wanted)


def test_the_sequence_balance_loss_sees_imbalance_within_a_sequence_that_the_batch_hides():
    one, other = torch.tensor([0.9, 0.1]).expand(4, 2), torch.tensor([0.1, 0.9]).expand(4, 2)
    scores = torch.stack([one, other])
    assert sequence_balance_loss(scores, 1).item() == pytest.approx(1.8)
    assert switch_balance_loss(scores.flatten(0, 1), torch.tensor([4, 4])).item() == pytest.approx(1.0)


def test_the_sequence_balance_loss_ignores_the_bias(small):
    router = Router(small)
    x = torch.randn(16, small.hidden_size)
    before = router.stats(router(x), 2).balance_loss
    router.expert_bias[0] = 10.0
    after = router.stats(router(x), 2)
    assert after.load[0] == 16
    torch.testing.assert_close(after.balance_loss, before)


@pytest.mark.parametrize("kind", ["sequence", "switch"])
def test_the_balance_loss_enters_the_objective_with_its_weight_reaches_the_router_and_never_the_loss(small, kind):
    config = replace(small, balance_loss=kind, aux_loss_alpha=0.25)
    torch.manual_seed(1)
    model = Transformer(config)
    tokens = torch.randint(64, (2, 16))
    losses = model.losses(tokens, tokens)
    torch.testing.assert_close(losses.objective, losses.loss + 0.25 * losses.routing.balance_loss.sum())
    torch.manual_seed(1)
    unweighted = Transformer(replace(config, aux_loss_alpha=0.0)).losses(tokens, tokens)
    assert torch.equal(unweighted.loss, losses.loss)
    (losses.objective - losses.loss).backward()
    assert all(layer.router.weight.grad.norm() > 0 for layer in model.moe_layers())


def test_the_z_loss_is_the_mean_squared_logsumexp_and_enters_with_its_weight(small):
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    ln2 = torch.tensor(2.0).log().item()
    assert router_z_loss(logits).item() == pytest.approx((ln2**2 + (1 + ln2) ** 2) / 2)
    losses = Transformer(replace(small, router_z_loss=0.5, balance_loss="none")).losses(*torch.randint(64, (2, 2, 8)))
    torch.testing.assert_close(losses.objective, losses.loss + 0.5 * losses.routing.z_loss.sum())


def skewed_training(**changes) -> float:
    """A router that sends everything to two of eight experts, trained by the balance alone; its last MaxVio."""
    config = ModelConfig(hidden_size=16, n_routed_experts=8, num_experts_per_tok=2, initializer_range=0.5, **changes)
    torch.manual_seed(3)
    router = Router(config)
    offset = torch.zeros(16)
    offset[0] = 3.0
    with torch.no_grad():
        router.weight[:2, 0] += 1.0
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(300):
        stats = router.stats(router(torch.randn(256, 16) + offset), 4)
        optimizer.zero_grad()
        if config.aux_loss_alpha:
            (config.aux_loss_alpha * stats.balance_loss).backward()
            optimizer.step()
        router.update_bias(stats.load)
    return max_violation(stats.load).item()


def test_a_skewed_router_is_balanced_by_the_loss_alone_by_the_bias_alone_and_by_nothing_else():
    off = {"aux_loss_alpha": 0.0, "bias_update_speed": 0.0}
    assert skewed_training(**off) > 1.5
    assert skewed_training(**off | {"aux_loss_alpha": 1.0}) < 0.5
    assert skewed_training(**off | {"bias_update_speed": 0.01}) < 0.5
    assert skewed_training(**off | {"aux_loss_alpha": 1.0, "balance_loss": "switch"}) < 0.5


def test_the_figures_of_balance():
    load = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0]])
    assert max_violation(load).tolist() == [0.0, 3.0, 1.0]
    assert load_entropy(load).tolist() == pytest.approx([1.0, 0.0, 0.5])
    assert dead_experts(load).tolist() == [0, 3, 2]
    assert load_record(load) == {"max_vio": 3.0, "entropy": 0.0, "dead_experts": 5}


def test_the_losses_of_balance_are_told_as_the_mean_over_the_layers():
    load, balance, z = torch.ones(3, 4, dtype=torch.int64), torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, 1.0, 1.5])
    record = routing_record(RoutingStats(load, balance, z), detailed=False)
    assert (record["balance_loss"], record["z_loss"]) == (3.0, 1.0)


def test_the_alarm_sounds_once_for_a_layer_that_stays_collapsed():
    even, collapsed = torch.full((8,), 100), torch.tensor([400, 400] + [0] * 6)
    load = torch.stack([even, collapsed])
    assert collapsed_layers(load, top_k=2) == [1]
    alarm = CollapseAlarm(2, {}, [1, 2])
    said = [alarm.check(load) for _ in range(2 * PATIENCE)]
    assert [index for index, line in enumerate(said) if line] == [PATIENCE - 1]
    assert "in layer 2" in said[PATIENCE - 1]
    assert CollapseAlarm(2, alarm.streaks, [1, 2]).check(torch.stack([even, even])) is None
