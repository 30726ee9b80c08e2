"""The published families: what tells them apart, as a table.

A family is a row: what its fields are called in `config.json`, what transformers takes where they are missing, and what
goes without saying. The model knows no family; whatever makes two of them differ is a field of `ModelConfig`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe.hub.folder import HubError


@dataclass(frozen=True)
class Names:
    """What the parts of a feed-forward layer are called in files. Attention and norms have our names everywhere."""

    layer: str = "mlp"
    router: str = "gate.weight"
    bias: str | None = None  # of the router, where the family has one
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # of an expert


@dataclass(frozen=True)
class Family:
    """One model type of transformers."""

    name: str  # as its classes there begin
    model_types: tuple[str, ...]  # in config.json; the first is written
    stores: Mapping[str, str]  # our fields, and what they are called there
    missing: Mapping[str, Any]  # our fields where config.json is silent or says null
    given: Mapping[str, Any]  # our fields that are the same for the whole family
    demands: Mapping[str, tuple[Any, ...]]  # theirs that must be one of these, if present: what the model cannot do
    names: Names = Names()

    @property
    def architecture(self) -> str:
        return f"{self.name}ForCausalLM"

    @property
    def dense(self) -> bool:
        return "n_routed_experts" not in self.stores


def named(*groups: str, **otherwise: str) -> dict[str, str]:
    """Our fields that are called the same there, and those that are called otherwise."""
    return {name: name for name in " ".join(groups).split()} | otherwise


BASE = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings rms_norm_eps "
    "initializer_range tie_word_embeddings"
)
GROUPED = "num_key_value_heads head_dim"
DEEPSEEK = (
    "intermediate_size attention_bias q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "first_k_dense_replace n_routed_experts num_experts_per_tok n_shared_experts moe_intermediate_size "
    "routed_scaling_factor n_group topk_group aux_loss_alpha"
)
SILENT = {"initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False}
SILENT_GROUPED = SILENT | {"num_key_value_heads": None, "head_dim": None}
HALVES = {"attention": "grouped", "rope_interleave": False}
DENSE = HALVES | {"bias_update_speed": 0.0, "balance_loss": "none"}
SOFTMAX = {"scoring_func": "softmax", "bias_update_speed": 0.0, "balance_loss": "switch", "n_shared_experts": 0}
PLAIN = {"hidden_act": ("silu", "swish"), "mlp_bias": (False,), "partial_rotary_factor": (1,), "is_causal": (True,)}
FULL_ATTENTION = PLAIN | {"use_sliding_window": (False,)}

FAMILIES = (
    Family(
        "DeepseekV3",
        ("deepseek_v3", "kimi_k2"),
        stores=named(BASE, DEEPSEEK, "norm_topk_prob rope_interleave num_nextn_predict_layers"),
        missing=SILENT
        | {"norm_topk_prob": True, "n_group": 8, "topk_group": 4, "n_shared_experts": 1, "routed_scaling_factor": 2.5}
        | {"rope_interleave": True, "q_lora_rank": 1536, "aux_loss_alpha": 1e-4, "num_nextn_predict_layers": 0},
        given={"attention": "latent", "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        demands=PLAIN | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
        names=Names(bias="gate.e_score_correction_bias"),
    ),
    Family(
        "DeepseekV2",
        ("deepseek_v2",),
        stores=named(BASE, DEEPSEEK, "topk_method"),
        missing=SILENT
        | {
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "q_lora_rank": 1536,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 0,
            "aux_loss_alpha": 1e-3,
        },
        given={"attention": "latent", "scoring_func": "softmax", "norm_topk_prob": False, "bias_update_speed": 0.0},
        demands=PLAIN | {"scoring_func": ("softmax",), "topk_method": ("greedy", "group_limited_greedy")},
    ),
    Family(
        "Llama",
        ("llama",),
        stores=named(BASE, GROUPED, "intermediate_size attention_bias"),
        missing=SILENT_GROUPED,
        given=DENSE,
        demands=PLAIN,
    ),
    Family(
        "Qwen2",
        ("qwen2",),
        stores=named(BASE, GROUPED, "intermediate_size"),
        missing=SILENT_GROUPED | {"num_key_value_heads": 32},
        given=DENSE | {"attention_bias": True},
        demands=FULL_ATTENTION,
    ),
    Family(
        "Qwen3",
        ("qwen3",),
        stores=named(BASE, GROUPED, "intermediate_size attention_bias"),
        missing=SILENT_GROUPED | {"num_key_value_heads": 32, "head_dim": 128},
        given=DENSE | {"qk_norm": "head"},
        demands=FULL_ATTENTION,
    ),
    Family(
        "Mixtral",
        ("mixtral",),
        stores=named(
            BASE,
            GROUPED,
            "num_experts_per_tok",
            n_routed_experts="num_local_experts",
            moe_intermediate_size="intermediate_size",
            aux_loss_alpha="router_aux_loss_coef",
        ),
        missing=SILENT_GROUPED
        | {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "aux_loss_alpha": 1e-3, "rope_theta": 1e6},
        given=HALVES | SOFTMAX | {"first_k_dense_replace": 0},
        demands=PLAIN | {"sliding_window": ()},
        names=Names("block_sparse_moe", parts=("w1", "w3", "w2")),
    ),
    Family(
        "Qwen3Moe",
        ("qwen3_moe",),
        stores=named(
            BASE,
            GROUPED,
            "intermediate_size num_experts_per_tok moe_intermediate_size norm_topk_prob attention_bias mlp_only_layers",
            n_routed_experts="num_experts",
            aux_loss_alpha="router_aux_loss_coef",
        ),
        missing=SILENT_GROUPED
        | {"num_key_value_heads": 4, "norm_topk_prob": False, "mlp_only_layers": (), "aux_loss_alpha": 1e-3},
        given=HALVES | SOFTMAX | {"first_k_dense_replace": 0, "qk_norm": "head"},
        demands=FULL_ATTENTION,
    ),
    Family(
        "Olmoe",
        ("olmoe",),
        stores=named(
            BASE,
            "num_key_value_heads num_experts_per_tok norm_topk_prob attention_bias",
            n_routed_experts="num_experts",
            moe_intermediate_size="intermediate_size",
            aux_loss_alpha="router_aux_loss_coef",
        ),
        missing=SILENT_GROUPED | {"rms_norm_eps": 1e-5, "norm_topk_prob": False, "aux_loss_alpha": 1e-2},
        given=HALVES | SOFTMAX | {"first_k_dense_replace": 0, "qk_norm": "projection"},
        demands=PLAIN | {"clip_qkv": ()},
    ),
)


def family_named(config: dict[str, Any]) -> Family:
    """The family of a config.json. Raises HubError."""
    kind = config.get("model_type")
    known = {name: family for family in FAMILIES for name in family.model_types}
    if not isinstance(kind, str) or kind not in known:
        raise HubError(f"config.json: model_type = {kind!r} is not one of the families known here: {', '.join(known)}")
    return known[kind]
