"""Less memory, the same result: layers computed again, logits piece by piece, micro-batches of any size."""

from dataclasses import replace

import pytest
import torch
from conftest import CPU, SMALL, build

from moe import model as room
from moe.config import ConfigError, ModelConfig, TrainConfig
from moe.cost import activation_bytes
from moe.device import DeviceError, resolve
from moe.model import IGNORE, Transformer
from moe.presets import presets
from train import accumulate


def gradients(model: Transformer, tokens, between=lambda: None):
    """Losses, and every gradient, with something happening between forward and backward."""
    model.zero_grad()
    torch.manual_seed(5)
    losses = model.losses(tokens, tokens.roll(-1, 1), mtp_weight=0.3)
    between()
    losses.objective.backward()
    return losses, {name: weight.grad.clone() for name, weight in model.named_parameters()}


def kept_bytes(model: Transformer, tokens) -> int:
    """Of all tensors that autograd keeps for the backward pass, weights not counted."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    seen, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(tokens, tokens)
    del losses
    return sum(seen.values())


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("changes", [{}, {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1}])
def test_layers_computed_again_give_the_same_losses_gradients_and_loads(backend, changes):
    model, tokens = build(expert_backend=backend, hidden_dropout=0.2, **changes), torch.randint(64, (3, 16))
    plain, wanted = gradients(model, tokens)
    model.activation_checkpointing = True
    again, got = gradients(model, tokens)
    assert torch.equal(plain.objective, again.objective)
    assert torch.equal(plain.routing.load, again.routing.load)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.parametrize("changes", [{}, {"n_group": 4, "topk_group": 2}])
def test_computing_again_never_routes_again(changes):
    model, tokens = build(**changes), torch.randint(64, (3, 16))
    _, wanted = gradients(model, tokens)
    model.activation_checkpointing = True

    def disturb():  # from here on every token would choose other experts
        for layer in model.moe_layers():
            layer.router.expert_bias.copy_(10 * torch.randn(8))

    _, got = gradients(model, tokens, disturb)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])
    _, elsewhere = gradients(model, tokens)
    assert not torch.allclose(elsewhere["layers.1.mlp.down_proj"], wanted["layers.1.mlp.down_proj"])


def test_computing_again_keeps_less():
    model, tokens = Transformer(replace(SMALL, num_hidden_layers=6)), torch.randint(64, (4, 32))
    plain = kept_bytes(model, tokens)
    model.activation_checkpointing = True
    assert kept_bytes(model, tokens) < plain / 3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_k_dense_replace": 4},
        {"hidden_size": 256, "num_experts_per_tok": 4, "moe_intermediate_size": 64},
        {"attention": "grouped", "num_key_value_heads": 2},
    ],
)
def test_the_estimate_of_kept_memory_is_within_a_half_of_what_is_counted(changes):
    config = ModelConfig(**changes)
    counted = kept_bytes(Transformer(config), torch.randint(512, (4, 128)))
    assert 0.67 < activation_bytes(config, 4 * 128) / counted < 1.5


@pytest.mark.parametrize("pieces", [1, 7, 48])
def test_logits_made_piece_by_piece_give_the_same_loss_and_gradients(monkeypatch, pieces):
    model, tokens = build(num_nextn_predict_layers=1), torch.randint(64, (3, 16))
    targets = tokens.roll(-1, 1)
    targets[0, 3:9] = IGNORE
    results = []
    for logits in (room.LOGITS, 64 * (48 // pieces)):
        monkeypatch.setattr(room, "LOGITS", logits)
        model.zero_grad()
        losses = model.losses(tokens, targets, mtp_weight=0.3)
        losses.objective.backward()
        results.append((losses, [weight.grad.clone() for weight in model.parameters()]))
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss)
    torch.testing.assert_close(results[0][0].mtp, results[1][0].mtp)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_no_more_logits_exist_at_a_time_than_promised(monkeypatch):
    monkeypatch.setattr(room, "LOGITS", 640)
    sizes, original = [], room.F.cross_entropy
    monkeypatch.setattr(
        room.F,
        "cross_entropy",
        lambda logits, *rest, **more: sizes.append(logits.numel()) or original(logits, *rest, **more),
    )
    Transformer(SMALL).losses(*torch.randint(64, (2, 3, 16))).objective.backward()
    assert max(sizes) <= 640
    assert sum(sizes) == 2 * 3 * 16 * 64  # each once, and once more for its gradient


def test_the_tokens_of_a_step_do_not_depend_on_the_micro_batch():
    model = Transformer(replace(SMALL, aux_loss_alpha=0.1))
    tokens = torch.randint(64, (12, 16))
    results = []
    for micro in TrainConfig(tokens_per_step=12 * 16, sequence_length=16).micro_batch_sizes():
        model.zero_grad()
        batches = [(part, part.roll(-1, 1)) for part in tokens.split(micro)]
        accumulate(model.losses, batches, CPU, model)
        results.append([weight.grad.clone() for weight in model.parameters()])
    assert len(results) == 6
    for other in results[1:]:
        for one, several in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, several, rtol=1e-3, atol=1e-6)


def test_micro_batches_that_would_not_be_equal_are_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"must divide the 12 sequences of a step: 12, 6, 4, 3, 2, 1 do"):
        TrainConfig(tokens_per_step=192, sequence_length=16, micro_batch_size=5)
    with pytest.raises(ConfigError, match=r"multiple of train.sequence_length = 60: 180 is"):
        TrainConfig(tokens_per_step=192, sequence_length=60)


def test_the_micro_batch_is_what_fits_the_memory(monkeypatch):
    tiny = presets()["tiny"]
    assert resolve(tiny)[0].micro_batch_size == 8
    each = activation_bytes(tiny.sized_model, 256)
    weights = 14 * 3_100_000
    for fits in (1, 2, 4):
        monkeypatch.setattr("moe.device.machine_bytes", lambda device, fits=fits: weights + 4 * each * (fits + 0.5))
        assert resolve(tiny)[0].micro_batch_size == fits
    asked = replace(tiny, train=replace(tiny.train, micro_batch_size=2))
    assert resolve(asked)[0].micro_batch_size == 2


def test_a_model_that_no_memory_here_could_train_is_refused_before_it_is_built():
    with pytest.raises(DeviceError, match=r"671.0B parameters takes 9,.*GB.*choose a smaller --preset"):
        resolve(presets()["v3"])
