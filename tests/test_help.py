"""Help fits a person: short pages, every field explained once, and a mistake answered in one line."""

import dataclasses
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

import sample
import train
from moe.hub.__main__ import export_command, import_command, parity_command
from moe.lab.__main__ import score_command, study_command
from moe.machine.command import find_command, read_arguments
from moe.machine.flags import UsageError, build, checked, comments, flags_of
from moe.machine.help import Manual
from moe.presets import presets

TRAIN = flags_of(train.Arguments)
sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
import prepare  # noqa: E402


def page(capsys, *arguments: str, width: int = 80) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit) as ended:
            train.parse(list(arguments))
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_help_of_training_is_a_page_with_every_everyday_flag_and_the_examples_one_a_line(capsys):
    short = page(capsys, "--help")
    assert len(short.splitlines()) <= 62
    for flag in TRAIN:
        assert (f"  {flag.names[0]}" in short) == ("." not in flag.names[0]), flag
    for line in (line for line in train.__doc__.splitlines() if line.startswith("python ")):
        assert f"  {line}\n" in short
    assert "--help-all" in short


@pytest.mark.parametrize("width", [60, 80, 133, 200])
@pytest.mark.parametrize("flag", ["-h", "--help", "--help-all"])
def test_pages_keep_to_the_width_without_colours_or_frames(capsys, width, flag):
    text = page(capsys, flag, width=width)
    assert text.isascii()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) < width


def test_the_full_listing_names_each_field_once_with_its_meaning_and_its_default(capsys):
    listing = " ".join(page(capsys, "--help-all").split())
    for flag in TRAIN:
        assert len(re.findall(rf"{re.escape(flag.names[-1])}(?![\w.-])", listing)) >= 1, flag
        assert flag.text in listing
    assert "(default: None)" not in listing
    assert "--model.rms-norm-eps X keeps normalisation from dividing by 0 (default: 1e-06)" in listing
    assert "--train.no-keep-best" in listing  # how what is on is turned off
    assert "--no-plain" not in listing  # what is off needs no such thing
    heading = "Attention: DeepSeek's latent one, or grouped queries as Llama, Qwen, OLMoE and Mixtral have them"
    assert listing.count(heading) == 1


def test_the_defaults_on_the_page_are_those_of_the_preset_that_is_named(capsys):
    wiki = " ".join(page(capsys, "--preset", "wiki", "--help-all").split())
    assert "(default: enwik8)" in wiki
    assert f"(default: {presets()['wiki'].model.n_routed_experts})" in wiki


COMMANDS = [score_command, study_command, import_command, export_command, parity_command]


@pytest.mark.parametrize("what", [train.Arguments, sample.Arguments, prepare.Arguments, *COMMANDS])
def test_every_flag_says_what_it_means_and_no_two_say_the_same(what):
    texts = [flag.text for flag in flags_of(what)]
    assert all(len(text) > 4 for text in texts), flags_of(what)
    assert len(set(texts)) > 0.9 * len(texts)


@dataclasses.dataclass(frozen=True)
class Inner:
    # What this is about
    # in two lines
    one: int = 1  # first
    two: tuple[int, ...] = (2, 3)  # second
    # no heading: it does not stand behind an empty line
    three: float = 0.5

    # Another thing
    four: Literal["a", "b"] = "a"  # where the formatter has put it


@dataclasses.dataclass(frozen=True)
class Outer:
    place: Annotated[Path | None, tyro.conf.Positional] = None  # where
    five: Annotated[int | Literal["auto"], tyro.conf.arg(aliases=("-f",))] = "auto"  # "quoted # sign"
    six: bool = True  # a switch
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_headings_and_meanings_are_read_from_the_comments():
    found = {flag.names[-1]: flag for flag in flags_of(Outer)}
    assert found["--inner.one"].heading == "What this is about in two lines"
    assert [found[f"--inner.{name}"].text for name in ("one", "two", "three", "four")] == [
        "first", "second", "", "where the formatter has put it",
    ]  # fmt: skip
    assert found["--inner.three"].heading == "What this is about in two lines"
    assert found["--inner.four"].heading == "Another thing"
    assert found["--five"].text == '"quoted # sign"'
    assert [found[name].value for name in ("--five", "--inner.two", "--inner.four")] == ["N|auto", "N ...", "a|b"]


