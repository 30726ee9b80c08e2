"""The commands as a user runs them, in processes of their own; bad input ends in one line and a non-zero exit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TEXT

ROOT = Path(__file__).parent.parent
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def run(*arguments, cwd, stdin: bytes = b"") -> subprocess.CompletedProcess:
    command = [sys.executable, *(str(ROOT / part) if str(part).endswith(".py") else str(part) for part in arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, timeout=300, env=environment, check=False)


def said(result: subprocess.CompletedProcess, code: int = 0) -> str:
    assert result.returncode == code, result.stderr.decode()
    assert b"Traceback" not in result.stderr
    assert b"Warning" not in result.stderr
    return result.stdout.decode()


def complaint(result: subprocess.CompletedProcess) -> str:
    """The one line a bad input gets."""
    assert result.returncode == 2
    lines = result.stderr.decode().strip().split("\n")
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a newcomer has run the first command."""
    folder = tmp_path_factory.mktemp("first steps")
    return folder, said(run("train.py", "--preset", "debug", cwd=folder))


def test_training_tells_its_plan_its_result_and_what_to_do_next(trained):
    folder, output = trained
    for wanted in ("parameters", "active", "device", "balance loss", "MaxVio", "tok/s", "ETA"):
        assert wanted in output
    assert "nats per character" in output
    assert "bits per byte" in output
    assert "dead experts" in output
    assert "python sample.py out/debug" in output
    names = {path.name for path in (folder / "out" / "debug").iterdir()}
    assert {"config.json", "tokenizer.json", "metrics.jsonl", "report.html", "checkpoints"} <= names
    stored = json.loads((folder / "out/debug/config.json").read_text())
    assert stored["runtime"]["device"] == "cpu"
    assert {"torch", "python", "git"} <= stored["versions"].keys()


