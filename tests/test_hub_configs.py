"""What a config.json means, and which one a model's configuration is."""

from dataclasses import fields, replace
from math import ceil, floor, log, pi

import pytest
import torch
from conftest import SMALL
from published import PUBLISHED

from moe.config import ModelConfig, RopeScaling
from moe.hub.configs import canonical, family_of, obstacles, read_config, write_config
from moe.hub.families import FAMILIES
from moe.hub.folder import HubError
from moe.hub.parity import draw
from moe.machine.cost import count
from moe.rotary import frequencies, softmax_magnitude, table_magnitude
from moe.router import Router

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
    for ours in family.missing.keys() - {"num_nextn_predict_layers", "rope_theta"}:  # read from elsewhere
        name = family.stores.get(ours, ours)
        if name not in theirs:
            assert name == "aux_loss_alpha" or not family.missing[ours]
            continue
        silent = {"n_group": 1, "topk_group": 1, "head_dim": None, "num_key_value_heads": None}
        meant = list(family.missing[ours]) if ours == "mlp_only_layers" else family.missing[ours]
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
        ("Qwen2", {"is_causal": False}, "is_causal = False cannot be computed here, only True"),
        ("Llama", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 is more than any model has"),
        ("Llama", {"rms_norm_eps": 10**400}, "rms_norm_eps = inf must be finite"),
        ("Llama", {"rope_scaling": YARN | {"attention_factor": 0.0}}, "attention_factor = 0.0"),
        ("Llama", {"layer_types": 3}, "layer_types"),
        ("Llama", {"rope_scaling": YARN | {"rope_type": ["yarn"]}}, "rope_type"),
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
    exact = config | {"rope_scaling": YARN | {"truncate": False}}
    assert read_config(exact)[1].rope_scaling == replace(wanted, truncate=False)
    outside = config | {"rope_scaling": YARN, "original_max_position_embeddings": 32}  # as Phi has it, and it wins
    assert read_config(outside)[1].rope_scaling == replace(wanted, original_max_position_embeddings=32)
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


def test_null_means_what_it_does_in_transformers():
    config = config_of("DeepseekV3") | dict.fromkeys(("n_shared_experts", "norm_topk_prob", "rope_interleave"))
    model = read_config(config)[1]
    assert (model.n_shared_experts, model.norm_topk_prob, model.rope_interleave) == (0, False, False)
    qwen = read_config(config_of("Qwen3Moe") | {"mlp_only_layers": None})[1]
    assert qwen.mlp_only_layers == ()
    assert read_config(config_of("Qwen2") | {"num_key_value_heads": None})[1].key_value_heads == 4


def deepseek_gates(config: dict, scores: list[float], bias: list[float]) -> dict[int, float]:
    """Experts and gates of one token as DeepSeek's inference code has them, in plain Python over its config.json."""
    experts, groups, kept = config["n_routed_experts"], config["n_group"], config["topk_group"]
    sigmoid = config["model_type"] == "deepseek_v3"
    biased = [score + offset * sigmoid for score, offset in zip(scores, bias, strict=True)]
    size = experts // groups
    members = [sorted(biased[size * group : size * (group + 1)], reverse=True) for group in range(groups)]
    worth = [sum(best[:2]) if sigmoid else best[0] for best in members]
    best_groups = sorted(range(groups), key=lambda group: -worth[group])[:kept]
    allowed = [expert for expert in range(experts) if groups == 1 or expert // size in best_groups]
    chosen = sorted(allowed, key=lambda expert: -biased[expert])[: config["num_experts_per_tok"]]
    total = sum(scores[expert] for expert in chosen) if sigmoid else 1.0
    return {expert: scores[expert] / total * config["routed_scaling_factor"] for expert in chosen}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("name", "method"), [("DeepseekV3", "noaux_tc"), ("DeepseekV2", "greedy")])
def test_deepseeks_own_code_normalises_sigmoid_gates_alone_and_groups_wherever_it_can(name, method, norm):
    config = config_of(name, n_group=4, topk_group=2, num_experts_per_tok=2, norm_topk_prob=norm, topk_method=method)
    config |= {"routed_scaling_factor": 16.0}
    model = read_config(config, "deepseek")[1]
    router = Router(replace(model, initializer_range=1.0))
    router.expert_bias.uniform_(-0.5, 0.5).mul_(model.scoring_func == "sigmoid")
    routing = router(torch.randn(50, model.hidden_size))
    for token in range(50):
        wanted = deepseek_gates(config, routing.scores[token].tolist(), router.expert_bias.tolist())
        found = dict(zip(routing.chosen[token].tolist(), routing.gates[token].tolist(), strict=True))
        assert found == pytest.approx(wanted, rel=1e-5)
    assert read_config(config)[1].norm_topk_prob == (norm and name == "DeepseekV3")


def test_deepseeks_own_code_has_one_eps_and_turns_neighbours():
    model = read_config(config_of("DeepseekV3", rms_norm_eps=1e-3, rope_interleave=False), "deepseek")[1]
    assert (model.rms_norm_eps, model.rope_interleave) == (1e-6, True)
    with pytest.raises(HubError, match="'llama3' is unknown to DeepSeek's code"):
        read_config(config_of("DeepseekV3", rope_scaling=YARN | {"rope_type": "llama3"}), "deepseek")


def deepseek_frequencies(dim: int, theta: float, context: int, original: int, factor: float) -> list[float]:
    """Of each pair, as DeepSeek's inference code has them."""
    plain = [theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    if context <= original:
        return plain

    def place(turns: float) -> float:
        return dim * log(original / (turns * 2 * pi)) / (2 * log(theta))

    low, high = max(floor(place(32)), 0), min(ceil(place(1)), dim - 1)
    ramp = [min(max((pair - low) / ((high - low) or 0.001), 0), 1) for pair in range(dim // 2)]
    return [one / factor * part + one * (1 - part) for one, part in zip(plain, ramp, strict=True)]


@pytest.mark.parametrize("original", [16, 64])  # the context has 64 positions
@pytest.mark.parametrize(("mscale", "meant"), [({}, 1.0), ({"mscale": 0.7, "mscale_all_dim": 1.3}, 0.7)])
def test_deepseeks_own_code_stretches_no_context_that_is_not_longer_and_knows_one_mscale(original, mscale, meant):
    rope = YARN | {"original_max_position_embeddings": original} | mscale
    config = config_of("DeepseekV3", rope_scaling=rope, rope_theta=100.0, qk_rope_head_dim=8)
    model = read_config(config, "deepseek")[1]
    found = frequencies(8, model.rope_theta, model.rope_scaling, torch.device("cpu"))
    assert found.tolist() == pytest.approx(deepseek_frequencies(8, 100.0, 64, original, 4.0))
    assert table_magnitude(model.rope_scaling) == 1
    sharper = (0.1 * meant * log(4.0) + 1) ** 2 if original < 64 else 1.0
    assert softmax_magnitude(model.rope_scaling) == pytest.approx(sharper)
    assert read_config(config)[1].rope_scaling.rope_type == "yarn"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_size_and_both_references_agree_on_it_but_for_an_eps(name):
    config, billions = PUBLISHED[name]
    family, model = read_config(config)
    assert count(model).total / 1e9 == pytest.approx(billions, rel=5e-3)
    there = read_config(config, "deepseek")[1]
    assert canonical(replace(there, rms_norm_eps=model.rms_norm_eps)) == canonical(model)
    assert there.rms_norm_eps == model.rms_norm_eps or name == "Moonlight-16B-A3B"
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


def test_transformers_deepseek_v2_wants_heads_that_divide_the_width():
    model = replace(SMALL, scoring_func="softmax", norm_topk_prob=False, num_attention_heads=3)
    assert obstacles(BY_NAME["DeepseekV2"], model) == ["num_attention_heads = 3 does not divide hidden_size = 32"]


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
