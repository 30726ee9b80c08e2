"""The price of a text: complete, causal, and the same as training's."""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, TEXT, build

import moe
from moe.checkpoint import Run
from moe.config import DataConfig, RunConfig, TrainConfig
from moe.corpus import prepare
from moe.data import TokenStream
from moe.lab.score import WINDOW, ScoreError, evaluate, overlapping_windows, price, prices_of, score
from moe.metrics import read_metrics
from moe.model import Transformer
from moe.presets import presets
from moe.tokenizer import bytes_tokenizer


@pytest.fixture
def bytes_run(tmp_path):
    torch.manual_seed(0)
    model = build(vocab_size=264).eval()
    config = RunConfig(model=model.config, train=TrainConfig(sequence_length=32))
    return Run(model, bytes_tokenizer(), config, tmp_path)


@pytest.mark.parametrize("windows", ["overlapping", "separate"])
def test_random_bytes_cost_about_eight_bits_each_under_an_untrained_model(bytes_run, windows):
    run = replace(bytes_run, model=Transformer(replace(SMALL, vocab_size=264, initializer_range=0.02)).eval())
    result = score(run, np.random.default_rng(0).bytes(3000), windows)
    assert (result.bytes, result.tokens) == (3000, 3000)
    assert result.to_json()["bits_per_byte"] == pytest.approx(math.log2(264), abs=0.05)


@pytest.mark.parametrize("windows", ["overlapping", "separate"])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 47, 48, 49, 100])
def test_appending_text_changes_no_earlier_price(bytes_run, windows, length):
    data = np.random.default_rng(1).bytes(150)
    whole, part = prices_of(bytes_run, data, windows), prices_of(bytes_run, data[:length], windows)
    assert (len(whole), len(part)) == (150, length)
    np.testing.assert_allclose(part, whole[:length], rtol=1e-4)


def test_each_price_is_the_models_own_given_at_least_half_a_window(bytes_run):
    data = np.random.default_rng(2).bytes(100)
    ids = torch.tensor([bytes_run.tokenizer.end_of_text, *data])
    prices = prices_of(bytes_run, data)
    for place in (0, 5, 31, 32, 60, 99):
        start = 0 if place < 32 else (place - 32) // 16 * 16 + 16
        assert place < 32 or 16 <= place - start < 32
        with torch.no_grad():
            logits = bytes_run.model(ids[None, start : place + 1])[0, -1]
        assert prices[place] == pytest.approx(-logits.log_softmax(-1)[data[place]].item(), rel=1e-4)


@pytest.mark.parametrize("length", [1, 2, 5, 32])
@pytest.mark.parametrize("total", [1, 2, 5, 32, 33, 34, 100])
def test_overlapping_windows_price_every_target_once(length, total):
    seen = [
        target
        for _, targets in overlapping_windows(np.arange(total + 1), length, 3)
        for target in targets.flatten().tolist()
        if target != -100
    ]
    assert seen == list(range(1, total + 1))


def test_the_load_counts_every_token_of_the_split_once_and_nothing_else(debug_run):
    run = moe.load(debug_run)
    stream = TokenStream(prepare(run.config.data), "val")
    for limit in (0, 65, 100):
        score, load = evaluate(run.model, stream, 64, nullcontext, limit)
        assert load.sum(-1).unique().tolist() == [score.tokens * run.config.model.num_experts_per_tok]


@pytest.mark.parametrize(("limit", "characters", "size"), [(0, 20 * 13, 20 * 19), (1 + 5 * 19, 5 * 13, 5 * 19)])
def test_an_evaluation_counts_the_characters_and_the_bytes_of_what_it_prices(
    bytes_run, tmp_path, limit, characters, size
):
    (tmp_path / "text.txt").write_text("Ünïcödé €uro\n" * 200, "utf-8")  # 13 characters, 19 bytes
    corpus = prepare(DataConfig(str(tmp_path / "text.txt"), tokenizer="bytes"), tmp_path / "prepared")
    result, _ = evaluate(bytes_run.model, TokenStream(corpus, "val"), 32, nullcontext, limit)
    assert (result.characters, result.bytes, result.tokens) == (characters, size, size)


def test_separate_windows_are_the_validation_loss_of_training(debug_run):
    run = moe.load(debug_run)
    text = TEXT.read_text()[1_003_854:].encode()
    result = score(run, text, "separate").to_json()
    last = read_metrics(debug_run / "metrics.jsonl")[-1]
    assert result["characters"] == 111_540
    assert result["nats_per_character"] == pytest.approx(last["val_nats_per_character"], rel=2e-3)  # bfloat16 there
    assert result["nats_per_token"] == pytest.approx(last["val_loss"], rel=2e-3)
    assert score(run, text[:20_000]).nats < score(run, text[:20_000], "separate").nats


def test_in_bfloat16_a_text_costs_nearly_the_same(debug_run):
    text = TEXT.read_bytes()[-3000:]
    exact, rounded = (score(moe.load(debug_run, dtype=dtype), text).nats for dtype in ("float32", "bfloat16"))
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=2e-3)


def whole_logits(model, batches):
    """Prices from the logits of all of a batch at once."""
    parts = []
    for tokens, targets in batches:
        with torch.no_grad():
            losses = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none")
        parts.append(losses[targets.flatten() != -100].double().numpy())
    return np.concatenate(parts)


def test_logits_piece_by_piece_change_no_price(bytes_run, monkeypatch):
    model, ids = bytes_run.model, np.random.default_rng(3).integers(264, size=200)
    batches = list(overlapping_windows(ids, 32, 3))
    wanted = whole_logits(model, batches)
    assert np.array_equal(price(model, iter(batches), nullcontext)[0], wanted)  # to the last bit in one piece
    for rows in (1, 7, 32, 95):
        monkeypatch.setattr("moe.model.LOGITS", 264 * rows + 1)
        np.testing.assert_allclose(price(model, iter(batches), nullcontext)[0], wanted, rtol=1e-5)


def test_no_more_logits_exist_at_a_time_than_in_training(bytes_run, monkeypatch):
    made = []
    bytes_run.model.lm_head.register_forward_hook(lambda module, given, out: made.append(out.numel()))
    monkeypatch.setattr("moe.model.LOGITS", 264 * 10)
    prices_of(bytes_run, bytes(100))
    assert max(made) == 264 * 10


def test_a_window_is_the_context_but_no_longer_than_the_cap(bytes_run, monkeypatch):
    data = np.random.default_rng(4).bytes(100)
    shorter = replace(bytes_run, model=build(vocab_size=264, max_position_embeddings=16).eval())
    shorter.model.load_state_dict(bytes_run.model.state_dict())
    wanted = prices_of(shorter, data)
    assert not np.array_equal(prices_of(bytes_run, data), wanted)
    monkeypatch.setattr("moe.lab.score.WINDOW", 16)
    assert np.array_equal(prices_of(bytes_run, data), wanted)


def test_no_presets_context_is_longer_than_the_cap():
    assert all(run.model.max_position_embeddings <= WINDOW for run in presets().values())


def test_an_empty_text_has_no_price(bytes_run):
    with pytest.raises(ScoreError, match="empty"):
        score(bytes_run, b"")
