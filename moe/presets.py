"""Complete runs by name, each with the machine it is for and what it reached there.

`tiny` is what config.py's defaults say. It has 8 experts, since 16, 32 and 64 are 0.027, 0.078 and 0.161 bits per byte
behind in the same time (`python -m moe.lab study experts`).
"""

from dataclasses import dataclass, replace

from moe.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

ONCE = OptimConfig(muon_lr=0.02, muon_weight_decay=0.1, adam_lr=0.006)  # for texts that are read once


@dataclass(frozen=True)
class Note:
    machine: str
    reached: str  # or what else there is to say


NOTES = {
    "tiny": Note("any laptop, 2 to 3 minutes", "1.43 nats per character of the validation split"),
    "dense": Note("any laptop, 2 minutes", "tiny's twin without routing: 1.43 nats per character"),
    "debug": Note("anything, seconds", "shows that everything works"),
    "wiki": Note("a laptop's CPU, an hour", "1.67 bits per byte of the last 5 MB after 10 minutes on two cores"),
    "small": Note("a GPU of 24 GB or more", "not trained yet"),
    "v2-lite": Note("more than one GPU", "DeepSeek-V2-Lite as it was pretrained, not trained here"),
    "v3": Note("more than one machine", "DeepSeek-V3 as it was pretrained, not trained here"),
}


def presets() -> dict[str, RunConfig]:
    tiny = RunConfig()
    all_dense = replace(tiny.model, first_k_dense_replace=tiny.model.num_hidden_layers)
    runs = (tiny, replace(tiny, preset="dense", model=all_dense), debug(), wiki(), small(), v2_lite(), v3())
    return {run.preset: run for run in runs}


def debug() -> RunConfig:
    model = ModelConfig(
        vocab_size=0,
        hidden_size=32,
        num_hidden_layers=2,
        max_position_embeddings=64,
        num_attention_heads=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        intermediate_size=64,
        n_routed_experts=4,
        moe_intermediate_size=32,
        bias_update_speed=0.02,  # 30 steps of 1e-3 would not move a choice
    )
    train = TrainConfig(
        tokens_per_step=512, sequence_length=64, short_until=0.0, eval_interval=15, save_interval=15, log_interval=10
    )
    return RunConfig(preset="debug", steps=30, model=model, data=DataConfig(vocab_size=320), optim=ONCE, train=train)


def wiki() -> RunConfig:
    """enwik8 in minutes to an hour. Narrow, because on a CPU it is the text seen that is scarce: in ten minutes a width
    of 128 learnt no more, and 256 far less."""
    model = ModelConfig(
        vocab_size=0,
        hidden_size=96,
        num_hidden_layers=4,
        max_position_embeddings=256,
        num_attention_heads=3,
        kv_lora_rank=48,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=288,
        n_routed_experts=16,
        moe_intermediate_size=96,
    )
    data = DataConfig(source="enwik8", vocab_size=1024, val_fraction=0.05, test_fraction=0.05)
    train = TrainConfig(
        tokens_per_step=8192, sequence_length=256, eval_interval=500, eval_tokens=1 << 17, save_interval=100
    )
    optim = replace(ONCE, muon_lr=0.014, adam_lr=0.016)
    return RunConfig(preset="wiki", minutes=60.0, model=model, data=data, optim=optim, train=train)


def small() -> RunConfig:
    """As many active parameters as GPT-2 small, 2.6 billion tokens of FineWeb-Edu."""
    model = ModelConfig(
        vocab_size=0,
        hidden_size=768,
        num_hidden_layers=12,
        max_position_embeddings=1024,
        num_attention_heads=12,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=2048,
        n_routed_experts=64,
        num_experts_per_tok=4,
        moe_intermediate_size=384,
    )
    data = DataConfig(source="fineweb-edu", tokenizer="gpt2", max_bytes=13_000_000_000)
    train = TrainConfig(
        tokens_per_step=1 << 17,
        sequence_length=1024,
        short_until=0.0,
        eval_interval=500,
        eval_tokens=1 << 20,
        save_interval=1000,
    )
    optim = replace(ONCE, adam_lr=0.003)
    return RunConfig(preset="small", steps=20_000, model=model, data=data, optim=optim, train=train)


def v2_lite() -> RunConfig:
    """DeepSeek-V2-Lite (arXiv 2405.04434): 15.7B parameters, 2.4B of them active."""
    model = ModelConfig(
        vocab_size=102_400,
        hidden_size=2048,
        num_hidden_layers=27,
        max_position_embeddings=4096,
        num_attention_heads=16,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=10_944,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        moe_intermediate_size=1408,
        scoring_func="softmax",
        norm_topk_prob=False,
        bias_update_speed=0.0,
        aux_loss_alpha=0.001,
    )
    return published("v2-lite", model)


def v3() -> RunConfig:
    """DeepSeek-V3 (arXiv 2412.19437): 671B parameters, 37B of them active."""
    model = ModelConfig(
        vocab_size=129_280,
        hidden_size=7168,
        num_hidden_layers=61,
        max_position_embeddings=4096,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=18_432,
        first_k_dense_replace=3,
        n_routed_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        routed_scaling_factor=2.5,
        n_group=8,
        topk_group=4,
        num_nextn_predict_layers=1,
    )
    return published("v3", model)


def published(name: str, model: ModelConfig) -> RunConfig:
    train = TrainConfig(
        tokens_per_step=1 << 22, sequence_length=4096, short_until=0.0, eval_interval=250, save_interval=500
    )
    data = DataConfig(source="fineweb-edu", tokenizer="gpt2")
    return RunConfig(preset=name, steps=100_000, model=model, data=data, optim=ONCE, train=train)
