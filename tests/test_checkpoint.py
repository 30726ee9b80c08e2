"""What a run leaves on disk: continued to the last bit, written whole, refused when damaged."""

import hashlib
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import test_resume
import torch
from conftest import run_training
from safetensors.torch import save_file
from test_resume import options

import moe
from moe.checkpoint import RunFolder
from moe.config import DataConfig
from moe.corpus import prepare
from moe.data import TokenStream
from moe.lab.score import evaluate
from moe.machine.device import DeviceError
from moe.machine.stored import CheckpointError, verify
from moe.machine.weights import load_model, load_tensors, tensors_of
from moe.metrics import MetricsLog, read_metrics
from moe.model import Transformer

FEATURES, AHEAD = options(test_resume.FEATURES), options(test_resume.AHEAD)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_resume_keeps_its_word(text, capsys):
    options = ("--out", "run", "--data", text, *FEATURES)
    assert run_training(*options, "--resume", "must") == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err
    assert run_training(*options, "--resume", "auto") == 0
    files = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert run_training(*options) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert run_training(*options, "--resume", "auto") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run_training(*options, "--resume", "must", "--deterministic") == 2
    assert "another deterministic" in capsys.readouterr().err
    assert run_training(*options, "--resume", "must", "--optim.muon-lr", "0.5") == 2
    assert "optim.muon_lr" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == files
    assert run_training("--out", "run", "--resume", "auto", "--steps", "22") == 0  # further than first planned
    assert len(read_metrics(Path("run/metrics.jsonl"))) == 22
    assert run_training("--out", "run", "--resume", "auto") == 0


def test_the_same_command_continues_a_run_flags_included(text):
    options = (
        "--out",
        "run",
        "--data",
        text,
        *FEATURES,
        "--deterministic",
        "--model.tie-word-embeddings",
        "--resume",
        "auto",
    )
    assert run_training(*options, "--model.no-norm-topk-prob") == 0
    assert run_training(*options, "--model.no-norm-topk-prob", "--steps", "21") == 0
    assert len(read_metrics(Path("run/metrics.jsonl"))) == 21


def test_what_is_evaluated_saved_and_loaded_is_the_average(text):
    options = ("--data", text, *FEATURES, "--dtype", "float32")
    assert run_training("--out", "plain", *options) == 0
    assert run_training("--out", "average", *options, "--optim.ema-decay", "0.8") == 0
    plain, average = (read_metrics(Path(name, "metrics.jsonl"))[-1] for name in ("plain", "average"))
    assert plain["loss"] == average["loss"]  # training is the same
    assert plain["val_loss"] != average["val_loss"]
    run = moe.load("average")
    stream = TokenStream(prepare(run.config.data), "val")
    score, _ = evaluate(run.model, stream, 16, nullcontext)
    assert score.record()["val_loss"] == pytest.approx(average["val_loss"])


def test_terms_of_multi_token_prediction_are_named_in_the_metrics_and_outside_the_loss(text):
    assert run_training("--out", "run", "--data", text, *FEATURES, *AHEAD, "--dtype", "float32") == 0
    assert run_training("--out", "none", "--data", text, *FEATURES, "--dtype", "float32") == 0
    records, none = (read_metrics(Path(name, "metrics.jsonl")) for name in ("run", "none"))
    assert all({"mtp_1_loss", "mtp_2_loss"} <= record.keys() for record in records)
    assert not any(name.startswith("mtp") for name in none[0])
    assert records[0]["loss"] == pytest.approx(5.56, abs=0.1)  # log 264, and no part of it twice


def test_training_goes_on_from_another_runs_weights_with_and_without_multi_token_prediction(text, capsys):
    options = ("--data", text, *FEATURES, "--steps", "1")
    assert run_training("--out", "plain", *options) == 0
    more = ("--model.num-nextn-predict-layers", "1")
    assert run_training("--out", "more", "--init-from", "plain", *options, *more, "--optim.muon-lr", "1e-9") == 0
    assert run_training("--out", "less", "--init-from", "more", *options, "--model.num-nextn-predict-layers", "0") == 0
    notices = capsys.readouterr().err
    assert "plain has 0 modules of multi-token prediction, this run has 1" in notices
    assert "more has 1 modules of multi-token prediction, this run has 0" in notices
    plain, more = (moe.load(name).model.layers[0].self_attn.o_proj.weight for name in ("plain", "more"))
    torch.testing.assert_close(plain, more)


