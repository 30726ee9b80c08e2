"""A configuration is right, or refused by the name of its field."""

import json
import re
import sys
from dataclasses import fields, replace

import pytest
from conftest import run_training

from moe.config import ConfigError, DataConfig, ModelConfig, OptimConfig, RopeScaling, RunConfig, TrainConfig
from moe.machine.device import resolve, resolve_device
from moe.machine.parsing import from_dict, to_dict
from moe.presets import presets

GROUPED = {"attention": "grouped"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_the_default_model_is_deepseek_v3_balanced_by_both_its_means():
    model = presets()["tiny"].model
    assert (model.bias_update_speed, model.balance_loss, model.aux_loss_alpha) == (1e-3, "sequence", 1e-4)
    assert (model.scoring_func, model.norm_topk_prob, model.n_shared_experts) == ("sigmoid", True, 1)
    assert model.first_k_dense_replace >= 1
    assert presets()["tiny"].train.sequence_length >= 256


def test_fields_carry_the_names_of_transformers_configs():
    from transformers import DeepseekV2Config, DeepseekV3Config, Qwen3MoeConfig

    theirs = {name for kind in (DeepseekV3Config, DeepseekV2Config, Qwen3MoeConfig) for name in kind().to_dict()}
    theirs |= {"rope_theta", "rope_scaling", "aux_loss_alpha", "scoring_func"}
    ours = {item.name for item in fields(ModelConfig)}
    own = {"hidden_dropout", "bias_update_speed", "balance_loss", "router_z_loss", "expert_backend"}
    own |= {"attention", "attention_output_bias", "qk_norm"}  # classes of their own in transformers, not fields
    assert ours - own <= theirs


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        (TrainConfig, {"short_until": 1.5}, "short_until"),
        (TrainConfig, {"short_until": 0.5, "short_parts": 3}, "short_parts = 3 must divide"),
        (ModelConfig, {"num_experts_per_tok": 17}, "n_routed_experts = 8"),
        (ModelConfig, {"n_group": 3}, "must divide n_routed_experts = 8"),
        (ModelConfig, {"n_group": 4, "topk_group": 5}, "topk_group = 5"),
        (ModelConfig, {"n_group": 8, "topk_group": 1}, "num_experts_per_tok = 2"),
        (ModelConfig, {"qk_rope_head_dim": 5}, "even"),
        (ModelConfig, GROUPED | {"head_dim": 5}, "head_dim = 5 must be even"),
        (ModelConfig, GROUPED | {"head_dim": 0}, "head_dim = 0"),
        (ModelConfig, GROUPED | {"hidden_size": 12}, "head_dim = 3 must be even"),
        (ModelConfig, GROUPED | {"num_key_value_heads": 3}, "num_key_value_heads = 3 must divide"),
        (ModelConfig, GROUPED | {"num_key_value_heads": 0}, "num_key_value_heads = 0"),
        (ModelConfig, GROUPED | {"hidden_size": 130}, "or give a head_dim"),
        (ModelConfig, {"num_key_value_heads": 2}, 'choose attention = "grouped"'),
        (ModelConfig, {"head_dim": 32}, 'choose attention = "grouped"'),
        (ModelConfig, {"qk_norm": "head"}, 'choose attention = "grouped"'),
        (ModelConfig, {"rope_theta": 1.0, "rope_scaling": RopeScaling("yarn", 2.0, 64)}, "rope_theta = 1.0"),
        (RopeScaling, {"factor": 4.0}, "rope_scaling.rope_type: yarn or llama3"),
        (RopeScaling, YARN | {"factor": 0.5}, "factor = 0.5 must be at least 1"),
        (RopeScaling, YARN | {"original_max_position_embeddings": 0}, "the context before scaling"),
        (RopeScaling, YARN | {"beta_slow": 40.0}, "beta_slow = 40.0"),
        (RopeScaling, YARN | {"attention_factor": 0.0}, "attention_factor = 0.0"),
        (RopeScaling, YARN | {"mscale": -1.0}, "mscale = -1.0"),
        (RopeScaling, YARN | {"rope_type": "llama3", "low_freq_factor": 4.0}, "high_freq_factor = 4.0"),
        (ModelConfig, {"hidden_size": 0}, "hidden_size = 0"),
        (ModelConfig, {"q_lora_rank": 0}, "q_lora_rank"),
        (ModelConfig, {"hidden_dropout": 1.0}, "hidden_dropout"),
        (ModelConfig, {"attention": "grouped", "q_lora_rank": 8}, "q_lora_rank = 8 belongs to latent attention"),
        (RopeScaling, YARN | {"factor": float("inf")}, "factor = inf must be at least 1 and finite"),
        (OptimConfig, {"muon_lr": float("nan")}, "muon_lr = nan must be finite"),
        (OptimConfig, {"grad_clip": float("inf")}, "grad_clip = inf must be finite"),
        (DataConfig, {"source": " "}, "give a file, a folder, or a data set's name"),
        (DataConfig, {"vocab_size": 100}, "257"),
        (DataConfig, {"val_fraction": 0.0}, "val_fraction"),
        (OptimConfig, {"warmup": 0.5, "decay": 0.6}, "add up"),
        (RunConfig, {"minutes": -1.0}, "minutes"),
        (RunConfig, {"steps": 0}, "steps"),
        (RunConfig, {"seed": -1}, "seed = -1"),
    ],
)
def test_what_cannot_work_is_refused_by_name(kind, change, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        kind(**change)


def test_a_window_longer_than_the_context_is_refused(capsys):
    assert run_training("--train.sequence-length", "128") == 2
    assert "max_position_embeddings = 64" in capsys.readouterr().err


@pytest.mark.parametrize("name", presets())
def test_every_preset_survives_json(name):
    config = presets()[name]
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_a_scaled_context_survives_json_and_is_refused_by_name():
    config = replace(presets()["tiny"], model=ModelConfig(rope_scaling=RopeScaling(**YARN)))
    stored = json.loads(json.dumps(to_dict(config)))
    assert from_dict(RunConfig, stored) == config
    stored["model"]["rope_scaling"]["rope_type"] = "linear"
    with pytest.raises(ConfigError, match=r"config\.model\.rope_scaling\.rope_type = 'linear' must be one of default"):
        from_dict(RunConfig, stored)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stepz": 1}, "'stepz'"),
        ({"steps": "1"}, "config.steps = '1' must be of type int"),
        ({"model": {"hidden_size": 1.5}}, "config.model.hidden_size"),
        ({"model": 3}, "config.model: expected an object"),
        ({"device": "tpu"}, "auto, cpu, cuda, mps"),
        ({"deterministic": 1}, "bool"),
        ({"minutes": None, "seed": True}, "config.seed"),
    ],
)
def test_stored_values_of_the_wrong_name_or_type_are_refused(change, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        from_dict(RunConfig, change)


def test_every_decision_about_the_machine_comes_with_a_reason():
    runtime, reasons = resolve(presets()["debug"])
    assert runtime.device == resolve_device("auto")[0]
    decisions = runtime.describe(reasons)
    assert {"device", "dtype", "compile", "experts", "batch", "threads"} == decisions.keys()
    assert all(": " in decision for decision in decisions.values())


def test_one_expert_with_normalised_gates_and_no_balance_warn_at_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    off = ("--model.bias-update-speed", "0", "--model.aux-loss-alpha", "0")
    assert run_training("--model.num-experts-per-tok", "1", *off, "--steps", "1", "--quiet") == 0
    warnings = capsys.readouterr().err
    assert "router learns nothing" in warnings
    assert "load balancing is off" in warnings


def test_a_failing_wandb_is_told_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run_training("--wandb", "offline", "--steps", "2", "--quiet") == 0
    assert capsys.readouterr().err.count("wandb is left out") == 1
    assert len((tmp_path / "out/debug/metrics.jsonl").read_text().splitlines()) == 2


def test_wandb_is_not_even_imported_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert run_training("--steps", "1", "--quiet") == 0
    assert "wandb" not in sys.modules


def test_windows_are_short_up_to_the_part_of_the_training_that_was_asked_for():
    config = TrainConfig(short_until=0.6, short_parts=4)
    assert [config.parts(progress) for progress in (0.0, 0.59, 0.6, 1.0)] == [4, 4, 1, 1]
    assert TrainConfig(short_until=0.0).parts(0.0) == 1
