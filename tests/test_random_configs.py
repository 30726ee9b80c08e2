"""Whatever a configuration says, it either trains a step or is refused by a message that teaches."""

import re
from dataclasses import fields, replace

import pytest
import torch
from conftest import CPU
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import ConfigError, ModelConfig, OptimConfig, RopeScaling, RunConfig, TrainConfig
from moe.model import Transformer
from moe.optim import Average, Optimizers, accumulate, mtp_weight

SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 12, 16])
SHARES = st.sampled_from([-0.5, 0.0, 0.1, 0.5, 1.0])
SCALINGS = st.builds(
    dict,
    rope_type=st.sampled_from(["default", "yarn", "llama3"]),
    factor=st.sampled_from([0.5, 1.0, 4.0]),
    original_max_position_embeddings=st.sampled_from([0, 8]),
    mscale=st.sampled_from([0.0, 0.7]),
    mscale_all_dim=st.sampled_from([0.0, 1.0]),
    high_freq_factor=st.sampled_from([0.5, 4.0]),
)
MODELS = st.fixed_dictionaries(
    {"vocab_size": st.just(24), "max_position_embeddings": st.sampled_from([8, 16])},
    optional={
        "hidden_size": SIZES,
        "num_hidden_layers": st.integers(0, 3),
        "tie_word_embeddings": st.booleans(),
        "hidden_dropout": SHARES,
        "attention": st.sampled_from(["latent", "grouped"]),
        "num_attention_heads": SIZES,
        "attention_bias": st.booleans(),
        "attention_output_bias": st.booleans(),
        "rope_theta": st.sampled_from([0.0, 1.0, 1e4]),
        "rope_interleave": st.booleans(),
        "rope_scaling": SCALINGS,
        "q_lora_rank": st.none() | SIZES,
        "kv_lora_rank": SIZES,
        "qk_nope_head_dim": SIZES,
        "qk_rope_head_dim": SIZES,
        "v_head_dim": SIZES,
        "num_key_value_heads": st.none() | SIZES,
        "head_dim": st.none() | SIZES,
        "qk_norm": st.sampled_from(["none", "head", "projection"]),
        "intermediate_size": SIZES,
        "first_k_dense_replace": st.integers(-1, 4),
        "mlp_only_layers": st.lists(st.integers(-1, 3), max_size=2).map(tuple),
        "n_routed_experts": SIZES,
        "num_experts_per_tok": st.integers(0, 5),
        "n_shared_experts": st.integers(-1, 2),
        "moe_intermediate_size": SIZES,
        "scoring_func": st.sampled_from(["sigmoid", "softmax"]),
        "norm_topk_prob": st.booleans(),
        "routed_scaling_factor": st.sampled_from([0.0, 1.0, 2.5]),
        "n_group": st.integers(0, 4),
        "topk_group": st.integers(0, 4),
        "topk_method": st.sampled_from(["noaux_tc", "group_limited_greedy", "greedy"]),
        "num_nextn_predict_layers": st.sampled_from([-1, 0, 1, 2, 7]),
        "bias_update_speed": SHARES,
        "balance_loss": st.sampled_from(["sequence", "switch", "none"]),
        "aux_loss_alpha": SHARES,
        "router_z_loss": SHARES,
        "expert_backend": st.sampled_from(["auto", "loop", "grouped", "gather"]),
    },
)
TRAINING = st.fixed_dictionaries(
    {"tokens_per_step": st.sampled_from([0, 16, 32, 40]), "sequence_length": st.sampled_from([0, 1, 4, 8, 16])},
    optional={
        "micro_batch_size": st.sampled_from(["auto", -1, 0, 1, 2, 3]),
        "activation_checkpointing": st.booleans(),
        "keep_last": st.integers(0, 2),
        "eval_tokens": st.integers(-1, 2),
    },
)
OPTIMIZERS = st.fixed_dictionaries(
    {},
    optional={
        "muon_lr": st.sampled_from([0.0, 0.02]),
        "muon_momentum": SHARES,
        "adam_beta1": SHARES,
        "warmup": SHARES,
        "decay": SHARES,
        "schedule": st.sampled_from(["wsd", "cosine"]),
        "grad_clip": SHARES,
        "mtp_weight": SHARES,
        "ema_decay": SHARES,
    },
)
FIELDS = {field.name for kind in (ModelConfig, RopeScaling, TrainConfig, OptimConfig) for field in fields(kind)}


