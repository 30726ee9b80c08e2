"""What a config.json means, and which one a model's configuration is."""

from dataclasses import fields, replace
from math import log

import pytest
from conftest import SMALL
from published import PUBLISHED

from moe.config import ModelConfig, RopeScaling
from moe.cost import count
from moe.hub.configs import canonical, family_of, obstacles, read_config, write_config
from moe.hub.families import FAMILIES
from moe.hub.folder import HubError
from moe.hub.parity import draw
from moe.rotary import softmax_magnitude, table_magnitude

BY_NAME = {family.name: family for family in FAMILIES}
EVERY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def config_of(name: str, **changes) -> dict:
    """A small config.json as transformers writes it. None takes a field away."""
    config = draw(BY_NAME[name], seed=3).config.to_dict() | {"rope_parameters": {"rope_theta": 1e4}} | changes
    return {field: value for field, value in config.items() if value is not None or field == "q_lora_rank"}


@EVERY
def test_a_field_that_is_not_there_means_what_it_means_to_transformers(family):
    import transformers

    kind = getattr(transformers, f"{family.name}Config")
    theirs = kind().to_dict()
    ours_alone = {"aux_loss_alpha", "num_nextn_predict_layers", "rope_theta"}  # of training, or read elsewhere
    for ours in family.missing.keys() - ours_alone:
        name = family.stores.get(ours, ours)
        if name not in theirs:
            assert family.missing[ours] is None or family.missing[ours] == SMALL.attention_bias
            continue
        silent = {"n_group": 1, "topk_group": 1, "head_dim": None, "num_key_value_heads": None}
        meant = family.missing[ours]
        assert theirs[name] == meant or (meant == silent.get(ours, "") and kind_says_nothing(kind, name)), name


def kind_says_nothing(kind, name: str) -> bool:
    """Whether a class of transformers has no default of its own, and makes one of other fields."""
    return {item.name: item.default for item in fields(kind)}[name] is None


