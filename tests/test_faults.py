"""A save that is killed, refused by the disk or cut off by a power failure never costs what was saved before."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import kills
import pytest
import torch
from conftest import TEXT, run_training
from safetensors import SafetensorError

import moe
import train
from moe.checkpoint import RunFolder, State
from moe.config import TrainConfig
from moe.hub.exports import export_run
from moe.machine import stored
from moe.machine.files import write_whole
from moe.machine.stored import CheckpointError
from moe.machine.weights import load_tensors
from moe.metrics import MetricsLog, read_metrics
from train import TrainingError

resource = pytest.importorskip("resource", reason="this system has no such limits")
ROOT = Path(__file__).parent.parent
OPTIONS = ("--tokens-per-step", 64, "--train.sequence-length", 16, "--data.tokenizer", "bytes", "--steps", 6)
OPTIONS += ("--train.save-interval", 2, "--train.keep-last", 1, "--train.eval-interval", 0)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT.read_text()[:1500])


def train_once(*more: object) -> int:
    return run_training("--out", "run", "--data", "text.txt", *OPTIONS, "--quiet", *more)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_killed_at_any_file_operation_of_a_save_a_whole_checkpoint_is_left_and_nothing_else_stays(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED_AT_EVERY_OPERATION]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    newest = [int(line) for line in result.stdout.split()]
    assert len(newest) >= 15  # so many operations there are, and more
    assert newest == sorted(newest)  # first only the old one, from some operation on the new one
    assert set(newest) == {1, 2}


KILLED_AT_EVERY_OPERATION = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from moe.checkpoint import RunFolder, State
from moe.config import TrainConfig
from moe.machine.stored import verify
from moe.machine.weights import load_tensors

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
torch.set_num_threads(1)

def save(step):
    tensors = {name: torch.full((100,), float(step)) for name in ("a", "b")}
    RunFolder(Path("run")).save(tensors, tensors.items(), State(step=step), TrainConfig(keep_last=1, keep_best=False))

def die_at(number):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in OPERATIONS and "run" in str(arguments[0]):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

number, status = 0, signal.SIGKILL
while status == signal.SIGKILL:
    number += 1
    shutil.rmtree("run", ignore_errors=True)
    Path("run").mkdir()
    save(1)
    if os.fork() == 0:
        die_at(number)
        save(2)
        os._exit(0)
    status = os.wait()[1]
    folder = RunFolder(Path("run"))
    newest = folder.checkpoints()[-1]
    verify(newest)
    assert load_tensors(newest / "model.safetensors")["a"].eq(int(newest.name)).all()
    print(int(newest.name))
    folder.acquire()
    folder.release()
    left = {path.name for path in Path("run/checkpoints").iterdir()}
    assert newest.name in left and left <= {"00000001", "00000002"}, left
    assert all((path / "manifest.json").exists() for path in Path("run/checkpoints").iterdir())
"""


def test_nothing_gets_its_name_before_its_data_are_on_the_disk_and_the_manifest_comes_last(monkeypatch):
    synced, named = set(), []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def inode(path):
        return os.stat(path).st_ino

    def noting_fsync(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def noting(call):
        def renamed(source, target):
            if not str(target).endswith(".old"):
                files = [Path(source), *Path(source).glob("*")]
                assert all(inode(file) in synced for file in files if file.is_file()), f"{target} before its data"
                if Path(target).name == "manifest.json":
                    assert {file.name for file in Path(source).parent.iterdir()} > {stored.MODEL, stored.STATE}
                    assert all(inode(file) in synced for file in Path(source).parent.iterdir())
            call(source, target)
            named.append(Path(target))
            synced.discard(inode(Path(target).parent))

        return renamed

    run = RunFolder(Path("run"))
    Path("run").mkdir()
    run.metrics.write_text('{"step": 1}\n')
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting(rename))
    monkeypatch.setattr(os, "replace", noting(replace))
    for step in (1, 2):
        tensors = {"a": torch.zeros(10)}
        path = run.save(tensors, tensors.items(), State(step=step), TrainConfig(keep_last=1))
        assert inode(run.metrics) in synced  # or a resumed run would have a gap there
        assert inode(path.parent) in synced  # the name itself
        run.metrics.write_text(run.metrics.read_text() + '{"step": 2}\n')
        synced.discard(inode(run.metrics))
    assert [path.name for path in named if path.name.isdigit()] == ["00000001", "00000002"]


