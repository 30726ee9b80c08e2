from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from moe.config import ModelConfig
from moe.device import Runtime
from moe.model import Transformer

TEXT = Path(__file__).parent.parent / "data" / "tinyshakespeare" / "input.txt"
CPU = Runtime("cpu", "float32", False, "auto", 8, 1)
SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    max_position_embeddings=32,
    initializer_range=0.2,
    num_attention_heads=2,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    intermediate_size=48,
    n_routed_experts=8,
    moe_intermediate_size=16,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small() -> ModelConfig:
    return SMALL


def build(config: ModelConfig = SMALL, **changes) -> Transformer:
    """A model whose every weight, bias, norm and expert bias is random and away from its resting value."""
    model = Transformer(replace(config, **changes))
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(weight, std=0.5)
        elif weight.ndim == 1:
            nn.init.uniform_(weight, 0.5, 1.5)
        elif name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
            nn.init.normal_(weight, std=0.2)
    if model.config.bias_update_speed:
        for layer in model.moe_layers():
            nn.init.normal_(layer.router.expert_bias, std=0.2)
    return model


def transformers_rope(config: ModelConfig) -> dict:
    """The rotary embedding in transformers' words, as a published config.json has it: without what it leaves out."""
    scaling = config.rope_scaling
    names = {
        "default": "",
        "yarn": "factor original_max_position_embeddings beta_fast beta_slow truncate mscale mscale_all_dim",
        "llama3": "factor original_max_position_embeddings low_freq_factor high_freq_factor",
    }[scaling.rope_type]
    rope = {name: getattr(scaling, name) for name in names.split()}
    if scaling.attention_factor is not None:
        rope["attention_factor"] = scaling.attention_factor
    return {"rope_type": scaling.rope_type, "rope_theta": config.rope_theta} | rope


def transformers_twin(model: Transformer, family: str = "DeepseekV3", **fields):
    """The same weights in one of transformers' models. fields: what its configuration calls otherwise."""
    import transformers

    config, kind = model.config, getattr(transformers, f"{family}Config")
    names = kind().to_dict().keys() - {"head_dim"}
    shared = {name: value for name, value in vars(config).items() if name in names}
    if config.attention == "grouped":
        fields |= {"head_dim": config.query_head_dim}
    fields |= {"num_key_value_heads": config.key_value_heads, "rope_parameters": transformers_rope(config)}
    theirs = kind(**shared | fields, attn_implementation="eager")
    twin = getattr(transformers, f"{family}ForCausalLM")(theirs).eval()
    ours = {
        (name if name.startswith("lm_head") else f"model.{name}")
        .replace("router.weight", "gate.weight")
        .replace("router.expert_bias", "gate.e_score_correction_bias"): tensor
        for name, tensor in model.state_dict().items()
    }
    for name in [name for name in ours if name.endswith("gate_up_proj.weight")]:  # a dense layer's, there two matrices
        for part, tensor in zip(("gate_proj", "up_proj"), ours.pop(name).chunk(2), strict=True):
            ours[name.replace("gate_up_proj", part)] = tensor
    for name in [name for name in ours if name.endswith("mlp.gate_up_proj") or name.endswith("mlp.down_proj")]:
        ours[name.replace("mlp.", "mlp.experts.")] = ours.pop(name)
    for name in ours.keys() - twin.state_dict().keys():
        if name.endswith("e_score_correction_bias"):  # of a family that has none
            assert not ours.pop(name).any()
    twin.load_state_dict(ours, strict=True)
    return twin


def run_training(*arguments: str) -> int:
    return train.main(["--preset", "debug", "--plain", *map(str, arguments)])


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory) -> Path:
    """A finished run of preset debug. Not to be written to."""
    folder = tmp_path_factory.mktemp("run") / "debug"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        assert run_training("--out", folder, "--data", TEXT, "--quiet") == 0
    return folder
