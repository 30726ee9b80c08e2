import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn

import train
from moe import hub
from moe.config import ModelConfig
from moe.machine.device import Runtime
from moe.model import Transformer

torch.set_num_threads(max(torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), 1))
settings.register_profile("unhurried", deadline=None)  # machines are busy at times
settings.load_profile("unhurried")
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


def transformers_twin(model: Transformer, folder: Path):
    """The same weights in the class of transformers that an export names; nothing missing, nothing left over."""
    from transformers import AutoModelForCausalLM

    hub.save(model, None, folder)
    twin, remarks = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(remarks.values())
    return twin.eval()


def run_training(*arguments: str) -> int:
    return train.main(["--preset", "debug", "--plain", "--no-report", *map(str, arguments)])


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    """A short one, in the folder that a test then works in."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "text.txt"
    path.write_text(TEXT.read_text()[:1100])
    return path


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory) -> Path:
    """A finished run of preset debug. Not to be written to."""
    folder = tmp_path_factory.mktemp("run") / "debug"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        assert run_training("--out", folder, "--data", TEXT, "--quiet") == 0
    return folder