def writes_that_stop_at(limit: int):
    """The disk takes so many bytes of a file and no more; of this file alone, as metrics wait meanwhile."""

    def patched(original):
        def limited(*arguments):
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            with LIMITED:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
                try:
                    return original(*arguments)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, before)

        return limited

    return patched


def fails(error: Exception, after: int = 0):
    """The original, but for one call."""

    def patched(original):
        calls = []

        def call(*arguments, **options):
            calls.append(1)
            if len(calls) == after + 1:
                raise error
            return original(*arguments, **options)

        return call

    return patched


LIMITED = threading.Lock()
FULL, READ_ONLY = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system")
FAULTS = {  # what is patched and how, and what is said of it
    "a write fails at the first byte": ("save_file", writes_that_stop_at(0), "File too large"),
    "a write fails at byte 20,000": ("save_file", writes_that_stop_at(20_000), "File too large"),
    "no space for the optimizer": ("save_file", fails(SafetensorError("No space left"), 1), "No space left"),
    "fsync fails": ("sync", fails(OSError(errno.EIO, "Input/output error"), 1), "Input/output error"),
    "no space for the manifest": ("write_whole", fails(FULL), "No space left"),
    "the rename fails": ("os.rename", fails(FULL), "No space left"),
    "the folder has become read-only": ("os.mkdir", fails(READ_ONLY), "Read-only file system"),
}


def faulty_save(monkeypatch, number: int, target: str, patched) -> None:
    """Of all saves, this one meets a disk that fails."""
    original_save, original_write, count = RunFolder.save, MetricsLog.write, []

    def save(self, *arguments):
        count.append(1)
        if len(count) != number:
            return original_save(self, *arguments)
        owner = getattr(stored, target.split(".")[0]) if "." in target else stored
        with pytest.MonkeyPatch.context() as patch:
            last = target.split(".")[-1]
            patch.setattr(owner, last, patched(getattr(owner, last)))
            return original_save(self, *arguments)

    def write(self, record):
        with LIMITED:
            original_write(self, record)

    monkeypatch.setattr(RunFolder, "save", save)
    monkeypatch.setattr(MetricsLog, "write", write)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_fails_ends_training_in_one_line_and_the_run_goes_on_later_as_if_nothing_had_been(
    fault, monkeypatch, capsys
):
    target, patched, said = FAULTS[fault]
    assert train_once() == 0
    whole = Path("run").rename("whole")
    with monkeypatch.context() as patch:
        faulty_save(patch, 2, target, patched)
        assert train_once() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"00000004 could not be saved: .*{said}.*; the checkpoint before it is untouched", line)
    run = RunFolder(Path("run"))
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["00000002"]
    assert moe.load("run")
    assert train_once("--resume", "auto") == 0
    assert kills.difference(whole, Path("run")) is None


