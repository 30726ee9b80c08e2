"""What is said of a training before it begins: memory, length and time; and that saying it touches nothing."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CPU, SMALL, run_training
from test_resume import FEATURES, options

import moe
from moe.checkpoint import State
from moe.config import RunConfig, TrainConfig
from moe.machine import plan as room
from moe.machine.cost import activation_bytes, count
from moe.machine.plan import Forecast, memory, memory_warning, model_warnings
from moe.machine.weights import tensors_of
from moe.model import Transformer
from moe.optim import Average, Optimizers
from moe.presets import presets

SETTINGS = options(FEATURES)
TRAIN = TrainConfig(tokens_per_step=1024, sequence_length=128, short_until=0.5, short_parts=4)
CONFIG = RunConfig(steps=100, model=replace(SMALL, max_position_embeddings=128), train=TRAIN)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", [{}, {"matrix_optimizer": "adamw"}, {"ema_decay": 0.9}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_held_is_counted_to_the_byte(optim, dtype):
    config = replace(CONFIG, optim=replace(CONFIG.optim, **optim))
    model = Transformer(config.model)
    optimizers, average = Optimizers(model, config.optim), Average(model, config.optim.ema_decay)
    model.losses(*torch.randint(64, (2, 2, 16))).objective.backward()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad  # of an expert without a token
    optimizers.step(0.5)
    parts = memory(config, replace(CPU, dtype=dtype)).parts
    weights = sum(weight.nbytes for weight in model.parameters())
    moments = sum(tensor.nbytes for name, tensor in optimizers.state() if not name.endswith("/step"))
    assert (parts["weights"], parts["gradients"], parts["moments"]) == (weights, weights, moments)
    assert parts.get("average", 0) == bool(config.optim.ema_decay) * weights
    assert parts.get("bfloat16 weights", 0) == (weights // 2 if dtype == "bfloat16" else 0)
    saved = [*tensors_of(model).values(), *(tensor for _, tensor in optimizers.state())]
    saved += [tensor for _, tensor in average.state()]
    assert parts["saving"] == pytest.approx(sum(tensor.nbytes for tensor in saved), rel=0.01)  # but biases and counts


def test_what_saving_copies_lies_beside_a_gpus_memory(monkeypatch):
    monkeypatch.setattr(room, "machine_bytes", lambda device: 1 << 30)
    assert "saving" not in memory(CONFIG, replace(CPU, device="cuda")).parts


def needed(config: RunConfig, micro: int, again: bool = False) -> int:
    changed = replace(config, train=replace(config.train, activation_checkpointing=again))
    return memory(changed, replace(CPU, micro_batch_size=micro)).total


@pytest.mark.parametrize(
    ("fits", "says"),
    [
        ((8, False), None),
        ((4, False), r"--train.micro-batch-size 4 would take \d"),
        ((1, False), r"--train.micro-batch-size 1 would take \d"),
        ((1, True), r"--train.activation-checkpointing --train.micro-batch-size 1 would take \d"),
        (None, r"not even with --train.activation-checkpointing: choose a smaller --preset"),
    ],
)
def test_where_memory_is_short_the_first_thing_that_would_help_is_named(fits, says, monkeypatch):
    there = needed(CONFIG, *fits) if fits else needed(CONFIG, 1, True) - 1
    monkeypatch.setattr(room, "machine_bytes", lambda device: there)
    said = memory_warning(CONFIG, replace(CPU, micro_batch_size=8))
    assert (said is None) if says is None else re.search(rf"warning: this takes an estimated .*: .*{says}", said)


def test_checkpointing_alone_is_named_where_a_smaller_micro_batch_is_none(monkeypatch):
    there = needed(CONFIG, 1, True)
    monkeypatch.setattr(room, "machine_bytes", lambda device: there)
    said = memory_warning(CONFIG, replace(CPU, micro_batch_size=1))
    assert ": --train.activation-checkpointing would take" in said


def test_a_system_that_does_not_say_its_memory_is_not_warned_of(monkeypatch):
    monkeypatch.setattr(room, "machine_bytes", lambda device: None)
    assert memory_warning(presets()["v3"], CPU) is None
    assert " of " not in str(memory(CONFIG, CPU)).split(":")[0]


def test_the_warning_comes_before_anything_is_tried(text, monkeypatch, capsys):
    monkeypatch.setattr(room, "machine_bytes", lambda device: 100_000)
    monkeypatch.setattr("train.Transformer", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_training("--out", "run", "--data", text, *SETTINGS)
    assert "warning: this takes an estimated " in capsys.readouterr().err


def test_of_a_model_that_will_not_learn_is_warned():
    alone = replace(CONFIG, model=replace(CONFIG.model, num_experts_per_tok=1))
    assert "every gate is 1" in next(model_warnings(alone))
    loose = replace(CONFIG, model=replace(CONFIG.model, bias_update_speed=0.0, aux_loss_alpha=0.0))
    assert "load balancing is off" in next(model_warnings(loose))
    assert list(model_warnings(CONFIG)) == []


# -- time --------------------------------------------------------------------------------------------------------------


def forecast(config: RunConfig, first: int, took: list[float]) -> str:
    """After steps from this one that took so long."""
    made, state = Forecast(config, split=10_000), State(step=first, seconds=2.0 * first)
    for number, seconds in enumerate(took, 1):
        parts = config.train.parts(state.progress(config))
        state = replace(state, step=state.step + 1, seconds=state.seconds + seconds)
        assert made.step(seconds, parts) == (number == 3)
    return made.line(state)


def ratio() -> float:
    """Of the work of a whole window to that of a quarter, where attention takes six times as long as its operations
    say."""
    whole, quarter = (count(CONFIG.model, length) for length in (128, 32))
    return (whole.training_flops + 15 * whole.attention_flops) / (quarter.training_flops + 15 * quarter.attention_flops)


def test_the_time_is_that_of_the_faster_measured_step_and_longer_for_longer_windows():
    said = forecast(CONFIG, 0, [9.0, 2.0, 3.0])  # 47 more of a quarter, 50 of whole windows
    assert ratio() > 1.05
    assert said.startswith(
        f"about {room.clock(14 + 2 * (47 + 50 * ratio()))} for 100 steps (the faster of steps 2 and 3"
    )
    assert "took 2.00 s; evaluation and saving not counted" in said


def test_a_resumed_run_is_told_what_is_left():
    assert forecast(CONFIG, 70, [9.0, 2.0, 1.0]).startswith("about 0:27 for the 27 steps that are left (")
    said = forecast(CONFIG, 47, [9.0, 2.0, 2.0])  # its last short step was the last that was measured
    assert said.startswith(f"about {room.clock(2 * 50 * ratio())} for the 50 steps that are left (")


def test_minutes_are_turned_into_steps_tokens_and_epochs():
    config = replace(CONFIG, minutes=10.0)
    said = forecast(config, 0, [1.0, 1.0, 1.0])
    steps = round(300 + 300 / ratio())
    tokens = f"{steps * 1024 / 1e3:.0f}k"
    assert said.startswith(
        f"10 minutes make about {steps} steps: {tokens} tokens, {steps * 1024 / 10_000:.0f} epochs ("
    )
    over = forecast(replace(CONFIG, minutes=0.04), 0, [1.0, 1.0, 1.0])
    assert over.startswith("0.04 minutes make about 3 steps")


@pytest.mark.parametrize("steps", [1, 2])
def test_a_training_of_fewer_steps_than_are_measured_is_told_as_well(steps):
    said = forecast(replace(CONFIG, steps=steps, train=replace(TRAIN, short_until=0.0)), 0, [0.05] * steps)
    assert said.startswith("about 0:00 for ")
    assert f"(step {steps} took 50 ms;" in said


def test_on_a_gpu_time_is_as_operations_are():
    made = Forecast(CONFIG, 1, "cuda")
    assert made.work == made.flops
    assert made.flops[4] == 1024 * count(CONFIG.model, 32).training_flops


# -- a plan and a run --------------------------------------------------------------------------------------------------


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and "data" not in path.parts}


def test_a_plan_is_told_and_nothing_is_left_behind(text, capsys):
    before = contents()
    assert run_training("--data", text, *SETTINGS, "--plan", "--wandb", "offline") == 0
    said = capsys.readouterr().out
    names = [line.split()[0] for line in said.splitlines()]
    assert names[:4] == ["run", "text", "model", "plan"]
    assert names[-3:] == ["peak", "time", "next"]
    assert "20 steps of 128 tokens: 2.56k tokens, 2.58 epochs" in said
    assert re.search(r"memory   \S+B of \S+B: weights \S+, gradients", said)
    assert re.search(r"about 0:0\d for 20 steps", said)
    assert contents() == before
    assert not Path("out/debug").exists()


def test_a_plan_of_going_on_leaves_the_run_as_it_is(text, capsys):
    assert run_training("--out", "run", "--data", text, *SETTINGS) == 0
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 21}\n{"st')  # that was not saved
    before = contents()
    assert run_training("--out", "run", "--data", text, *SETTINGS, "--plan") == 2
    assert "holds a run" in capsys.readouterr().err
    assert run_training("--out", "run", "--resume", "auto", "--steps", 30, "--plan") == 0
    assert "for the 7 steps that are left (the faster of steps 22 and 23" in capsys.readouterr().out
    assert contents() == before


def test_the_time_is_told_once_in_a_run_and_not_when_nothing_is_left(text, capsys):
    assert run_training("--out", "run", "--data", text, *SETTINGS) == 0
    assert capsys.readouterr().out.count("\ntime ") == 1
    assert run_training("--out", "run", "--resume", "auto", "--steps", 22) == 0
    assert "\ntime " not in capsys.readouterr().out


def test_planning_changes_nothing_of_what_a_run_becomes(text):
    assert run_training("--out", "one", "--data", text, *SETTINGS, "--plan") == 0
    assert run_training("--out", "one", "--data", text, *SETTINGS) == 0
    assert run_training("--out", "other", "--data", text, *SETTINGS, "--quiet") == 0
    one, other = (moe.load(name).model.state_dict() for name in ("one", "other"))
    assert all(one[name].equal(other[name]) for name in one)


def test_the_peak_is_stored_with_the_run_and_a_run_without_it_goes_on(text):
    assert run_training("--out", "run", "--data", text, *SETTINGS) == 0
    facts = json.loads(Path("run/config.json").read_text())
    assert facts.pop("peak_flops") > 1e6
    Path("run/config.json").write_text(json.dumps(facts))
    assert moe.load("run")
    assert run_training("--out", "run", "--resume", "auto", "--steps", 21) == 0


def test_activations_are_the_estimate_that_the_micro_batch_is_chosen_by():
    wanted = activation_bytes(CONFIG.model, 8, 128)
    assert memory(CONFIG, replace(CPU, dtype="bfloat16")).parts["activations"] == wanted
    assert memory(CONFIG, CPU).parts["activations"] == wanted * 4 // 3
