"""The whole model: against transformers, under accumulation, and what it counts."""

from dataclasses import replace

import pytest
import torch
from conftest import CPU, build, transformers_twin

from moe.config import ConfigError, ModelConfig, RopeScaling
from moe.experts import MLP
from moe.machine.cost import count
from moe.model import IGNORE, Transformer
from moe.optim import Optimizers, accumulate
from moe.presets import presets


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 10, "first_k_dense_replace": 0},
        {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5},
        {"norm_topk_prob": False, "n_shared_experts": 2, "v_head_dim": 12},
    ],
)
@torch.no_grad()
def test_logits_are_those_of_transformers_deepseek_v3(changes, tmp_path):
    model = build(**changes)
    tokens = torch.randint(64, (2, 20))
    wanted = transformers_twin(model, tmp_path)(tokens).logits
    assert (model(tokens) - wanted).abs().max() < 1e-4 * wanted.abs().max()


BIASES = {"attention_bias": True, "attention_output_bias": True}
GROUPED = {"attention": "grouped", "num_attention_heads": 4, "num_key_value_heads": 2, "rope_interleave": False}
DENSE = GROUPED | {"first_k_dense_replace": 3, "rms_norm_eps": 1e-3}  # a large eps tells whose it is
SOFTMAX = {"scoring_func": "softmax", "bias_update_speed": 0.0, "n_shared_experts": 0, "first_k_dense_replace": 0}
MIXED = GROUPED | SOFTMAX | {"rms_norm_eps": 1e-3}
V2 = SOFTMAX | {"norm_topk_prob": False, "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": 10}
YARN = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0)
DEEPSEEK_YARN = replace(YARN, mscale=0.7, mscale_all_dim=1.3)
LLAMA3 = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=16, high_freq_factor=2.0)
FAMILIES = {
    "DeepseekV3": BIASES | {"rope_scaling": DEEPSEEK_YARN, "q_lora_rank": 10, "rms_norm_eps": 1e-3},
    "DeepseekV3, no mscale": BIASES | {"rope_scaling": YARN},
    "DeepseekV3, half-split": {"rope_interleave": False, "rope_scaling": replace(YARN, attention_factor=0.8)},
    "DeepseekV2": V2 | {"rope_scaling": DEEPSEEK_YARN},
    "DeepseekV2, groups": V2 | {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    "Llama": DENSE | BIASES | {"rope_scaling": LLAMA3},
    "Qwen2": DENSE | {"attention_bias": True, "rope_theta": 1e6, "tie_word_embeddings": True},
    "Qwen3": DENSE | {"qk_norm": "head", "num_key_value_heads": 1, "rope_scaling": YARN},
    "Qwen3Moe": MIXED | BIASES | {"qk_norm": "head", "head_dim": 12, "mlp_only_layers": (1,)},
    "Olmoe": MIXED | {"qk_norm": "projection", "norm_topk_prob": False},
    "Mixtral": MIXED | {"rope_theta": 1e6},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_the_family_that_has_this_architecture(family, tmp_path):
    model = build(**FAMILIES[family])
    tokens = torch.randint(64, (2, 32))
    twin = transformers_twin(model, tmp_path)
    wanted = twin(tokens).logits
    assert type(twin).__name__ == f"{family.split(',')[0]}ForCausalLM"
    assert (model(tokens) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_logits_are_float32_of_the_promised_shape():
    assert build()(torch.randint(64, (2, 7))).shape == (2, 7, 64)
    assert build().bfloat16()(torch.randint(64, (2, 7))).dtype == torch.float32


@pytest.mark.parametrize("kind", ["sequence", "switch"])
@pytest.mark.parametrize("first_k_dense_replace", [1, 3])
def test_accumulation_is_one_large_batch(small, kind, first_k_dense_replace):
    config = replace(small, balance_loss=kind, aux_loss_alpha=0.3, router_z_loss=0.1)
    model = Transformer(replace(config, first_k_dense_replace=first_k_dense_replace))
    tokens = torch.randint(64, (6, 16))
    gradients, results = [], []
    for micro_batches in ([tokens], list(tokens.split(2))):
        model.zero_grad()
        results.append(
            accumulate(model.losses, [(part, part.roll(-1, 1)) for part in micro_batches], CPU.autocast, model)
        )
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    torch.testing.assert_close(results[0].loss, results[1].loss)
    torch.testing.assert_close(results[0].objective, results[1].objective)
    for one, several in zip(*gradients, strict=True):
        torch.testing.assert_close(one, several, rtol=1e-3, atol=1e-6)
    if first_k_dense_replace == 1:
        assert torch.equal(results[0].routing.load, results[1].routing.load)
        assert results[0].routing.load.sum(-1).tolist() == [6 * 16 * 2] * 2


def test_the_bias_moves_once_per_step_by_the_load_of_all_micro_batches(small):
    model = Transformer(replace(small, bias_update_speed=0.1))
    tokens = torch.randint(64, (4, 16))
    losses = accumulate(model.losses, [(part, part) for part in tokens.split(1)], CPU.autocast, model)
    model.update_expert_bias(losses.routing.load)
    for layer, load in zip(model.moe_layers(), losses.routing.load.float(), strict=True):
        step = 0.1 * (load.mean() - load).sign()
        torch.testing.assert_close(layer.router.expert_bias, step - step.mean())


def test_it_overfits_one_batch(small):
    model = Transformer(replace(small, initializer_range=0.1))
    optimizers = Optimizers(model, presets()["tiny"].optim)
    tokens = torch.randint(64, (4, 17))
    for _ in range(60):
        losses = accumulate(model.losses, [(tokens[:, :-1], tokens[:, 1:])], CPU.autocast, model)
        optimizers.step(0.1)
        optimizers.zero_grad()
        model.update_expert_bias(losses.routing.load)
    assert losses.loss < 0.1


def test_targets_of_minus_100_are_not_scored(small):
    model, (tokens, targets) = build(), torch.randint(64, (2, 2, 8))
    masked = targets.clone()
    masked[:, 4:] = IGNORE
    cut = model.losses(tokens[:, :4], targets[:, :4]).loss
    torch.testing.assert_close(model.losses(tokens, masked).loss, cut)


def test_every_weight_learns_from_the_loss():
    model = build()
    tokens = torch.randint(64, (4, 32))
    model.losses(tokens, tokens.roll(-1, 1)).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_a_fresh_model_knows_nothing_and_says_so_evenly():
    config = replace(presets()["tiny"].model, vocab_size=512)
    tokens = torch.randint(512, (4, 64))
    with torch.no_grad():
        loss = Transformer(config).losses(tokens, tokens.roll(-1, 1)).loss
    assert loss.item() == pytest.approx(torch.tensor(512.0).log().item(), abs=0.05)


def test_tied_embeddings_are_one_tensor(small):
    model = Transformer(replace(small, tie_word_embeddings=True))
    assert model.lm_head.weight is model.embed_tokens.weight
    assert count(model.config).total == sum(weight.numel() for weight in model.parameters())


def test_dropout_acts_in_training_alone(small):
    model = Transformer(replace(small, hidden_dropout=0.5))
    tokens = torch.randint(64, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_parameter_counts_worked_by_hand(small):
    attention = 32 * 2 * 12 + 32 * (12 + 4) + 12 + 12 * 2 * (8 + 8) + 2 * 8 * 32
    dense, expert, router = 3 * 32 * 48, 3 * 32 * 16, 8 * 32
    per_layer = attention + 2 * 32
    total = 3 * per_layer + dense + 2 * (8 * expert + expert + router) + 32 + 2 * 64 * 32
    size = count(small, sequence_length=31)
    assert size.total == total == sum(weight.numel() for weight in Transformer(small).parameters())
    assert size.active == total - 2 * 6 * expert - 64 * 32
    assert size.attention_flops == 3 * 2 * 2 * (12 + 8) * 16  # layers, 2 FLOP, heads, widths, mean window


def test_grouped_attention_counted_by_hand(small):
    config = replace(small, attention="grouped", num_attention_heads=4, num_key_value_heads=2, qk_norm="head")
    biased = replace(config, attention_bias=True, attention_output_bias=True, head_dim=10)
    for each, width, biases in ((config, 8, 0), (biased, 10, 10 * (4 + 2 + 2) + 32)):
        attention = 32 * width * (4 + 2 + 2 + 4) + 2 * width + biases
        size = count(each, sequence_length=31)
        assert sum(weight.numel() for weight in Transformer(each).layers[0].self_attn.parameters()) == attention
        assert size.total == sum(weight.numel() for weight in Transformer(each).parameters())
        assert size.attention_flops == 3 * 2 * 4 * 2 * width * 16  # layers, 2 FLOP, heads, widths, mean window


def test_biases_start_at_zero(small):
    model = Transformer(replace(small, attention="grouped", **BIASES))
    assert not any(weight.any() for name, weight in model.named_parameters() if name.endswith(".bias"))


def test_the_dense_twin_has_the_same_active_parameters_but_for_the_router():
    tiny, dense = (replace(presets()[name].model, vocab_size=512) for name in ("tiny", "dense"))
    router = tiny.num_moe_layers * tiny.n_routed_experts * tiny.hidden_size
    assert count(tiny).active - router == count(dense).active
    assert not any(not isinstance(block.mlp, MLP) for block in Transformer(dense).blocks())


def test_initial_outputs_to_the_residual_stream_are_scaled_by_depth():
    model = Transformer(ModelConfig(num_hidden_layers=8))
    stds = {name: weight.std().item() for name, weight in model.named_parameters() if weight.ndim > 1}
    assert stds["layers.3.self_attn.kv_b_proj.weight"] == pytest.approx(0.02, rel=0.05)
    assert stds["layers.3.self_attn.o_proj.weight"] == pytest.approx(0.005, rel=0.05)
    assert stds["layers.3.mlp.down_proj"] == pytest.approx(0.005, rel=0.05)
    assert stds["layers.3.mlp.shared_experts.down_proj.weight"] == pytest.approx(0.005, rel=0.05)


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="vocab_size"):
        Transformer(ModelConfig(vocab_size=0))