def test_every_step_has_a_line_of_metrics_with_the_balance_beside_the_loss(trained):
    lines = [json.loads(line) for line in (trained[0] / "out/debug/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    for line in lines:
        assert {"loss", "balance_loss", "max_vio", "dead_experts", "entropy", "grad_norm", "tokens"} <= line.keys()
    assert lines[-1]["val_loss"] < lines[14]["val_loss"]
    assert lines[-1]["load_by_layer"][0]
    assert sum(lines[-1]["load_by_layer"][0]) == 512 * 2


def test_sampling_streams_and_a_seed_repeats_itself(trained):
    folder, _ = trained
    first = said(run("sample.py", "--prompt", "ROMÉO:", "--seed", "3", "--max-new-tokens", "40", cwd=folder))
    assert first.startswith("ROMÉO:")
    assert first == said(
        run("sample.py", "out/debug", "--prompt", "ROMÉO:", "--seed", "3", "--max-new-tokens", "40", cwd=folder)
    )


def test_samples_as_json_are_one_object_and_nothing_else(trained):
    command = (
        "sample.py",
        "--json",
        "--num-samples",
        "3",
        "--max-new-tokens",
        "4",
        "--prompt-file",
        "-",
        "--top-k",
        "5",
        "--dtype",
        "bfloat16",
    )
    result = json.loads(said(run(*command, cwd=trained[0], stdin=b"KING \xff")))
    assert result["prompt"] == "KING \ufffd"
    assert [len(sample["tokens"]) for sample in result["samples"]] == [4, 4, 4]
    assert all(sample.keys() == {"text", "tokens", "logprobs", "stopped"} for sample in result["samples"])
    assert all(price < 0 for sample in result["samples"] for price in sample["logprobs"])
    asked = run("sample.py", "out/debug", "-i", "--max-new-tokens", "2", cwd=trained[0], stdin=b"caf\xe9\n\n")
    assert asked.returncode == 0
    assert asked.stdout.startswith(b"caf\xe9")


def test_scoring_a_file(trained):
    folder, _ = trained
    (folder / "a.txt").write_bytes("Any text, ÿes\n".encode() + b"\xff")
    result = json.loads(said(run("-m", "moe.lab", "score", "out/debug", "a.txt", "--json", cwd=folder)))
    assert (result["characters"], result["bytes"]) == (15, 16)
    assert "bits per byte" in said(
        run("-m", "moe.lab", "score", "out/debug", "a.txt", "--windows", "separate", "--dtype", "bfloat16", cwd=folder)
    )


def test_preparing_and_training_on_a_text_of_ones_own(tmp_path):
    (tmp_path / "my text.txt").write_text(TEXT.read_text()[:50_000])
    assert "tokens" in said(
        run("data/prepare.py", "my text.txt", "--out", "ready", "--vocab-size", "300", cwd=tmp_path)
    )
    output = said(run("train.py", "--preset", "debug", "--data", "ready", "--steps", "2", "--quiet", cwd=tmp_path))
    assert output == ""
    assert said(run("sample.py", "--max-new-tokens", "5", cwd=tmp_path))


def test_preparing_json_lines_tells_of_every_split(tmp_path):
    lines = [json.dumps({"story": part}) for part in TEXT.read_text()[:60_000].split("\n\n")]
    (tmp_path / "stories.jsonl").write_text("\n".join(lines))
    settings = ("--out", "ready", "--field", "story", "--test-fraction", "0.2", "--tokenizer", "bytes")
    output = said(run("data/prepare.py", "stories.jsonl", *settings, "--max-bytes", "40000", cwd=tmp_path))
    sizes = {line.split()[0]: int(line.split()[3].replace(",", "")) for line in output.splitlines()[:3]}
    assert sizes.keys() == {"train", "val", "test"}
    assert sizes["val"] < sizes["test"] < sizes["train"] < 40_000
    assert "python train.py --data ready" in output


def test_training_goes_on_from_another_runs_weights_and_tokenizer(trained):
    folder, _ = trained
    (folder / "other.txt").write_text("A quite different text, of no great length. " * 200)
    start = ("--init-from", "out/debug", "--data", "other.txt", "--out", "out/more", "--steps", "3")
    output = said(run("train.py", "--preset", "debug", *start, "--optim.muon-lr", "1e-9", cwd=folder))
    assert "vocabulary 320" in output
    tokenizers = [(folder / "out" / name / "tokenizer.json").read_text() for name in ("debug", "more")]
    assert tokenizers[0] == tokenizers[1]
    losses = [json.loads(line)["loss"] for line in (folder / "out/more/metrics.jsonl").read_text().splitlines()]
    assert losses[0] < 5.2  # untrained: log 320 = 5.8


def test_an_interrupted_run_saves_says_how_to_go_on_and_goes_on(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--preset", "debug", "--steps", "100000", "--out", "run", "--plain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    metrics = tmp_path / "run/metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, b"")
    assert b"--out run --resume auto" in output
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    more = run("train.py", "--out", "run", "--resume", "auto", "--steps", str(last + 2), cwd=tmp_path)
    assert "trained" in said(more)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train.py", "--preset", "tinny"), "tiny, dense, debug"),
        (("train.py", "--data", "nowhere.txt"), "no such file"),
        (("train.py", "--data", "empty.txt"), "empty"),
        (("train.py", "--data", "binary.txt"), "byte 3"),
        (("train.py", "--data", "short.txt", "--data.tokenizer", "bytes"), "sequence-length"),
        (("train.py", "--data", "short.txt"), "vocab"),
        (("train.py", "--preset", "debug", "--model.num-experts-per-tok", "9"), "num_experts_per_tok = 9"),
        (("train.py", "--model.qk-rope-head-dim", "7"), "qk_rope_head_dim = 7"),
        (("train.py", "--out", "run", "--resume", "must"), "holds no complete checkpoint"),
        pytest.param(("train.py", "--device", "cuda"), "--device auto", marks=WITHOUT_GPU),
        (("sample.py",), "python train.py"),
        (("sample.py", "nowhere"), "no run"),
        (("sample.py", "--temperature", "-1"), "temperature"),
        (("sample.py", "--prompt", "a", "--prompt-file", "b"), "exclude"),
        (("sample.py", "-i", "--prompt", "a"), "exclude"),
        (("sample.py", "--prompt-file", "nowhere"), "nowhere"),
        (("-m", "moe.lab", "score", "nowhere", "short.txt"), "no run"),
        (("data/prepare.py", "binary.txt", "--out", "x"), "--errors replace"),
        (("data/prepare.py", "short.txt", "--val-fraction", "2"), "val_fraction"),
        (("data/prepare.py", "short.txt", "--test-fraction", "0.95"), "leave nothing to train on"),
        (("data/prepare.py", "lines.jsonl", "--field", "body"), "lines.jsonl, line 2: there is no field 'body'"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path, arguments, says):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"abc\xfe")
    (tmp_path / "short.txt").write_text("To be, or not to be.")
    (tmp_path / "lines.jsonl").write_text('{"body": "To be"}\n{"text": "or not"}\n')
    assert says in complaint(run(*arguments, cwd=tmp_path))
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_mistyped_flag_is_answered_with_the_right_one(tmp_path):
    result = run("train.py", "--model.n-routed-expert", "4", cwd=tmp_path)
    assert result.returncode == 2
    assert b"--model.n-routed-experts" in result.stderr + result.stdout


def test_presets_are_listed(tmp_path):
    output = said(run("train.py", "--list-presets", cwd=tmp_path))
    names = [line.split()[0] for line in output.splitlines() if not line.startswith(" ")]
    assert names == ["tiny", "dense", "debug", "wiki", "small", "v2-lite", "v3"]
    about = dict(zip(names, re.split(r"^\S+ +", output, flags=re.MULTILINE)[1:], strict=True))
    assert "15.7B parameters, 2.4" in about["v2-lite"]  # as DeepSeek publishes them
    assert "671B parameters, 36.6B active" in about["v3"]
    assert "118M active" in about["small"]
    assert all("B of memory or more: " in text and "a step, on " in text for text in about.values())
