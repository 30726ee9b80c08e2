"""Which `ModelConfig` a `config.json` on the hub means, and which `config.json` a `ModelConfig` is.

There are two references, transformers and the inference code that DeepSeek published with V3. Where they compute
different things from one `config.json`, `reading` says which to follow, and the difference becomes fields of
`ModelConfig` (see `as_deepseek`). They agree on every model that DeepSeek has published.
"""

from dataclasses import fields, replace
from typing import Any, Literal, get_args

from moe.config import ConfigError, ModelConfig, RopeScaling
from moe.hub.families import FAMILIES, Family, family_named
from moe.hub.folder import HubError
from moe.machine.parsing import from_dict

Reading = Literal["transformers", "deepseek"]
Config = dict[str, Any]  # a config.json

EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")  # transformers has two names in each family
NULLS = {  # what null means, where it is not the same as silence
    "q_lora_rank": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "n_shared_experts": 0,
    "norm_topk_prob": False,
    "rope_interleave": False,
}
ROPE = {  # what each kind of scaling has, beside its type
    "default": "",
    "yarn": "factor original_max_position_embeddings beta_fast beta_slow truncate mscale mscale_all_dim "
    "attention_factor",
    "llama3": "factor original_max_position_embeddings low_freq_factor high_freq_factor",
}
UNSET_BY_ZERO = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
# Fields without a part in the outputs, or in those of some models only
TRAINING = (
    "initializer_range hidden_dropout num_nextn_predict_layers bias_update_speed balance_loss aux_loss_alpha "
    "router_z_loss expert_backend"
)
LATENT = "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"
ROUTED = (
    "n_routed_experts num_experts_per_tok n_shared_experts moe_intermediate_size scoring_func norm_topk_prob "
    "routed_scaling_factor n_group topk_group topk_method"
)


def read_config(config: Config, reading: Reading = "transformers") -> tuple[Family, ModelConfig]:
    """What a config.json means. Raises HubError naming the field that is missing, wrong, or beyond this model."""
    if reading not in get_args(Reading):
        raise HubError(f"reading = {reading} is not known: give one of {', '.join(get_args(Reading))}")
    family = family_named(config)
    check_demands(family, config)
    try:
        model = from_dict(ModelConfig, stated(family, config) | read_rope(config, family), "config.json")
        model = replace(model, **dense_layers(config, family, model.num_hidden_layers))
    except ConfigError as error:
        raise HubError(f"config.json: {str(error).removeprefix('config.json: ')}") from None
    except OverflowError:  # a context that is no number of a float's size
        raise HubError("config.json: the context is longer than any model's: download it again") from None
    if model.attention == "grouped" and config.get("head_dim") not in (None, model.query_head_dim):
        raise HubError(f"config.json: head_dim = {config['head_dim']} must be {model.query_head_dim} in this family")
    return family, as_deepseek(model) if reading == "deepseek" else model


def stated(family: Family, config: Config) -> dict[str, Any]:
    """Our fields as a config.json states them, or leaves them to the family. Raises HubError for one missing."""
    values = dict(family.given)
    for ours, theirs in family.stores.items():
        spellings = EXPERT_COUNTS if theirs in EXPERT_COUNTS else (theirs,)
        silent = family.missing.get(ours)
        found = next((config[name] for name in spellings if name in config), silent)
        values[ours] = NULLS.get(ours, silent) if found is None else found
        if values[ours] is None and ours not in NULLS:
            raise HubError(f"config.json: {theirs} is missing")
    if "attention_bias" in family.stores:  # there it stands for the output's as well
        values["attention_output_bias"] = values["attention_bias"]
    return values


def check_demands(family: Family, config: Config) -> None:
    """Raises HubError for what this model cannot compute."""
    for name, allowed in family.demands.items():
        value = config.get(name)
        if value is not None and value not in allowed:
            wanted = " or ".join(map(repr, allowed or (None,)))
            raise HubError(f"config.json: {name} = {value!r} cannot be computed here, only {wanted}")
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise HubError(f"config.json: layer_types = {kinds} has more than full_attention, which is all there is here")


