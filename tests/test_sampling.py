"""Cached and uncached write the same; the filters do what they say."""

import pytest
import torch
from conftest import build
from hypothesis import given, settings
from hypothesis import strategies as st

import moe
from moe.attention import Cache
from moe.config import ConfigError, SampleConfig
from moe.sampling import SamplingError, Step, decode, draw, draws, sample


@torch.inference_mode()
def without_cache(model, tokens: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy, everything computed afresh for every token: by half a context anew where the context is full."""
    context = model.config.max_position_embeddings
    half = (context + 1) // 2
    text = window = tokens
    for _ in range(new):
        if window.shape[1] > context:
            window = window[:, -half:]
        token = model(window)[:, -1].argmax(-1, keepdim=True)
        text, window = torch.cat((text, token), 1), torch.cat((window, token), 1)
    return text


@pytest.mark.parametrize("prompt_length", [1, 10, 32, 50])
def test_cached_and_uncached_write_the_same_200_tokens_beyond_the_context_too(prompt_length, capsys):
    model = build().eval()
    tokens = torch.randint(64, (2, prompt_length))
    cached = moe.generate(model, tokens, max_new_tokens=200, temperature=0.0)
    uncached = without_cache(model, tokens, 200)
    assert cached.shape == (2, prompt_length + 200)
    assert cached.equal(uncached)
    assert cached[:, :prompt_length].equal(tokens)
    assert capsys.readouterr().err.count("longer than the context") == 1


@pytest.mark.parametrize("interleaved", [True, False])
def test_grouped_attention_writes_the_same_cached_and_uncached(interleaved):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "qk_norm": "head"}
    model = build(attention="grouped", rope_interleave=interleaved, **heads).eval()
    tokens = torch.randint(64, (2, 10))
    assert moe.generate(model, tokens, 60, temperature=0.0).equal(without_cache(model, tokens, 60))


@pytest.mark.parametrize("attention", ["latent", "grouped"])
def test_the_cache_follows_the_text_and_changes_no_token(attention, monkeypatch):
    model, tokens = build(attention=attention, max_position_embeddings=1000).eval(), torch.randint(64, (2, 10))
    caches = []

    def write(room: int | None) -> torch.Tensor:
        def kept(config, batch, length, *rest):
            caches.append(Cache(config, batch, room or length, *rest))
            return caches[-1]

        monkeypatch.setattr("moe.sampling.Cache", kept)
        return moe.generate(model, tokens, 60, temperature=0.0)

    assert write(None).equal(write(1000))
    assert [cache.entries[0].shape[1] for cache in caches] == [80, 1000]


def test_of_a_prompt_only_the_last_tokens_logits_are_made():
    model, made = build().eval(), []
    model.lm_head.register_forward_hook(lambda module, given, out: made.append(out.numel()))
    moe.generate(model, torch.randint(64, (2, 30)), 3)
    assert made == [2 * 64]  # those of what is written come from the decoder


@pytest.mark.parametrize("attention", ["latent", "grouped"])
@pytest.mark.parametrize("backend", ["loop", "grouped", "gather", "auto"])
def test_in_bfloat16_a_model_writes_and_its_logits_stay_near(attention, backend):
    model = build(attention=attention, expert_backend=backend, initializer_range=0.1).eval()
    tokens = torch.randint(64, (4, 16))
    with torch.no_grad():
        exact, rounded = model(tokens), model.bfloat16()(tokens)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm(dim=-1).median() < 0.05 * exact.norm(
        dim=-1
    ).median()  # a near-tie may route otherwise
    written = moe.generate(model, tokens, 40, temperature=1.0, top_p=0.9, seed=0)
    assert written.shape == (4, 56)
    with torch.no_grad():
        assert model(written[:, -32:]).isfinite().all()


def test_it_is_written_in_the_models_dtype_whatever_autocast_is_about():
    model, tokens = build().eval(), torch.randint(64, (2, 10))
    wanted = moe.generate(model, tokens, 20, temperature=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert moe.generate(model, tokens, 20, temperature=0.0).equal(wanted)


def test_greedy_decoding_is_the_argmax_of_the_plain_forward():
    model = build().eval()
    out = moe.generate(model, torch.tensor([[1, 2, 3]]), 20, temperature=0.0)
    with torch.no_grad():
        assert model(out[:, :-1]).argmax(-1)[:, 2:].equal(out[:, 3:])


def test_a_seed_repeats_itself_and_rows_of_a_batch_differ():
    model, tokens = build().eval(), torch.ones(3, 4, dtype=torch.int64)
    first, again = (moe.generate(model, tokens, 20, seed=5) for _ in range(2))
    assert first.equal(again)
    assert not first[0].equal(first[1])
    assert not first.equal(moe.generate(model, tokens, 20, seed=6))


def test_generate_stops_at_no_token_unless_told_and_leaves_the_mode_alone():
    model = build().train()
    tokens = torch.tensor([[1], [2]])
    greedy = moe.generate(model, tokens, 12, temperature=0.0)
    stop = greedy[0, 4].item()
    told = moe.generate(model, tokens, 12, temperature=0.0, stop=stop)
    first = (greedy[0, 1:] == stop).nonzero()[0].item() + 1
    assert told[0, : first + 1].equal(greedy[0, : first + 1])
    assert (told[0, first:] == stop).all()
    assert model.training


def test_padding_of_the_vocabulary_is_never_drawn():
    model = build().eval()
    out = moe.generate(model, torch.ones(8, 1, dtype=torch.int64), 40, temperature=5.0, vocab_size=10)
    assert out.max() < 10


def frequencies(logits, **settings) -> torch.Tensor:
    drawn = draw(logits.expand(4000, -1), SampleConfig(**settings), torch.Generator().manual_seed(0))
    return torch.bincount(drawn, minlength=logits.shape[-1]) / 4000


def test_chances_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    for temperature in (0.5, 1.0, 2.0):
        wanted = (logits[0] / temperature).softmax(-1)
        torch.testing.assert_close(frequencies(logits, temperature=temperature), wanted, rtol=0, atol=0.03)


def test_each_filter_keeps_exactly_what_it_promises():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    kept = lambda **settings: frequencies(logits, **{"temperature": 1.0} | settings).nonzero().flatten().tolist()  # noqa: E731
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.69) == [0, 1]
    assert kept(top_p=0.71) == [0, 1, 2]
    assert kept(top_p=1e-6) == [0]
    assert kept(min_p=0.6) == [0, 1]
    assert kept(min_p=1.0) == [0]
    assert kept(top_k=3, min_p=0.6) == [0, 1]
    assert kept(top_k=100) == [0, 1, 2, 3]


def test_filters_see_the_chances_at_the_temperature():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for temperature, top_p, min_p in ((1.0, 2, 2), (0.5, 1, 1), (2.0, 2, 3)):  # at 0.5 chances go as 16 : 9 : 4 : 1
        assert (frequencies(logits, temperature=temperature, top_p=0.5) > 0).sum() == top_p
        assert (frequencies(logits, temperature=temperature, min_p=0.6) > 0).sum() == min_p


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 3), st.integers(0, 9), st.floats(0.01, 1), st.floats(0, 1))
def test_no_setting_leaves_nothing_to_draw(temperature, top_k, top_p, min_p):
    drawn = draw(torch.randn(3, 7), SampleConfig(temperature, top_k, top_p, min_p))
    assert ((drawn >= 0) & (drawn < 7)).all()


@pytest.mark.parametrize("setting", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}])
def test_impossible_settings_are_refused_by_name(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        SampleConfig(**setting)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_are_never_drawn_from(temperature, broken):
    logits = torch.zeros(2, 8)
    logits[1, 3] = broken
    with pytest.raises(SamplingError, match="not finite"):
        draw(logits, SampleConfig(temperature=temperature))


def test_tokens_without_a_position_are_refused():
    with pytest.raises(SamplingError, match=r"\(1, 0\)"):
        moe.generate(build(), torch.zeros(1, 0, dtype=torch.int64), 1)


def test_text_generation_continues_the_prompt(debug_run):
    run = moe.load(debug_run)
    text = moe.generate_text(run, "ROMÉO:", max_new_tokens=30, seed=1)
    assert text.startswith("ROMÉO:")
    assert len(text) > 20
    assert text == moe.generate_text(run, "ROMÉO:", max_new_tokens=30, seed=1)


def test_a_generation_that_fails_leaves_the_mode_alone():
    model = build().train()
    with pytest.raises(SamplingError):
        moe.generate(model, torch.zeros(1, 0, dtype=torch.int64), 3)
    assert model.training


@torch.inference_mode()
def priced_afresh(model, tokens: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """The log-probability of every token after the prompt, each from a forward pass of its own over what the model had
    before it: half a context anew where the context was full."""
    context = model.config.max_position_embeddings
    half, begin, prices = (context + 1) // 2, 0, []
    for at in range(prompt_length, tokens.shape[1]):
        if at - begin > context:
            begin = at - half
        logprobs = model(tokens[:, begin:at])[:, -1].log_softmax(-1)
        prices.append(logprobs.gather(-1, tokens[:, at, None])[:, 0])
    return torch.stack(prices, dim=1)


@pytest.mark.parametrize("prompt_length", [1, 20, 50])
@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 2.0}])
def test_the_price_of_a_token_is_the_models_own_whatever_it_was_drawn_with(prompt_length, setting):
    model, prompt = build().eval(), torch.randint(64, (3, prompt_length))
    drawing = decode(model, prompt, SampleConfig(**setting), generator=torch.Generator().manual_seed(3))
    steps = [(step.tokens, step.logprobs()) for step, _ in zip(drawing, range(70), strict=False)]
    written = torch.cat([prompt, *(tokens[:, None] for tokens, _ in steps)], dim=1)
    wanted = priced_afresh(model, written, prompt_length)
    torch.testing.assert_close(torch.stack([prices for _, prices in steps], dim=1), wanted, rtol=1e-4, atol=1e-4)


def test_a_price_leaves_out_what_only_pads_the_vocabulary():
    step = next(decode(build().eval(), torch.ones(4, 3, dtype=torch.int64), SampleConfig(), vocab_size=10))
    assert step.logits.shape == (4, 10)
    assert torch.allclose(step.logits.softmax(-1).gather(-1, step.tokens[:, None])[:, 0].log(), step.logprobs())


def test_prices_cost_nothing_where_they_are_not_asked_for_and_change_no_text(debug_run, monkeypatch):
    run = moe.load(debug_run)
    priced = list(draws(run, "ROMEO:", SampleConfig(), 30, 2, seed=4, logprobs=True))
    assert all(each.logprob <= 0 for each in priced)
    monkeypatch.setattr(Step, "logprobs", None)
    plain = list(draws(run, "ROMEO:", SampleConfig(), 30, 2, seed=4))
    assert [each[:2] for each in plain] == [each[:2] for each in priced]
    assert {each.logprob for each in plain} == {None}
    assert list(sample(run, "ROMEO:", SampleConfig(), 30, 2, seed=4)) == [each[:2] for each in plain if not each.ends]


def test_a_sample_ends_with_the_token_that_stops_it_and_the_others_go_on(debug_run, monkeypatch):
    run = moe.load(debug_run)
    monkeypatch.setattr(type(run.tokenizer), "stops", frozenset(range(0, run.tokenizer.vocab_size, 4)))
    drawn = list(draws(run, "a", SampleConfig(temperature=1.0), 200, 3, seed=1))
    for number in range(3):
        *before, last = [each for each in drawn if each.sample == number]
        assert last.ends
        assert last.token % 4 == 0
        assert not any(each.ends or each.token % 4 == 0 for each in before)