def test_an_old_checkpoint_that_cannot_be_removed_ends_training_and_the_new_one_is_there(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        faulty_save(patch, 2, "shutil.rmtree", fails(READ_ONLY, after=1))
        assert train_once() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "00000004 is saved, but an older one could not be removed: " in line
    assert [path.name for path in RunFolder(Path("run")).checkpoints()] == ["00000004"]
    assert train_once("--resume", "auto") == 0


def test_a_save_that_failed_is_noticed_before_the_next_one(monkeypatch, capsys):
    faulty_save(monkeypatch, 1, "os.mkdir", fails(FULL))
    assert train_once("--steps", 60, "--train.save-interval", 40) == 2
    assert "00000040 could not be saved" in capsys.readouterr().err
    assert 40 <= len(read_metrics(Path("run/metrics.jsonl"))) < 60


def test_what_nobody_has_heard_of_a_save_is_said_at_the_end(monkeypatch, capsys):
    def broken(self, progress):
        if len(steps) == 3:
            raise TrainingError("step 3: something else")
        steps.append(1)
        return original(self, progress)

    original, steps = train.Optimizers.step, []
    faulty_save(monkeypatch, 1, "os.mkdir", fails(FULL))
    monkeypatch.setattr(train.Optimizers, "step", broken)
    monkeypatch.setattr(RunFolder, "saved", lambda self, patient=True: None)
    assert train_once("--train.save-interval", 3) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "could not be saved" in lines[0]
    assert lines[1] == "error: step 3: something else"


def test_the_lock_is_kept_until_the_checkpoint_is_written_even_if_waiting_for_it_is_interrupted(monkeypatch):
    run, tensors, wait = RunFolder(Path("run")), {"a": torch.zeros(3)}, moe.checkpoint.wait
    run.acquire()
    go = threading.Event()
    monkeypatch.setattr(stored, "sync", lambda path, original=stored.sync: go.wait(10) and original(path))
    run.save_meanwhile(tensors, tensors.items(), State(step=1), TrainConfig())
    with monkeypatch.context() as patch:
        patch.setattr(moe.checkpoint, "wait", lambda futures: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run.saved()
    threading.Timer(0.2, go.set).start()
    assert run.release() is None
    assert [path.name for path in run.checkpoints()] == ["00000001"]
    assert wait is moe.checkpoint.wait


@pytest.mark.parametrize("room", [0, 50])  # in bytes: not even half a line
def test_a_metrics_file_that_cannot_be_written_ends_training_in_one_line(room, monkeypatch, capsys):
    assert train_once() == 0
    metrics = Path("run/metrics.jsonl")
    before, limit = metrics.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    original = MetricsLog.write

    def full(self, record):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before + room, limit[1]))
        try:
            original(self, record)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", full)
        assert train_once("--resume", "auto", "--steps", "9") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl: cannot be written" in line
    assert train_once("--resume", "auto", "--steps", "9") == 0
    assert [record["step"] for record in read_metrics(metrics)] == list(range(1, 10))


def test_a_file_that_could_not_be_written_leaves_nothing_and_is_named(monkeypatch):
    Path("config.json").write_text("before")
    monkeypatch.setattr(os, "fsync", fails(OSError(errno.ENOSPC, "No space left on device"))(os.fsync))
    with pytest.raises(OSError, match=r"No space left on device: 'config\.json'"):
        write_whole(Path("config.json"), b"after")
    assert Path("config.json").read_text() == "before"
    assert [path.name for path in Path().iterdir() if "config" in path.name] == ["config.json"]


def test_what_a_killed_process_was_writing_beside_the_checkpoints_goes_and_other_hidden_files_stay():
    Path("run").mkdir()
    for name in (".metrics.jsonl.123", ".config.json.9", ".tokenizer.json.77", ".gitignore", ".config.json.bak"):
        Path("run", name).touch()
    run = RunFolder(Path("run"))
    run.acquire()
    run.release()
    assert {path.name for path in Path("run").iterdir()} == {".gitignore", ".config.json.bak", ".lock"}


def test_what_goes_wrong_while_training_goes_on_is_raised_at_the_next_step_and_only_once(monkeypatch):
    run, tensors = RunFolder(Path("run")), {"a": torch.zeros(3)}
    monkeypatch.setattr(stored, "sync", fails(FULL)(stored.sync))
    run.save_meanwhile(tensors, tensors.items(), State(step=1), TrainConfig())
    with pytest.raises(CheckpointError, match="No space left"):
        run.saved()
    run.saved()
    run.save_meanwhile(tensors, tensors.items(), State(step=2), TrainConfig())
    run.saved()
    assert [path.name for path in run.checkpoints()] == ["00000002"]


