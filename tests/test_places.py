"""Every command works from any folder, on paths with spaces, umlauts and a leading dash."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from conftest import TEXT
from test_scripts import ROOT, run

import sample

FOLDER = "über all/a b"
TEXTS = ["my text ä.txt", "-x", "日本 [1] 100% {b} $HOME.txt"]


def runs(*arguments, cwd: Path) -> str:
    """What a command writes that is content, and opens no file in whatever encoding the machine prefers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONWARNDEFAULTENCODING", "1")
        patch.setenv("PYTHONWARNINGS", "always::EncodingWarning")
        result = run(*arguments, cwd=cwd)
    errors = result.stderr.decode()
    assert result.returncode == 0, errors
    assert not [line for line in errors.splitlines() if "EncodingWarning" in line and str(ROOT) in line]
    return result.stdout.decode()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a space in its name in which texts of strange names lie."""
    folder = tmp_path_factory.mktemp("another place")
    for name in TEXTS:
        (folder / name).write_text(TEXT.read_text("utf-8")[:20_000], "utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(place) -> Path:
    settings = ("--preset", "debug", "--data", f"./{TEXTS[0]}", "--out", f"{FOLDER}/-x ü", "--steps", "2")
    assert f"{FOLDER}/-x ü" in runs("train.py", *settings, cwd=place)
    return place / FOLDER / "-x ü"


def test_a_run_in_a_strange_place_samples_scores_resumes_and_is_exported(place, trained, tmp_path):
    short, inside = ("--max-new-tokens", "3"), trained.parent
    assert runs("sample.py", trained, "--prompt", "- a dash first", *short, cwd=tmp_path).startswith("- a dash first")
    assert runs("sample.py", "./-x ü", "--prompt-file", place / TEXTS[2], "--color", *short, cwd=inside)
    assert "nats per token" in runs("-m", "moe.lab", "score", "./-x ü", place / "-x", cwd=inside)
    goes_on = ("--out=-x ü", "--data", place / TEXTS[0], "--resume", "auto", "--steps", "3")
    assert "trained" in runs("train.py", *goes_on, cwd=inside)
    assert "exported" in runs("-m", "moe.hub", "export", "./-x ü", "./-hf ß", cwd=inside)
    assert "imported" in runs("-m", "moe.hub", "import", "./-hf ß", "./-back é", cwd=inside)


@pytest.mark.parametrize("name", TEXTS[1:])
def test_a_text_of_any_name_is_prepared(place, name, tmp_path):
    out = tmp_path / "pre pared ö"
    runs("data/prepare.py", f"./{name}", "--out", out, "--vocab-size", "300", cwd=place)
    assert json.loads((out / "corpus.json").read_text("utf-8"))


@pytest.mark.skipif(sys.platform != "linux", reason="a name of bytes that are no text")
def test_names_that_are_no_text_are_read_and_printed(place, tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_bytes((place / "-x").read_bytes())
    output = runs("data/prepare.py", name, "--out", os.fsdecode(b"out\xe9"), "--vocab-size", "300", cwd=tmp_path)
    assert "python train.py --data out?" in output


@pytest.mark.skipif(os.name != "posix", reason="elsewhere arguments are text")
def test_arguments_that_are_no_text_are_prompts_in_any_locale(trained, tmp_path, monkeypatch):
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    prompt = b"caf\xe9 \xf0\x9f\x98\x80"
    result = run("sample.py", trained, "--max-new-tokens", "2", "--prompt", os.fsdecode(prompt), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(prompt)


@pytest.mark.parametrize("text", ["one\r\ntwo\r\n", "\ufeffmarked", "", "\0"])
@pytest.mark.parametrize("source", ["file", "-"])
def test_windows_line_ends_a_mark_and_nothing_at_all_are_prompts(text, source, tmp_path, monkeypatch):
    path = tmp_path / "a prompt.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    given = sample.read_prompt(sample.Arguments(prompt_file=path if source == "file" else Path("-")))
    assert given == text.removeprefix("\ufeff")
