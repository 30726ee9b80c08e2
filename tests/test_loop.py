"""What train.py promises of every step: its gradients, its rate, and that looking on changes nothing."""

from pathlib import Path

import pytest
import torch
from conftest import run_training
from test_resume import FEATURES, options

import moe
import train
from moe.metrics import read_metrics
from moe.optim import lr_share

SETTINGS = options(FEATURES)


def test_how_often_a_run_is_evaluated_and_saved_changes_nothing_of_what_it_learns(text):
    settings = ("--data", text, *SETTINGS, "--dtype", "float32")
    assert run_training("--out", "plain", *settings) == 0
    assert run_training("--out", "often", *settings, "--train.eval-interval", 3, "--train.save-interval", 4) == 0
    plain, often = (moe.load(name).model.state_dict() for name in ("plain", "often"))
    assert all(plain[name].equal(often[name]) for name in plain)


def test_gradients_are_clipped_before_the_step_and_their_whole_norm_is_told(text, monkeypatch):
    original, norms = train.Optimizers.step, []

    def measured(self, progress):
        norms.append(torch.nn.utils.get_total_norm([weight.grad for weight in self.names]).item())
        return original(self, progress)

    monkeypatch.setattr(train.Optimizers, "step", measured)
    assert run_training("--out", "run", "--data", text, *SETTINGS, "--optim.grad-clip", 0.1) == 0
    assert norms == pytest.approx([0.1] * 20, rel=1e-4)
    assert all(record["grad_norm"] > 0.2 for record in read_metrics(Path("run/metrics.jsonl")))


def test_each_step_is_made_at_the_rate_of_where_training_stood_before_it(debug_run):
    config = moe.load(debug_run).config
    rates = [record["lr_share"] for record in read_metrics(debug_run / "metrics.jsonl")]
    assert rates == [lr_share(step / config.steps, config.optim) for step in range(config.steps)]


@pytest.mark.parametrize("failure", [moe.MoeError("no room"), RuntimeError("no room\nat all"), MemoryError()])
def test_a_report_that_fails_costs_a_training_nothing(failure, text, monkeypatch, capsys):
    def fail(*_):
        raise failure

    monkeypatch.setattr(train, "make_report", fail)
    assert run_training("--out", "run", "--data", text, *SETTINGS, "--steps", 2, "--report") == 0
    told = capsys.readouterr()
    reason = "no room" if str(failure) else "MemoryError"
    assert f"notice: there is no report ({reason}); python -m moe.lab report run tries again" in told.err
    assert "sample" in told.out
