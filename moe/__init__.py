"""moe: a compact mixture-of-experts language model, DeepSeek-V3 from scratch. Read the rooms in this order: config,
tokenizer, corpus, data, router, experts, rotary, attention, model, optim, checkpoint, sampling, metrics; and, where you
need them, layers, presets, and the folders decoding, machine, lab, hub."""

from moe.checkpoint import Run, load
from moe.config import ModelConfig, MoeError, RunConfig, SampleConfig
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
]
