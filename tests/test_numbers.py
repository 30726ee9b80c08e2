"""Numbers that are no longer finite, and memory that is not there: noticed at once, named, and never saved."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build, run_training
from test_resume import FEATURES, options

import train
from moe.checkpoint import RunFolder
from moe.lab.report.history import History
from moe.metrics import read_metrics
from moe.optim import not_finite

SETTINGS = options(FEATURES)


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_keeps_the_checkpoint(text, monkeypatch, capsys):
    original, calls = train.accumulate, []

    def broken(*arguments):
        losses = original(*arguments)
        calls.append(1)
        return losses._replace(loss=losses.loss * np.nan) if len(calls) == 8 else losses

    monkeypatch.setattr(train, "accumulate", broken)
    assert run_training("--out", "run", "--data", text, *SETTINGS, "--train.save-interval", "5") == 2
    assert "step 8: the loss is nan" in capsys.readouterr().err
    assert [path.name for path in RunFolder(Path("run")).checkpoints()] == ["00000005"]
    assert len(read_metrics(Path("run/metrics.jsonl"))) == 7


def test_a_weight_that_is_not_finite_is_never_saved(text, monkeypatch, capsys):
    original, calls = train.Optimizers.step, []

    def ruin(self, progress):
        calls.append(1)
        share = original(self, progress)
        if len(calls) == 10:
            self.adam.param_groups[1]["params"][0].data.fill_(np.nan)
        return share

    monkeypatch.setattr(train.Optimizers, "step", ruin)
    assert run_training("--out", "run", "--data", text, *SETTINGS, "--train.save-interval", "5") == 2
    assert "no longer finite" in capsys.readouterr().err
    assert [path.name for path in RunFolder(Path("run")).checkpoints()] == ["00000005"]


def spoil(monkeypatch, steps: set[int]) -> list[int]:
    """Make the losses of these steps nan; the list of those whose optimizer was asked to step will follow."""
    accumulate, step = train.accumulate, train.Optimizers.step
    seen, stepped = [], []

    def spoilt(*arguments):
        losses = accumulate(*arguments)
        seen.append(1)
        return losses._replace(loss=losses.loss * np.nan) if len(seen) in steps else losses

    def counted(self, progress):
        stepped.append(len(seen))
        return step(self, progress)

    monkeypatch.setattr(train, "accumulate", spoilt)
    monkeypatch.setattr(train.Optimizers, "step", counted)
    return stepped


def test_so_many_broken_steps_on_end_are_left_out_with_a_warning_and_change_nothing(text, monkeypatch, capsys):
    stepped = spoil(monkeypatch, {4, 8, 9})
    settings = ("--out", "run", "--data", text, *SETTINGS, "--optim.ema-decay", "0.5")
    assert run_training(*settings, "--train.skip-non-finite", "2") == 0
    assert set(range(1, 21)) - set(stepped) == {4, 8, 9}
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in warnings] == [f"step {step} is left out" for step in (4, 8, 9)]
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in Path("run/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, 21))  # NaN is no JSON
    assert [line["step"] for line in lines if line["skipped"]] == [4, 8, 9]
    assert [line["step"] for line in lines if line["loss"] is None] == [4, 8, 9]
    assert np.isnan(History.read(Path("run/metrics.jsonl"))["nats_per_character"]).sum() == 3


def test_one_broken_step_on_end_more_than_may_be_left_out_ends_training(text, monkeypatch, capsys):
    spoil(monkeypatch, {4, 8, 9, 10})
    settings = ("--out", "run", "--data", text, *SETTINGS, "--train.skip-non-finite", "2")
    assert run_training(*settings) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: step 10: the loss is nan")
    assert "the last checkpoint in run is untouched" in last
    assert len(read_metrics(Path("run/metrics.jsonl"))) == 9


def test_a_run_none_of_whose_steps_could_be_made_yet_is_resumed(text, monkeypatch):
    stepped = spoil(monkeypatch, {1, 2})
    settings = ("--out", "run", "--data", text, *SETTINGS, "--train.skip-non-finite", "2", "--resume", "auto")
    assert run_training(*settings, "--steps", "2") == 0
    assert stepped == []
    assert run_training(*settings, "--steps", "4") == 0
    assert stepped == [3, 4]


def test_the_first_parameter_that_is_not_finite_is_named_weights_before_gradients():
    model = build()
    names = [name for name, _ in model.named_parameters()]
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    weights = dict(model.named_parameters())
    assert not_finite(model, 1.0, 1.0) is None
    assert not_finite(model, float("nan"), 1.0) == "the loss is nan and the gradient's norm 1.0"
    for name in (names[5], names[3]):
        weights[name].grad.view(-1)[0] = float("inf")
    assert not_finite(model, 1.0, float("inf")).endswith(f"(not finite: the gradient of {names[3]}, and 1 more)")
    weights[names[7]].data.view(-1)[-1] = float("nan")
    assert f"(not finite: {names[7]} itself" in not_finite(model, 1.0, float("inf"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_memory_that_runs_out_names_the_flag_to_lower(error, text, monkeypatch, capsys):
    def exhausted(*arguments):
        raise error

    monkeypatch.setattr(train, "accumulate", exhausted)
    assert run_training("--out", "run", "--data", text, *SETTINGS, "--quiet") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: lower --train.micro-batch-size")


def test_any_other_runtime_error_is_a_mistake_of_ours_and_not_hidden(text, monkeypatch):
    monkeypatch.setattr(train, "accumulate", lambda *arguments: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run_training("--out", "run", "--data", text, *SETTINGS, "--quiet")
