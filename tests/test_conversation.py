"""The prompt loop: a line is continued or obeyed, and a mistake ends neither the line before it nor the loop."""

import os
import re
import select
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import build

import moe
import sample
from moe.config import MoeError, SampleConfig
from sample import Arguments, Conversation

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(debug_run):
    return moe.load(debug_run)


@pytest.fixture
def talk(run, monkeypatch, capsys):
    """What is written to standard output and to standard error when these lines are typed."""

    def answers(*lines: str, **settings) -> tuple[str, str]:
        left = iter([*lines, None])
        monkeypatch.setattr(sample, "next_line", lambda: next(left))
        Conversation(run, Arguments(max_new_tokens=20, seed=3, **settings)).hold()
        return capsys.readouterr()

    return answers


def test_a_line_is_continued_and_two_slashes_begin_a_text_with_one(talk, run):
    out, _ = talk("ROMEO:", "//etc")
    made = [moe.generate_text(run, prompt, 20, seed=3) for prompt in ("ROMEO:", "/etc")]
    assert out == "".join(f"{text}\n" for text in made)


def test_settings_hold_from_then_on(talk, run):
    out, errors = talk("/temperature 0", "/max-new-tokens 5", "a", "/top_k 3", "/temperature 2", "/seed 9", "a")
    made = [
        moe.generate_text(run, "a", 5, temperature=0, seed=3),
        moe.generate_text(run, "a", 5, temperature=2, top_k=3, seed=9),
    ]
    assert out == "".join(f"{text}\n" for text in made)
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/temprature 1", "/temprature is not known: did you mean temperature?"),
        ("/", "/ is not known: there are seed, "),
        ("/seed x", "--seed x: give a whole number"),
        ("/seed -1", "--seed -1 must lie between 0"),
        ("/seed", "--seed needs a value"),
        ("/seed 1 2", "'2' is one argument too many"),
        ("/top-p 7", "top_p = 7.0 must lie in (0, 1]"),
        ("/max-new-tokens -3", "--max-new-tokens must not be negative"),
        ("/experts", "there is no sample yet"),
        ("/json", "/json is not known"),
    ],
)
def test_a_mistake_is_one_line_and_the_loop_goes_on(talk, line, says):
    out, errors = talk(line, "/max-new-tokens 2", "still here")
    assert errors.split("\n")[1].startswith(f"error: {says}")
    assert errors.count("\n") == 2
    assert out.startswith("still here")


@pytest.mark.parametrize("end", ["", "/quit", "/quit "])
def test_an_empty_line_and_quit_end(talk, end):
    assert talk(end, "never asked") == (
        "",
        "note: write the beginning of a text; /help lists commands, an empty line ends\n",
    )


def test_help_names_every_command_and_what_is_set(talk):
    _, errors = talk("/top-k 7", "/help")
    for command in (*sample.SETTINGS, "--experts", "--quit"):
        assert f"  {command.replace('--', '/')} " in errors
    assert re.search(r"/top-k N +keep the k most likely; 0: all \(now: 7\)", errors)


def test_experts_tells_how_the_last_sample_was_shared(talk):
    out, errors = talk("ROMEO:", "/experts", "/experts 1", "/experts 0", "/experts two")
    assert out.count("layer 1   0:") == 2
    assert out.count("largest gate in layer 1") == 2
    assert "error: layer 0 has no experts: 1 have" in errors
    assert "error: /experts two: give the number of a layer" in errors


def test_a_dense_model_says_that_it_has_no_experts(run):
    dense = replace(run, model=build(first_k_dense_replace=3))
    with pytest.raises(MoeError, match="this model has no experts"):
        Conversation(dense, Arguments()).hear("/experts")


def test_an_interrupted_sample_comes_back_to_the_prompt(talk, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "draws", interrupted)
    out, errors = talk("a", "b")
    assert out == "a\nb\n"
    assert errors.count("stopped\n") == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": -1},
        {"seed": 2**63},
        {"num_samples": 0},
        {"max_new_tokens": -1},
        {"prompt": "a", "interactive": True},
        {"json": True, "color": True},
        {"json": True, "color_layer": 1},
    ],
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(MoeError):
        Arguments(**settings)
    assert Arguments().drawing == SampleConfig()


TAKE_OVER = """import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C there is meant for this process
os.execv(sys.argv[1], sys.argv[1:])"""


class Terminal:
    """A program in a terminal of its own, as somebody sits before it."""

    def __init__(self, *command: str) -> None:
        import pty  # which Windows has not

        self.master, slave = pty.openpty()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80"}
        environment = {name: value for name, value in environment.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
        streams = {"stdin": slave, "stdout": slave, "stderr": slave}
        command = (sys.executable, "-c", TAKE_OVER, *command)
        self.process = subprocess.Popen(command, **streams, env=environment, start_new_session=True)
        os.close(slave)
        self.shown = ""

    def until(self, *wanted: str, again: str = "") -> str:
        """What is shown until one of these is. again: typed once more every few seconds."""
        begin, end, next_time = len(self.shown), time.monotonic() + 240, time.monotonic() + 5
        while not any(text in self.shown[begin:] for text in wanted):
            assert time.monotonic() < end, self.shown[-500:]
            if again and time.monotonic() > next_time:
                self.type(again)
                next_time += 5
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.master, 4096).decode(errors="replace")
                except OSError:  # it has ended
                    break
        return self.shown[begin:]

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


@pytest.mark.skipif(os.name != "posix", reason="needs a terminal that a program can play")
def test_in_a_terminal_lines_are_edited_remembered_interrupted_and_ended(debug_run):
    pytest.importorskip("readline")
    with Terminal(sys.executable, str(ROOT / "sample.py"), str(debug_run), "-i", "--temperature", "0") as terminal:
        terminal.until("\n> ")
        terminal.type("/max-new-tokens 10000000\n")
        terminal.until("\n> ")
        terminal.type("ROMEX\x7fO:\n")  # backspace
        terminal.until("\nROMEO:")
        time.sleep(0.3)
        terminal.type("\x03")
        assert "stopped" in terminal.until("stopped\r\n> ", "stopped\n> ")
        terminal.type("\x03")  # between prompt and waiting Python does not hear it
        assert "Ctrl-D ends" in terminal.until("ends)\r\n> ", "ends)\n> ", again="\x03")
        terminal.type("\x1b[A\x1b[A\n")  # twice the arrow up
        assert "/max-new-tokens 10000000" in terminal.until("\n> ")
        terminal.type("/experts\n")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=120) == 0