def test_a_run_of_another_version_is_refused_as_such_and_left_alone(text, capsys):
    assert run_training("--out", "run", "--data", text, *FEATURES, "--steps", "1") == 0
    facts = json.loads(Path("run/config.json").read_text())
    facts["config"]["train"]["batch_size"] = facts.pop("format")
    Path("run/config.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="made by another version of this program"):
        moe.load("run")
    for checkpoint in RunFolder(Path("run")).checkpoints():
        (checkpoint / "manifest.json").unlink()
    assert run_training("--out", "run", "--data", text, *FEATURES) == 2
    assert "another version" in capsys.readouterr().err
    assert Path("run/metrics.jsonl").exists()


def test_the_length_is_what_was_asked_for_steps_or_minutes(text, capsys):
    options = ("--data", text, *FEATURES[:-2])  # without its --steps
    assert run_training("--out", "run", *options, "--minutes", "0.0001") == 0
    assert len(read_metrics(Path("run/metrics.jsonl"))) == 1
    assert run_training("--out", "run", "--resume", "auto", "--steps", "3") == 0  # from here on by steps
    assert len(read_metrics(Path("run/metrics.jsonl"))) == 3
    assert run_training("--out", "more", *options, "--minutes", "1", "--steps", "3") == 2
    assert "exclude each other" in capsys.readouterr().err


def test_a_resumed_run_may_be_cut_into_other_micro_batches_to_fit_a_smaller_machine(text):
    options = ("--out", "run", "--data", text, *FEATURES)
    assert run_training(*options) == 0
    smaller = ("--train.micro-batch-size", "1", "--train.activation-checkpointing")
    assert run_training(*options, *smaller, "--resume", "auto", "--steps", "21") == 0
    assert json.loads(Path("run/config.json").read_text())["runtime"]["micro_batch_size"] == 1
    assert len(read_metrics(Path("run/metrics.jsonl"))) == 21


def test_evaluations_before_the_last_may_price_a_part_of_the_split_and_say_so(text):
    options = ("--data", text, *FEATURES, "--dtype", "float32", "--train.eval-interval", "20")
    assert run_training("--out", "run", *options, "--steps", "21", "--train.eval-tokens", "40") == 0
    part, whole = (record for record in read_metrics(Path("run/metrics.jsonl")) if "val_loss" in record)
    assert (part["val_tokens"], whole["val_tokens"]) == (39, 110)
    assert part["val_nats_per_character"] == pytest.approx(part["val_loss"] * 39 / 39, rel=0.05)


def test_a_test_split_is_priced_once_at_the_end(text):
    options = ("--data", text, *FEATURES, "--train.eval-interval", "10", "--data.test-fraction", "0.2")
    assert run_training("--out", "run", *options, "--dtype", "float32") == 0
    records = read_metrics(Path("run/metrics.jsonl"))
    assert [record["step"] for record in records if "test_loss" in record] == [20]
    run = moe.load("run")
    score, _ = evaluate(run.model, TokenStream(prepare(run.config.data), "test"), 16, nullcontext)
    assert score.bytes == 220
    assert score.record("test")["test_loss"] == pytest.approx(records[-1]["test_loss"])


def test_a_run_does_not_continue_on_a_changed_text(text, capsys):
    options = ("--out", "run", "--data", text, *FEATURES)
    assert run_training(*options) == 0
    text.write_text(text.read_text().replace("e", "a"))
    assert run_training(*options, "--resume", "auto", "--steps", "30") == 2
    assert "is not the text that run began with" in capsys.readouterr().err


def test_a_run_continues_where_its_text_has_moved_to(text):
    options = ("--out", "run", *FEATURES)
    assert run_training(*options, "--data", text) == 0
    moved = text.rename(text.with_name("moved.txt"))
    assert run_training(*options, "--data", moved, "--resume", "auto", "--steps", "30") == 0
    assert moe.load("run").config.data.source == str(moved)
    assert run_training("--out", "run", "--resume", "auto", "--steps", "31") == 0


def test_a_run_does_not_continue_on_a_text_that_was_split_otherwise(text, capsys):
    def prepared(fraction: float) -> None:
        prepare(DataConfig(str(text), tokenizer="bytes", val_fraction=fraction), Path("prepared"))

    prepared(0.1)
    options = ("--out", "run", "--data", "prepared", *FEATURES)
    assert run_training(*options) == 0
    shutil.rmtree("prepared")
    prepared(0.5)
    assert run_training(*options, "--resume", "auto", "--steps", "30") == 2
    assert "is not the text that run began with" in capsys.readouterr().err


def test_leftovers_of_a_start_killed_before_its_first_checkpoint_are_started_over(text):
    assert run_training("--out", "run", "--data", text, *FEATURES) == 0
    for checkpoint in RunFolder(Path("run")).checkpoints():
        (checkpoint / "manifest.json").unlink()
    for resume in ("auto", "never"):
        assert run_training("--out", "run", "--data", text, *FEATURES, "--steps", "3", "--resume", resume) == 0
        assert [record["step"] for record in read_metrics(Path("run/metrics.jsonl"))] == [1, 2, 3]
        (RunFolder(Path("run")).checkpoints()[-1] / "manifest.json").unlink()


def test_a_folder_with_somebody_elses_files_is_left_alone(text, capsys):
    Path("theirs").mkdir()
    Path("theirs/config.json").write_text('{"model_type": "deepseek_v3"}')
    assert run_training("--out", "theirs", "--data", text, *FEATURES) == 2
    assert "no training run made" in capsys.readouterr().err
    assert Path("theirs/config.json").read_text() == '{"model_type": "deepseek_v3"}'


def test_what_is_hidden_in_somebody_elses_folder_stays_and_what_a_killed_process_hid_goes(text, capsys):
    theirs = Path("theirs/checkpoints/.git/HEAD")
    theirs.parent.mkdir(parents=True)
    theirs.write_text("main")
    assert run_training("--out", "theirs", "--data", text, *FEATURES) == 2
    assert "no training run made" in capsys.readouterr().err
    assert theirs.read_text() == "main"
    assert run_training("--out", "run", "--data", text, *FEATURES) == 0
    unfinished = [Path(f"run/checkpoints/.{name}") for name in ("00000021.1234", "00000010.1234.old")]
    for folder in unfinished:
        folder.mkdir()
    assert run_training("--out", "run", "--data", text, *FEATURES, "--resume", "auto") == 0
    assert not any(folder.exists() for folder in unfinished)


def test_a_checkpoint_whose_removal_is_interrupted_does_not_count(text, monkeypatch):
    assert run_training("--out", "run", "--data", text, *FEATURES) == 0
    folder = RunFolder(Path("run"))
    (checkpoint,) = folder.checkpoints()[-1:]
    with monkeypatch.context() as patch:
        patch.setattr(moe.machine.stored.shutil, "rmtree", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            moe.machine.stored.remove_checkpoint(checkpoint)
    assert checkpoint not in folder.checkpoints()
    assert list(Path("run/checkpoints").glob(".*"))
    folder.acquire()
    folder.release()
    assert not list(Path("run/checkpoints").glob(".*"))


def test_a_folder_in_use_is_refused(text, capsys):
    folder = RunFolder(Path("run"))
    folder.acquire()
    other = RunFolder(Path("run"))
    with pytest.raises(CheckpointError, match="in use"):
        other.acquire()
    folder.release()
    other.acquire()
    other.release()


def test_without_a_folder_named_no_run_is_written_over_another(text):
    for _ in range(2):
        assert run_training("--data", text, *FEATURES, "--steps", "1") == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["data", "debug", "debug-2"]
    assert moe.checkpoint.newest_run() == Path("out/debug-2")


def test_a_start_that_came_to_nothing_does_not_use_up_a_name(text):
    assert run_training("--data", "nowhere.txt") == 2
    assert run_training("--data", text, *FEATURES, "--steps", "1") == 0
    assert Path("out/debug/config.json").exists()


def test_old_checkpoints_go_and_the_newest_stay(text):
    options = (
        "--data",
        text,
        *FEATURES,
        "--train.save-interval",
        "4",
        "--train.keep-last",
        "3",
        "--train.no-keep-best",
    )
    assert run_training("--out", "run", *options) == 0
    assert [int(path.name) for path in RunFolder(Path("run")).checkpoints()] == [12, 16, 20]
    assert [path for path in Path("run/checkpoints").iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def copy(debug_run, tmp_path) -> Path:
    shutil.copytree(debug_run, tmp_path / "copy")
    return tmp_path / "copy"


def damage_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", [damage_byte, lambda path: path.write_bytes(path.read_bytes()[:-9]), Path.unlink])
def test_a_damaged_checkpoint_is_refused_by_name(copy, name, how):
    checkpoint = RunFolder(copy).checkpoints()[-1]
    verify(checkpoint)
    how(checkpoint / name)
    with pytest.raises(CheckpointError, match=name):
        moe.load(copy)


@pytest.fixture
def imported(copy) -> Path:
    """A run's folder as an importer leaves it: nothing of it was trained here, so there is no optimizer."""
    checkpoint = RunFolder(copy).checkpoints()[-1]
    (checkpoint / "optimizer.safetensors").unlink()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"]["optimizer.safetensors"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_an_imported_model_is_there_to_be_used_and_started_from(imported, debug_run, text):
    theirs, ours = (moe.load(folder).model.state_dict() for folder in (imported, debug_run))
    assert all(theirs[name].equal(ours[name]) for name in ours)
    assert run_training("--out", "mine", "--data", text, "--steps", "1", "--init-from", imported) == 0


@pytest.mark.parametrize("resume", ["auto", "must"])
@pytest.mark.parametrize("more", [(), ("--data", "other.txt", "--steps", "3", "--optim.muon-lr", "0.5")])
def test_an_imported_model_is_not_continued(imported, resume, more, capsys):
    assert run_training("--out", imported, "--resume", resume, *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds an imported model, not a training run: start from it with --init-from" in line


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_no_checkpoint_is_without_a_model_and_a_state(imported, name):
    path = RunFolder(imported).checkpoints()[-1] / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"][name]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=name):
        moe.load(imported)


def test_every_file_that_the_manifest_lists_is_verified(imported):
    checkpoint = RunFolder(imported).checkpoints()[-1]
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["more.json"] = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (checkpoint / "more.json").write_text("{}")
    verify(checkpoint)
    (checkpoint / "more.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"more\.json is damaged"):
        verify(checkpoint)


def test_a_run_opened_in_bfloat16_is_the_float32_one_rounded_but_for_the_bias(debug_run):
    exact, rounded = moe.load(debug_run).model, moe.load(debug_run, dtype="bfloat16").model
    assert not rounded.training
    theirs = rounded.state_dict()
    for name, tensor in exact.state_dict().items():
        bias = name.endswith("expert_bias")
        assert theirs[name].equal(tensor if bias else tensor.bfloat16()), name
    with pytest.raises(CheckpointError, match="dtype = float16 is not known: give one of float32, bfloat16"):
        moe.load(debug_run, dtype="float16")


def test_tied_weights_are_stored_once_and_tied_again_when_opened(text):
    assert run_training("--out", "run", "--data", text, *FEATURES, "--steps", "1", "--model.tie-word-embeddings") == 0
    stored = load_tensors(RunFolder(Path("run")).checkpoints()[-1] / "model.safetensors")
    assert "lm_head.weight" not in stored
    for dtype in ("float32", "bfloat16"):
        model = moe.load("run", dtype=dtype).model
        assert model.lm_head.weight is model.embed_tokens.weight
        assert model.lm_head.weight.equal(stored["embed_tokens.weight"].to(getattr(torch, dtype)))


def test_opening_a_run_draws_no_random_numbers(debug_run):
    before = torch.get_rng_state()
    moe.load(debug_run)
    assert torch.get_rng_state().equal(before)


def test_a_model_that_no_memory_here_could_hold_is_refused_with_what_would_help(debug_run, monkeypatch):
    def with_memory(share: float):
        needed = sum(tensor.nbytes for tensor in stored.values())
        monkeypatch.setattr("moe.machine.device.machine_bytes", lambda device: int(share * needed))

    stored = load_tensors(RunFolder(debug_run).checkpoints()[-1] / "model.safetensors")
    with_memory(0.8)
    with pytest.raises(DeviceError, match=r"needs 0\.0 GB as float32, this machine has 0 GB: .*--dtype bfloat16"):
        moe.load(debug_run)
    moe.load(debug_run, dtype="bfloat16")
    with_memory(0.4)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(DeviceError, match=f"as {dtype}, .* take a smaller model"):
            moe.load(debug_run, dtype=dtype)
    monkeypatch.setattr("moe.machine.device.machine_bytes", lambda device: None)  # a system that does not say
    moe.load(debug_run)


def test_a_file_that_does_not_fit_is_refused_with_all_that_is_wrong_and_nothing_is_copied(tmp_path, small):
    model, other = Transformer(small), Transformer(small)
    tensors = dict(tensors_of(other))
    tensors["more"] = tensors.pop("norm.weight")
    tensors["lm_head.weight"] = torch.zeros(2, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    with pytest.raises(CheckpointError, match=WRONG):
        load_model(model, tmp_path / "model.safetensors")
    assert all(before[name].equal(tensor) for name, tensor in tensors_of(model).items())


WRONG = r"lm_head.weight is \(2, 3\) instead of \(64, 32\); more is not known; norm.weight is missing$"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 3}', "\x00"])
def test_a_damaged_manifest_or_config_is_an_error_of_our_own(copy, content):
    (RunFolder(copy).checkpoints()[-1] / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError):
        moe.load(copy)
    (copy / "config.json").write_text(content)
    with pytest.raises(moe.MoeError, match="train anew with another --out"):
        RunFolder(copy).read_setup()


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(copy):
    from moe.tokenizer import bytes_tokenizer

    (copy / "tokenizer.json").write_text(json.dumps(bytes_tokenizer().to_json()))
    with pytest.raises(CheckpointError, match="not the tokenizer this run was trained with"):
        moe.load(copy)


def test_training_moves_the_expert_bias_by_whole_steps_and_keeps_it_centred(debug_run):
    biases = [layer.router.expert_bias for layer in moe.load(debug_run).model.moe_layers()]
    for bias in biases:
        assert bias.abs().max() > 0.02
        assert abs(bias.mean().item()) < 1e-5


def test_metrics_are_whole_lines_and_a_torn_last_one_is_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.1 + 0.2})
    assert read_metrics(path)[0]["loss"] == 0.1 + 0.2  # unrounded
    path.write_text(path.read_text() + '{"step": 4')
    assert len(read_metrics(path)) == 3
    MetricsLog(path, keep_steps=2)
    assert len(read_metrics(path)) == 2
    path.write_text("nonsense\n")
    with pytest.raises(moe.MoeError, match="line 1"):
        read_metrics(path)


@pytest.mark.parametrize(
    "name", ["config.json", "checkpoints/00000030/manifest.json", "checkpoints/00000030/state.json"]
)
def test_a_file_nested_beyond_all_measure_is_one_clear_error(debug_run, tmp_path, name):
    shutil.copytree(debug_run, tmp_path / "run")
    (tmp_path / "run" / name).write_text("[" * 100_000)
    with pytest.raises(CheckpointError):
        moe.load(tmp_path / "run")
