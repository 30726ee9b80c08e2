"""What a run shows while it trains, on any terminal and on none."""

import io
import os
import sys
import time

import pytest
import torch
from rich.console import Console

from moe.machine import display as room
from moe.machine.display import ASCII, BLOCKS, Display, Pace, load_line, row_of_blocks
from moe.machine.peak import LONGEST, measured, peak_of

RECORD = {"step": 10, "loss": 4.9, "max_vio": 0.84, "balance_loss": 1.08, "dead_experts": 1}
EVALUATED = {"val_loss": 3.0, "val_nats_per_character": 3.01}
PACE = Pace(0.33, 16_687, 0.0123, 65)


@pytest.mark.parametrize(
    ("load", "row"),
    [
        ([5, 5, 5, 5], "[▄▄▄▄]"),  # even: half the height
        ([0, 10, 5, 5], "[ █▄▄]"),
        ([20, 0, 0, 0], "[█   ]"),  # more than twice an even share is as full as that
        ([1, 1000, 1000], "[▁▆▆]"),  # a single token is not none
        ([0, 0], "[  ]"),
        ([7], "[▄]"),
    ],
)
def test_an_even_share_is_half_the_height_and_only_a_dead_expert_is_empty(load, row):
    assert row_of_blocks(torch.tensor(load), BLOCKS) == row


def test_every_level_has_a_letter_that_ascii_has_too():
    assert len(set(BLOCKS)) == len(set(ASCII)) == 9
    assert ASCII.isascii()
    assert row_of_blocks(torch.arange(9), ASCII) == f"[{ASCII}]"


def test_more_experts_than_fit_are_shown_as_their_profile_the_dead_among_them():
    load = torch.zeros(256, dtype=torch.int64)
    load[::2] = 10
    row = row_of_blocks(load, BLOCKS)
    assert row == f"[{'█' * 16}{' ' * 16}]"
    assert len(row_of_blocks(torch.ones(33), BLOCKS)) == 34


def test_of_many_layers_a_plain_line_shows_the_worst_in_order():
    load = torch.full((20, 32), 10)
    load[17, 3], load[4, 5] = 200, 100
    numbers = range(1, 21)
    assert load_line(load, BLOCKS, numbers).startswith("experts  the worst 2 of 20 MoE layers 5 [")
    assert "  18 [" in load_line(load, BLOCKS, numbers)
    assert load_line(load[:2], BLOCKS, [1, 2]).startswith("experts  layer 1 [")


def frame(width: int, encoding: str, load, record=RECORD, name="run") -> str:
    """The last frame on a terminal of this width and encoding, which refuses what it cannot show."""
    file = io.TextIOWrapper(io.BytesIO(), encoding)
    display = Display()
    display.console = Console(force_terminal=True, width=width, file=file, soft_wrap=True, color_system=None)
    display.levels = BLOCKS if room.can_show(BLOCKS, display.console.encoding) else ASCII
    display.live = True
    display.start(name, numbers=range(1, 41))
    display.step(record, PACE, load)
    display.close()
    file.flush()
    return file.buffer.getvalue().decode(encoding).rstrip().removesuffix("\x1b[?25h").rpartition("\x1b[2K")[2].rstrip()


def test_a_terminal_shows_everything_at_a_glance():
    load = torch.tensor([[0, 10, 5, 5], [5, 5, 5, 5]])
    first, losses, speed, *layers = frame(100, "utf-8", load, RECORD | EVALUATED, "my[x]").splitlines()
    assert first.startswith("my[x] ")
    assert first.endswith(" 33 %  step 10  ETA 1:05")
    assert losses == "loss 4.900  val 3.010/char  balance loss 1.080  MaxVio 0.84  dead 1"
    assert speed == "16,687 tok/s  MFU 1.2 %"
    assert layers == ["layer 1  [ █▄▄]  MaxVio 1.00  dead 1  the worst", "layer 2  [▄▄▄▄]  MaxVio 0.00"]


def test_of_many_layers_a_terminal_shows_eight_and_always_the_worst():
    display, load = Display(), torch.full((27, 64), 10)
    display.start("run", numbers=range(27))
    for worst in (20, 20, 3):
        load[worst] = torch.arange(64)
        lines = display.bars(load)
        assert len(lines) == 8
        assert next(line for line in lines if "the worst" in line).startswith(f"layer {worst}")
        assert lines[-1].endswith("(8 of 27 MoE layers)")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("width", [1, 20, 200])
@pytest.mark.parametrize("load", [None, torch.arange(8).view(1, 8), torch.ones(40, 300)])
def test_no_width_and_no_encoding_break_a_frame(width, encoding, load):
    lines = frame(width, encoding, load).splitlines()
    assert all(len(line) <= width for line in lines)
    assert len(lines) <= 3 + 8


def shown(display: Display) -> None:
    display.start("run", numbers=[1, 2])
    display.step(RECORD | EVALUATED, PACE, torch.ones(2, 4))
    display.step(RECORD | {"step": 50}, PACE, None)
    display.close()


@pytest.mark.parametrize("environment", [{"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {"TERM": "dumb"}, {"CI": "1"}])
def test_what_is_piped_gets_plain_lines_whatever_the_environment_says(environment, monkeypatch):
    for name, value in {"COLUMNS": "20", **environment}.items():
        monkeypatch.setenv(name, value)
    pipe = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", pipe)
    shown(Display())
    pipe.flush()
    lines = pipe.buffer.getvalue().decode("ascii").splitlines()
    told = "33 %  loss 4.900  val 3.010/char  balance loss 1.080  MaxVio 0.84  dead 1  16,687 tok/s  MFU 1.2 %"
    steps = [f"step {number:>5}  {told}  ETA 1:05" for number in (10, 50)]
    assert lines == [steps[0], "experts  layer 1 [====]  2 [====]", steps[1]]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
@pytest.mark.parametrize(("environment", "drawn"), [({}, True), ({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False)])
def test_a_real_terminal_is_drawn_on_unless_it_is_a_dumb_one(environment, drawn, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    leader, follower = os.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        shown(Display())
        print("the end", flush=True)
        said = b""
        while b"the end" not in said:
            said += os.read(leader, 1 << 16)
    os.close(leader)
    assert "MFU 1.2 %" in said.decode()
    assert "[▄▄▄▄]" in said.decode()
    assert (b"\x1b[2K" in said) == drawn
    assert not ("NO_COLOR" in environment and b"\x1b[3" in said)


def test_the_peak_is_measured_once_briefly_and_without_random_numbers():

    measured.cache_clear()
    before, began = torch.get_rng_state(), time.perf_counter()
    peak = peak_of("cpu", torch.float32)
    assert time.perf_counter() - began < LONGEST + 5  # of a machine that has other things to do
    assert torch.equal(torch.get_rng_state(), before)
    assert peak.flops > 1e6
    assert peak_of("cpu", torch.float32) == peak


def test_the_peak_of_a_known_card_is_its_makers_figure(monkeypatch):

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert peak_of("cuda", torch.bfloat16).flops == 989e12
    monkeypatch.setattr("moe.machine.peak.measured", lambda device, dtype, threads: 1e12)
    assert peak_of("cuda", torch.float32).flops == 1e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert peak_of("cuda", torch.bfloat16).flops == 1e12
