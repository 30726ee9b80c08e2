"""Multi-token prediction: what each depth sees, what it predicts, and that it stays beside the loss."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, SMALL, build
from torch import nn

from moe.config import OptimConfig
from moe.machine.cost import count
from moe.model import IGNORE, Transformer
from moe.optim import Optimizers, accumulate, mtp_weight

DEEP = replace(SMALL, num_nextn_predict_layers=2)


def copier(depth: int, sees: bool) -> Transformer:
    """A model whose last module of multi-token prediction predicts the very token whose embedding it is given, or, not
    seeing that, the token of the state it is given: what it predicts shows which token that was."""
    config = replace(SMALL, num_nextn_predict_layers=depth, first_k_dense_replace=3, num_hidden_layers=3)
    model = Transformer(replace(config, vocab_size=config.hidden_size))
    width = config.hidden_size
    with torch.no_grad():
        for block in model.blocks():  # nothing is added to the residual stream
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.embed_tokens.weight.copy_(torch.eye(width))
        model.lm_head.weight.copy_(50 * torch.eye(width))
        for number, module in enumerate(model.mtp_modules(), 1):
            part = slice(0, width) if sees and number == depth else slice(width, None)
            module.eh_proj.weight.zero_()
            module.eh_proj.weight[:, part] = torch.eye(width)
    return model


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_depth_k_at_position_i_sees_token_i_plus_k_and_is_asked_for_the_target_at_that_place(depth):
    text = torch.arange(24)[None]  # the target at a place is the token after it; here, whatever a copy would say
    assert copier(depth, sees=True).losses(text, text).mtp[-1] < 1e-3
    assert copier(depth, sees=True).losses(text, text.roll(1, 1)).mtp[-1] > 1
    targets = torch.full_like(text, IGNORE)
    targets[:, depth:] = text[:, :-depth]  # the state that position i hands on is t_i's
    assert copier(depth, sees=False).losses(text, targets).mtp[-1] < 1e-3


def naive(model: Transformer, tokens, targets) -> list[torch.Tensor]:
    """Equations 21-25 position by position, each prefix by itself."""
    config, results = model.config, []
    hidden, table = model.hidden_states(tokens)[0], model.rotary_table(tokens)
    for depth, module in enumerate(model.mtp_modules(), 1):
        states = []
        for i in range(tokens.shape[1] - depth):
            past = torch.cat(
                (module.enorm(model.embed_tokens(tokens[:, depth : i + depth + 1])), module.hnorm(hidden[:, : i + 1])),
                -1,
            )
            x, _ = module.block(module.eh_proj(past), tuple(part[: i + 1] for part in table))
            states.append(module.norm(x[:, -1]))
        hidden = torch.stack(states, 1)
        logits = hidden @ model.lm_head.weight.T
        results.append(F.cross_entropy(logits.reshape(-1, config.vocab_size), targets[:, depth:].flatten()))
    return results


def test_the_terms_are_those_of_the_equations_and_causal():
    model = build(num_nextn_predict_layers=2)
    tokens, targets = torch.randint(64, (2, 2, 10))
    torch.testing.assert_close(
        model.losses(tokens, targets).mtp, torch.stack(naive(model, tokens, targets)), rtol=1e-4, atol=1e-4
    )


def test_the_terms_enter_the_objective_with_their_weight_and_never_the_loss():
    model = build(num_nextn_predict_layers=2, aux_loss_alpha=0.0)
    tokens, targets = torch.randint(64, (2, 2, 10))
    plain, weighted = model.losses(tokens, targets), model.losses(tokens, targets, mtp_weight=0.3)
    assert torch.equal(plain.loss, weighted.loss)
    torch.testing.assert_close(weighted.objective, weighted.loss + 0.3 * weighted.mtp.mean())
    shallow = build()
    shallow.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("mtp.")})
    assert torch.equal(shallow(tokens), model(tokens))
    torch.testing.assert_close(shallow.losses(tokens, targets).loss, plain.loss)


def test_embedding_and_head_are_shared_and_learn_from_it():
    model = build(num_nextn_predict_layers=1)
    tokens = torch.randint(64, (2, 10))
    model.losses(tokens, tokens, mtp_weight=1.0).mtp.mean().backward()
    learning = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert {
        "embed_tokens.weight",
        "lm_head.weight",
        "mtp.0.eh_proj.weight",
        "layers.0.self_attn.o_proj.weight",
    } <= learning
    assert not any(isinstance(part, nn.Embedding) for part in model.mtp.modules())


def test_accumulation_is_one_large_batch_with_multi_token_prediction():
    model = Transformer(replace(DEEP, aux_loss_alpha=0.3))
    tokens = torch.randint(64, (6, 16))
    results, gradients = [], []
    for parts in ([tokens], list(tokens.split(2))):
        model.zero_grad()
        results.append(accumulate(model.losses, [(part, part.roll(-1, 1)) for part in parts], CPU.autocast, model, 0.3))
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    torch.testing.assert_close(results[0].mtp, results[1].mtp)
    torch.testing.assert_close(results[0].objective, results[1].objective)
    assert torch.equal(results[0].routing.load, results[1].routing.load)
    for one, several in zip(*gradients, strict=True):
        torch.testing.assert_close(one, several, rtol=1e-3, atol=1e-6)


def test_its_experts_are_balanced_like_the_others():
    model = Transformer(DEEP)
    tokens = torch.randint(64, (2, 16))
    load = model.losses(tokens, tokens).routing.load
    assert load.shape == (2 + 2, 8)
    assert load.sum(-1).tolist() == [64, 64, 60, 56]  # a depth has one position less than the one before
    model.update_expert_bias(load)
    assert all(layer.router.expert_bias.any() for layer in model.moe_layers())


def test_a_dense_model_predicts_further_with_dense_layers():
    model = build(num_nextn_predict_layers=2, first_k_dense_replace=3)
    assert model.moe_layers() == []
    tokens, targets = torch.randint(64, (2, 2, 10))
    losses = model.losses(tokens, targets)
    assert losses.routing is None
    torch.testing.assert_close(losses.mtp, torch.stack(naive(model, tokens, targets)), rtol=1e-4, atol=1e-4)


def test_the_weight_falls_once():
    config = OptimConfig()
    assert [mtp_weight(progress, config) for progress in (0.0, 0.66, 0.68, 1.0)] == [0.3, 0.3, 0.1, 0.1]


def test_every_weight_of_it_is_trained_and_it_learns_to_look_ahead():
    model = Transformer(replace(DEEP, initializer_range=0.1))
    optimizers = Optimizers(model, OptimConfig())
    tokens = torch.randint(64, (4, 17))
    before = {name: weight.detach().clone() for name, weight in model.mtp.named_parameters()}
    for _ in range(60):
        losses = accumulate(model.losses, [(tokens[:, :-1], tokens[:, 1:])], CPU.autocast, model, 0.3)
        optimizers.step(0.1)
        optimizers.zero_grad()
    assert losses.mtp.max() < 0.2
    for name, weight in model.mtp.named_parameters():
        assert not torch.equal(weight, before[name]), name


def test_it_is_counted_apart():
    size, plain = count(DEEP), count(SMALL)
    assert (size.total, size.active) == (plain.total, plain.active)
    model = Transformer(DEEP)
    assert size.mtp_total == sum(weight.numel() for weight in model.mtp.parameters())
    idle = 6 * 3 * 32 * 16
    assert size.mtp_active == size.mtp_total - 2 * idle + 2 * 64 * 32
    assert size.training_flops > plain.training_flops