def build_config(model: dict, training: dict, optimizer: dict) -> RunConfig:
    scaling = RopeScaling(**model.pop("rope_scaling", {}))
    shape = ModelConfig(**model, rope_scaling=scaling)
    return RunConfig(model=shape, train=TrainConfig(**training), optim=OptimConfig(**optimizer))


def teaches(message: str) -> bool:
    """It is one line, names a field, and that field's value follows."""
    return "\n" not in message and any(re.search(rf"\b{name} = \S", message) for name in FIELDS)


def train_a_step(config: RunConfig) -> None:
    model = Transformer(config.model)
    model.activation_checkpointing = config.train.activation_checkpointing
    optimizers, average = Optimizers(model, config.optim), Average(model, config.optim.ema_decay)
    micro = config.train.micro_batch_size if config.train.micro_batch_size != "auto" else 1
    tokens = torch.randint(24, (config.train.sequences_per_step, config.train.sequence_length))
    batches = [(part, part.roll(-1, 1)) for part in tokens.split(micro)]
    losses = accumulate(model.losses, batches, CPU.autocast, model, mtp_weight(0.5, config.optim))
    assert losses.loss.isfinite()
    assert losses.objective.isfinite()
    optimizers.step(0.5)
    if losses.routing is not None:
        model.update_expert_bias(losses.routing.load)
    average.update(1)
    assert all(weight.isfinite().all() for weight in model.parameters())


VALID = {
    "hidden_size": [8, 16, 24],  # and expert widths: rows of whole 16 bytes
    "attention": ["latent", "grouped"],
    "num_attention_heads": [1, 2, 4],
    "q_lora_rank": [None, 3],
    "tie_word_embeddings": [False, True],
    "hidden_dropout": [0.0, 0.5],
    "attention_bias": [False, True],
    "rope_interleave": [False, True],
    "v_head_dim": [1, 8, 48],
    "intermediate_size": [1, 12],
    "first_k_dense_replace": [0, 1, 2, 5],
    "n_routed_experts": [8, 12],
    "num_experts_per_tok": [1, 2],
    "n_shared_experts": [0, 1, 2],
    "moe_intermediate_size": [4, 8],
    "scoring_func": ["sigmoid", "softmax"],
    "norm_topk_prob": [True, False],
    "n_group": [1, 2, 4],
    "num_nextn_predict_layers": [0, 1, 3],
    "balance_loss": ["sequence", "switch", "none"],
    "router_z_loss": [0.0, 0.1],
    "expert_backend": ["auto", "loop", "gather", "grouped"],
}
SOUND = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in VALID.items()}).map(
    lambda values: values | ({"q_lora_rank": None} if values["attention"] == "grouped" else {})
)


@settings(max_examples=60, deadline=None)
@given(SOUND, st.booleans(), st.sampled_from([1, 2, 4]))
def test_every_combination_of_sound_values_trains_a_step(values, recomputed, micro):
    sizes = {"vocab_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 8, "kv_lora_rank": 5}
    shape = ModelConfig(**values, **sizes, topk_group=max(1, values["n_group"] // 2))
    train = TrainConfig(tokens_per_step=32, sequence_length=8, micro_batch_size=micro)
    train_a_step(RunConfig(model=shape, train=replace(train, activation_checkpointing=recomputed)))


@settings(max_examples=150, deadline=None)
@given(SOUND, MODELS, TRAINING, OPTIMIZERS, st.randoms(use_true_random=False))
def test_a_few_strange_values_among_sound_ones_train_a_step_or_are_refused(sound, model, training, optimizer, random):
    strange = {name: model[name] for name in random.sample(sorted(model), min(2, len(model)))}
    sizes = {"vocab_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 8, "n_group": 1}
    train = {"tokens_per_step": 32, "sequence_length": 8} if random.random() < 0.8 else training
    expect_a_step_or_a_lesson(sound | sizes | strange, train, optimizer if random.random() < 0.2 else {})


@settings(max_examples=100, deadline=None)
@given(MODELS, TRAINING, OPTIMIZERS)
def test_a_random_configuration_trains_a_step_or_is_refused_by_the_name_of_a_field(model, training, optimizer):
    expect_a_step_or_a_lesson(model, training, optimizer)


def expect_a_step_or_a_lesson(model: dict, training: dict, optimizer: dict) -> None:
    refusal = None
    try:
        train_a_step(build_config(dict(model), training, optimizer))
    except ConfigError as error:
        refusal = str(error)
    assert refusal is None or teaches(refusal), refusal


@pytest.mark.parametrize("message", ["it failed", "hidden_size is wrong", "hidden_size = 3 is\nwrong"])
def test_a_message_without_field_and_value_does_not_count(message):
    assert not teaches(message)