def test_what_is_saved_is_the_moment_of_the_save_though_training_goes_on(monkeypatch):
    run, weight = RunFolder(Path("run")), torch.zeros(3)
    run.saving = run.writer.submit(lambda: Path())  # something to wait for
    run.save_meanwhile({"a": weight}, [("b", weight)], State(step=1), TrainConfig())
    weight += 1
    run.saved()
    for name in ("model.safetensors", "optimizer.safetensors"):
        (tensor,) = load_tensors(run.checkpoints()[-1] / name).values()
        assert tensor.eq(0).all()


def test_the_best_checkpoint_is_kept_beside_the_last_ones():
    run, tensors = RunFolder(Path("run")), {"a": torch.zeros(3)}
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)):
        state = State(step=step, val_loss=loss, val_tokens=100)
        run.save(tensors, tensors.items(), state, TrainConfig(keep_last=2))
    assert [int(path.name) for path in run.checkpoints()] == [2, 4, 5]
    assert run.best() == {100: (1.0, run.path / "checkpoints" / "00000002")}
    run.save(tensors, tensors.items(), State(step=6), TrainConfig(keep_last=1, keep_best=False))
    assert [int(path.name) for path in run.checkpoints()] == [6]


def test_prices_of_different_parts_of_the_split_are_not_compared():
    run, tensors = RunFolder(Path("run")), {"a": torch.zeros(3)}
    for step, loss, priced in ((1, 1.0, 50), (2, 2.0, 50), (3, 3.0, 100), (4, 4.0, 100), (5, 5.0, 100)):
        state = State(step=step, val_loss=loss, val_tokens=priced)
        run.save(tensors, tensors.items(), state, TrainConfig(keep_last=1))
    assert [int(path.name) for path in run.checkpoints()] == [1, 3, 5]


def test_a_training_that_got_worse_says_when_it_was_best_and_that_checkpoint_opens(capsys):
    Path("text.txt").write_text(TEXT.read_text()[:1350] + "0123456789" * 15)  # the less expected, the more is learnt
    settings = ("--steps", 30, "--train.eval-interval", 5, "--train.keep-last", 1)
    assert run_training("--out", "run", "--data", "text.txt", *OPTIONS, *settings) == 0
    best = min(read_metrics(Path("run/metrics.jsonl")), key=lambda record: record.get("val_loss", 99))
    folder = Path("run/checkpoints") / f"{best['step']:08d}"
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("best "))
    assert f"{best['val_nats_per_character']:.4f} at step {best['step']}, kept as {folder};" in line
    assert moe.load(folder).checkpoint == folder
    assert moe.load("run").checkpoint == Path("run/checkpoints/00000030")
    with pytest.raises(CheckpointError, match=f"00000077 is no complete checkpoint: there are {folder.name}, 00000030"):
        moe.load("run/checkpoints/00000077")
    assert run_training("--out", "more", "--init-from", folder, "--data", "text.txt", *OPTIONS, "--steps", 1) == 0
    export_run(folder, Path("hub"))
    assert f"| {best['val_nats_per_character']:.4f} nats per character" in Path("hub/README.md").read_text()


def test_a_run_may_stand_in_a_folder_that_is_called_checkpoints():
    assert run_training("--out", "checkpoints/mine", "--data", "text.txt", *OPTIONS, "--steps", 1, "--quiet") == 0
    assert moe.load("checkpoints/mine").checkpoint == Path("checkpoints/mine/checkpoints/00000001")


def test_killed_at_random_a_run_ends_as_if_it_had_not_been():
    total = kills.harness(kills=2, seed=1, jobs=1, text=TEXT.read_text()[:4000], variants=("many",))
    assert total.faults == []
    assert total.kills >= 2