def read_rope(config: Config, family: Family) -> Config:
    """Our rope_theta and rope_scaling, from either of the forms that transformers has had."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise HubError(f"config.json: rope_parameters = {rope!r} must be one object, for all layers")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE:
        raise HubError(f"config.json: rope_type = {kind!r} cannot be computed here, only {', '.join(ROPE)}")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise HubError("config.json: partial_rotary_factor: rotating a part of each head is not implemented here")
    theta = rope.get("rope_theta") or config.get("rope_theta") or family.missing.get("rope_theta", 10_000.0)
    scaling = {name: rope[name] for name in ROPE[kind].split() if rope.get(name) is not None}
    for name in UNSET_BY_ZERO & scaling.keys():
        if not scaling[name]:
            del scaling[name]
    if kind != "default":
        context = config.get("max_position_embeddings")
        original = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = original or context
        if "factor" not in scaling and isinstance(original, int) and isinstance(context, int) and original:
            scaling["factor"] = context / original
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind} | scaling}


def dense_layers(config: Config, family: Family, layers: int) -> dict[str, Any]:
    """Which of the layers have no experts, in our fields."""
    if family.dense:
        return {"first_k_dense_replace": layers}
    if "mlp_only_layers" in family.stores:
        listed, every, phase = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1, 1
    else:  # transformers does not know this one of DeepSeek's, and all published models have 1
        listed, every, phase = [], config.get("moe_layer_freq") or 1, 0
    if not isinstance(every, int) or every < 1:
        raise HubError(f"config.json: {every!r} is no distance between layers with experts")
    between = {layer for layer in range(layers) if (layer + phase) % every}
    return {"mlp_only_layers": tuple(sorted({*listed, *between}))}


def as_deepseek(model: ModelConfig) -> ModelConfig:
    """As DeepSeek's inference code computes (DeepSeek-V3's repository, inference/model.py), where transformers does
    otherwise.

    Sigmoid gates are always normalised and softmax gates never, whatever norm_topk_prob says. Groups count wherever
    there are several. Every norm has eps 1e-6; rotated pairs are always neighbours. YaRN counts only in a context
    longer than the original one, and knows one mscale, for the scores.
    """
    if model.attention != "latent":
        return model
    grouped = "group_limited_greedy" if model.topk_method == "greedy" else model.topk_method
    changes: Config = {"norm_topk_prob": model.scoring_func == "sigmoid", "topk_method": grouped}
    changes |= {"rope_interleave": True, "rms_norm_eps": 1e-6}
    rope = model.rope_scaling
    if rope.rope_type == "llama3":
        raise HubError("config.json: rope_type = 'llama3' is unknown to DeepSeek's code: read it as transformers does")
    if rope.rope_type == "yarn" and model.max_position_embeddings > rope.original_max_position_embeddings:
        mscale = rope.mscale or 1.0
        rope = replace(rope, mscale=mscale, mscale_all_dim=mscale, attention_factor=None, truncate=True)
    else:
        rope = RopeScaling()
    return replace(model, **changes, rope_scaling=rope)


def write_config(family: Family, model: ModelConfig) -> Config:
    """The config.json of a family for this model, which both transformers 4 and 5 understand."""
    model = replace(model, **grouping(model), **dense_first(model))
    config = {theirs: getattr(model, ours) for ours, theirs in family.stores.items()}
    config |= {"num_key_value_heads": model.key_value_heads} | write_rope(model)
    if "head_dim" in config:
        config["head_dim"] = model.query_head_dim
    if "mlp_only_layers" in config:
        config |= {"mlp_only_layers": dense_of(model), "decoder_sparse_step": 1}
    if "n_group" in family.stores:  # for DeepSeek's own code and for programs that serve models
        named = ("scoring_func", "topk_method", "norm_topk_prob")
        config |= {name: family.given[name] for name in named if name in family.given} | {"moe_layer_freq": 1}
    if "topk_method" in family.stores:
        config["topk_method"] = "greedy" if model.n_group == 1 else "group_limited_greedy"
    kind = {"architectures": [family.architecture], "model_type": family.model_types[0], "hidden_act": "silu"}
    return kind | config | {"attention_dropout": 0.0, "use_cache": True}


def write_rope(model: ModelConfig) -> Config:
    """Rotary embedding in the fields that transformers 4 has, and 5 takes as well."""
    scaling, kind = model.rope_scaling, model.rope_scaling.rope_type
    if kind == "default":
        return {"rope_theta": model.rope_theta, "rope_scaling": None}
    values = {name: getattr(scaling, name) for name in ROPE[kind].split()}
    given = {name: value for name, value in values.items() if value or value is False}  # 0: not given
    return {"rope_theta": model.rope_theta, "rope_scaling": {"rope_type": kind, "type": kind} | given}


def grouping(model: ModelConfig) -> dict[str, Any]:
    """The fields of the choice by groups, where all groups are kept anyway as if there were one."""
    if model.topk_method == "greedy" or model.topk_group == model.n_group:
        return {"n_group": 1, "topk_group": 1, "topk_method": "noaux_tc"}
    return {name: getattr(model, name) for name in ("n_group", "topk_group", "topk_method")}


def dense_first(model: ModelConfig) -> dict[str, Any]:
    """The fields that say which layers are dense, those before the first with experts as such."""
    dense = dense_of(model)
    leading = next((layer for layer in range(len(dense)) if dense[layer] != layer), len(dense))
    return {"first_k_dense_replace": leading, "mlp_only_layers": tuple(dense[leading:])}


def dense_of(model: ModelConfig) -> list[int]:
    return [layer for layer in range(model.num_hidden_layers) if model.is_dense(layer)]


def canonical(model: ModelConfig) -> ModelConfig:
    """The same computation, with every field that has no part in it at its default: equal for models that compute the
    same. Multi-token prediction is left out, as a family's classes do."""
    dense, idle = dense_of(model), TRAINING.split()
    known = grouping(model) | dense_first(model)
    if not dense:
        idle += ["intermediate_size"]
    if len(dense) == model.num_hidden_layers:
        idle += ROUTED.split()
    if model.attention == "grouped":
        idle += LATENT.split()
        known |= {"num_key_value_heads": model.key_value_heads, "head_dim": model.query_head_dim}
    defaults = {item.name: item.default for item in fields(ModelConfig)}
    rope, used = model.rope_scaling, {"rope_type", *ROPE[model.rope_scaling.rope_type].split()}
    scaling = RopeScaling(**{name: getattr(rope, name) for name in used})
    return replace(model, **known | {name: defaults[name] for name in idle} | {"rope_scaling": scaling})