@EVERY
@pytest.mark.parametrize("seed", range(4))
def test_what_is_read_and_written_means_the_same(family, seed):
    config = draw(family, seed).config.to_dict()
    _, model = read_config(config)
    assert family_of(model) is family
    assert canonical(read_config(write_config(family, model))[1]) == canonical(model)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("Llama", {"model_type": "gpt2"}, "model_type = 'gpt2' is not one of the families known here: deepseek_v3"),
        ("Llama", {"model_type": ["llama"]}, "model_type"),
        ("Llama", {"hidden_size": None}, "hidden_size is missing"),
        ("Llama", {"hidden_size": "32"}, "hidden_size = '32' must be of type int"),
        ("Llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3 must divide"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' cannot be computed here, only 'silu'"),
        ("Llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("Llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type = 'longrope'"),
        ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ("Llama", {"rope_scaling": {"full_attention": {"rope_theta": 1e4}}}, "must be one object"),
        ("Llama", {"rope_scaling": [1]}, "must be one object"),
        ("Llama", {"rope_scaling": YARN | {"factor": 0.5}}, "factor = 0.5 must be at least 1"),
        ("Llama", {"rope_scaling": YARN | {"factor": "4"}}, "factor = '4'"),
        ("Qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("Qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("Mixtral", {"sliding_window": 32}, "sliding_window = 32 cannot be computed here, only None"),
        ("Olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("Olmoe", {"head_dim": 6}, "head_dim = 6 must be"),
        ("Qwen3Moe", {"decoder_sparse_step": -1}, "-1 is no distance"),
        ("Qwen3Moe", {"mlp_only_layers": [9]}, "mlp_only_layers"),
        ("Qwen3Moe", {"mlp_only_layers": "all"}, "mlp_only_layers"),
        ("DeepseekV3", {"topk_method": "greedy"}, "topk_method = 'greedy' cannot be computed here, only 'noaux_tc'"),
        ("DeepseekV3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("DeepseekV3", {"n_group": 3}, "n_group = 3 must divide n_routed_experts = 8"),
        ("DeepseekV2", {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
    ],
)
def test_what_cannot_be_computed_here_is_refused_by_the_name_of_its_field(name, changes, says):
    config = config_of(name, **changes)
    with pytest.raises(HubError) as refused:
        read_config(config)
    assert says in str(refused.value)


def test_rotary_embedding_is_read_in_both_forms_that_transformers_has_had():
    wanted = RopeScaling("yarn", 4.0, 16)
    for rope in ({"rope_parameters": YARN | {"rope_theta": 5e5}}, {"rope_scaling": YARN, "rope_theta": 5e5}):
        config = {name: value for name, value in config_of("Llama").items() if not name.startswith("rope_")}
        model = read_config(config | rope)[1]
        assert (model.rope_theta, model.rope_scaling) == (5e5, wanted)
    older = {"type": "yarn", "original_max_position_embeddings": 16, "factor": None, "mscale": None, "beta_fast": 0}
    assert read_config(config | {"rope_scaling": older})[1].rope_scaling == wanted  # the factor from both contexts
    del config["max_position_embeddings"]
    with pytest.raises(HubError, match="max_position_embeddings is missing"):
        read_config(config)


def test_without_a_rope_theta_mixtral_has_its_own():
    config = {name: value for name, value in config_of("Mixtral").items() if not name.startswith("rope_")}
    assert read_config(config)[1].rope_theta == 1e6


def test_layers_with_experts_at_a_distance_are_found():
    qwen = config_of("Qwen3Moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[1])
    model = read_config(qwen)[1]
    assert [layer for layer in range(6) if not model.is_dense(layer)] == [3, 5]
    deepseek = config_of("DeepseekV3", num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2)
    model = read_config(deepseek)[1]
    assert [layer for layer in range(6) if not model.is_dense(layer)] == [2, 4]


def test_kimi_k2_is_a_deepseek_v3():
    assert read_config(config_of("DeepseekV3", model_type="kimi_k2"))[0] is BY_NAME["DeepseekV3"]


def test_null_shared_experts_are_none():
    assert read_config(config_of("DeepseekV3") | {"n_shared_experts": None})[1].n_shared_experts == 0


def gates_of(name: str, reading: str, **changes) -> tuple:
    model = read_config(config_of(name, n_group=4, topk_group=2, num_experts_per_tok=2, **changes), reading)[1]
    return model.norm_topk_prob, model.topk_method, model.routed_scaling_factor


@pytest.mark.parametrize("norm", [True, False])
def test_deepseeks_own_code_normalises_sigmoid_gates_alone_and_groups_wherever_it_can(norm):
    scaled = {"norm_topk_prob": norm, "routed_scaling_factor": 16.0}
    assert gates_of("DeepseekV3", "transformers", **scaled) == (norm, "noaux_tc", 16.0)
    assert gates_of("DeepseekV3", "deepseek", **scaled) == (True, "noaux_tc", 16.0)
    scaled["topk_method"] = "greedy"
    assert gates_of("DeepseekV2", "transformers", **scaled) == (False, "greedy", 16.0)
    assert gates_of("DeepseekV2", "deepseek", **scaled) == (False, "group_limited_greedy", 16.0)


def test_deepseeks_own_code_stretches_no_context_that_is_not_longer_and_knows_one_mscale():
    short = config_of("DeepseekV3", rope_scaling=YARN | {"original_max_position_embeddings": 64})
    assert read_config(short)[1].rope_scaling.rope_type == "yarn"
    assert read_config(short, "deepseek")[1].rope_scaling == RopeScaling()
    for mscale, wanted in (({}, 1.0), ({"mscale": 0.7, "mscale_all_dim": 1.3}, 0.7)):
        scaling = read_config(config_of("DeepseekV3", rope_scaling=YARN | mscale), "deepseek")[1].rope_scaling
        assert (scaling.mscale, scaling.mscale_all_dim) == (wanted, wanted)
        assert (table_magnitude(scaling), softmax_magnitude(scaling)) == (1, (0.1 * wanted * log(4.0) + 1) ** 2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_published_size_and_both_references_agree_on_it(name):
    config, billions = PUBLISHED[name]
    family, model = read_config(config)
    assert count(model).total / 1e9 == pytest.approx(billions, rel=5e-3)
    assert canonical(read_config(config, "deepseek")[1]) == canonical(model)
    assert obstacles(family, model) == []


DENSE = {"first_k_dense_replace": 3, "attention": "grouped", "rope_interleave": False}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention": "grouped", "n_shared_experts": 0, "scoring_func": "softmax"}, "rope_interleave = True"),
        ({"n_shared_experts": 0}, "n_shared_experts = 0 (there at least 1)"),
        ({"scoring_func": "softmax", "n_shared_experts": 2}, "scoring_func = softmax (there sigmoid)"),
        ({"mlp_only_layers": (2,)}, "mlp_only_layers = (2,) (there ())"),
        ({"attention_bias": True}, "attention_output_bias = False (there True)"),
        ({"n_group": 8, "topk_group": 4}, "n_group = 8 leaves one expert in each group"),
        (DENSE | {"attention_output_bias": True}, "attention_output_bias = True"),
        (DENSE | {"qk_norm": "projection"}, "qk_norm = projection"),
        (DENSE | {"head_dim": 10, "num_attention_heads": 3}, "num_attention_heads = 3 does not divide"),
    ],
)
def test_an_architecture_that_no_family_has_is_refused_with_the_fields_in_the_way(changes, says):
    with pytest.raises(HubError, match="no published family has this architecture; in the way of") as refused:
        family_of(replace(SMALL, **changes))
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "DeepseekV3"),
        ({"mlp_only_layers": (1, 0)}, "DeepseekV3"),
        ({"first_k_dense_replace": 3, "n_shared_experts": 0, "scoring_func": "softmax"}, "DeepseekV3"),  # all dense
        ({"scoring_func": "softmax", "norm_topk_prob": False, "n_group": 4, "topk_group": 4}, "DeepseekV2"),
        (DENSE, "Llama"),
        (DENSE | {"attention_bias": True}, "Qwen2"),
        (DENSE | {"qk_norm": "head"}, "Qwen3"),
    ],
)
def test_what_has_no_effect_is_in_no_ones_way(changes, name):
    model = replace(SMALL, **changes)
    assert family_of(model).name == name
    assert canonical(read_config(write_config(BY_NAME[name], model))[1]) == canonical(model)


def test_the_default_model_is_a_deepseek_v3():
    assert family_of(ModelConfig()).name == "DeepseekV3"
