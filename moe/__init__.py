"""moe: a compact mixture-of-experts language model, DeepSeek-V3 from scratch. Read the rooms in this order: config,
tokenizer, corpus, data, router, experts, rotary, attention, model, optim, device, checkpoint, sampling, metrics."""

from moe.checkpoint import Run, load
from moe.config import ModelConfig, MoeError, RunConfig, SampleConfig, presets
from moe.experts import MLP, MoE
from moe.model import Transformer
from moe.sampling import generate, generate_text

__all__ = [
    "MLP",
    "MoE",
    "ModelConfig",
    "MoeError",
    "Run",
    "RunConfig",
    "SampleConfig",
    "Transformer",
    "generate",
    "generate_text",
    "load",
    "presets",
]