def obstacles(family: Family, model: ModelConfig) -> list[str]:
    """The fields that a family cannot express."""
    try:
        there = canonical(read_config(write_config(family, model))[1])
    except HubError as error:
        return [str(error).removeprefix("config.json: ")]
    here = canonical(model)
    names = [item.name for item in fields(ModelConfig) if getattr(here, item.name) != getattr(there, item.name)]
    found = [f"{name} = {getattr(here, name)} (there {getattr(there, name)})" for name in names]
    width, heads, experts = model.hidden_size, model.num_attention_heads, model.n_routed_experts
    if family.name in ("Llama", "DeepseekV2") and width % heads:
        found.append(f"num_attention_heads = {heads} does not divide hidden_size = {width}")
    if "n_shared_experts" in family.stores and model.num_moe_layers and not model.n_shared_experts:
        found.append("n_shared_experts = 0 (there at least 1)")
    if family.names.bias and model.num_moe_layers and experts // here.n_group < 2:
        found.append(f"n_group = {here.n_group} leaves one expert in each group (there at least 2)")
    return found


def family_of(model: ModelConfig) -> Family:
    """The family that has this architecture. Raises HubError with the fields that stand in the way of the nearest."""
    found = {family.name: obstacles(family, model) for family in FAMILIES}
    routed = model.num_moe_layers > 0
    nearest = min(FAMILIES, key=lambda family: (family.dense and routed, len(found[family.name])))
    if reasons := found[nearest.name]:
        raise HubError(f"no published family has this architecture; in the way of {nearest.name}: {', '.join(reasons)}")
    return nearest
