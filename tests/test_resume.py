"""A run that is stopped and continued is the one that was never stopped, to the last bit."""

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import kills
import pytest
from conftest import TEXT, run_training

import train
from moe.checkpoint import RunFolder, read_state
from moe.metrics import read_metrics
from moe.presets import presets
from moe.tokenizer import GPT2_PATTERN, SINGLE_BYTES, BytePairs

ROOT = Path(__file__).parent.parent
# Accumulation, dropout, both balance losses' terms, an epoch's end: 20 steps of 4 x 2 windows of 16 from about 60.
FEATURES = {
    "--tokens-per-step": 128,
    "--train.micro-batch-size": 4,
    "--model.hidden-dropout": 0.2,
    "--model.router-z-loss": 0.01,
    "--train.sequence-length": 16,
    "--data.tokenizer": "bytes",
    "--steps": 20,
}
AHEAD = {
    "--model.num-nextn-predict-layers": 2,
    "--optim.mtp-final-from": 0.5,
    "--optim.ema-decay": 0.8,
    "--optim.matrix-optimizer": "adamw",
}
GROUPED = {"--model.attention": "grouped", "--train.activation-checkpointing": None, "--train.eval-tokens": 40}
BALANCE = {
    "bias and loss": {},
    "switch loss": {"--model.balance-loss": "switch", "--model.bias-update-speed": 0, "--optim.schedule": "cosine"},
    "bias alone": {"--model.balance-loss": "none", "--train.short-until": 0.5, "--train.short-parts": 4},
    "neither, and all that looks ahead": {"--model.balance-loss": "none", "--model.bias-update-speed": 0}
    | AHEAD
    | GROUPED,
}
SMALLER = {  # than any preset, but of its structure
    "--model.hidden-size": 32,
    "--model.num-hidden-layers": 2,
    "--model.first-k-dense-replace": 1,
    "--model.intermediate-size": 48,
    "--model.moe-intermediate-size": 16,
    "--model.num-attention-heads": 2,
    "--model.kv-lora-rank": 16,
    "--model.qk-nope-head-dim": 8,
    "--model.qk-rope-head-dim": 8,
    "--model.v-head-dim": 16,
    "--model.vocab-size": 264,
    "--model.max-position-embeddings": 64,
}


def options(*parts: dict) -> list[object]:
    """The flags of all parts, later ones instead of earlier ones."""
    together: dict = {}
    for part in parts:
        together |= part
    return [part for name, value in together.items() for part in (name, value) if part is not None]


def stop_after(monkeypatch, step: int, request: int = signal.SIGINT) -> None:
    """Press Ctrl-C, or send another signal, during a step."""
    original = train.Optimizers.step
    calls = []

    def counted(self, progress):
        calls.append(progress)
        if len(calls) == step:
            signal.raise_signal(request)
        return original(self, progress)

    monkeypatch.setattr(train.Optimizers, "step", counted)


def stopped_and_resumed_is_the_same(monkeypatch, settings: list[object], step: int) -> Path:
    """Train twice with these settings, once stopped after a step and continued; the folder of either."""
    assert run_training("--out", "whole", *settings) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert run_training("--out", "parts", *settings) == 0
    assert step <= int(RunFolder(Path("parts")).checkpoints()[-1].name) < 20
    assert run_training("--out", "parts", *settings, "--resume", "auto") == 0
    assert kills.difference(Path("whole"), Path("parts")) is None
    return Path("parts")


