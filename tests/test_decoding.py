"""The form that writes computes what the model does: every kind of layer, any number of sequences."""

import pytest
import torch
from conftest import build
from torch.utils._python_dispatch import TorchDispatchMode

from moe.attention import Cache, RMSNorm
from moe.config import ModelConfig, RopeScaling
from moe.decoding import decoder as decoding
from moe.decoding.decoder import AHEAD, FETCHED_BYTES, FEW, Decoder, Turns, normalizer, product
from moe.rotary import rotary_table, rotate

YARN = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, mscale_all_dim=1.0)
GROUPED = {"attention": "grouped", "num_attention_heads": 4}
KINDS = {
    "plain": {},
    "small queries, biases": {"q_lora_rank": 10, "attention_bias": True, "attention_output_bias": True},
    "YaRN, uneven widths": {"rope_scaling": YARN, "v_head_dim": 20},
    "half-split": {"rope_interleave": False},
    "tied, all dense": {"tie_word_embeddings": True, "first_k_dense_replace": 3},
    "dense in between": {"first_k_dense_replace": 0, "mlp_only_layers": (1,)},
    "no shared expert": {"n_shared_experts": 0, "norm_topk_prob": False},
    "two shared experts": {"n_shared_experts": 2, "routed_scaling_factor": 2.5},
    "groups of experts": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "softmax": {"scoring_func": "softmax", "bias_update_speed": 0.0},
    "one of one": {"n_routed_experts": 1, "num_experts_per_tok": 1},
    "widths that no grouped product takes": {"moe_intermediate_size": 18},
    "multi-token prediction": {"num_nextn_predict_layers": 1},
    "loop": {"expert_backend": "loop"},
    "grouped": {"expert_backend": "grouped"},
    "gather": {"expert_backend": "gather"},
    "grouped queries": GROUPED | {"num_key_value_heads": 2},
    "one key head, half-split, YaRN": GROUPED
    | {"num_key_value_heads": 1, "rope_interleave": False, "rope_scaling": YARN},
    "norm of heads": GROUPED | {"num_key_value_heads": 2, "head_dim": 12, "qk_norm": "head"},
    "norm of projections, biases": GROUPED
    | {"qk_norm": "projection", "attention_bias": True, "attention_output_bias": True},
}


def logits_step_by_step(model, tokens: torch.Tensor, prompt: int, room: int = 8, make=Decoder) -> torch.Tensor:
    """Of every position from the prompt's last on; those behind it by the decoder. (B, S) -> (B, S - prompt + 1, V)."""
    cache = Cache(model.config, len(tokens), room, tokens.device, model.embed_tokens.weight.dtype)
    logits = [model(tokens[:, :prompt], cache)[:, -1]]
    step = make(model, cache)
    logits += [step(tokens[:, at]) for at in range(prompt, tokens.shape[1])]
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("sequences", [1, 2, 7, 40])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_decoder_computes_the_model(kind, sequences):
    model = build(**KINDS[kind]).eval()
    tokens = torch.randint(64, (sequences, 24))
    wanted = model(tokens)[:, 4:]
    got = logits_step_by_step(model, tokens, 5)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())


@pytest.mark.parametrize("kind", ["plain", "norm of heads", "loop", "groups of experts"])
@pytest.mark.parametrize("sequences", [1, 4])
@torch.inference_mode()
def test_in_bfloat16_it_is_as_near_to_the_exact_logits_as_the_model(kind, sequences):
    model, tokens = build(**KINDS[kind], initializer_range=0.1).eval(), torch.randint(64, (sequences, 24))
    exact = model(tokens)[:, 4:]
    model.bfloat16()
    off = [
        (logits - exact).norm(dim=-1).median()
        for logits in (model(tokens)[:, 4:], logits_step_by_step(model, tokens, 5))
    ]
    assert off[1] < 1.5 * off[0]