@pytest.mark.parametrize(
    ("arguments", "built"),
    [
        ([], Outer()),
        (["here", "-f", "7"], Outer(Path("here"), 7)),
        (["--five=auto", "./-x"], Outer(Path("-x"))),
        (["--no-six", "--inner.two", "4", "5", "--inner.one=-6"], Outer(None, "auto", False, Inner(-6, (4, 5)))),
        (["--inner.one", "-6", "--inner.three", "-1e-3", "x"], Outer(Path("x"), inner=Inner(-6, three=-1e-3))),
    ],
)  # fmt: skip
def test_what_is_given_is_built(arguments, built):
    assert build(Outer, checked(arguments, flags_of(Outer), "python x.py")) == built


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--stesp 3", "--stesp is not known: did you mean --steps?"),
        ("--model.n_routed_expert 4", "--model.n-routed-expert is not known: did you mean --model.n-routed-experts?"),
        ("--no-quit", "--no-quit is not known: did you mean --no-quiet?"),
        ("--qqqq", "--qqqq is not known: python train.py --help lists what is"),
        ("-x", "-x is not known"),
        ("--device cdua", "--device cdua is not known: did you mean cuda? There are auto, cpu, cuda, mps"),
        ("--preset tiyn", "--preset tiyn is not known: did you mean tiny? There are tiny, dense, debug"),
        ("--steps 1e3", "--steps 1e3: give a whole number"),
        ("--minutes soon", "--minutes soon: give a number"),
        ("--train.micro-batch-size all", "--train.micro-batch-size all: give a whole number or auto"),
        ("--model.mlp-only-layers 1 x", "--model.mlp-only-layers x: give a whole number"),
        ("--steps", "--steps needs a value: --steps N"),
        ("--resume --plain", "--resume needs a value: --resume never|auto|must"),
        ("--plain=yes", "--plain takes no value, but is given 'yes'"),
        ("tiny", "'tiny' is one argument too many: python train.py --help says what may be given"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line_with_what_was_meant(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(arguments.split()) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {says}")
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_what_may_be_given_several_times_is_read_each_time():
    def what(places: tyro.conf.Positional[tuple[Path, ...]], more: tyro.conf.UseAppendAction[tuple[int, ...]] = ()):
        return places, more

    def read(*arguments):
        return build(what, checked(arguments, flags_of(what), "python x.py"))

    assert read("a", "--more", "1", "b", "--more=2") == ((Path("a"), Path("b")), (1, 2))
    for arguments, says in {
        (): "PLACES must be given: python x.py PLACES",
        ("a", "--more", "x"): "a whole number",
    }.items():
        with pytest.raises(UsageError, match=says):
            read(*arguments)


def test_what_must_be_given_is_named_with_the_whole_command():
    flags = flags_of(score_command)
    with pytest.raises(UsageError, match=r"FILE must be given: python -m moe\.lab score RUN FILE"):
        checked(["run"], flags, "python -m moe.lab score")
    with pytest.raises(UsageError, match="RUN and FILE must be given"):
        checked([], flags, "python -m moe.lab score")


def test_a_command_within_a_command_is_found_and_a_mistyped_one_named(capsys):
    commands = {"score": score_command, "more": {"outer": Outer}}
    with pytest.raises(UsageError, match="did you mean score"):
        find_command("python -m x", commands, "", ["scroe"])
    with pytest.raises(UsageError, match="did you mean outer"):
        find_command("python -m x", commands, "", ["more", "oter"])
    with pytest.raises(UsageError, match="which command"):
        find_command("python -m x", commands, "", ["more"])
    with pytest.raises(SystemExit):
        find_command("python -m x", commands, "What it does.", ["--help"])
    assert "score  Price every byte" in capsys.readouterr().out
    assert find_command("python -m x", commands, "", ["score", "a", "b", "--json"]).keywords["json"]


@given(st.lists(st.text(max_size=5) | st.sampled_from(["--inner.one", "-f", "3", "--no-six", "=", "--inner.two=1"])))
def test_any_command_line_is_built_or_refused(arguments):
    with suppress(UsageError, SystemExit):
        assert isinstance(read_arguments(Outer, Manual("python x.py", "What it does."), arguments), Outer)


def test_reading_flags_needs_no_sources(monkeypatch):
    monkeypatch.setattr("moe.machine.flags.comments", comments.__wrapped__)
    monkeypatch.setattr("inspect.getsource", lambda what: (_ for _ in ()).throw(OSError()))
    assert [flag.text for flag in flags_of(Inner)] == [""] * 4