@pytest.mark.parametrize("balance", BALANCE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_to_the_last_bit(text, monkeypatch, balance, dtype):
    settings = options({"--data": text, "--dtype": dtype}, FEATURES, BALANCE[balance])
    run = stopped_and_resumed_is_the_same(monkeypatch, settings, step=7)
    state = read_state(RunFolder(run).checkpoints()[-1])
    assert state.step == 20
    assert state.epoch > 0


@pytest.mark.parametrize("preset", presets())
def test_every_preset_is_resumed_to_the_last_bit(text, monkeypatch, preset):
    config = presets()[preset]
    shapes = SMALLER | {"--train.sequence-length": 32, "--tokens-per-step": 128, "--data.val-fraction": 0.1}
    if config.model.n_routed_experts > 16:
        shapes |= {"--model.n-routed-experts": 16}
    if config.model.q_lora_rank:
        shapes |= {"--model.q-lora-rank": 24}
    if not config.model.num_moe_layers:
        shapes |= {"--model.first-k-dense-replace": 2}
    shapes |= {"--data.test-fraction": 0, "--train.eval-tokens": 0, "--train.eval-interval": 2}
    settings = options({"--preset": preset, "--data": text, "--data.tokenizer": "bytes", "--steps": 6}, shapes)
    stopped_and_resumed_is_the_same(monkeypatch, settings, step=3)


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes", "gpt2"])
def test_a_run_of_any_tokenizer_is_resumed_to_the_last_bit(text, monkeypatch, tokenizer):
    ours = BytePairs([*SINGLE_BYTES, b"th", b"the", b" the"], GPT2_PATTERN)  # in place of a download
    monkeypatch.setattr("moe.corpus.build.gpt2_tokenizer", lambda: ours)
    text.write_text(TEXT.read_text()[:5000])
    settings = options({"--data": text}, FEATURES, {"--data.tokenizer": tokenizer, "--data.vocab-size": 270})
    stopped_and_resumed_is_the_same(monkeypatch, [*settings, "--steps", "6"], step=2)


def test_a_run_that_started_from_another_is_resumed_to_the_last_bit(text, monkeypatch, debug_run):
    settings = options({"--data": text, "--init-from": debug_run}, FEATURES, {"--data.tokenizer": "bpe", "--steps": 6})
    stopped_and_resumed_is_the_same(monkeypatch, settings, step=2)


def test_steps_that_were_left_out_are_left_out_again(text, monkeypatch):
    original = train.accumulate

    def broken(losses_of, batches, autocast, model, weight):
        losses = original(losses_of, batches, autocast, model, weight)
        return losses._replace(loss=losses.loss * float("nan")) if batches[0][0].sum() % 3 == 0 else losses

    monkeypatch.setattr(train, "accumulate", broken)
    settings = options({"--data": text, "--train.skip-non-finite": 20}, FEATURES)
    run = stopped_and_resumed_is_the_same(monkeypatch, settings, step=3)
    records = read_metrics(run / "metrics.jsonl")
    assert 0 < sum(record["skipped"] > 0 for record in records) < len(records) - 3


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no such signal")
def test_sigusr1_saves_and_goes_on_and_changes_nothing_else(text, monkeypatch):
    settings = options({"--data": text}, FEATURES, {"--train.keep-last": 9, "--train.eval-interval": 0})
    settings += ["--train.save-interval", "0"]
    assert run_training("--out", "whole", *settings) == 0
    stop_after(monkeypatch, 7, signal.SIGUSR1)
    assert run_training("--out", "saved", *settings) == 0
    assert [int(path.name) for path in RunFolder(Path("saved")).checkpoints()] == [7, 20]
    assert kills.difference(Path("whole"), Path("saved")) is None


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no such signal")
def test_sigusr1_while_a_run_is_being_prepared_saves_its_first_step(text, monkeypatch):
    original = train.prepare

    def asked_to_save(*arguments, **options):
        signal.raise_signal(signal.SIGUSR1)
        return original(*arguments, **options)

    monkeypatch.setattr(train, "prepare", asked_to_save)
    settings = options({"--data": text, "--train.keep-last": 9, "--train.eval-interval": 0}, FEATURES)
    assert run_training("--out", "run", *settings, "--steps", 3, "--train.save-interval", 0) == 0
    assert [int(path.name) for path in RunFolder(Path("run")).checkpoints()] == [1, 3]


def test_minutes_that_were_used_up_before_a_stop_are_not_given_twice(text, monkeypatch):
    settings = options({"--data": text}, FEATURES)[:-2]  # without its --steps
    budget = ("--out", "run", *settings, "--minutes", "0.06")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run_training(*budget) == 0
    before = read_state(RunFolder(Path("run")).checkpoints()[-1])
    assert (before.step, before.seconds < 3.6) == (3, True)
    assert run_training(*budget, "--resume", "auto") == 0
    records = read_metrics(Path("run/metrics.jsonl"))
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert all(one["seconds"] < two["seconds"] for one, two in pairwise(records))
    assert records[-2]["seconds"] < 3.6 <= records[-1]["seconds"]


def test_a_killed_run_resumes_from_its_last_checkpoint_without_gaps_or_doubles(text):
    settings = options({"--data": text, "--out": "run", "--train.save-interval": 5, "--resume": "auto"}, FEATURES)
    command = [sys.executable, "-c", KILLED, "--preset", "debug", "--plain", *map(str, settings)]
    killed = subprocess.run(command, cwd=Path.cwd(), env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert int(RunFolder(Path("run")).checkpoints()[-1].name) in (5, 10)  # the later one was being written
    assert len(read_metrics(Path("run/metrics.jsonl"))) == 12
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')
    assert run_training(*settings) == 0
    assert [record["step"] for record in read_metrics(Path("run/metrics.jsonl"))] == list(range(1, 21))


KILLED = """
import os, signal, sys
import torch, train
torch.set_num_threads(1)
original = train.Optimizers.step
calls = []
def step(self, progress):
    calls.append(1)
    if len(calls) == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, progress)
train.Optimizers.step = step
train.main(sys.argv[1:])
"""