@torch.inference_mode()
def test_a_rotation_is_a_product_with_a_matrix_beyond_a_block_too():
    for interleaved in (True, False):
        config = ModelConfig(qk_rope_head_dim=8, rope_interleave=interleaved, rope_scaling=YARN)
        turns, x = Turns(config, torch.device("cpu")), torch.randn(3, 8)
        for position in (0, 5, AHEAD - 1, AHEAD, 3 * AHEAD + 2, 7):
            table = rotary_table(torch.tensor([position]), 8, config.rope_theta, YARN)
            wanted = rotate(x.unsqueeze(1), table, interleaved).squeeze(1)
            torch.testing.assert_close(x @ turns.at(position), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e4])
def test_a_norm_by_hand_is_rmsnorm(vectors, dtype, size):
    norm = RMSNorm(24, eps=1e-6).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = (size * torch.randn(vectors, 24)).to(dtype)
    with torch.inference_mode():
        got, wanted = normalizer(norm, vectors)(x), norm(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-30)


@torch.inference_mode()
def test_a_matrix_that_is_read_through_before_multiplies_the_same():
    for rows in (4, 300, 3000):  # below, within and above what is fetched
        for vectors in (1, FEW, FEW + 1):
            layer, x = torch.nn.Linear(100, rows, bias=rows == 4), torch.randn(vectors, 100)
            assert (layer.weight.nbytes in FETCHED_BYTES) == (rows == 300)
            assert product(layer, vectors)(x).equal(layer(x))


@torch.inference_mode()
def test_weights_are_looked_at_not_copied():
    model, tokens = build().eval(), torch.randint(64, (1, 9))
    cache = Cache(model.config, 1, 16, tokens.device, torch.float32)
    model.hidden_states(tokens[:, :8], cache)
    step = Decoder(model, cache)
    for name, weight in model.named_parameters():
        weight.mul_(1.5 if "norm" not in name else 1.1)
    behind = Cache(model.config, 1, 16, tokens.device, torch.float32)
    behind.entries, behind.length = [entries.clone() for entries in cache.entries], cache.length
    wanted = model(tokens[:, 8:], behind)[:, -1]
    torch.testing.assert_close(step(tokens[:, 8]), wanted, rtol=1e-4, atol=1e-5)


class Count(TorchDispatchMode):
    """How many operations reach the device's kernels, views included, and on how many threads."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.threads = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        self.threads.add(torch.get_num_threads())
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_token_takes_less_than_half_the_operations_of_the_models_forward():
    model, tokens = build().eval(), torch.randint(64, (1, 9))
    cache = Cache(model.config, 1, 16, tokens.device, torch.float32)
    model.hidden_states(tokens[:, :7], cache)
    step = Decoder(model, cache)
    step(tokens[:, 7])
    with Count() as decoder:
        step(tokens[:, 8])
    with Count() as forward:
        model(tokens[:, 8:], cache)
    assert 2 * decoder.operations < forward.operations


@pytest.mark.parametrize(
    ("sequences", "vocabulary", "threads"), [(1, 64, {1}), (FEW, 64, {1}), (FEW + 1, 64, {3}), (1, 512, {1, 3})]
)
@torch.no_grad()
def test_a_few_tokens_meet_what_is_small_on_one_thread_and_the_others_come_back(
    sequences, vocabulary, threads, monkeypatch
):
    monkeypatch.setattr(decoding, "ONE_THREAD_NUMBERS", 4096)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        model, tokens = build(vocab_size=vocabulary).eval(), torch.randint(64, (sequences, 8))
        cache = Cache(model.config, sequences, 16, tokens.device, torch.float32)
        model.hidden_states(tokens, cache)
        step, new = Decoder(model, cache), tokens[:, 0]
        with Count() as seen:
            step(new)
        assert seen.threads == threads
        assert torch.get_num_threads() == 3
        with pytest.raises(IndexError):
            step(new + 1000)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
